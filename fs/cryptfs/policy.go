package cryptfs

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/record"
	"github.com/kmsfs/kmsfs/fs/rewrap"
)

// ApplyPolicy makes p the store's policy and tells what changed. What an
// existing store cannot take is refused: see classify.Compare, and a key that a
// class would lose while files have recipients under it (ErrKeyInUse). Files
// that are there stay as they are.
func (v *Volume) ApplyPolicy(ctx context.Context, p *classify.Policy) (changes []string, err error) {
	if err := v.mayChange(); err != nil {
		return nil, err
	}
	if err := p.Check(); err != nil {
		return nil, err
	}
	changes, err = classify.Compare(v.Info().Policy, p)
	if err != nil {
		return changes, err
	}
	resolved, err := resolveKeys(ctx, v.conf.Provider, p, v.Info().Keys)
	if err != nil {
		return changes, err
	}
	dropped := map[string][]string{}
	for name, keys := range v.Info().Keys {
		for _, key := range keys {
			if !slices.Contains(resolved.active[name], key) && !slices.Contains(resolved.retired[name], key) {
				dropped[name] = append(dropped[name], key)
			}
		}
	}
	if err := v.notInUse(ctx, dropped); err != nil {
		return changes, err
	}
	return changes, v.writePolicy(ctx, p, resolved)
}

// writePolicy writes a new store record. The name keys of new classes are in it,
// and in their files before it is in place.
func (v *Volume) writePolicy(ctx context.Context, p *classify.Policy, resolved keySet) error {
	rec := cloneRecord(v.rec)
	resolved.put(rec)
	old := *v.layout // openRecord puts the old rules into its policy
	old.Policy = v.policy.Clone()
	storeKey, err := openRecord(ctx, v.keys, v.rec, &old, v.classes)
	if err != nil {
		return err
	}
	defer storeKey.Wipe()
	classes := map[string]*class{}
	for _, name := range p.Names() {
		c := newClass(name, p.Classes[name], rec.Active(name), rec.Body.Keys[name], v.layout.Placement, v.layout.HeaderSize)
		if err := v.keysFor(ctx, rec, c, v.classes[name]); err != nil {
			return err
		}
		classes[name] = c
	}
	if err := setPolicy(rec, p, storeKey); err != nil {
		return err
	}
	if err := signRecord(rec, storeKey); err != nil {
		return err
	}
	if err := writeClassFiles(v.meta, rec); err != nil {
		return err
	}
	if err := rewrap.WriteRecord(v.root, v.meta, rec); err != nil {
		return err
	}
	v.adopt(rec, p, classes)
	return nil
}

// keySet returns the keys that the classes have now.
func (v *Volume) keySet() keySet {
	v.ns.RLock()
	defer v.ns.RUnlock()
	return keysOf(v.rec)
}

func cloneRecord(r *record.Store) *record.Store {
	c := *r
	c.Body.Names = maps.Clone(r.Body.Names)
	c.Keys = record.StoreKeys{Store: maps.Clone(r.Keys.Store), Names: maps.Clone(r.Keys.Names)}
	return &c
}

// keysFor puts a class's wrapped name key and store key into the record: those
// of before, wrapped for the keys of now, or new ones.
func (v *Volume) keysFor(ctx context.Context, rec *record.Store, c, old *class) error {
	if old != nil && slices.Equal(old.keys().Keys, c.keys().Keys) && v.wrapsOnly(old, c.keys().Allowed) {
		c.header = old.header
		return nil
	}
	size := v.layout.HeaderSize
	if old == nil {
		fixed := envelope.Fixed{Suite: uint8(v.layout.Suite), Store: v.layout.ID, File: envelope.NewID()}
		if err := addNameKey(ctx, v.keys, rec, c, fixed, size); err != nil {
			return err
		}
	} else {
		h, err := v.keys.Extend(ctx, old.header, old.keys(), c.keys(), keywrap.PurposeNames)
		if err != nil {
			return fmt.Errorf("name key of class %s: %w", c.name, err)
		}
		c.header, c.spare = h, nil
		if rec.Keys.Names[c.name], err = h.Encode(size); err != nil {
			return err
		}
	}
	return v.extendStoreKey(ctx, rec, c, old)
}

// wrapsOnly reports whether the wrapped name key and store key of a class have
// recipients under these keys only.
func (v *Volume) wrapsOnly(c *class, keys []string) bool {
	only := func(h *envelope.Header) bool {
		return !slices.ContainsFunc(h.Recipients, func(r envelope.Recipient) bool { return !slices.Contains(keys, r.Wrapped.Key) })
	}
	h, err := envelope.Parse(v.rec.Keys.Store[c.name])
	return err == nil && only(h) && only(c.header) && (c.spare == nil || only(c.spare))
}

