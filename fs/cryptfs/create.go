package cryptfs

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
)

const aclDefaultAttr = "system.posix_acl_default"

// modeIn returns the mode that a new file gets in a directory: with a default
// ACL there the store's file system applies that, else the umask counts.
func (v *Volume) modeIn(n *Node, dir *backing.Dir, mode uint32, c Caller) uint32 {
	n.mu.Lock()
	acl := n.dir.dacl
	n.mu.Unlock()
	if acl == aclUnknown {
		acl = aclNone
		if _, err := dir.Attrs("").Get(aclDefaultAttr); err == nil {
			acl = aclDefault
		}
		n.mu.Lock()
		n.dir.dacl = acl
		n.mu.Unlock()
	}
	if acl == aclDefault {
		return mode
	}
	return mode &^ (c.Umask & 0o777)
}

// own gives a new file to its caller. In a setgid directory the group is the
// directory's, and the store's file system has seen to that.
func (v *Volume) own(dir *backing.Dir, entry string, mode uint32, c Caller) error {
	if !v.isRoot {
		return nil
	}
	if c.Uid == 0 && c.Gid == 0 {
		return nil
	}
	st, err := dir.Stat("")
	if err != nil {
		return err
	}
	gid := int(c.Gid)
	if st.Mode&unix.S_ISGID != 0 {
		gid = -1
	}
	if c.Uid == 0 && (gid <= 0) {
		return nil
	}
	if err := dir.Chown(entry, int(c.Uid), gid); err != nil {
		return err
	}
	if mode&(unix.S_ISUID|unix.S_ISGID) != 0 && mode&unix.S_IFMT != unix.S_IFLNK {
		now, err := dir.Stat(entry)
		if err != nil {
			return err
		}
		return dir.Chmod(entry, now.Mode&0o1777|mode&(unix.S_ISUID|unix.S_ISGID)|now.Mode&unix.S_ISGID)
	}
	return nil
}

// made is what every operation that makes a name goes through: make is called
// with the directory open and the long name in place. On failure nothing is
// left behind.
func (v *Volume) made(dir *Node, cipher *nameenc.Cipher, name string, make func(d *backing.Dir, entry string) error) (*Node, Attr, error) {
	s, err := dir.seal(cipher, name)
	if err != nil {
		return nil, Attr{}, err
	}
	v.ns.RLock()
	defer v.ns.RUnlock()
	ref, err := v.use(dir)
	if err != nil {
		return nil, Attr{}, err
	}
	defer ref.release()
	if err := placeName(ref.Dir, s); err != nil {
		return nil, Attr{}, err
	}
	if err := make(ref.Dir, s.entry); err != nil {
		dropName(ref.Dir, s.entry)
		return nil, Attr{}, err
	}
	st, err := lstat(ref.Dir, s.entry)
	if err != nil {
		return nil, Attr{}, err
	}
	who := v.identify(st, func() []byte { return ref.Handle(s.entry) })
	n := v.nodes.intern(st, who, dir, s.entry, name, dir.dirClass())
	return n, n.attr(st), nil
}

// Create makes and opens a regular file; EEXIST if the name is there. The key
// service is asked before the name exists.
func (v *Volume) Create(ctx context.Context, dir *Node, name string, flags int, mode uint32, c Caller) (*Node, *Handle, Attr, error) {
	cipher, err := v.loadForWrite(ctx, dir)
	if err != nil {
		return nil, nil, Attr{}, err
	}
	if _, err := dir.seal(cipher, name); err != nil { // before a key is spent on it
		return nil, nil, Attr{}, err
	}
	sec, err := v.newKey(ctx, dir.dirClass())
	if err != nil {
		return nil, nil, Attr{}, err
	}
	defer v.descr.opening()()
	var disk *backing.File
	n, a, err := v.made(dir, cipher, name, func(d *backing.Dir, entry string) error {
		var err error
		m := v.modeIn(dir, d, mode&0o7777, c)
		disk, err = d.Open(entry, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, m)
		if err != nil {
			return err
		}
		if err = v.own(d, entry, m|unix.S_IFREG, c); err != nil {
			_ = d.Unlink(entry)
		}
		return err
	})
	if err != nil {
		if disk != nil {
			_ = disk.Close() // nothing was written through it
		}
		sec.wipe()
		return nil, nil, Attr{}, err
	}
	f, err := v.attach(n, &opener{disk: disk, writable: true, sec: sec})
	if err != nil {
		v.Forget(n, 1)
		return nil, nil, Attr{}, err
	}
	f.suid.Store(a.Mode&(unix.S_ISUID|unix.S_ISGID) != 0)
	n.bare.Store(true)
	return n, newHandle(f, true), a, nil
}

