package fusefs

import (
	"context"
	"errors"
	"sync"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// dirStream is one open directory. The offset of an entry is its place in the
// handle's snapshot plus one, so seekdir(3) costs nothing and offsets hold for
// the handle's life; reading from offset 0 again (rewinddir) takes a new one.
type dirStream struct {
	node   *cryptfs.Node
	handle *cryptfs.DirHandle

	mu   sync.Mutex // the kernel serialises readers of one descriptor, pread-like ones apart
	used bool       // the snapshot has been read from
}

// entries returns the snapshot to read from at offset.
func (d *dirStream) entries(ctx context.Context, offset uint64) ([]cryptfs.DirEntry, error) {
	if offset == 0 && d.used {
		if err := d.handle.Rewind(ctx); err != nil {
			return nil, err
		}
	}
	d.used = true
	all := d.handle.Entries()
	return all[min(offset, uint64(len(all))):], nil
}

func (f *fileSystem) OpenDir(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n, ok := f.nodes.get(in.NodeId)
	if !ok {
		return statusStale
	}
	h, err := f.volume.OpenDir(request(cancel, &in.InHeader), n)
	if err != nil {
		return f.status("opendir", &in.InHeader, err)
	}
	out.Fh = f.dirs.add(&dirStream{node: n, handle: h})
	return fuse.OK
}

func (f *fileSystem) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	d, ok := f.dirs.get(in.Fh)
	if !ok {
		return statusBadHandle
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	rest, err := d.entries(request(cancel, &in.InHeader), in.Offset)
	if err != nil {
		return f.status("readdir", &in.InHeader, err)
	}
	for i := range rest {
		if !out.AddDirEntry(entry(&rest[i], in.Offset+uint64(i)+1)) {
			break
		}
	}
	return fuse.OK
}

func entry(e *cryptfs.DirEntry, next uint64) fuse.DirEntry {
	return fuse.DirEntry{Name: e.Name, Ino: e.Ino, Mode: e.Mode, Off: next}
}

// ReadDirPlus is ReadDir and a Lookup for every entry. The kernel takes the
// references of exactly those entries that are in the reply, so nothing is
// looked up before it is known to fit.
func (f *fileSystem) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	d, ok := f.dirs.get(in.Fh)
	if !ok {
		return statusBadHandle
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	ctx := request(cancel, &in.InHeader)
	rest, err := d.entries(ctx, in.Offset)
	if err != nil {
		return f.status("readdirplus", &in.InHeader, err)
	}
	room := int(in.Size)
	for i := range rest {
		e := &rest[i]
		need := plusSize(e.Name)
		if need > room {
			break
		}
		if f.addPlus(ctx, in, d.node, e, in.Offset+uint64(i)+1, out) {
			room -= need
		}
	}
	return fuse.OK
}

// addPlus adds one entry, and reports false for one that vanished since the
// snapshot. The caller has seen that it fits.
func (f *fileSystem) addPlus(ctx context.Context, in *fuse.ReadIn, dir *cryptfs.Node, e *cryptfs.DirEntry, next uint64, out *fuse.DirEntryList) bool {
	if e.Name == "." || e.Name == ".." {
		out.AddDirLookupEntry(entry(e, next)) // node 0: the kernel has these already
		return true
	}
	n, a, err := f.volume.LookupEntry(ctx, dir, *e)
	if errors.Is(err, unix.ENOENT) {
		return false
	}
	to := out.AddDirLookupEntry(entry(e, next))
	if err != nil {
		// The name is there, its node is not to be had. It stays in the
		// listing without one, and the caller's own lookup gets the error.
		f.status("readdirplus", &in.InHeader, err)
		return true
	}
	f.enter(n, &a, to)
	return true
}

// direntHeader is sizeof(struct fuse_dirent) without the name.
const direntHeader = 24

// plusSize is the room that an entry takes in a READDIRPLUS reply
// (FUSE_DIRENTPLUS_SIZE in the kernel's header).
func plusSize(name string) int {
	return int(unsafe.Sizeof(fuse.EntryOut{})) + (direntHeader+len(name)+7)&^7
}

func (f *fileSystem) ReleaseDir(in *fuse.ReleaseIn) {
	if d, ok := f.dirs.remove(in.Fh); ok {
		d.handle.Close()
	}
}

func (f *fileSystem) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	n, ok := f.nodes.get(in.NodeId)
	if !ok {
		return statusStale
	}
	return f.status("fsyncdir", &in.InHeader, f.volume.FsyncDir(n))
}
