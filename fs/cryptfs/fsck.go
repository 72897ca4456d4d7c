package cryptfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
	"github.com/kmsfs/kmsfs/fs/record"
)

// FsckConfig says what to check.
type FsckConfig struct {
	Config
	Repair   bool                           // restore records from their second copies, clear what a crash left
	Progress func(files uint64, now string) // called often, from several goroutines; now is a ciphertext path
}

// FsckReport is what a check found. Paths are ciphertext paths.
type FsckReport struct {
	Directories uint64    `json:"directories"`
	Files       uint64    `json:"files"`
	Others      uint64    `json:"others"` // symlinks and special files
	Bytes       uint64    `json:"bytes"`  // plaintext bytes read and authenticated
	Problems    []Problem `json:"problems"`
}

// Problem is one finding.
type Problem struct {
	Path   string     `json:"path"`
	What   string     `json:"what"` // for people
	Kind   fault.Kind `json:"-"`
	Class  string     `json:"kind"` // the kind's name, or "orphan", "foreign", "unfinished", "pending"
	Mended bool       `json:"mended"`
}

// Damaged reports whether anything found is damage that is still there.
func (r *FsckReport) Damaged() bool {
	return slices.ContainsFunc(r.Problems, func(p Problem) bool {
		return !p.Mended && (p.Kind == fault.Integrity || p.Kind == fault.BadFormat || p.Class == "unfinished" || p.Class == "foreign")
	})
}

// KeysMissing reports whether files could not be checked for want of a key.
func (r *FsckReport) KeysMissing() bool {
	return slices.ContainsFunc(r.Problems, func(p Problem) bool {
		switch p.Kind {
		case fault.KeyDenied, fault.KeyMissing, fault.KeyRevoked, fault.KeyExpired, fault.KeyRejected, fault.KeyUnavailable:
			return true
		}
		return false
	})
}

// Fsck checks every record, name, header and chunk of a store that nobody has
// mounted (ErrLocked). The error is of the check itself; what the store has
// wrong is in the report.
func Fsck(ctx context.Context, c FsckConfig) (*FsckReport, error) {
	c.ReadOnly, c.Alone = !c.Repair, true
	v, err := Open(ctx, c.Config)
	if err != nil {
		return nil, err
	}
	k := &checker{v: v, conf: c, report: &FsckReport{Problems: []Problem{}}, ids: map[string]string{}}
	k.group, ctx = errgroup.WithContext(ctx)
	k.group.SetLimit(2 * runtime.GOMAXPROCS(0))
	err = k.checkStore()
	if err == nil {
		err = k.dir(ctx, v.root, ".")
	}
	if werr := k.group.Wait(); err == nil {
		err = werr
	}
	if cerr := v.Close(); err == nil {
		err = cerr
	}
	slices.SortFunc(k.report.Problems, func(a, b Problem) int { return strings.Compare(a.Path+a.What, b.Path+b.What) })
	return k.report, err
}

type checker struct {
	v     *Volume
	conf  FsckConfig
	group *errgroup.Group

	mu     sync.Mutex
	report *FsckReport
	ids    map[string]string // directory id -> path
}

