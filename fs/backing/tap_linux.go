package backing

import "golang.org/x/sys/unix"

// Tap is called in place of every operation on a store: it may record it, fail
// it, or do only a part of it. Tests put power cuts and failing disks there; a
// mount has none. Do is called from many goroutines at once.
type Tap interface {
	// Do does the operation by calling do, or does not; the caller gets its
	// error. op is valid during the call.
	Do(op *Op, do func() error) error
}

// Op is one operation, with what its system call gets; fields that it does not
// use are zero.
type Op struct {
	Call      string // open, read, write, truncate, fallocate, fsync, fdatasync, syncfs, stat, readdir, mkdir, mknod, symlink, unlink, rmdir, rename, link, readlink, chmod, chown, utimens, getxattr, setxattr, removexattr, listxattr, flock
	Fd        int    // the open file, or the directory that Name is in
	Name      string // "": Fd itself
	ToFd      int    // rename, link: the directory that NewName is in
	NewName   string
	Off, Size int64  // bytes; Size of mknod: the device
	Data      []byte // of write, setxattr, symlink
	Flags     uint32 // of open, rename, setxattr; mode of fallocate
	Attr      string // name of the extended attribute
	Mode      uint32
	Uid, Gid  int
	Times     [2]unix.Timespec // atime, mtime
}

func (d *Dir) do(op *Op, f func() error) error {
	if d.tap == nil {
		return f()
	}
	op.Fd = d.fd
	return d.tap.Do(op, f)
}

// fdDo makes a descriptor.
func (d *Dir) fdDo(op *Op, f func() (int, error)) (int, error) {
	if d.tap == nil {
		return retryFd(f)
	}
	op.Fd = d.fd
	return tapped(d.tap, op, func() (int, error) { return retryFd(f) })
}

// do retries f when a signal interrupts it.
func (f *File) do(op *Op, g func() error) error {
	if f.tap == nil {
		return retry(g)
	}
	op.Fd = f.fd
	return f.tap.Do(op, func() error { return retry(g) })
}

func tapped[T any](t Tap, op *Op, f func() (T, error)) (v T, err error) {
	err = t.Do(op, func() (err error) {
		v, err = f()
		return err
	})
	return v, err
}