// Tmpfile makes a regular file without a name (O_TMPFILE) that Link may give one.
func (v *Volume) Tmpfile(ctx context.Context, dir *Node, flags int, mode uint32, c Caller) (*Node, *Handle, Attr, error) {
	if _, err := v.loadForWrite(ctx, dir); err != nil {
		return nil, nil, Attr{}, err
	}
	sec, err := v.newKey(ctx, dir.dirClass())
	if err != nil {
		return nil, nil, Attr{}, err
	}
	defer v.descr.opening()()
	disk, st, err := v.tempIn(dir, mode, c)
	if err != nil {
		sec.wipe()
		return nil, nil, Attr{}, err
	}
	n := v.nodes.intern(st, v.identify(st, disk.Handle), nil, "", "", dir.dirClass())
	f, err := v.attach(n, &opener{disk: disk, writable: true, sec: sec, home: dir})
	if err != nil {
		v.Forget(n, 1)
		return nil, nil, Attr{}, err
	}
	return n, newHandle(f, true), n.attr(st), nil
}

func (v *Volume) tempIn(dir *Node, mode uint32, c Caller) (*backing.File, backing.Stat, error) {
	v.ns.RLock()
	defer v.ns.RUnlock()
	ref, err := v.use(dir)
	if err != nil {
		return nil, backing.Stat{}, err
	}
	defer ref.release()
	disk, err := ref.TempFile(v.modeIn(dir, ref.Dir, mode&0o7777, c))
	if err != nil {
		return nil, backing.Stat{}, err
	}
	if v.isRoot {
		if err = disk.Chown(int(c.Uid), int(c.Gid)); err != nil {
			_ = disk.Close()
			return nil, backing.Stat{}, err
		}
	}
	st, err := disk.Stat()
	if err != nil {
		_ = disk.Close()
	}
	return disk, st, err
}

// Mknod makes an empty regular file, a fifo, a socket or, as root, a device.
// rdev is in Linux dev_t encoding.
func (v *Volume) Mknod(ctx context.Context, dir *Node, name string, mode uint32, rdev uint64, c Caller) (*Node, Attr, error) {
	cipher, err := v.loadForWrite(ctx, dir)
	if err != nil {
		return nil, Attr{}, err
	}
	return v.made(dir, cipher, name, func(d *backing.Dir, entry string) error {
		m := mode&unix.S_IFMT | v.modeIn(dir, d, mode&0o7777, c)
		if err := d.Mknod(entry, m, rdev); err != nil {
			return err
		}
		err := v.own(d, entry, m, c)
		if err != nil {
			_ = d.Unlink(entry)
		}
		return err
	})
}

// Mkdir makes a directory. It is built under a temporary name and has its
// record before it has its own.
func (v *Volume) Mkdir(ctx context.Context, dir *Node, name string, mode uint32, c Caller) (*Node, Attr, error) {
	cipher, err := v.loadForWrite(ctx, dir)
	if err != nil {
		return nil, Attr{}, err
	}
	v.ns.RLock()
	cl := v.classes[v.policy.ClassOf(v.childPath(dir, name))]
	v.ns.RUnlock()
	own, err := v.names(ctx, cl)
	if err != nil {
		return nil, Attr{}, err
	}
	rec, err := newDirRecord(own, cl.name)
	if err != nil {
		return nil, Attr{}, err
	}
	n, a, err := v.made(dir, cipher, name, func(d *backing.Dir, entry string) error {
		tmp := backing.TempName()
		if err := v.buildDir(dir, d, tmp, rec.Encode(), mode, c); err != nil {
			removeDir(d, tmp)
			return err
		}
		err := d.Rename(tmp, d, entry, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) { // a file system without flags
			err = d.Rename(tmp, d, entry, 0)
		}
		if err != nil {
			removeDir(d, tmp)
		}
		return err
	})
	if err != nil {
		return nil, Attr{}, err
	}
	v.ns.RLock()
	defer v.ns.RUnlock()
	v.settleDir(n, nameenc.DirID(rec.ID), cl, true)
	return n, a, nil
}

