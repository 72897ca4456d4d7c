package fusefs

import (
	"context"
	"log/slog"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

var _ fuse.RawFileSystem = (*fileSystem)(nil)

// cacheSeconds is how long the kernel may trust a name, the absence of a name,
// and attributes. Nobody but this mount changes the store, and the kernel
// drops what its own calls change, so an hour could as well be for ever; it
// bounds what a mistake can do.
const cacheSeconds = 3600

// fileSystem answers the kernel's requests. All methods are safe for
// concurrent use; go-fuse calls each in a goroutine of its own.
type fileSystem struct {
	volume *cryptfs.Volume
	log    *slog.Logger
	failed func(Failure) // may be nil
	kernel *kernelView
	nodes  *nodeTable[*cryptfs.Node]
	files  *handleTable[*cryptfs.Handle]
	dirs   *handleTable[*dirStream]
	writes *arrivals
	pruner *pruner
}

func newFileSystem(v *cryptfs.Volume, log *slog.Logger) *fileSystem {
	f := &fileSystem{
		volume: v,
		log:    log,
		nodes:  newNodeTable[*cryptfs.Node](),
		files:  newHandleTable[*cryptfs.Handle](),
		dirs:   newHandleTable[*dirStream](),
		writes: newArrivals(),
	}
	f.pruner = &pruner{count: f.nodes.count, sample: f.nodes.sample, max: maxKnown, wake: make(chan struct{}, 1), log: log}
	// The kernel knows the root from the start and never forgets it.
	f.nodes.add(fuse.FUSE_ROOT_ID, v.Root())
	return f
}

func (f *fileSystem) String() string { return "kmsfs" }

// SetDebug does nothing: a trace of requests would have plaintext names in it.
func (f *fileSystem) SetDebug(bool) {}

// Init does nothing: Mount has everything ready before the first request.
func (f *fileSystem) Init(*fuse.Server) {}

// OnUnmount runs after the last request, also when the kernel went away
// without a word (abort, umount -f, umount -l and the last user gone). It
// gives back what the kernel did not.
func (f *fileSystem) OnUnmount() {
	f.files.drain(func(h *cryptfs.Handle) {
		f.status("flush at unmount", &fuse.InHeader{}, h.Flush())
		h.Release()
	})
	f.dirs.drain(func(d *dirStream) { d.handle.Close() })
	f.nodes.forget(fuse.FUSE_ROOT_ID, 1) // the volume's own
	f.nodes.drain(f.volume.Forget)
}

// Forget gives back n of the kernel's references on a node.
func (f *fileSystem) Forget(nodeid, n uint64) {
	if nodeid == fuse.FUSE_ROOT_ID {
		return
	}
	if node, refs := f.nodes.forget(nodeid, n); refs > 0 {
		f.volume.Forget(node, refs)
	}
}

// request is the context of one request: it is done when the caller was
// interrupted. It must not be used after the reply, when go-fuse gives the
// channel to another request.
func request(cancel <-chan struct{}, h *fuse.InHeader) context.Context {
	return &fuse.Context{Caller: h.Caller, Cancel: cancel}
}

func caller(h *fuse.InHeader, umask uint32) cryptfs.Caller {
	return cryptfs.Caller{Uid: h.Uid, Gid: h.Gid, Umask: umask}
}

// enter hands the reference on n to the kernel and fills its entry.
func (f *fileSystem) enter(n *cryptfs.Node, a *cryptfs.Attr, out *fuse.EntryOut) {
	if old, refs := f.nodes.add(n.ID(), n); refs > 0 {
		f.volume.Forget(old, refs)
	}
	f.pruner.crowded(f.nodes.crowd(n.ID()))
	out.NodeId, out.Generation = n.ID(), uint64(n.Generation())
	out.EntryValid = cacheSeconds
	out.AttrValid = cacheSeconds
	fillAttr(a, &out.Attr)
}

// StatFs reports the numbers of the store's file system.
func (f *fileSystem) StatFs(_ <-chan struct{}, in *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	s, err := f.volume.Statfs()
	if err != nil {
		return f.status("statfs", in, err)
	}
	out.Blocks, out.Bfree, out.Bavail = s.Blocks, s.Bfree, s.Bavail
	out.Files, out.Ffree = s.Files, s.Ffree
	out.Bsize, out.Frsize = uint32(s.Bsize), uint32(s.Frsize)
	out.NameLen = uint32(s.Namelen)
	return fuse.OK
}

// Access is not asked with default_permissions: the kernel checks modes and
// ACLs itself.
func (f *fileSystem) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.OK }

// Ioctl answers what a file system without ioctls does; lsattr and the like
// understand it.
func (f *fileSystem) Ioctl(<-chan struct{}, *fuse.IoctlIn, []byte, *fuse.IoctlOut, []byte) fuse.Status {
	return statusNoTTY
}

// GetLk, SetLk and SetLkw are not asked: locks stay in the kernel.
func (f *fileSystem) GetLk(<-chan struct{}, *fuse.LkIn, *fuse.LkOut) fuse.Status {
	return statusUnsupported
}

func (f *fileSystem) SetLk(<-chan struct{}, *fuse.LkIn) fuse.Status { return statusUnsupported }

func (f *fileSystem) SetLkw(<-chan struct{}, *fuse.LkIn) fuse.Status { return statusUnsupported }

// CopyFileRange makes the kernel copy through its page cache, as
// fs/fuse/file.c does on EOPNOTSUPP: the two files have different keys, so
// there is nothing to share below.
func (f *fileSystem) CopyFileRange(<-chan struct{}, *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	return 0, statusUnsupported
}

// openFlags are the flags of open(2) that mean something below the kernel.
// O_APPEND is an offset by now, O_SYNC comes as fsync, O_DIRECT is the kernel's.
func openFlags(flags uint32) int {
	return int(flags) & (unix.O_ACCMODE | unix.O_TRUNC | unix.O_EXCL)
}
