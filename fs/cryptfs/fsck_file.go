package cryptfs

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
)

// fileAt says where a file id was met first.
type fileAt struct {
	key  inoKey
	path string
}

// linkedFile is a store file with several names.
type linkedFile struct {
	nlink uint32
	names []linkAt
	class string              // that its header is for, "" if that is not known
	read  map[string]struct{} // classes under which it was read
}

type linkAt struct{ path, class string }

// regular checks a file of the tree, one with several names under the first of
// them that comes.
func (k *checker) regular(ctx context.Context, d *backing.Dir, in *checkedDir, i *item, where string) error {
	k.count(func(r *FsckReport) { r.Files++ })
	if i.st.Nlink > 1 && k.known(i.st, linkAt{where, in.cl.name}) {
		k.advance(1, uint64(i.st.Size))
		return nil
	}
	own, err := d.OpenDir(".")
	if err != nil {
		k.failed(where, err)
		return nil
	}
	return k.later(func() error {
		defer func() { _ = own.Close() }()
		err := k.file(ctx, own, in.cl, i, where)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			k.failed(where, err)
		}
		return nil
	})
}

// known notes a name of a file that has several, and reports whether it was read
// before for a directory of the same class.
func (k *checker) known(st backing.Stat, at linkAt) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	f := k.linked[keyOf(st)]
	if f == nil {
		f = &linkedFile{nlink: st.Nlink, read: map[string]struct{}{}}
		k.linked[keyOf(st)] = f
	}
	f.names = append(f.names, at)
	_, done := f.read[at.class]
	f.read[at.class] = struct{}{}
	return done
}

// file checks a file's size and header and, unless that takes too long, all that
// is under its key.
func (k *checker) file(ctx context.Context, d *backing.Dir, cl *class, i *item, where string) error {
	if i.st.Size == 0 {
		k.advance(1, 0)
		return nil
	}
	read := uint64(0)
	defer func() { k.advance(1, uint64(i.st.Size)-min(read, uint64(i.st.Size))) }()
	disk, err := k.v.openEntry(d, i.Name, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer func() { _ = disk.Close() }()
	block, err := k.v.readBlock(disk, []*backing.Dir{d}, i.st)
	if err != nil {
		return err
	}
	h, err := envelope.Parse(block)
	if err != nil {
		return fmt.Errorf("header: %w", err)
	}
	if err := k.header(h, cl, i, where); err != nil {
		return err
	}
	if k.conf.Quick {
		k.births.note(h.Birth)
		_, err := cl.geo.PlainSize(dare.CipherOff(k.sizeOf(disk, h, i.st.Size)))
		return err
	}
	sec, err := k.v.unwrap(ctx, cl, block)
	if err != nil {
		return err
	}
	defer sec.wipe()
	k.births.note(h.Birth)
	return k.chunks(ctx, disk, cl, &sec, i.st.Size, &read)
}

// sizeOf is a store file's size with what the journal has for it.
func (k *checker) sizeOf(disk *backing.File, h *envelope.Header, size int64) int64 {
	return chunkfile.Look(disk, size, k.v.overlay(h)).Size()
}

// header checks what a header says without its key.
func (k *checker) header(h *envelope.Header, cl *class, i *item, where string) error {
	l := k.v.layout
	if h.Store != l.ID || h.Suite != uint8(l.Suite) || h.ChunkSize != cl.geo.ChunkSize || h.BlockSize != l.HeaderSize {
		return fmt.Errorf("file %s: %w", h.File, ErrHeader)
	}
	if k.v.place.Sidecar(h.File[:]) != i.needs && i.st.Type() == unix.S_IFREG {
		return fmt.Errorf("header is that of file %s: %w", h.File, ErrHeader)
	}
	allowed := slices.ContainsFunc(h.Recipients, func(r envelope.Recipient) bool { return r.Class == cl.name })
	k.mu.Lock()
	defer k.mu.Unlock()
	if f := k.linked[keyOf(i.st)]; f != nil {
		f.class = cl.name
		if !allowed {
			f.class = h.Recipients[0].Class
		}
	}
	if !allowed {
		return fmt.Errorf("header of file %s has no recipient of class %s: %w", h.File, cl.name, ErrHeader)
	}
	first, twice := k.files[h.File]
	if !twice {
		k.files[h.File] = fileAt{keyOf(i.st), where}
	} else if first.key != keyOf(i.st) {
		k.report.Problems = append(k.report.Problems, Problem{Path: where, Class: classDuplicate,
			What: "has the file id of " + first.path + ": one is a copy of the other, as tools make that do not keep hard links"})
	}
	return nil
}

// chunks reads and authenticates a file.
func (k *checker) chunks(ctx context.Context, disk *backing.File, cl *class, sec *secrets, size int64, read *uint64) error {
	f, err := chunkfile.Open(chunkfile.Config{
		Disk: disk, Geo: cl.geo, Codec: sec.codec, Owner: unlogged{}, Size: size, Sparse: sec.header.Sparse,
		Pending: k.v.overlay(sec.header),
	})
	if err != nil {
		return err
	}
	defer f.Wipe()
	buf := make([]byte, min(f.Size(), 1<<20))
	defer clear(buf)
	for off := int64(0); off < f.Size(); off += int64(len(buf)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if data, err := f.SeekData(off); err == nil && data > off {
			off = data &^ int64(cl.geo.ChunkSize-1) // leap over a hole
		}
		n, err := f.ReadAt(buf, off)
		if err != nil {
			return err
		}
		*read += uint64(n)
		k.advance(0, uint64(n))
	}
	k.count(func(r *FsckReport) { r.Bytes += uint64(f.Size()) })
	return nil
}

// neededSidecar is a header file that is missing beside a name of a file that has
// others.
type neededSidecar struct{ dir, entry, sidecar string }

// sideOf is a header file with several names.
type sideOf struct {
	keys  map[inoKey]struct{}
	names int
	nlink uint32
	path  string
}

func (k *checker) noteSidecar(id envelope.ID, where string, st backing.Stat) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.sides[id]
	if s == nil {
		s = &sideOf{keys: map[inoKey]struct{}{}, path: where}
		k.sides[id] = s
	}
	s.keys[keyOf(st)] = struct{}{}
	s.names++
	s.nlink = st.Nlink
}

