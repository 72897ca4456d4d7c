package backing

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// TempPrefix begins the name of every temporary of the store.
const TempPrefix = ".kmsfs.tmp."

// Dir is an open directory.
type Dir struct {
	fd   int
	proc string // "/proc/self/fd/N/", for system calls that take only paths
	tap  Tap    // nil: none
}

func newDir(fd int, tap Tap) *Dir { return &Dir{fd, procPath(fd) + "/", tap} }

// procPath names an open file for calls that take only paths. It is a link of
// proc(5) to the file itself, not to its name.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// OpenRoot opens the directory at path, following symlinks in path.
func OpenRoot(path string) (*Dir, error) { return OpenRootTapped(path, nil) }

// OpenRootTapped is OpenRoot with a tap on everything that is done in and below
// the directory; nil: none.
func OpenRootTapped(path string, tap Tap) (*Dir, error) {
	fd, err := retryFd(func() (int, error) {
		return unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, err
	}
	return newDir(fd, tap), nil
}

// Close releases the descriptor.
func (d *Dir) Close() error { return unix.Close(d.fd) }

// OpenDir opens the directory name in d; a symlink is ENOTDIR or ELOOP. One
// that may be searched but not read is opened all the same: it can be used for
// everything but ReadDir and Sync.
func (d *Dir) OpenDir(name string) (*Dir, error) {
	const flags = unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	open := func(how int) (int, error) {
		return d.fdDo(&Op{Call: "open", Name: name, Flags: uint32(flags | how)},
			func() (int, error) { return unix.Openat(d.fd, name, flags|how, 0) })
	}
	fd, err := open(unix.O_RDONLY)
	if errors.Is(err, unix.EACCES) && name != "." {
		fd, err = open(unix.O_PATH)
	}
	if err != nil {
		return nil, err
	}
	return newDir(fd, d.tap), nil
}

// Open opens the file name in d. flags are open(2)'s; O_NOFOLLOW and O_CLOEXEC
// are added. A fifo or device is opened without waiting.
func (d *Dir) Open(name string, flags int, mode uint32) (*File, error) {
	flags |= unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK
	fd, err := d.fdDo(&Op{Call: "open", Name: name, Flags: uint32(flags), Mode: mode},
		func() (int, error) { return unix.Openat(d.fd, name, flags, mode) })
	if err != nil {
		return nil, err
	}
	return &File{fd, d.tap}, nil
}

// Stat tells about name in d, without following a symlink; name "" is d itself.
func (d *Dir) Stat(name string) (st Stat, err error) {
	if d.tap == nil {
		return statAt(d.fd, name)
	}
	return tapped(d.tap, &Op{Call: "stat", Fd: d.fd, Name: name}, func() (Stat, error) { return statAt(d.fd, name) })
}

// Mkdir, Mknod, Symlink, Unlink and Rmdir are the system calls of these names.
func (d *Dir) Mkdir(name string, mode uint32) error {
	return d.do(&Op{Call: "mkdir", Name: name, Mode: mode}, func() error { return unix.Mkdirat(d.fd, name, mode) })
}

// Mknod makes a special or an empty regular file; dev is in Linux dev_t encoding.
func (d *Dir) Mknod(name string, mode uint32, dev uint64) error {
	return d.do(&Op{Call: "mknod", Name: name, Mode: mode, Size: int64(dev)},
		func() error { return unix.Mknodat(d.fd, name, mode, int(dev)) })
}

// Symlink makes a symbolic link name with the given contents.
func (d *Dir) Symlink(target, name string) error {
	return d.do(&Op{Call: "symlink", Name: name, Data: []byte(target)},
		func() error { return unix.Symlinkat(target, d.fd, name) })
}

// Unlink removes a name that is no directory.
func (d *Dir) Unlink(name string) error {
	return d.do(&Op{Call: "unlink", Name: name}, func() error { return unix.Unlinkat(d.fd, name, 0) })
}

// Rmdir removes an empty directory.
func (d *Dir) Rmdir(name string) error {
	return d.do(&Op{Call: "rmdir", Name: name}, func() error { return unix.Unlinkat(d.fd, name, unix.AT_REMOVEDIR) })
}

// Rename is renameat2(2).
func (d *Dir) Rename(name string, to *Dir, newName string, flags uint) error {
	op := &Op{Call: "rename", Name: name, ToFd: to.fd, NewName: newName, Flags: uint32(flags)}
	return d.do(op, func() error {
		err := unix.Renameat2(d.fd, name, to.fd, newName, flags)
		if flags == 0 && (errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL)) {
			return unix.Renameat(d.fd, name, to.fd, newName)
		}
		return err
	})
}

// Link makes newName in to another name of name in d.
func (d *Dir) Link(name string, to *Dir, newName string) error {
	return d.do(&Op{Call: "link", Name: name, ToFd: to.fd, NewName: newName},
		func() error { return unix.Linkat(d.fd, name, to.fd, newName, 0) })
}

