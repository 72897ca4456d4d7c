package backing

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"
)

// File is an open file of the store.
type File struct {
	fd  int
	tap Tap // nil: none
}

// Close releases the descriptor and any lock on it.
func (f *File) Close() error { return unix.Close(f.fd) }

// ReadAt fills p from offset off. n < len(p) only at the end of the file, and
// then with a nil error.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if f.tap == nil {
		return f.readAt(p, off)
	}
	return tapped(f.tap, &Op{Call: "read", Fd: f.fd, Off: off, Size: int64(len(p))}, func() (int, error) { return f.readAt(p, off) })
}

func (f *File) readAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		m, err := unix.Pread(f.fd, p[n:], off+int64(n))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return n, err
		}
		if m == 0 {
			break
		}
		n += m
	}
	return n, nil
}

// WriteAt writes all of p at offset off, or fails; on failure an unknown part
// is written.
func (f *File) WriteAt(p []byte, off int64) error {
	if f.tap == nil {
		return f.writeAt(p, off)
	}
	return f.tap.Do(&Op{Call: "write", Fd: f.fd, Off: off, Size: int64(len(p)), Data: p}, func() error { return f.writeAt(p, off) })
}

func (f *File) writeAt(p []byte, off int64) error {
	for len(p) > 0 {
		n, err := unix.Pwrite(f.fd, p, off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrShortWrite
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// Size returns the file's size in bytes.
func (f *File) Size() (int64, error) {
	st, err := f.Stat()
	return st.Size, err
}

// Stat tells about the file.
func (f *File) Stat() (Stat, error) {
	if f.tap == nil {
		return statAt(f.fd, "")
	}
	return tapped(f.tap, &Op{Call: "stat", Fd: f.fd}, func() (Stat, error) { return statAt(f.fd, "") })
}

// Truncate sets the size; what is added reads as zeros.
func (f *File) Truncate(size int64) error {
	return f.do(&Op{Call: "truncate", Size: size}, func() error { return unix.Ftruncate(f.fd, size) })
}

// Allocate is fallocate(2) with mode.
func (f *File) Allocate(mode uint32, off, size int64) error {
	return f.do(&Op{Call: "fallocate", Flags: mode, Off: off, Size: size},
		func() error { return unix.Fallocate(f.fd, mode, off, size) })
}

// Punch makes [off, off+size) read as zeros, without changing the size.
func (f *File) Punch(off, size int64) error {
	err := f.Allocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, size)
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	return f.zeroFill(off, size) // a file system without holes
}

// zeroFill writes zeros over what there is of [off, off+size).
func (f *File) zeroFill(off, size int64) error {
	all, err := f.Size()
	if err != nil {
		return err
	}
	size = min(size, all-off)
	zeros := make([]byte, max(0, min(size, 1<<20)))
	for size > 0 {
		n := min(size, int64(len(zeros)))
		if err := f.WriteAt(zeros[:n], off); err != nil {
			return err
		}
		off, size = off+n, size-n
	}
	return nil
}

// SeekData returns the offset of the first data at or after off; ok is false
// if there is none up to the end of the file.
func (f *File) SeekData(off int64) (data int64, ok bool, err error) {
	n, err := unix.Seek(f.fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return 0, false, nil
	case errors.Is(err, unix.EINVAL): // no SEEK_DATA here: all is data
		size, err := f.Size()
		return off, err == nil && off < size, err
	}
	return n, err == nil, err
}

// SeekHole returns the offset of the first hole at or after off, at the latest
// the end of the file. off is less than the size; ENXIO otherwise.
func (f *File) SeekHole(off int64) (int64, error) {
	n, err := unix.Seek(f.fd, off, unix.SEEK_HOLE)
	if errors.Is(err, unix.EINVAL) { // no SEEK_HOLE here: there is none
		return f.Size()
	}
	return n, err
}

// Sync is fsync(2).
func (f *File) Sync() error {
	return f.do(&Op{Call: "fsync"}, func() error { return unix.Fsync(f.fd) })
}

// Datasync is fdatasync(2).
func (f *File) Datasync() error {
	return f.do(&Op{Call: "fdatasync"}, func() error { return unix.Fdatasync(f.fd) })
}

// SetTimes sets atime and mtime; Nsec may be UTIME_NOW or UTIME_OMIT.
func (f *File) SetTimes(atime, mtime unix.Timespec) error {
	return f.do(&Op{Call: "utimens", Times: [2]unix.Timespec{atime, mtime}},
		func() error {
			times := []unix.Timespec{atime, mtime}
			err := unix.UtimesNanoAt(f.fd, "", times, unix.AT_EMPTY_PATH)
			if errors.Is(err, unix.EINVAL) { // before Linux 5.8: a path, which costs as much again as the rest
				err = unix.UtimesNanoAt(unix.AT_FDCWD, f.path(), times, 0)
			}
			return err
		})
}

// Reopen opens the same file once more, with other flags; also one that was
// opened with O_PATH, or has no name left.
func (f *File) Reopen(flags int) (*File, error) {
	var fd int
	err := f.do(&Op{Call: "open", Flags: uint32(flags)}, func() (err error) {
		fd, err = unix.Open(f.path(), flags|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &File{fd, f.tap}, nil
}

// Chmod and Chown act on the open file.
func (f *File) Chmod(mode uint32) error {
	return f.do(&Op{Call: "chmod", Mode: mode}, func() error { return unix.Fchmod(f.fd, mode) })
}

// Chown sets owner and group; -1 leaves one alone.
func (f *File) Chown(uid, gid int) error {
	return f.do(&Op{Call: "chown", Uid: uid, Gid: gid}, func() error { return unix.Fchown(f.fd, uid, gid) })
}

// Link gives the open file a name, also if it has none (O_TMPFILE).
func (f *File) Link(to *Dir, name string) error {
	return f.do(&Op{Call: "link", ToFd: to.fd, NewName: name},
		func() error { return unix.Linkat(unix.AT_FDCWD, f.path(), to.fd, name, unix.AT_SYMLINK_FOLLOW) })
}

func (f *File) path() string { return procPath(f.fd) }
