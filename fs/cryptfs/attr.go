package cryptfs

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// Time is a file time.
type Time struct {
	Sec  int64
	Nsec uint32
}

// Time returns t in the standard library's form.
func (t Time) Time() time.Time { return time.Unix(t.Sec, int64(t.Nsec)) }

// Attr is what stat(2) tells about a plaintext file. Size is the plaintext
// size, Blocks the space that the store takes, in 512-byte units; Mode holds
// type and permissions; Rdev is in Linux dev_t encoding.
type Attr struct {
	Ino                        uint64
	Size, Blocks               int64
	Mode, Nlink, Uid, Gid      uint32
	Rdev                       uint64
	Blksize                    uint32
	Atime, Mtime, Ctime, Btime Time
}

// SetAttr says what to change; nil and false leave things alone.
type SetAttr struct {
	Mode, Uid, Gid     *uint32
	Size               *int64
	Atime, Mtime       *Time
	AtimeNow, MtimeNow bool
	KillPriv           bool // clear setuid, and setgid where group-executable
}

func newTime(t unix.StatxTimestamp) Time { return Time{t.Sec, t.Nsec} }

// attr translates what the store says of a node. The plaintext size follows
// from the store file's size alone; for an open file memory knows better.
func (n *Node) attr(st backing.Stat) Attr {
	a := Attr{
		Ino: st.Ino, Size: st.Size, Blocks: st.Blocks, Mode: st.Mode, Nlink: st.Nlink, Uid: st.Uid, Gid: st.Gid,
		Rdev: st.Rdev, Blksize: st.Blksize,
		Atime: newTime(st.Atime), Mtime: newTime(st.Mtime), Ctime: newTime(st.Ctime), Btime: newTime(st.Btime),
	}
	n.mu.Lock()
	cl, f := n.class, n.file
	n.mu.Unlock()
	switch {
	case n.typ == unix.S_IFREG && f != nil:
		a.Size = f.cf.Size()
		if ts, ok := f.cf.Dirty(); ok {
			a.Mtime = Time{ts.Sec, uint32(ts.Nsec)}
			if a.Ctime.Time().Before(a.Mtime.Time()) {
				a.Ctime = a.Mtime
			}
		}
	case n.typ == unix.S_IFREG && cl != nil:
		size, _ := cl.geo.PlainSize(dare.CipherOff(st.Size)) // stat answers even for an impossible size
		a.Size = int64(size)
	case n.typ == unix.S_IFLNK && cl != nil && !cl.plain:
		if size, ok := nameenc.TargetLen(int(st.Size)); ok {
			a.Size = int64(size)
		}
	}
	return a
}

// stat asks the store about a node where it is now, or about its open file.
func (v *Volume) stat(n *Node) (backing.Stat, error) {
	v.ns.RLock()
	defer v.ns.RUnlock()
	if n.dir != nil {
		if r := v.dirs.get(n); r != nil {
			defer r.release()
			return r.Stat("")
		}
	}
	l, ok := n.where()
	if !ok {
		return n.statOpen()
	}
	dir, err := v.use(l.parent)
	if err != nil {
		return backing.Stat{}, err
	}
	defer dir.release()
	st, err := lstat(dir.Dir, l.entry)
	if err == nil && keyOf(st) != n.key {
		err = unix.ESTALE
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) {
		if st, oerr := n.statOpen(); oerr == nil {
			return st, nil
		}
	}
	return st, err
}

func (n *Node) statOpen() (backing.Stat, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.file != nil:
		var st backing.Stat
		err := n.file.disk.useHeld(func(d *backing.File) (err error) { st, err = d.Stat(); return err })
		return st, err
	case n.ghost != nil:
		return n.ghost.path.Stat()
	}
	return backing.Stat{}, unix.ESTALE
}

// Getattr tells about a node. It reads no header and calls no key service.
func (v *Volume) Getattr(n *Node) (Attr, error) {
	st, err := v.stat(n)
	if err != nil {
		return Attr{}, err
	}
	return n.attr(st), nil
}

// Setattr changes attributes and returns all of them.
func (v *Volume) Setattr(ctx context.Context, n *Node, s SetAttr) (Attr, error) {
	if err := v.mayChange(); err != nil {
		return Attr{}, err
	}
	if s.Size != nil {
		if err := v.truncate(ctx, n, *s.Size); err != nil {
			return Attr{}, v.note(n, err)
		}
	}
	times := s.Atime != nil || s.Mtime != nil || s.AtimeNow || s.MtimeNow
	if f := n.openFile(); f != nil && times {
		// What is in memory goes out first, or it would change mtime again.
		if err := f.cf.Flush(); err != nil {
			return Attr{}, err
		}
	}
	if err := v.change(n, s, times); err != nil {
		return Attr{}, err
	}
	return v.Getattr(n)
}

