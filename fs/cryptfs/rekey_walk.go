package cryptfs

import (
	"context"
	"errors"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// treeDir is a directory of the store as a job sees it: by descriptor, without a
// node in the volume's table. node is only a bearer of id and class for names. One
// whose record cannot be read has neither, and names as the store has them.
type treeDir struct {
	dir    *backing.Dir
	entry  []string // the way to it from the root, as the store names it
	path   string   // plaintext path; not from "/" on where that cannot be told
	id     nameenc.DirID
	class  *class
	cipher *nameenc.Cipher
	node   *Node
}

// newTreeDir reads and checks a directory's record. d stays the caller's.
func (v *Volume) newTreeDir(ctx context.Context, d *backing.Dir, entry []string, plain string) (*treeDir, error) {
	t := &treeDir{dir: d, entry: entry, path: plain}
	err := lifted(d, func() error {
		cl, rec, cipher, err := v.dirAt(ctx, d)
		if err == nil {
			t.class, t.cipher, t.id = cl, cipher, nameenc.DirID(rec.ID)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	t.node = &Node{dir: &dirState{id: t.id, class: t.class, loaded: true}}
	return t, nil
}

// seal and unseal translate names of the directory.
func (t *treeDir) seal(name string) (stored, error) { return t.node.seal(t.cipher, name) }

func (t *treeDir) unseal(entry string) (name string, ok bool, err error) {
	return t.node.unseal(t.cipher, t.dir, entry)
}

// at returns the store's path of an entry, for messages.
func (t *treeDir) at(entry string) string {
	return path.Join(append([]string{"."}, append(t.entry, entry)...)...)
}

// child returns the plaintext path of a name in the directory.
func (t *treeDir) child(name string) string { return path.Join(t.path, name) }

// below returns the way to an entry.
func (t *treeDir) below(entry string) []string {
	return append(append(make([]string, 0, len(t.entry)+1), t.entry...), entry)
}

// list returns what is in the directory.
func (t *treeDir) list() (out []backing.Entry, err error) {
	err = lifted(t.dir, func() error { out, err = t.dir.ReadDir(); return err })
	return out, err
}

// treeItem is an entry of the plaintext tree.
type treeItem struct {
	entry string // in the store
	name  string // plaintext
	st    backing.Stat
}

// items returns the entries of the plaintext tree that are in the directory. bad
// is called for what is none and not the store's own either; its error ends the
// listing.
func (t *treeDir) items(v *Volume, bad func(path string, err error) error) ([]treeItem, error) {
	entries, err := t.list()
	if err != nil {
		return nil, err
	}
	out := make([]treeItem, 0, len(entries))
	for _, e := range entries {
		if isInternal(e.Name) {
			continue
		}
		name, ok, err := e.Name, true, error(nil)
		if t.class != nil {
			err = v.let(t.dir, func() (err error) { name, ok, err = t.unseal(e.Name); return err })
		}
		if err == nil && !ok {
			err = ErrName
		}
		it := treeItem{entry: e.Name, name: name}
		if err == nil {
			err = v.let(t.dir, func() (err error) { it.st, err = t.dir.Stat(e.Name); return err })
		}
		if err != nil {
			if err := bad(t.at(e.Name), err); err != nil {
				return nil, err
			}
			continue
		}
		out = append(out, it)
	}
	return out, nil
}

// openPath opens the directory at a way of entries from d.
func openPath(d *backing.Dir, entries []string) (*backing.Dir, error) {
	cur, err := d.OpenDir(".")
	for _, e := range entries {
		if err != nil {
			return nil, err
		}
		var next *backing.Dir
		err = lifted(cur, func() error { next, err = cur.OpenDir(e); return err })
		_ = cur.Close()
		cur = next
	}
	return cur, err
}

// find returns the directory that the entry of a plaintext path is in, and the
// item; the caller closes the directory. The root itself is ErrFixed. Symbolic
// links are not followed.
func (v *Volume) findPath(ctx context.Context, plain string) (*treeDir, treeItem, error) {
	parts := strings.FieldsFunc(path.Clean("/"+plain), func(r rune) bool { return r == '/' })
	if len(parts) == 0 {
		return nil, treeItem{}, ErrFixed
	}
	d, err := v.root.OpenDir(".")
	if err != nil {
		return nil, treeItem{}, err
	}
	at, entries := "/", []string(nil)
	for {
		t, err := v.newTreeDir(ctx, d, entries, at)
		var it treeItem
		if err == nil {
			it, err = t.item(parts[0])
		}
		if err != nil {
			_ = d.Close()
			return nil, it, err
		}
		if len(parts) == 1 {
			return t, it, nil
		}
		var sub *backing.Dir
		err = lifted(d, func() error { sub, err = d.OpenDir(it.entry); return err })
		_ = d.Close()
		if err != nil {
			return nil, it, err
		}
		d, entries, at, parts = sub, t.below(it.entry), t.child(parts[0]), parts[1:]
	}
}

// item looks a name up.
func (t *treeDir) item(name string) (treeItem, error) {
	s, err := t.seal(name)
	if errors.Is(err, ErrReserved) {
		err = unix.ENOENT
	}
	if err != nil {
		return treeItem{}, err
	}
	it := treeItem{entry: s.entry, name: name}
	err = lifted(t.dir, func() error { it.st, err = t.dir.Stat(s.entry); return err })
	return it, err
}