// Readlink returns a symlink's contents.
func (d *Dir) Readlink(name string) (string, error) {
	buf := make([]byte, 4096)
	var n int
	err := d.do(&Op{Call: "readlink", Name: name}, func() (err error) {
		n, err = unix.Readlinkat(d.fd, name, buf)
		return err
	})
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// Chmod sets the mode of name itself; a symlink, which has none, is ELOOP.
func (d *Dir) Chmod(name string, mode uint32) error {
	return d.do(&Op{Call: "chmod", Name: name, Mode: mode}, func() error { return d.chmod(name, mode) })
}

func (d *Dir) chmod(name string, mode uint32) error {
	// fchmodat(2) follows symlinks, and only new kernels can be told not to.
	fd, err := retryFd(func() (int, error) {
		return unix.Openat(d.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	st, err := statAt(fd, "")
	if err != nil {
		return err
	}
	if st.Type() == unix.S_IFLNK {
		return unix.ELOOP
	}
	return unix.Chmod(procPath(fd), mode)
}

// ChmodSelf sets the mode of d, also where it may not be searched.
func (d *Dir) ChmodSelf(mode uint32) error {
	return d.do(&Op{Call: "chmod", Mode: mode}, func() error { return unix.Chmod(strings.TrimSuffix(d.proc, "/"), mode) })
}

// Chown sets owner and group of name itself; -1 leaves one alone.
func (d *Dir) Chown(name string, uid, gid int) error {
	return d.do(&Op{Call: "chown", Name: name, Uid: uid, Gid: gid},
		func() error { return unix.Fchownat(d.fd, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW) })
}

// SetTimes sets atime and mtime of name itself; Nsec may be UTIME_NOW or UTIME_OMIT.
func (d *Dir) SetTimes(name string, atime, mtime unix.Timespec) error {
	return d.do(&Op{Call: "utimens", Name: name, Times: [2]unix.Timespec{atime, mtime}}, func() error {
		return unix.UtimesNanoAt(d.fd, name, []unix.Timespec{atime, mtime}, unix.AT_SYMLINK_NOFOLLOW)
	})
}

// Sync is fsync(2) of the directory.
func (d *Dir) Sync() error { return d.do(&Op{Call: "fsync"}, d.sync) }

func (d *Dir) sync() error {
	err := retry(func() error { return unix.Fsync(d.fd) })
	if !errors.Is(err, unix.EBADF) {
		return err
	}
	// It was opened when it could not be read.
	own, err := retryFd(func() (int, error) {
		return unix.Openat(d.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(own) }()
	return retry(func() error { return unix.Fsync(own) })
}

// Statfs is fstatfs(2).
func (d *Dir) Statfs() (st unix.Statfs_t, err error) {
	err = d.do(&Op{Call: "statfs"}, func() error { return retry(func() error { return unix.Fstatfs(d.fd, &st) }) })
	return st, err
}

// ReadFile returns the contents of a small file; longer than limit is ErrTooBig.
func (d *Dir) ReadFile(name string, limit int) ([]byte, error) {
	f, err := d.Open(name, unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // read only: nothing to lose
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	for { // with a byte more than there should be, to see that it is all
		buf := make([]byte, min(size, int64(limit))+1)
		n, err := f.ReadAt(buf, 0)
		switch {
		case err != nil:
			return nil, err
		case n > limit:
			return nil, ErrTooBig
		case n < len(buf):
			return buf[:n], nil
		}
		size = 2 * int64(n) // it grows
	}
}

// Replace makes name hold data, whatever it was: a temporary in d, written,
// synced, renamed over name, and d synced. A crash leaves the old or the new
// contents and at most a temporary.
func (d *Dir) Replace(name string, data []byte, mode uint32) error {
	tmp := TempName()
	if err := d.WriteNew(tmp, data, mode, true); err != nil {
		return err
	}
	if err := d.Rename(tmp, d, name, 0); err != nil {
		_ = d.Unlink(tmp) // the rename's error is the one to tell
		return err
	}
	return d.Sync()
}

// WriteNew makes a new file; it fails with EEXIST if name is there, and leaves
// nothing behind on any other failure.
func (d *Dir) WriteNew(name string, data []byte, mode uint32, sync bool) error {
	f, err := d.Open(name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, mode)
	if err != nil {
		return err
	}
	err = f.WriteAt(data, 0)
	if err == nil && sync {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		_ = d.Unlink(name)
	}
	return err
}

// TempName returns a fresh name for a temporary.
func TempName() string {
	var b [12]byte
	_, _ = rand.Read(b[:])
	return TempPrefix + hex.EncodeToString(b[:])
}

// TempFile opens a file without a name (O_TMPFILE) in d.
func (d *Dir) TempFile(mode uint32) (*File, error) {
	const flags = unix.O_TMPFILE | unix.O_RDWR | unix.O_CLOEXEC
	fd, err := d.fdDo(&Op{Call: "open", Name: ".", Flags: flags, Mode: mode},
		func() (int, error) { return unix.Openat(d.fd, ".", flags, mode) })
	if err != nil {
		return nil, err
	}
	return &File{fd, d.tap}, nil
}

// Lock takes an exclusive lock on the file name in d, making it if need be,
// without waiting. The lock goes with the returned File.
func (d *Dir) Lock(name string) (*File, error) {
	f, err := d.Open(name, unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(f.fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrLocked
		}
		return nil, err
	}
	return f, nil
}

func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func retryFd(f func() (int, error)) (int, error) {
	for {
		if fd, err := f(); !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}