// changer is where attributes are changed: a name in a directory, or an open file.
type changer interface {
	chmod(mode uint32) error
	chown(uid, gid int) error
	times(atime, mtime unix.Timespec) error
	stat() (backing.Stat, error)
}

type entryChanger struct {
	dir   *backing.Dir
	entry string
}

func (c entryChanger) chmod(mode uint32) error  { return c.dir.Chmod(c.entry, mode) }
func (c entryChanger) chown(uid, gid int) error { return c.dir.Chown(c.entry, uid, gid) }
func (c entryChanger) times(a, m unix.Timespec) error {
	return c.dir.SetTimes(c.entry, a, m)
}
func (c entryChanger) stat() (backing.Stat, error) { return c.dir.Stat(c.entry) }

type fileChanger struct{ f *backing.File }

func (c fileChanger) chmod(mode uint32) error        { return c.f.Chmod(mode) }
func (c fileChanger) chown(uid, gid int) error       { return c.f.Chown(uid, gid) }
func (c fileChanger) times(a, m unix.Timespec) error { return c.f.SetTimes(a, m) }
func (c fileChanger) stat() (backing.Stat, error)    { return c.f.Stat() }

func (v *Volume) change(n *Node, s SetAttr, times bool) error {
	v.ns.RLock()
	defer v.ns.RUnlock()
	open := n.openFile()
	var c changer
	if l, ok := n.where(); ok || n == v.nodes.root {
		entry := l.entry
		if n == v.nodes.root {
			l.parent, entry = n, "."
		}
		dir, err := v.use(l.parent)
		if err != nil {
			return err
		}
		defer dir.release()
		c = entryChanger{dir.Dir, entry}
	} else {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.file == nil {
			return unix.ESTALE
		}
		fd := n.file.disk.held()
		if fd == nil {
			return unix.ESTALE
		}
		defer n.file.disk.put(fd)
		c = fileChanger{fd.File}
	}
	v.touched(n.key)
	if err := applyAttrs(c, s, times); err != nil {
		return err
	}
	if open != nil && s.Mode != nil {
		open.suid.Store(*s.Mode&(unix.S_ISUID|unix.S_ISGID) != 0)
	}
	return nil
}

func applyAttrs(c changer, s SetAttr, times bool) error {
	if s.Uid != nil || s.Gid != nil {
		uid, gid := -1, -1
		if s.Uid != nil {
			uid = int(*s.Uid)
		}
		if s.Gid != nil {
			gid = int(*s.Gid)
		}
		if err := c.chown(uid, gid); err != nil {
			return err
		}
	}
	if s.Mode != nil {
		if err := c.chmod(*s.Mode & 0o7777); err != nil {
			return err
		}
	}
	if s.KillPriv && s.Mode == nil {
		if err := killPriv(c); err != nil {
			return err
		}
	}
	if !times {
		return nil
	}
	return c.times(timespec(s.Atime, s.AtimeNow), timespec(s.Mtime, s.MtimeNow))
}

// killPriv clears what a write or a change of owner by somebody without
// CAP_FSETID clears: setuid, and setgid of a group-executable file.
func killPriv(c changer) error {
	st, err := c.stat()
	if err != nil || st.Type() != unix.S_IFREG {
		return err
	}
	mode := st.Mode & 0o7777
	clean := mode &^ unix.S_ISUID
	if mode&unix.S_IXGRP != 0 {
		clean &^= unix.S_ISGID
	}
	if clean == mode {
		return nil
	}
	return c.chmod(clean)
}

func timespec(t *Time, now bool) unix.Timespec {
	switch {
	case now:
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	case t != nil:
		return unix.Timespec{Sec: t.Sec, Nsec: int64(t.Nsec)}
	default:
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	}
}

// truncate sets a file's size. Cutting it to nothing needs no key; anything
// else opens the file.
func (v *Volume) truncate(ctx context.Context, n *Node, size int64) error {
	if n.typ != unix.S_IFREG {
		return unix.EINVAL
	}
	h, err := v.open(ctx, n, openMode{write: size != 0, cut: size == 0})
	if err != nil {
		return err
	}
	defer h.Release()
	if size == 0 {
		return nil
	}
	return h.Truncate(size)
}
