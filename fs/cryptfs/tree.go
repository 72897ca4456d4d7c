package cryptfs

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/record"
)

// Caller is on whose behalf something is made. Where the process is root, new
// files belong to it; the umask applies unless the directory has a default ACL.
type Caller struct {
	Uid, Gid uint32
	Umask    uint32
}

// Lookup finds a name in a directory; ENOENT if it is not there. The node comes
// with a reference.
func (v *Volume) Lookup(ctx context.Context, dir *Node, name string) (*Node, Attr, error) {
	cipher, err := v.load(ctx, dir)
	if err != nil {
		return nil, Attr{}, err
	}
	s, err := dir.seal(cipher, name)
	if err != nil {
		if err == error(ErrReserved) {
			err = unix.ENOENT
		}
		return nil, Attr{}, err
	}
	return v.lookupEntry(dir, s.entry, name)
}

func (v *Volume) lookupEntry(dir *Node, entry, name string) (*Node, Attr, error) {
	v.ns.RLock()
	defer v.ns.RUnlock()
	ref, err := v.use(dir)
	if err != nil {
		return nil, Attr{}, err
	}
	defer ref.release()
	st, err := lstat(ref.Dir, entry)
	if err != nil {
		return nil, Attr{}, err
	}
	who := v.identify(st, func() []byte { return ref.Handle(entry) })
	n := v.nodes.intern(st, who, dir, entry, name, dir.dirClass())
	return n, n.attr(st), nil
}

// DirEntry is a name in a directory.
type DirEntry struct {
	Name  string
	Ino   uint64
	Mode  uint32 // type bits; 0 if the store's file system does not say
	entry string
}

// DirHandle is an open directory: a snapshot of its names.
type DirHandle struct {
	v       *Volume
	n       *Node
	ref     *dirRef
	entries []DirEntry
}

// OpenDir opens a directory. Names that fail authentication, and files that
// somebody else put into the store, are left out, counted and logged.
func (v *Volume) OpenDir(ctx context.Context, n *Node) (*DirHandle, error) {
	if _, err := v.load(ctx, n); err != nil {
		return nil, err
	}
	v.ns.RLock()
	ref, err := v.use(n)
	v.ns.RUnlock()
	if err != nil {
		return nil, err
	}
	d := &DirHandle{v: v, n: n, ref: ref}
	if err := d.Rewind(ctx); err != nil {
		ref.release()
		return nil, err
	}
	return d, nil
}

// Entries returns the snapshot, "." and ".." first. It must not be changed.
func (d *DirHandle) Entries() []DirEntry { return d.entries }

// Close lets go of the directory.
func (d *DirHandle) Close() { d.ref.release() }

// Rewind takes a new snapshot.
func (d *DirHandle) Rewind(ctx context.Context) error {
	cipher, err := d.v.load(ctx, d.n)
	if err != nil {
		return err
	}
	parent := d.n.key.ino
	if l, ok := d.n.where(); ok {
		parent = l.parent.key.ino
	}
	out := []DirEntry{{Name: ".", Ino: d.n.key.ino, Mode: unix.S_IFDIR}, {Name: "..", Ino: parent, Mode: unix.S_IFDIR}}
	var failed error
	err = d.ref.Each(func(e backing.Entry) bool {
		name, ok, err := d.n.unseal(cipher, d.ref.Dir, e.Name)
		if err != nil && !isDamage(err) {
			failed = err // it may be there, and a listing without it would not say so
			return false
		}
		if err != nil {
			d.v.counters.foreign.Add(1)
			d.v.log.Error("directory entry left out", "dir", d.n.key.ino, "entry", e.Name, "error", err, "audit", true)
		}
		if ok {
			out = append(out, DirEntry{name, e.Ino, e.Type, e.Name})
		}
		return true
	})
	if err = errors.Join(err, failed); err != nil {
		return err
	}
	d.entries = out
	return nil
}

// LookupEntry is Lookup for an entry of a snapshot, without encrypting its name
// again.
func (v *Volume) LookupEntry(ctx context.Context, dir *Node, e DirEntry) (*Node, Attr, error) {
	if e.entry == "" {
		return nil, Attr{}, unix.EINVAL // "." and ".."
	}
	return v.lookupEntry(dir, e.entry, e.Name)
}

// FsyncDir makes a directory's names durable. Once the journal is stopped it
// fails, as Fsync does.
func (v *Volume) FsyncDir(n *Node) error {
	if v.journal != nil {
		if err := v.journal.Err(); err != nil {
			return err
		}
	}
	v.ns.RLock()
	defer v.ns.RUnlock()
	ref, err := v.use(n)
	if err != nil {
		return err
	}
	defer ref.release()
	if err := v.syncRecords(n); err != nil {
		return err
	}
	for _, child := range v.freshIn(n) { // without its record it would not be there
		if err := v.syncRecord(child); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return ref.Sync()
}

// freshIn returns the directories in n whose records may not be on the disk.
func (v *Volume) freshIn(n *Node) (out []*Node) {
	v.loose.mu.Lock()
	defer v.loose.mu.Unlock()
	for child := range v.loose.fresh {
		if l, ok := child.where(); ok && l.parent == n {
			out = append(out, child)
		}
	}
	return out
}

// syncRecords makes the directory records on the way to the root durable, those
// that were made since the volume was opened: without its record a directory
// has no names.
func (v *Volume) syncRecords(n *Node) error {
	for {
		n.mu.Lock()
		fresh := n.dir.fresh
		n.mu.Unlock()
		if fresh {
			if err := v.syncRecord(n); err != nil {
				return err
			}
		}
		l, ok := n.where()
		if !ok {
			return nil
		}
		n = l.parent
	}
}

// syncRecord makes a directory's record durable. After a sync that failed it is
// written once more: what the kernel could not write it takes for written.
func (v *Volume) syncRecord(n *Node) error {
	ref, err := v.use(n)
	if err != nil {
		return err
	}
	defer ref.release()
	n.mu.Lock()
	again := n.dir.unsure
	n.dir.unsure = true
	n.mu.Unlock()
	sync := func() error { return syncFile(ref.Dir, dirFile) }
	if again {
		sync = func() error {
			b, err := ref.ReadFile(dirFile, record.MaxDir)
			if err != nil {
				return err
			}
			return ref.Replace(dirFile, b, 0o600)
		}
	}
	if err := lifted(ref.Dir, sync); err != nil {
		return err
	}
	v.firm(n)
	return nil
}

// syncFile makes a file and its name durable.
func syncFile(d *backing.Dir, name string) error {
	f, err := d.Open(name, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // nothing was written through it
	if err := f.Sync(); err != nil {
		return err
	}
	return d.Sync()
}
