package backing

import "golang.org/x/sys/unix"

// Stat is what statx(2) tells about a file, as far as kmsfs uses it.
type Stat struct {
	Dev, Ino                   uint64
	Size, Blocks               int64 // bytes; 512-byte units
	Mode, Nlink, Uid, Gid      uint32
	Rdev                       uint64 // Linux dev_t
	Blksize                    uint32
	Atime, Mtime, Ctime, Btime unix.StatxTimestamp // Btime is zero where the file system has none
}

func statAt(fd int, name string) (Stat, error) {
	flags := unix.AT_SYMLINK_NOFOLLOW | unix.AT_STATX_SYNC_AS_STAT
	if name == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	var x unix.Statx_t
	err := retry(func() error {
		return unix.Statx(fd, name, flags, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &x)
	})
	if err != nil {
		return Stat{}, err
	}
	st := Stat{
		Dev: unix.Mkdev(x.Dev_major, x.Dev_minor), Ino: x.Ino,
		Size: int64(x.Size), Blocks: int64(x.Blocks),
		Mode: uint32(x.Mode), Nlink: x.Nlink, Uid: x.Uid, Gid: x.Gid,
		Rdev: unix.Mkdev(x.Rdev_major, x.Rdev_minor), Blksize: x.Blksize,
		Atime: x.Atime, Mtime: x.Mtime, Ctime: x.Ctime,
	}
	if x.Mask&unix.STATX_BTIME != 0 {
		st.Btime = x.Btime
	}
	return st, nil
}

// Type returns the file type bits of the mode.
func (s Stat) Type() uint32 { return s.Mode & unix.S_IFMT }
