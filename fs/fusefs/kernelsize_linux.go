package fusefs

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// kernelView asks the kernel how long it takes a file to be. With the writeback
// cache only the kernel knows the end of a file that somebody writes, and
// lseek(2) with SEEK_DATA and SEEK_HOLE comes here without what the kernel has
// in memory (fs/fuse/file.c, fuse_lseek).
//
// No call sends a request to the mount itself, which nothing here may do (see
// Mount): the file is found in the kernel's table of inodes by its handle, and
// statx answers from memory.
type kernelView struct {
	mountpoint string
	dev        uint64
}

// fileidIno64Gen is FILEID_INO64_GEN of the kernel's include/linux/exportfs.h: a
// FUSE file handle is the node's number and its generation (fs/fuse/inode.c,
// fuse_encode_fh).
const fileidIno64Gen = 0x81

// newKernelView is called when the mount is there.
func newKernelView(mountpoint string) (*kernelView, error) {
	st, err := statxCached(unix.AT_FDCWD, mountpoint, 0)
	if err != nil {
		return nil, err
	}
	return &kernelView{mountpoint, unix.Mkdev(st.Dev_major, st.Dev_minor)}, nil
}

// size returns the size of a regular file that the kernel knows, in bytes. It
// takes CAP_DAC_READ_SEARCH, and fails with EPERM without.
func (k *kernelView) size(nodeid uint64, generation uint32) (int64, error) {
	if k == nil {
		return 0, unix.ESTALE
	}
	root, err := unix.Open(k.mountpoint, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(root) }()
	if st, err := statxCached(root, "", unix.AT_EMPTY_PATH); err != nil || unix.Mkdev(st.Dev_major, st.Dev_minor) != k.dev {
		return 0, fmt.Errorf("%s is not this mount any more: %w", k.mountpoint, unix.ESTALE)
	}
	var id [12]byte
	binary.NativeEndian.PutUint32(id[0:], uint32(nodeid>>32))
	binary.NativeEndian.PutUint32(id[4:], uint32(nodeid))
	binary.NativeEndian.PutUint32(id[8:], generation)
	fd, err := unix.OpenByHandleAt(root, unix.NewFileHandle(fileidIno64Gen, id[:]), unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(fd) }()
	st, err := statxCached(fd, "", unix.AT_EMPTY_PATH)
	return int64(st.Size), err
}

// statxCached is statx(2) that sends no request.
func statxCached(fd int, path string, flags int) (st unix.Statx_t, err error) {
	err = unix.Statx(fd, path, flags|unix.AT_STATX_DONT_SYNC, unix.STATX_SIZE|unix.STATX_TYPE, &st)
	return st, err
}