func (k *checker) add(p Problem) {
	if p.Class == "" {
		p.Class = p.Kind.String()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.report.Problems = append(k.report.Problems, p)
}

func (k *checker) failed(at string, err error) {
	k.add(Problem{Path: at, What: err.Error(), Kind: fault.Of(err)})
}

// checkStore checks what lies in .kmsfs beside the record, which Open has
// checked: first copies of name keys, and files that a crash left open.
func (k *checker) checkStore() error {
	v := k.v
	for _, name := range v.policy.Names() {
		at := path.Join(metaDir, classesDir, name)
		b, err := readClassFile(v.meta, name)
		if err == nil && bytes.Equal(b, v.rec.Keys.Names[name]) {
			continue
		}
		p := Problem{Path: at, What: "wrapped name key differs from the copy in the store record", Kind: fault.Integrity}
		if k.conf.Repair {
			if err := writeClassFiles(v.meta, v.rec); err != nil {
				return err
			}
			p.Mended = true
		}
		k.add(p)
	}
	if v.conf.ReadOnly {
		if err := k.unfinished(); err != nil {
			return err
		}
	}
	return k.jobs()
}

// unfinished tells of files that the next mount, or a repair, will finish.
func (k *checker) unfinished() error {
	if b, err := k.v.meta.ReadFile(record.RewrapFile, record.MaxRewrap); err == nil && len(b) > 0 {
		k.add(Problem{Path: path.Join(metaDir, record.RewrapFile), Class: "unfinished",
			What: "a rewrap was ended while it wrote headers: mount the store, or run fsck --repair, to finish them"})
	}
	if k.v.found != nil {
		k.add(Problem{Path: path.Join(metaDir, journalDir), Class: "unfinished",
			What: "the store was not unmounted cleanly: mount it, or run fsck --repair, to finish files that were being written"})
	}
	return nil
}

// dir checks a directory and what is in it; d stays the caller's.
func (k *checker) dir(ctx context.Context, d *backing.Dir, at string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	entries, err := d.ReadDir()
	if err != nil {
		k.failed(at, err)
		return nil
	}
	cl, n, cipher := k.record(ctx, d, at)
	if cl == nil {
		return nil
	}
	k.count(func(r *FsckReport) { r.Directories++ }, at)
	owners := k.owners(d, entries)
	for _, e := range entries {
		if at == "." && e.Name == metaDir {
			continue
		}
		if err := k.entry(ctx, d, at, e, owners, cl, n, cipher); err != nil {
			return err
		}
	}
	return nil
}

func (k *checker) count(f func(r *FsckReport), now string) {
	k.mu.Lock()
	f(k.report)
	files := k.report.Files
	k.mu.Unlock()
	if k.conf.Progress != nil {
		k.conf.Progress(files, now)
	}
}

// record checks both copies of a directory's record and restores one from the
// other. The node is only a bearer of id and class, for unseal.
func (k *checker) record(ctx context.Context, d *backing.Dir, at string) (*class, *Node, *nameenc.Cipher) {
	cl, rec, cipher, err := k.v.dirAt(ctx, d)
	if err != nil {
		k.failed(path.Join(at, dirFile), err)
		return nil, nil, nil
	}
	want := rec.Encode()
	first, err := d.ReadFile(dirFile, len(want))
	if err != nil || !bytes.Equal(first, want) {
		p := Problem{Path: path.Join(at, dirFile), What: "first copy of the directory record is missing or damaged", Kind: fault.Integrity}
		if k.conf.Repair {
			p.Mended = d.Replace(dirFile, want, 0o600) == nil
		}
		k.add(p)
	}
	second, err := d.Attrs("").Get(dirAttr)
	if err == nil && !bytes.Equal(second, want) || errors.Is(err, unix.ENODATA) {
		p := Problem{Path: at, What: "second copy of the directory record is missing or damaged", Class: "second-copy"}
		if k.conf.Repair {
			p.Mended = setDirAttr(d, want) == nil
		}
		k.add(p)
	}
	k.mu.Lock()
	other, twice := k.ids[string(rec.ID[:])]
	k.ids[string(rec.ID[:])] = at
	k.mu.Unlock()
	if twice {
		k.add(Problem{Path: at, What: "has the directory id of " + other, Kind: fault.Integrity})
	}
	n := &Node{dir: &dirState{id: nameenc.DirID(rec.ID), class: cl, loaded: true}}
	return cl, n, cipher
}

func (k *checker) entry(ctx context.Context, d *backing.Dir, at string, e backing.Entry, owners map[string]bool, cl *class, n *Node, cipher *nameenc.Cipher) error {
	where := path.Join(at, e.Name)
	if isInternal(e.Name) {
		k.internal(d, where, e, owners)
		return nil
	}
	if _, ok, err := n.unseal(cipher, d, e.Name); err != nil {
		k.add(Problem{Path: where, What: "name: " + err.Error(), Kind: fault.Of(err), Class: "foreign"})
	} else if !ok {
		k.add(Problem{Path: where, What: "not a file of this store", Class: "foreign"})
		return nil
	}
	st, err := d.Stat(e.Name)
	if err != nil {
		k.failed(where, err)
		return nil
	}
	k.attrs(d, where, e.Name, cl, cipher)
	switch st.Type() {
	case unix.S_IFDIR:
		sub, err := d.OpenDir(e.Name)
		if err != nil {
			k.failed(where, err)
			return nil
		}
		defer func() { _ = sub.Close() }()
		return k.dir(ctx, sub, where)
	case unix.S_IFREG:
		own, err := d.OpenDir(".")
		if err != nil {
			return err
		}
		k.group.Go(func() error {
			defer func() { _ = own.Close() }()
			return k.file(ctx, own, e.Name, where, cl, st)
		})
	case unix.S_IFLNK:
		k.link(d, e.Name, where, cl, cipher)
	default:
		k.count(func(r *FsckReport) { r.Others++ }, where)
	}
	return nil
}

func (k *checker) link(d *backing.Dir, entry, where string, cl *class, cipher *nameenc.Cipher) {
	k.count(func(r *FsckReport) { r.Others++ }, where)
	if _, err := readTarget(d, entry, cl, cipher); err != nil {
		k.failed(where, fmt.Errorf("symlink target: %w", err))
	}
}

// attrs checks a file's attributes of the user namespace.
func (k *checker) attrs(d *backing.Dir, where, entry string, cl *class, cipher *nameenc.Cipher) {
	a := d.Attrs(entry)
	names, err := a.List()
	if err != nil {
		return // a file system without attributes, or a kind of file without
	}
	for _, name := range names {
		plain, sealed := strings.CutPrefix(name, sealedAttr)
		switch {
		case sealed && !cl.plain:
			if plain, err = cipher.DecryptAttrName(plain); err != nil {
				k.failed(where, fmt.Errorf("attribute %s: %w", name, err))
				continue
			}
		case cl.plain && strings.HasPrefix(name, plainPrefix) && !strings.HasPrefix(name, attrPrefix):
			plain = strings.TrimPrefix(name, plainPrefix)
		default:
			continue
		}
		value, err := a.Get(name)
		if err == nil {
			_, err = cipher.DecryptAttrValue(plain, value)
		}
		if err != nil {
			k.failed(where, fmt.Errorf("attribute %s: %w", name, err))
		}
	}
}

// file reads and authenticates a whole file.
func (k *checker) file(ctx context.Context, d *backing.Dir, entry, where string, cl *class, st backing.Stat) error {
	k.count(func(r *FsckReport) { r.Files++ }, where)
	n, err := k.read(ctx, d, entry, cl, st)
	k.count(func(r *FsckReport) { r.Bytes += uint64(n) }, where)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	k.failed(where, err)
	return nil
}

func (k *checker) read(ctx context.Context, d *backing.Dir, entry string, cl *class, st backing.Stat) (int64, error) {
	v := k.v
	if st.Size == 0 {
		return 0, nil
	}
	disk, err := v.openEntry(d, entry, unix.O_RDONLY)
	if err != nil {
		return 0, err
	}
	defer func() { _ = disk.Close() }()
	block, err := v.readBlock(disk, []*backing.Dir{d}, st)
	if err != nil {
		return 0, err
	}
	sec, err := v.unwrap(ctx, cl, block)
	if err != nil {
		return 0, err
	}
	defer sec.wipe()
	f, err := chunkfile.Open(chunkfile.Config{
		Disk: disk, Geo: cl.geo, Codec: sec.codec, Owner: unlogged{}, Size: st.Size, Sparse: sec.header.Sparse,
		Pending: v.overlay(sec.header),
	})
	if err != nil {
		return 0, err
	}
	defer f.Wipe()
	buf := make([]byte, min(f.Size(), 1<<20))
	for off := int64(0); off < f.Size(); off += int64(len(buf)) {
		if err := ctx.Err(); err != nil {
			return off, err
		}
		if data, err := f.SeekData(off); err == nil && data > off {
			off = data &^ int64(cl.geo.ChunkSize-1) // leap over a hole
		}
		if _, err := f.ReadAt(buf, off); err != nil {
			return off, err
		}
	}
	clear(buf)
	return f.Size(), nil
}

// internal checks the store's own files in a directory: each belongs to
// something that is there.
func (k *checker) internal(d *backing.Dir, where string, e backing.Entry, owners map[string]bool) {
	p := Problem{Path: where, Class: "orphan"}
	switch {
	case e.Name == dirFile:
		return
	case strings.HasPrefix(e.Name, longName):
		if owners[e.Name] {
			return
		}
		p.What = "long name without an entry"
	case strings.HasPrefix(e.Name, sidecarPrefix):
		if owners[e.Name] {
			return
		}
		p.What = "sidecar without a file"
	case strings.HasPrefix(e.Name, targetPrefix):
		if owners[e.Name] {
			return
		}
		p.What = "target without a symlink"
	case isTemp(e.Name):
		p.What = "temporary that a crash left"
	default:
		k.add(Problem{Path: where, What: "not a file of this store", Class: "foreign"})
		return
	}
	if k.conf.Repair {
		p.Mended = k.v.quarantine(d, e.Name) == nil
	}
	k.add(p)
}

// owners returns the names of the store's own files that entries of a directory
// need there: long names and sidecars.
func (k *checker) owners(d *backing.Dir, entries []backing.Entry) map[string]bool {
	out := map[string]bool{}
	for _, e := range entries {
		if hash, long := strings.CutPrefix(e.Name, longEntry); long {
			out[longName+hash] = true
		}
		if isInternal(e.Name) {
			continue
		}
		if st, err := d.Stat(e.Name); err == nil {
			if side, err := k.v.sidecarOf(d, e.Name, st); err == nil {
				out[side] = true
			}
		}
	}
	return out
}
