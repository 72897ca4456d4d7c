package fusefs

import (
	"errors"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// fillAttr translates attributes. The FUSE protocol has the lower 32 bits of
// struct stat's device number (the kernel's new_encode_dev).
func fillAttr(a *cryptfs.Attr, out *fuse.Attr) {
	out.Ino = a.Ino
	out.Size = uint64(a.Size)
	out.Blocks = uint64(a.Blocks)
	out.Atime, out.Atimensec = uint64(a.Atime.Sec), a.Atime.Nsec
	out.Mtime, out.Mtimensec = uint64(a.Mtime.Sec), a.Mtime.Nsec
	out.Ctime, out.Ctimensec = uint64(a.Ctime.Sec), a.Ctime.Nsec
	out.Mode = a.Mode
	out.Nlink = a.Nlink
	out.Uid, out.Gid = a.Uid, a.Gid
	out.Rdev = uint32(a.Rdev)
	out.Blksize = a.Blksize
}

// GetAttr needs no file handle: a node stays usable after its last unlink.
func (f *fileSystem) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n, ok := f.nodes.get(in.NodeId)
	if !ok {
		return statusStale
	}
	a, err := f.volume.Getattr(n)
	if err != nil {
		return f.status("getattr", &in.InHeader, err)
	}
	out.AttrValid = cacheSeconds
	fillAttr(&a, &out.Attr)
	return fuse.OK
}

// SetAttr serves chmod, chown, truncate and utimensat.
func (f *fileSystem) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	told := in.Valid&^fuse.FATTR_FH == kernelTimes
	if h, ok := f.files.get(in.Fh); ok && told && in.Valid&fuse.FATTR_FH != 0 {
		return f.writtenOut(h, in)
	}
	n, ok := f.nodes.get(in.NodeId)
	if !ok {
		return statusStale
	}
	a, err := f.volume.Setattr(request(cancel, &in.InHeader), n, setAttr(in, n.IsDir()))
	if told && errors.Is(err, unix.ESTALE) {
		return fuse.OK // the kernel tells when a file was removed, and syncfs(2) would fail
	}
	if err != nil {
		return f.status("setattr", &in.InHeader, err)
	}
	out.AttrValid = cacheSeconds
	fillAttr(&a, &out.Attr)
	return fuse.OK
}

// kernelTimes is what the kernel sets after it has written out what was in its
// cache, and when a file has got or lost a name (fs/fuse/inode.c,
// fuse_flush_times). The former comes with a file handle, as nothing else of this
// kind does.
const kernelTimes = fuse.FATTR_MTIME | fuse.FATTR_CTIME

// writtenOut gives a file that the kernel has written out the time of the newest
// write. The kernel does not look at the attributes of the answer.
func (f *fileSystem) writtenOut(h *cryptfs.Handle, in *fuse.SetAttrIn) fuse.Status {
	err := h.WrittenOut(cryptfs.Time{Sec: int64(in.Mtime), Nsec: in.Mtimensec})
	return f.status("flush", &in.InHeader, err)
}

// changes are the SetAttrIn fields that change something themselves.
const changes = fuse.FATTR_MODE | fuse.FATTR_UID | fuse.FATTR_GID | fuse.FATTR_SIZE |
	fuse.FATTR_ATIME | fuse.FATTR_MTIME

func setAttr(in *fuse.SetAttrIn, dir bool) cryptfs.SetAttr {
	var s cryptfs.SetAttr
	if mode, ok := in.GetMode(); ok {
		s.Mode = &mode
	}
	if uid, ok := in.GetUID(); ok {
		s.Uid = &uid
	}
	if gid, ok := in.GetGID(); ok {
		s.Gid = &gid
	}
	if size, ok := in.GetSize(); ok {
		signed := int64(size)
		s.Size = &signed
	}
	switch {
	case in.Valid&fuse.FATTR_ATIME_NOW != 0:
		s.AtimeNow = true
	case in.Valid&fuse.FATTR_ATIME != 0:
		s.Atime = &cryptfs.Time{Sec: int64(in.Atime), Nsec: in.Atimensec}
	}
	switch {
	case in.Valid&fuse.FATTR_MTIME_NOW != 0:
		s.MtimeNow = true
	case in.Valid&fuse.FATTR_MTIME != 0:
		s.Mtime = &cryptfs.Time{Sec: int64(in.Mtime), Nsec: in.Mtimensec}
	}
	s.KillPriv = !dir && s.Mode == nil && killPriv(in.Valid)
	return s
}

// killPriv reports whether a setattr must clear setuid and setgid. With
// CAP_HANDLE_KILLPRIV_V2 the kernel leaves that to us: it says so for a
// truncate, means it with every change of owner, and sends a setattr that
// changes nothing for chown(-1, -1).
func killPriv(valid uint32) bool {
	return valid&(fuse.FATTR_KILL_SUIDGID|fuse.FATTR_UID|fuse.FATTR_GID) != 0 || valid&changes == 0
}

// statxMask: the basic attributes and the birth time are what Statx answers, asked for or not.
const statxMask = unix.STATX_BASIC_STATS | unix.STATX_BTIME

// Statx is asked where the caller wants the birth time (Linux 6.6).
func (f *fileSystem) Statx(_ <-chan struct{}, in *fuse.StatxIn, out *fuse.StatxOut) fuse.Status {
	n, ok := f.nodes.get(in.NodeId)
	if !ok {
		return statusStale
	}
	a, err := f.volume.Getattr(n)
	if err != nil {
		return f.status("statx", &in.InHeader, err)
	}
	out.AttrValid = cacheSeconds
	out.Statx = fuse.Statx{
		Mask:      statxMask,
		Blksize:   a.Blksize,
		Nlink:     a.Nlink,
		Uid:       a.Uid,
		Gid:       a.Gid,
		Mode:      uint16(a.Mode),
		Ino:       a.Ino,
		Size:      uint64(a.Size),
		Blocks:    uint64(a.Blocks),
		Atime:     statxTime(a.Atime),
		Btime:     statxTime(a.Btime),
		Ctime:     statxTime(a.Ctime),
		Mtime:     statxTime(a.Mtime),
		RdevMajor: unix.Major(a.Rdev),
		RdevMinor: unix.Minor(a.Rdev),
	}
	return fuse.OK
}

func statxTime(t cryptfs.Time) fuse.SxTime {
	return fuse.SxTime{Sec: uint64(t.Sec), Nsec: t.Nsec}
}
