package fusefs

import (
	"errors"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
)

// GetXAttr copies the value into dest. An empty dest asks for the size.
func (f *fileSystem) GetXAttr(cancel <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	n, ok := f.nodes.get(h.NodeId)
	if !ok {
		return 0, statusStale
	}
	value, err := f.volume.Getxattr(request(cancel, h), n, name)
	if (name == aclAccess || name == aclDefault) && errors.Is(err, unix.EOPNOTSUPP) {
		// The store's file system has no ACLs. The kernel asks before every
		// permission check and would fail the check with this errno.
		return 0, fuse.ENODATA
	}
	if err != nil {
		return 0, f.status("getxattr", h, err)
	}
	return answer(dest, value)
}

// answer copies a value of variable length: its size is told in any case.
func answer(dest, value []byte) (uint32, fuse.Status) {
	size := uint32(len(value))
	if len(dest) == 0 {
		return size, fuse.OK
	}
	if len(dest) < len(value) {
		return size, statusRange
	}
	copy(dest, value)
	return size, fuse.OK
}

// ListXAttr copies the names, each ended by NUL, into dest.
func (f *fileSystem) ListXAttr(cancel <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	n, ok := f.nodes.get(h.NodeId)
	if !ok {
		return 0, statusStale
	}
	names, err := f.volume.Listxattr(request(cancel, h), n)
	if err != nil {
		return 0, f.status("listxattr", h, err)
	}
	var list []byte
	for _, name := range names {
		list = append(append(list, name...), 0)
	}
	return answer(dest, list)
}

func (f *fileSystem) SetXAttr(cancel <-chan struct{}, in *fuse.SetXAttrIn, name string, data []byte) fuse.Status {
	n, ok := f.nodes.get(in.NodeId)
	if !ok {
		return statusStale
	}
	ctx := request(cancel, &in.InHeader)
	err := f.volume.Setxattr(ctx, n, name, data, int(in.Flags), caller(&in.InHeader, 0))
	if err == nil && name == aclAccess && in.SetXAttrFlags&fuse.SETXATTR_ACL_KILL_SGID != 0 {
		// The caller is not in the file's group. A local file system would
		// clear setgid in setting the ACL's mode bits; the store's one does
		// not, because there the daemon is the caller.
		err = f.clearSetgid(cancel, &in.InHeader, n)
	}
	return f.status("setxattr", &in.InHeader, err)
}

func (f *fileSystem) clearSetgid(cancel <-chan struct{}, h *fuse.InHeader, n *cryptfs.Node) error {
	a, err := f.volume.Getattr(n)
	if err != nil || a.Mode&unix.S_ISGID == 0 {
		return err
	}
	mode := a.Mode & 0o7777 &^ unix.S_ISGID
	_, err = f.volume.Setattr(request(cancel, h), n, cryptfs.SetAttr{Mode: &mode})
	return err
}

func (f *fileSystem) RemoveXAttr(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	n, ok := f.nodes.get(h.NodeId)
	if !ok {
		return statusStale
	}
	return f.status("removexattr", h, f.volume.Removexattr(request(cancel, h), n, name))
}
