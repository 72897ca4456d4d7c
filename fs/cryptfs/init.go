package cryptfs

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/record"
	"github.com/kmsfs/kmsfs/fs/rewrap"
)

// Init makes a store in a directory that is absent or empty. The store record
// is written last: a directory without one is no store, and a failure leaves
// what was there.
func Init(ctx context.Context, c InitConfig) (*Info, error) {
	if err := c.Policy.Check(); err != nil {
		return nil, err
	}
	if !record.HeaderSizeOK(c.HeaderSize) {
		return nil, fmt.Errorf("header size %d: %w", c.HeaderSize, envelope.ErrInvalid)
	}
	resolved, err := resolveKeys(ctx, c.Provider, c.Policy, nil)
	if err != nil {
		return nil, err
	}
	made := os.Mkdir(c.Store, 0o700) == nil
	info, err := initIn(ctx, c, resolved)
	if err != nil && made {
		_ = os.Remove(c.Store) // only if nothing is left in it
	}
	return info, err
}

func initIn(ctx context.Context, c InitConfig, resolved keySet) (*Info, error) {
	root, err := backing.OpenRoot(c.Store)
	if err != nil {
		return nil, err
	}
	defer func() { _ = root.Close() }()
	if entries, err := root.ReadDir(); err != nil {
		return nil, err
	} else if len(entries) > 0 {
		return nil, ErrNotEmpty
	}
	if c.Placement == envelope.Xattr {
		if err := probeXattrs(root, c.HeaderSize); err != nil {
			return nil, err
		}
	}
	b := &builder{conf: c, resolved: resolved, id: envelope.NewID(), rec: &record.Store{}}
	b.keys = envelope.NewManager(c.Provider, b.id, envelope.Options{Log: c.Log})
	defer b.keys.Close()
	if err := b.makeKeys(ctx); err != nil {
		return nil, err
	}
	if err := b.write(ctx, root); err != nil {
		b.clean(root)
		return nil, err
	}
	layout, err := b.rec.Layout()
	if err != nil {
		return nil, err
	}
	layout.Policy = b.conf.Policy.Clone()
	return newInfo(b.rec, layout, true), nil
}

// keySet is the keys of every class, aliases resolved: active wrap new data
// keys, retired only unwrap.
type keySet struct{ active, retired map[string][]string }

// all returns the keys that may unwrap: the active ones, then the retired.
func (k keySet) all() map[string][]string {
	out := map[string][]string{}
	for name := range k.active {
		out[name] = slices.Concat(k.active[name], k.retired[name])
	}
	return out
}

// put enters the keys into a record.
func (k keySet) put(rec *record.Store) {
	rec.Body.Keys = k.all()
	rec.Body.Retired = maps.Clone(k.retired)
}

// keysOf returns the keys that a record has.
func keysOf(rec *record.Store) keySet {
	k := keySet{map[string][]string{}, rec.Body.Retired}
	for name := range rec.Body.Keys {
		k.active[name] = rec.Active(name)
	}
	return k
}

// resolveKeys asks the services for every key of the policy: aliases become
// the keys that they stand for now, and a key that cannot be used is refused. A
// retired key may be in any state, and one that known has is taken without
// asking: it may be gone.
func resolveKeys(ctx context.Context, p keywrap.Provider, policy *classify.Policy, known map[string][]string) (keySet, error) {
	out := keySet{map[string][]string{}, map[string][]string{}}
	for _, name := range policy.Names() {
		for _, uri := range policy.Classes[name].Keys {
			d, err := p.Describe(ctx, uri)
			if err != nil {
				return out, fmt.Errorf("class %s: %w", name, err)
			}
			if d.State != keywrap.Enabled {
				return out, fmt.Errorf("class %s: key %s is %s: %w", name, d.Key, d.State, ErrKeyState)
			}
			if !slices.Contains(out.active[name], d.Key) {
				out.active[name] = append(out.active[name], d.Key)
			}
		}
		for _, uri := range policy.Classes[name].Retired {
			if !slices.Contains(known[name], uri) {
				d, err := p.Describe(ctx, uri)
				if err != nil {
					return out, fmt.Errorf("class %s, retired key: %w", name, err)
				}
				uri = d.Key
			}
			if !slices.Contains(out.active[name], uri) && !slices.Contains(out.retired[name], uri) {
				out.retired[name] = append(out.retired[name], uri)
			}
		}
	}
	return out, nil
}

func probeXattrs(root *backing.Dir, size int) error {
	name := backing.TempName()
	if err := root.WriteNew(name, nil, 0o600, false); err != nil {
		return err
	}
	defer func() { _ = root.Unlink(name) }()
	if err := root.Attrs(name).Set(headerAttr, make([]byte, size), 0); err != nil {
		return fmt.Errorf("%w: %w", ErrNoXattrs, err)
	}
	return nil
}

// builder makes a new store's keys and record.
type builder struct {
	conf     InitConfig
	resolved keySet
	id       envelope.ID
	keys     *envelope.Manager
	rec      *record.Store
	classes  map[string]*class
	storeKey *envelope.FileKey
}

