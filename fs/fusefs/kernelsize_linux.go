package fusefs

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// kernelView asks the kernel how long it takes a file to be. With the writeback
// cache only the kernel knows the end of a file that somebody writes, and
// lseek(2) with SEEK_DATA and SEEK_HOLE comes here without what the kernel has
// in memory (fs/fuse/file.c, fuse_lseek).
//
// No call sends a request to the mount itself, which nothing here may do (see
// Mount): who asks has the file open, and statx answers from memory.
type kernelView struct{ dev uint64 }

// newKernelView is called when the mount is there.
func newKernelView(mountpoint string) (*kernelView, error) {
	st, err := statxCached(mountpoint)
	if err != nil {
		return nil, err
	}
	return &kernelView{unix.Mkdev(st.Dev_major, st.Dev_minor)}, nil
}

// size returns the size in bytes of the file of inode number ino, which thread
// pid has open. It fails for a thread whose files this process may not see.
func (k *kernelView) size(pid uint32, ino uint64) (int64, error) {
	if k == nil {
		return 0, unix.ESTALE
	}
	proc := fmt.Sprintf("/proc/%d/", pid)
	dir, err := os.Open(proc + "fdinfo")
	if err != nil {
		return 0, err
	}
	defer func() { _ = dir.Close() }()
	for {
		names, err := dir.Readdirnames(256)
		if err != nil {
			return 0, unix.ENOENT // no more, or no more to be had
		}
		for _, fd := range names {
			info, err := os.ReadFile(proc + "fdinfo/" + fd)
			if err != nil || inoOf(string(info)) != ino {
				continue
			}
			st, err := statxCached(proc + "fd/" + fd)
			if err == nil && unix.Mkdev(st.Dev_major, st.Dev_minor) == k.dev && st.Ino == ino {
				return int64(st.Size), nil
			}
		}
	}
}

// inoOf returns the inode number that a file of proc_pid_fdinfo(5) has, since
// Linux 5.14.
func inoOf(info string) uint64 {
	_, rest, _ := strings.Cut(info, "\nino:\t")
	line, _, _ := strings.Cut(rest, "\n")
	ino, _ := strconv.ParseUint(line, 10, 64)
	return ino
}

// statxCached is statx(2) that sends no request.
func statxCached(path string) (st unix.Statx_t, err error) {
	err = unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_SIZE|unix.STATX_INO, &st)
	return st, err
}
