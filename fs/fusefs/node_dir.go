package fusefs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// Lookup also tells the kernel how long it may remember that a name does not
// exist: in the FUSE protocol that is success with node 0, whereas ENOENT is
// asked again every time.
func (f *fileSystem) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if name == "." || name == ".." {
		return f.lookupHandle(cancel, h, name, out)
	}
	dir, ok := f.nodes.get(h.NodeId)
	if !ok {
		return statusStale
	}
	n, a, err := f.volume.Lookup(request(cancel, h), dir, name)
	status := f.entered("lookup", h, n, &a, err, out)
	if status == fuse.ENOENT {
		out.EntryValid = cacheSeconds
		return fuse.OK
	}
	return status
}

// lookupHandle is how the kernel asks for a node by a file handle
// (open_by_handle_at(2), NFS): for "." in a node that it may have forgotten, or
// that an earlier mount told of; and for ".." in a directory that it came by so.
// No path of a user gets here with these names.
func (f *fileSystem) lookupHandle(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	n, ok := f.nodes.get(h.NodeId)
	var a cryptfs.Attr
	var err error
	switch {
	case ok && f.volume.Hold(n):
		a, err = f.volume.Getattr(n)
		if err != nil {
			f.volume.Forget(n, 1)
		}
	default:
		n, a, err = f.volume.Find(request(cancel, h), h.NodeId)
	}
	if err == nil && name == ".." {
		child := n
		n, a, err = f.volume.Parent(child)
		f.volume.Forget(child, 1)
	}
	return f.entered("lookup by handle", h, n, &a, err, out)
}

// entered ends an operation that names a node.
func (f *fileSystem) entered(op string, h *fuse.InHeader, n *cryptfs.Node, a *cryptfs.Attr, err error, out *fuse.EntryOut) fuse.Status {
	if err != nil {
		return f.status(op, h, err)
	}
	f.enter(n, a, out)
	return fuse.OK
}

func (f *fileSystem) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	dir, ok := f.nodes.get(in.NodeId)
	if !ok {
		return statusStale
	}
	n, a, err := f.volume.Mknod(request(cancel, &in.InHeader), dir, name, in.Mode, uint64(in.Rdev),
		caller(&in.InHeader, in.Umask))
	return f.entered("mknod", &in.InHeader, n, &a, err, out)
}

func (f *fileSystem) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	dir, ok := f.nodes.get(in.NodeId)
	if !ok {
		return statusStale
	}
	n, a, err := f.volume.Mkdir(request(cancel, &in.InHeader), dir, name, in.Mode, caller(&in.InHeader, in.Umask))
	return f.entered("mkdir", &in.InHeader, n, &a, err, out)
}

func (f *fileSystem) Symlink(cancel <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	dir, ok := f.nodes.get(h.NodeId)
	if !ok {
		return statusStale
	}
	n, a, err := f.volume.Symlink(request(cancel, h), dir, name, target, caller(h, 0))
	return f.entered("symlink", h, n, &a, err, out)
}

func (f *fileSystem) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	n, ok := f.nodes.get(h.NodeId)
	if !ok {
		return nil, statusStale
	}
	target, err := f.volume.Readlink(n)
	if err != nil {
		return nil, f.status("readlink", h, err)
	}
	return []byte(target), fuse.OK
}

// Link answers with the same node number as the file has under its other
// names, so that the kernel keeps one inode for all of them.
func (f *fileSystem) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	dir, ok := f.nodes.get(in.NodeId)
	n, found := f.nodes.get(in.Oldnodeid)
	if !ok || !found {
		return statusStale
	}
	a, err := f.volume.Link(request(cancel, &in.InHeader), n, dir, name)
	return f.entered("link", &in.InHeader, n, &a, err, out)
}

func (f *fileSystem) Unlink(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	dir, ok := f.nodes.get(h.NodeId)
	if !ok {
		return statusStale
	}
	return f.status("unlink", h, f.volume.Unlink(request(cancel, h), dir, name))
}

func (f *fileSystem) Rmdir(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	dir, ok := f.nodes.get(h.NodeId)
	if !ok {
		return statusStale
	}
	return f.status("rmdir", h, f.volume.Rmdir(request(cancel, h), dir, name))
}

func (f *fileSystem) Rename(cancel <-chan struct{}, in *fuse.RenameIn, name, newName string) fuse.Status {
	if in.Flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) != 0 {
		return statusInvalid
	}
	dir, ok := f.nodes.get(in.NodeId)
	newDir, found := f.nodes.get(in.Newdir)
	if !ok || !found {
		return statusStale
	}
	err := f.volume.Rename(request(cancel, &in.InHeader), dir, name, newDir, newName, in.Flags)
	return f.status("rename", &in.InHeader, err)
}