func (b *builder) makeKeys(ctx context.Context) error {
	c := b.conf
	b.rec.Body = record.StoreBody{
		ID: b.id.String(), Created: time.Now().UTC().Truncate(time.Second), Placement: c.Placement.String(),
		HeaderSize: c.HeaderSize, Suite: c.Suite.String(), Names: map[string]string{},
	}
	b.resolved.put(b.rec)
	b.rec.Keys = record.StoreKeys{Store: map[string][]byte{}, Names: map[string][]byte{}}
	b.classes = map[string]*class{}
	for _, name := range c.Policy.Names() {
		cl := newClass(name, c.Policy.Classes[name], b.rec.Active(name), b.rec.Body.Keys[name], c.Placement, c.HeaderSize)
		b.classes[name] = cl
		if err := addNameKey(ctx, b.keys, b.rec, cl, envelope.Fixed{Suite: uint8(c.Suite), Store: b.id, File: envelope.NewID()}, c.HeaderSize); err != nil {
			return err
		}
	}
	return b.makeStoreKey(ctx)
}

// addNameKey makes a class's name key and puts it into the record.
func addNameKey(ctx context.Context, keys *envelope.Manager, rec *record.Store, c *class, f envelope.Fixed, size int) error {
	h, key, err := keys.Create(ctx, c.keys(), keywrap.PurposeNames, f, size)
	if err != nil {
		return fmt.Errorf("name key of class %s: %w", c.name, err)
	}
	defer key.Wipe()
	if c.cipher, err = nameenc.New(key.PRK()); err != nil {
		return err
	}
	c.header = h
	rec.Body.Names[c.name] = hex.EncodeToString(h.Commitment[:])
	rec.Keys.Names[c.name], err = h.Encode(size)
	return err
}

func (b *builder) makeStoreKey(ctx context.Context) error {
	names := b.conf.Policy.Names()
	first := b.classes[names[0]]
	fixed := envelope.Fixed{Suite: uint8(b.conf.Suite), Store: b.id, File: b.id}
	h, key, err := b.keys.Create(ctx, first.keys(), keywrap.PurposeStore, fixed, b.conf.HeaderSize)
	if err != nil {
		return fmt.Errorf("store key: %w", err)
	}
	b.storeKey = key
	for _, name := range names {
		own := h
		if name != first.name {
			if own, err = b.keys.Extend(ctx, h, first.keys(), b.classes[name].keys(), keywrap.PurposeStore); err != nil {
				return fmt.Errorf("store key for class %s: %w", name, err)
			}
		}
		if b.rec.Keys.Store[name], err = own.Encode(b.conf.HeaderSize); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) write(ctx context.Context, root *backing.Dir) error {
	defer b.storeKey.Wipe()
	if err := setPolicy(b.rec, b.conf.Policy, b.storeKey); err != nil {
		return err
	}
	if err := signRecord(b.rec, b.storeKey); err != nil {
		return err
	}
	if err := root.Mkdir(metaDir, 0o700); err != nil {
		return err
	}
	meta, err := root.OpenDir(metaDir)
	if err != nil {
		return err
	}
	defer func() { _ = meta.Close() }()
	if err := writeClassFiles(meta, b.rec); err != nil {
		return err
	}
	rootClass := b.classes[b.conf.Policy.ClassOf("/")]
	d, err := newDirRecord(rootClass.cipher, rootClass.name)
	if err != nil {
		return err
	}
	if err := writeDirRecord(root, d); err != nil {
		return err
	}
	if err := root.Sync(); err != nil {
		return err
	}
	text, err := b.rec.Encode()
	if err != nil {
		return err
	}
	// Without the first copy there is no store, so that it comes first here.
	if err := meta.Replace(storeFile, text, 0o600); err != nil {
		return err
	}
	return rewrap.WriteCopy(root, text)
}

// writeClassFiles writes the first copies of the wrapped name keys.
func writeClassFiles(meta *backing.Dir, rec *record.Store) error {
	if err := meta.Mkdir(classesDir, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	dir, err := meta.OpenDir(classesDir)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	for _, name := range slices.Sorted(maps.Keys(rec.Keys.Names)) {
		if err := dir.Replace(name, rec.Keys.Names[name], 0o600); err != nil {
			return err
		}
	}
	return nil
}

// clean takes away what a failed init made; there was nothing else before.
func (b *builder) clean(root *backing.Dir) {
	if meta, err := root.OpenDir(metaDir); err == nil {
		if dir, err := meta.OpenDir(classesDir); err == nil {
			_ = dir.Each(func(e backing.Entry) bool { _ = dir.Unlink(e.Name); return true })
			_ = dir.Close()
			_ = meta.Rmdir(classesDir)
		}
		_ = meta.Each(func(e backing.Entry) bool { _ = meta.Unlink(e.Name); return true })
		_ = meta.Close()
	}
	_ = root.Rmdir(metaDir)
	_ = root.Unlink(record.StoreCopy)
	_ = root.Unlink(dirFile)
	_ = root.Attrs("").Remove(dirAttr)
}