// checkLinks compares link counts with the names that were found.
func (k *checker) checkLinks() error {
	if err := k.bringSidecars(); err != nil {
		return err
	}
	elsewhere := map[inoKey]uint32{}
	if len(k.linked)+len(k.sides) > 0 {
		if err := countLinks(k.v.meta, elsewhere); err != nil {
			return err
		}
	}
	for key, f := range k.linked {
		found := uint32(len(f.names)) + elsewhere[key]
		at := slices.MinFunc(f.names, func(a, b linkAt) int { return strings.Compare(a.path, b.path) }).path
		if found != f.nlink {
			k.add(Problem{Path: at, Class: classLinks, What: fmt.Sprintf("has %d names, of which %d are in the store", f.nlink, found)})
		}
		for _, n := range f.names {
			if f.class != "" && n.class != f.class {
				k.add(Problem{Path: n.path, Kind: fault.Integrity, What: "a name of " + at + " in a directory of another class"})
			}
		}
	}
	for id, s := range k.sides {
		n := uint32(s.names)
		for key := range s.keys {
			n += elsewhere[key]
		}
		if len(s.keys) == 1 && n != s.nlink || len(s.keys) > 1 {
			k.add(Problem{Path: s.path, Class: classLinks,
				What: fmt.Sprintf("header file of %s has %d names, of which %d are in the store, in %d files", id, s.nlink, n, len(s.keys))})
		}
	}
	return nil
}

// bringSidecars puts header files beside names that lack them, from beside others
// of the same file.
func (k *checker) bringSidecars() error {
	for _, n := range k.needs {
		p := Problem{Path: path.Join(n.dir, n.entry), What: "its header file is not in the directory", Kind: fault.Integrity}
		k.mend(p, func() error { return k.bringSidecar(n) })
	}
	return nil
}

func (k *checker) bringSidecar(n neededSidecar) error {
	to, err := openPath(k.v.root, strings.FieldsFunc(n.dir, func(r rune) bool { return r == '/' }))
	if err != nil {
		return err
	}
	defer func() { _ = to.Close() }()
	if _, err := to.Stat(n.sidecar); err == nil {
		return nil // reading the file has brought it
	}
	linked := false
	err = k.v.walk(func(d *backing.Dir, e backing.Entry) bool {
		if e.Name == n.sidecar {
			linked = keepTimes(to, func() error { return d.Link(n.sidecar, to, n.sidecar) }) == nil
		}
		return !linked
	})
	if err == nil && !linked {
		err = ErrHeader
	}
	return err
}

// countLinks counts names of files below a directory.
func countLinks(d *backing.Dir, into map[inoKey]uint32) error {
	entries, err := d.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range entries {
		st, err := d.Stat(e.Name)
		if err != nil {
			return err
		}
		if st.Type() == unix.S_IFREG && st.Nlink > 1 {
			into[keyOf(st)]++
		}
		if st.Type() != unix.S_IFDIR {
			continue
		}
		sub, err := d.OpenDir(e.Name)
		if err != nil {
			return err
		}
		err = countLinks(sub, into)
		_ = sub.Close()
		if err != nil {
			return err
		}
	}
	return nil
}