// extendStoreKey wraps the store key for a class, from any class that can.
func (v *Volume) extendStoreKey(ctx context.Context, rec *record.Store, c, old *class) error {
	var first error
	names := v.policy.Names()
	if old != nil { // its own first
		names = append([]string{old.name}, names...)
	}
	for _, name := range names {
		h, err := envelope.Parse(v.rec.Keys.Store[name])
		if err == nil {
			var ext *envelope.Header
			if ext, err = v.keys.Extend(ctx, h, v.classes[name].keys(), c.keys(), keywrap.PurposeStore); err == nil {
				rec.Keys.Store[c.name], err = ext.Encode(v.layout.HeaderSize)
				return err
			}
		}
		if first == nil {
			first = fmt.Errorf("store key for class %s: %w", c.name, err)
		}
	}
	return first
}

// adopt puts a written policy to work. Classes keep their identity, as nodes
// and open files point at them; directories learn whether they still agree.
func (v *Volume) adopt(rec *record.Store, p *classify.Policy, classes map[string]*class) {
	v.ns.Lock()
	defer v.ns.Unlock()
	next := map[string]*class{}
	for name, c := range classes {
		old := v.classes[name]
		if old == nil {
			next[name] = c
			continue
		}
		old.mu.Lock()
		old.conf, old.ec, old.header, old.spare = c.conf, c.keys(), c.header, nil
		old.sample.Store(nil)
		old.mu.Unlock()
		next[name] = old
	}
	v.rec, v.policy, v.classes = rec, p, next
	v.layout.Policy = p
	v.nodes.mu.Lock()
	defer v.nodes.mu.Unlock()
	for _, n := range v.nodes.byKey {
		if n.dir == nil {
			continue
		}
		want := p.ClassOf(v.pathOf(n))
		n.mu.Lock()
		if n.dir.loaded {
			n.dir.agrees = n.dir.class.name == want
		}
		n.mu.Unlock()
	}
}

// Classify adds a rule for an empty directory, which gets a record of the new
// class. A crash between the two leaves a directory that takes no files until
// Classify is called again.
func (v *Volume) Classify(ctx context.Context, n *Node, className string) error {
	if err := v.mayChange(); err != nil {
		return err
	}
	if n.dir == nil {
		return unix.ENOTDIR
	}
	if n == v.nodes.root {
		return fmt.Errorf("the root has the policy's default class: %w", ErrFixed)
	}
	v.ns.RLock()
	cl, path := v.classes[className], v.pathOf(n)
	v.ns.RUnlock()
	if cl == nil {
		return fmt.Errorf("%q: %w", className, ErrNoClass)
	}
	cipher, err := v.names(ctx, cl)
	if err != nil {
		return err
	}
	if err := v.isEmpty(n); err != nil {
		return err
	}
	info := v.Info()
	p, err := info.Policy.WithRule(path, className)
	if err != nil {
		return err
	}
	if err := v.writePolicy(ctx, p, v.keySet()); err != nil {
		return err
	}
	err = v.reclassEmpty(ctx, n, cl, cipher)
	if err == nil && v.conf.Classified != nil {
		v.conf.Classified(ctx, className)
	}
	return err
}

func (v *Volume) isEmpty(n *Node) error {
	v.ns.RLock()
	defer v.ns.RUnlock()
	l, ok := n.where()
	if !ok {
		return unix.ENOENT
	}
	parent, err := v.use(l.parent)
	if err != nil {
		return err
	}
	defer parent.release()
	err = checkEmpty(parent.Dir, l.entry)
	if err == error(unix.ENOTEMPTY) {
		return ErrNotEmptyDir
	}
	return err
}

// reclassEmpty gives an empty directory a record of another class. Nothing can
// be made in it meanwhile: v.ns is held.
func (v *Volume) reclassEmpty(_ context.Context, n *Node, cl *class, cipher *nameenc.Cipher) error {
	v.ns.Lock()
	defer v.ns.Unlock()
	ref, err := v.use(n)
	if err != nil {
		return err
	}
	defer ref.release()
	empty := true
	err = ref.Each(func(e backing.Entry) bool { empty = isInternal(e.Name); return empty })
	if err != nil {
		return err
	}
	if !empty {
		return ErrNotEmptyDir
	}
	rec, err := newDirRecord(cipher, cl.name)
	if err != nil {
		return err
	}
	if err := writeDirRecord(ref.Dir, rec); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dir.id, n.dir.class, n.dir.agrees, n.dir.loaded = nameenc.DirID(rec.ID), cl, true, true
	return nil
}
