package faultsweep

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

const chunk = 4096

// entry is what a name of the plaintext tree leads to.
type entry struct {
	typ, mode uint32
	ino       uint64
	nlink     uint32
	data      []byte
	target    string
	xattr     string // user.k
	mtime     int64
}

// tree is the plaintext tree: path -> entry.
type tree map[string]entry

// read returns a volume's tree.
func read(v *cryptfs.Volume) (tree, error) {
	out := tree{}
	a, err := v.Getattr(v.Root())
	if err != nil {
		return nil, err
	}
	return out, out.visit(v, v.Root(), a, ".")
}

func (t tree) visit(v *cryptfs.Volume, n *cryptfs.Node, a cryptfs.Attr, at string) (err error) {
	ctx := context.Background()
	e := entry{typ: a.Mode & unix.S_IFMT, mode: a.Mode & 0o7777, ino: a.Ino, nlink: a.Nlink, mtime: a.Mtime.Sec}
	switch e.typ {
	case unix.S_IFLNK:
		e.target, err = v.Readlink(n)
	case unix.S_IFREG:
		e.data, err = contents(v, n, a.Size)
	case unix.S_IFDIR:
		err = t.list(v, n, at)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", brief(at), err)
	}
	if e.typ == unix.S_IFREG || e.typ == unix.S_IFDIR {
		value, err := v.Getxattr(ctx, n, "user.k")
		if err != nil && !errors.Is(err, unix.ENODATA) {
			return fmt.Errorf("%s: attribute: %w", brief(at), err)
		}
		e.xattr = string(value)
	}
	t[at] = e
	return nil
}

func (t tree) list(v *cryptfs.Volume, n *cryptfs.Node, at string) error {
	ctx := context.Background()
	d, err := v.OpenDir(ctx, n)
	if err != nil {
		return err
	}
	defer d.Close()
	for _, e := range d.Entries() {
		if e.Name == "." || e.Name == ".." {
			continue
		}
		child, a, err := v.LookupEntry(ctx, n, e)
		if err != nil {
			return fmt.Errorf("%s: %w", brief(e.Name), err)
		}
		err = t.visit(v, child, a, at+"/"+e.Name)
		v.Forget(child, 1)
		if err != nil {
			return err
		}
	}
	return nil
}

func contents(v *cryptfs.Volume, n *cryptfs.Node, size int64) ([]byte, error) {
	h, err := v.Open(context.Background(), n, unix.O_RDONLY, false)
	if err != nil {
		return nil, err
	}
	defer h.Release()
	p := make([]byte, size+1)
	m, err := h.ReadAt(p, 0)
	if err == nil && int64(m) != size {
		err = fmt.Errorf("%d bytes of %d", m, size)
	}
	return bytes.Clone(p[:m]), err
}

func brief(s string) string { return s[:min(len(s), 40)] }

// between holds a tree against the states that it may be in: its names are those
// of one of them, all else is, object for object, as in one of them. torn: a file
// may also end with a chunk between two sizes.
func between(got tree, states []tree, torn bool) error {
	var errs []error
	for _, s := range states {
		if err := got.names(s); err != nil {
			errs = append(errs, err)
			continue
		}
		for at, e := range got {
			var may []entry
			for _, s := range states {
				if w, ok := s[at]; ok && w.typ == e.typ {
					may = append(may, w)
				}
			}
			if err := e.like(may, torn); err != nil {
				return fmt.Errorf("%s: %w", brief(at), err)
			}
		}
		return nil
	}
	return errors.Join(errs...)
}

func (t tree) names(want tree) error {
	for at, e := range t {
		if w, ok := want[at]; !ok {
			return fmt.Errorf("%s is there", brief(at))
		} else if w.typ != e.typ {
			return fmt.Errorf("%s has type %o, want %o", brief(at), e.typ, w.typ)
		}
	}
	for at := range want {
		if _, ok := t[at]; !ok {
			return fmt.Errorf("%s is not there", brief(at))
		}
	}
	return nil
}

// like: each chunk is one that the file had, and so is the size.
func (e entry) like(may []entry, torn bool) error {
	has := func(f func(m entry) bool) bool { return slices.ContainsFunc(may, f) }
	switch {
	case !has(func(m entry) bool { return m.mode == e.mode }):
		return fmt.Errorf("mode %o", e.mode)
	case !has(func(m entry) bool { return m.xattr == e.xattr }):
		return fmt.Errorf("attribute of %d bytes", len(e.xattr))
	case !has(func(m entry) bool { return m.target == e.target }):
		return fmt.Errorf("target %q", brief(e.target))
	case e.typ == unix.S_IFREG && !has(func(m entry) bool { return len(m.data) == len(e.data) }) && !(torn && len(e.data)%chunk == 0 &&
		has(func(m entry) bool { return len(m.data) < len(e.data) }) && has(func(m entry) bool { return len(m.data) > len(e.data) })):
		return fmt.Errorf("%d bytes, want %v", len(e.data), sizes(may))
	}
	for from := 0; from < len(e.data); from += chunk {
		to := min(from+chunk, len(e.data))
		if !has(func(m entry) bool { return alike(m.data, e.data, from, to) }) {
			return fmt.Errorf("bytes %d to %d of %d never were so; sizes %v", from, to, len(e.data), sizes(may))
		}
	}
	return nil
}

// alike compares a chunk as far as the file had it then: where it ended in the
// chunk, the rest is zeros.
func alike(had, got []byte, from, to int) bool {
	if from >= len(had) {
		return false
	}
	end := min(to, len(had))
	return bytes.Equal(had[from:end], got[from:end]) && len(bytes.Trim(got[end:to], "\x00")) == 0
}

func sizes(may []entry) (out []int) {
	for _, m := range may {
		out = append(out, len(m.data))
	}
	return out
}

// links: the number of names of a file is what stat says.
func (t tree) links() error {
	names := map[uint64]uint32{}
	for _, e := range t {
		names[e.ino]++
	}
	for at, e := range t {
		if e.typ == unix.S_IFREG && names[e.ino] != e.nlink {
			return fmt.Errorf("%s has %d names, and says %d", brief(at), names[e.ino], e.nlink)
		}
	}
	return nil
}

func split(p string) (dir, name string) {
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		return p[:i], p[i+1:]
	}
	return ".", p
}
