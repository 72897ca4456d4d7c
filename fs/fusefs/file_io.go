package fusefs

import (
	"fmt"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// opened gives h to the kernel. The pages it has cached stay: they cannot be
// older than the store, which only this mount changes.
func (f *fileSystem) opened(h *cryptfs.Handle, out *fuse.OpenOut) {
	out.Fh = f.files.add(h)
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	if h.Writable() && f.volume.Tight() { // write(2) itself is to say that the disk is full
		out.OpenFlags |= fuse.FOPEN_DIRECT_IO
	}
}

func (f *fileSystem) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	dir, ok := f.nodes.get(in.NodeId)
	if !ok {
		return statusStale
	}
	n, h, a, err := f.volume.Create(request(cancel, &in.InHeader), dir, name, openFlags(in.Flags), in.Mode,
		caller(&in.InHeader, in.Umask))
	if err != nil {
		return f.status("create", &in.InHeader, err)
	}
	f.enter(n, &a, &out.EntryOut)
	f.opened(h, &out.OpenOut)
	return fuse.OK
}

// Tmpfile serves open(2) with O_TMPFILE.
func (f *fileSystem) Tmpfile(cancel <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	dir, ok := f.nodes.get(in.NodeId)
	if !ok {
		return statusStale
	}
	n, h, a, err := f.volume.Tmpfile(request(cancel, &in.InHeader), dir, openFlags(in.Flags), in.Mode,
		caller(&in.InHeader, in.Umask))
	if err != nil {
		return f.status("tmpfile", &in.InHeader, err)
	}
	f.enter(n, &a, &out.EntryOut)
	f.opened(h, &out.OpenOut)
	return fuse.OK
}

func (f *fileSystem) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n, ok := f.nodes.get(in.NodeId)
	if !ok {
		return statusStale
	}
	h, err := f.volume.Open(request(cancel, &in.InHeader), n, openFlags(in.Flags), in.Mode&fuse.OPEN_KILL_SUIDGID != 0)
	if err != nil {
		return f.status("open", &in.InHeader, err)
	}
	f.opened(h, out)
	return fuse.OK
}

// Read opens chunks straight into the reply buffer.
func (f *fileSystem) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	h, ok := f.files.get(in.Fh)
	if !ok {
		return nil, statusBadHandle
	}
	n, err := h.ReadAt(buf, int64(in.Offset))
	if err != nil {
		return nil, f.status("read", &in.InHeader, err)
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

func (f *fileSystem) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	h, ok := f.files.get(in.Fh)
	if !ok {
		return 0, statusBadHandle
	}
	cached := in.WriteFlags&fuse.WRITE_CACHE != 0
	if cached && int64(in.Offset) > h.Size() { // or what is between is a hole until it comes
		f.writes.awaitBefore(in.Unique)
	}
	f.writes.came(in.Unique)
	n, err := h.WriteAt(data, int64(in.Offset), in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0)
	if err == nil && !cached {
		err = h.WrittenNow() // the kernel tells the times of its cache's writes only
	}
	if err != nil {
		return 0, f.status("write", &in.InHeader, err)
	}
	return uint32(n), fuse.OK
}

// Writev is what go-fuse calls; from the FUSE device the data comes in one
// piece. A failure after the first piece is a short write, as in write(2).
func (f *fileSystem) Writev(cancel <-chan struct{}, in *fuse.WriteIn, data [][]byte) (uint32, fuse.Status) {
	var done uint32
	part := *in
	for _, piece := range data {
		part.Offset = in.Offset + uint64(done)
		n, status := f.Write(cancel, &part, piece)
		if !status.Ok() && done == 0 {
			return 0, status
		}
		done += n
		if !status.Ok() || int(n) < len(piece) {
			break
		}
	}
	return done, fuse.OK
}

// Lseek is asked for SEEK_DATA and SEEK_HOLE only.
func (f *fileSystem) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	h, ok := f.files.get(in.Fh)
	if !ok {
		return statusBadHandle
	}
	off, err := f.seek(h, in)
	if err != nil {
		return f.status("lseek", &in.InHeader, err)
	}
	out.Offset = uint64(off)
	return fuse.OK
}

// seek takes a file that somebody may write for data up to the end that the
// kernel knows: what it has in its cache may be anywhere in it.
func (f *fileSystem) seek(h *cryptfs.Handle, in *fuse.LseekIn) (int64, error) {
	off := int64(in.Offset)
	if !h.Writers() {
		return h.Seek(off, int(in.Whence))
	}
	size, err := f.kernel.size(in.Pid, h.Ino())
	switch {
	case err != nil: // the caller is not to be seen; programs read the file then
		return 0, fmt.Errorf("size of a file that is being written: %w: %v", unix.EOPNOTSUPP, err)
	case off < 0 || off >= size:
		return 0, unix.ENXIO
	case in.Whence == unix.SEEK_HOLE:
		return size, nil
	}
	return off, nil
}

func (f *fileSystem) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	h, ok := f.files.get(in.Fh)
	if !ok {
		return statusBadHandle
	}
	return f.status("fallocate", &in.InHeader, h.Allocate(in.Mode, int64(in.Offset), int64(in.Length)))
}

// Flush is close(2) on one descriptor. Before it the kernel has written out what
// it has of the file, which is in the store when a write is answered; close(2)
// has the errors. So there is nothing to do, and the kernel need not ask at every
// close.
func (f *fileSystem) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return statusNeverAsk }

// fsyncDataOnly is FUSE_FSYNC_FDATASYNC.
const fsyncDataOnly = 1 << 0

func (f *fileSystem) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	h, ok := f.files.get(in.Fh)
	if !ok {
		return statusBadHandle
	}
	return f.status("fsync", &in.InHeader, h.Fsync(in.FsyncFlags&fsyncDataOnly != 0))
}

// Release comes once, after the last descriptor and mapping are gone.
func (f *fileSystem) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	if h, ok := f.files.remove(in.Fh); ok {
		h.Release()
	}
}
