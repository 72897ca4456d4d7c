package powercut

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// inode is a file of the model disk. Its data is not changed in place: states
// share it.
type inode struct {
	mode     uint32 // with the type
	uid, gid int
	data     []byte
	target   string
	xattrs   map[string]string
	entries  map[string]uint64 // of a directory
}

// disk is a whole tree by inode number.
type disk struct {
	root   uint64
	inodes map[uint64]*inode
}

// loadDisk reads the tree at path, as it is and durable.
func loadDisk(path string) (*disk, error) {
	d := &disk{inodes: map[uint64]*inode{}}
	var err error
	d.root, err = d.load(path)
	return d, err
}

func (d *disk) load(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, err
	}
	if d.inodes[st.Ino] != nil { // another name of it
		return st.Ino, nil
	}
	n := &inode{mode: st.Mode, uid: int(st.Uid), gid: int(st.Gid)}
	d.inodes[st.Ino] = n
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		n.target, err = os.Readlink(path)
		return st.Ino, err
	case unix.S_IFREG:
		if n.data, err = os.ReadFile(path); err != nil {
			return 0, err
		}
	case unix.S_IFDIR:
		n.entries = map[string]uint64{}
		entries, err := os.ReadDir(path)
		if err != nil {
			return 0, err
		}
		for _, e := range entries {
			if n.entries[e.Name()], err = d.load(filepath.Join(path, e.Name())); err != nil {
				return 0, err
			}
		}
	}
	n.xattrs, err = loadXattrs(path)
	return st.Ino, err
}

func loadXattrs(path string) (map[string]string, error) {
	out := map[string]string{}
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return nil, err
	}
	for name := range splitNul(string(buf[:n])) {
		value := make([]byte, 64<<10)
		m, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, err
		}
		out[name] = string(value[:m])
	}
	return out, nil
}

func splitNul(s string) map[string]struct{} {
	out := map[string]struct{}{}
	for len(s) > 0 {
		i := slices.Index([]byte(s), 0)
		out[s[:i]], s = struct{}{}, s[i+1:]
	}
	return out
}

// clone copies d so that the copy's inodes may be replaced and their maps changed.
func (d *disk) clone() *disk {
	out := &disk{d.root, make(map[uint64]*inode, len(d.inodes))}
	for ino, n := range d.inodes {
		out.inodes[ino] = n.clone()
	}
	return out
}

func (n *inode) clone() *inode {
	c := *n
	c.xattrs, c.entries = maps.Clone(n.xattrs), maps.Clone(n.entries)
	return &c
}

// build makes the tree in the empty directory path.
func (d *disk) build(path string) error {
	made := map[uint64]string{d.root: path}
	return d.fill(d.inodes[d.root], path, made)
}

func (d *disk) fill(n *inode, path string, made map[uint64]string) error {
	for name, ino := range n.entries {
		at := filepath.Join(path, name)
		if first, ok := made[ino]; ok {
			if err := os.Link(first, at); err != nil {
				return err
			}
			continue
		}
		made[ino] = at
		if err := d.make(d.inodes[ino], at, made); err != nil {
			return err
		}
	}
	return n.setAttrs(path)
}

func (d *disk) make(n *inode, at string, made map[uint64]string) error {
	switch n.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err := os.Mkdir(at, 0o700); err != nil {
			return err
		}
		return d.fill(n, at, made)
	case unix.S_IFLNK:
		return os.Symlink(n.target, at)
	case unix.S_IFREG:
		if err := n.write(at); err != nil {
			return err
		}
		return n.setAttrs(at)
	}
	return unix.Mknod(at, n.mode, 0)
}

// write makes the file, with holes where whole pages are zeros.
func (n *inode) write(at string) error {
	f, err := os.OpenFile(at, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = f.Truncate(int64(len(n.data)))
	for from := 0; from < len(n.data) && err == nil; {
		to := from
		for to < len(n.data) && !isZero(n.data[to:min(to+4096, len(n.data))]) {
			to = min(to+4096, len(n.data))
		}
		if to > from {
			_, err = f.WriteAt(n.data[from:to], int64(from))
		}
		from = to + 4096
	}
	return errors.Join(err, f.Close())
}

func (n *inode) setAttrs(path string) error {
	for name, value := range n.xattrs {
		if err := unix.Lsetxattr(path, name, []byte(value), 0); err != nil {
			return err
		}
	}
	if n.uid != os.Getuid() || n.gid != os.Getgid() {
		if err := unix.Lchown(path, n.uid, n.gid); err != nil {
			return err
		}
	}
	return unix.Chmod(path, n.mode&0o7777)
}

// sum tells one reachable tree from another.
func (d *disk) sum() [32]byte {
	h := sha256.New()
	d.hash(h, d.root, map[uint64]int{})
	return [32]byte(h.Sum(nil))
}

func (d *disk) hash(h io.Writer, ino uint64, seen map[uint64]int) {
	n := d.inodes[ino]
	if at, ok := seen[ino]; ok {
		fmt.Fprintf(h, "again %d\n", at)
		return
	}
	seen[ino] = len(seen)
	fmt.Fprintf(h, "%o %d %d %q %d\n", n.mode, n.uid, n.gid, n.target, len(n.data))
	_, _ = h.Write(n.data)
	for _, name := range slices.Sorted(maps.Keys(n.xattrs)) {
		fmt.Fprintf(h, "x %q %q\n", name, n.xattrs[name])
	}
	for _, name := range slices.Sorted(maps.Keys(n.entries)) {
		fmt.Fprintf(h, "e %q\n", name)
		d.hash(h, n.entries[name], seen)
	}
}