// buildDir makes a directory with its record. Owner and mode come last: they
// may be such that we could not write into it any more.
func (v *Volume) buildDir(parent *Node, d *backing.Dir, tmp string, rec []byte, mode uint32, c Caller) error {
	// The record is not synced: after a crash somebody must look for it.
	if _, err := v.journal.Epoch(); err != nil {
		return err
	}
	m := v.modeIn(parent, d, mode&0o7777, c)
	if err := d.Mkdir(tmp, m|0o700); err != nil {
		return err
	}
	sub, err := d.OpenDir(tmp)
	if err != nil {
		return err
	}
	defer func() { _ = sub.Close() }()
	if err := sub.WriteNew(dirFile, rec, 0o600, false); err != nil {
		return err
	}
	if err := setDirAttr(sub, rec); err != nil {
		return err
	}
	if m&0o700 != 0o700 {
		st, err := sub.Stat("")
		if err != nil {
			return err
		}
		if err := d.Chmod(tmp, st.Mode&(0o7077)|m&0o700); err != nil {
			return err
		}
	}
	return v.own(d, tmp, unix.S_IFDIR, c)
}

// removeDir removes a directory of which nobody has seen more than a temporary
// name: its own files, then itself. One with anything else in it stays.
func removeDir(d *backing.Dir, name string) {
	if sub, err := d.OpenDir(name); err == nil {
		_ = lifted(sub, func() (err error) {
			eerr := sub.Each(func(e backing.Entry) bool {
				if isInternal(e.Name) {
					err = sub.Unlink(e.Name)
				}
				return err == nil
			})
			return errors.Join(eerr, err)
		})
		_ = sub.Close()
	}
	_ = d.Rmdir(name) // what cannot be removed is fsck's
}

// Link gives a node another name, in a directory of the same class. It adds a
// reference.
func (v *Volume) Link(ctx context.Context, n *Node, dir *Node, name string) (Attr, error) {
	cipher, err := v.loadForWrite(ctx, dir)
	if err != nil {
		return Attr{}, err
	}
	n.mu.Lock()
	cl := n.class
	n.mu.Unlock()
	if cl != dir.dirClass() {
		return Attr{}, fmt.Errorf("link: %w", ErrCrossClass)
	}
	got, a, err := v.made(dir, cipher, name, func(d *backing.Dir, entry string) error {
		if l, _ := n.where(); l.parent != dir && v.isFresh(dir) {
			if err := v.syncRecords(dir); err != nil { // the new name must not be lost with the record
				return err
			}
		}
		return v.linkInto(n, d, entry)
	})
	if err != nil {
		return Attr{}, err
	}
	if got != n {
		v.Forget(got, 1)
		return Attr{}, unix.ESTALE
	}
	return a, nil
}

// linkInto makes entry in d a name of n, its sidecar first.
func (v *Volume) linkInto(n *Node, d *backing.Dir, entry string) error {
	l, named := n.where()
	if !named {
		f := n.openFile()
		if f == nil {
			return unix.ENOENT
		}
		if err := f.sidecarInto(d); err != nil {
			return err
		}
		return f.disk.useHeld(func(disk *backing.File) error { return disk.Link(d, entry) })
	}
	from, err := v.use(l.parent)
	if err != nil {
		return err
	}
	defer from.release()
	st, err := from.Stat(l.entry)
	if err == nil && keyOf(st) != n.key {
		err = unix.ESTALE
	}
	if err != nil {
		return err
	}
	side, err := v.sidecarOf(from.Dir, l.entry, st)
	if err == nil && side != "" {
		err = v.linkSidecar(from.Dir, d, side)
	}
	if err != nil {
		return err
	}
	return from.Link(l.entry, d, entry)
}

// sidecarInto copies the sidecar of an unnamed file, if it has one by now, to
// the directory that it is about to get a name in.
func (f *openFile) sidecarInto(d *backing.Dir) error {
	f.mu.Lock()
	id := f.secrets.header.File
	f.mu.Unlock()
	name := f.v.place.Sidecar(id[:])
	if name == "" || f.home == nil {
		return nil
	}
	home, err := f.v.use(f.home)
	if err != nil {
		return err
	}
	defer home.release()
	err = home.Link(name, d, name)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}
