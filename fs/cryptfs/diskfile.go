package cryptfs

import (
	"container/list"
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// diskFile is the store file of an open file, and its chunkfile's disk. Its
// descriptor may be closed for others, and is opened again by the file's place
// in the store when it is needed. So a file has one as long as it has no place
// (it was removed, or has no name yet), and while its name is being removed.
type diskFile struct {
	v *Volume
	n *Node

	at *list.Element // in descriptors.files; guarded by descriptors.mu

	mu     sync.Mutex
	fd     *descriptor // nil: closed
	write  bool        // it is opened for writing
	used   bool        // since it was last asked to give its descriptor
	closed bool        // for good
	failed error       // of closing, for the next who syncs
}

// descriptor is an open file with users, guarded by diskFile.mu.
type descriptor struct {
	*backing.File
	users int
	dead  bool // the last user closes it
}

// newDiskFile takes over disk, which is open.
func (v *Volume) newDiskFile(n *Node, disk *backing.File, write bool) *diskFile {
	s := &diskFile{v: v, n: n, write: write, used: true, fd: &descriptor{File: disk}}
	v.descr.reserve(false)
	d := &s.v.descr
	d.mu.Lock()
	defer d.mu.Unlock()
	s.at = d.files.PushBack(s)
	return s
}

// give closes the descriptor for others, if it may; inUse says that it may when
// its user is done. descriptors.mu is held.
func (s *diskFile) give() (gave, inUse bool) {
	if _, named := s.n.where(); !named {
		return false, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.fd.users > 0 || s.n.pins.Load() > 0:
		return false, true
	case s.used:
		s.used = false
		return false, false
	}
	s.retire()
	s.fd, s.at = nil, nil
	return true, false
}

// held returns the descriptor if it is there; nil otherwise. put follows.
func (s *diskFile) held() *descriptor {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd != nil {
		s.fd.users++
		s.used = true
	}
	return s.fd
}

// get returns the descriptor, opened again if need be; put gives it back.
// Volume.ns is not locked.
func (s *diskFile) get() (*descriptor, error) {
	return s.getFrom(func(flags int) (*backing.File, error) {
		s.v.descr.reserve(true)
		s.v.ns.RLock()
		defer s.v.ns.RUnlock()
		return s.v.openPlaced(s.n, flags)
	})
}

// getLocked is get for a caller that has Volume.ns locked.
func (s *diskFile) getLocked() (*descriptor, error) {
	return s.getFrom(func(flags int) (*backing.File, error) {
		s.v.descr.reserve(false)
		return s.v.openPlaced(s.n, flags)
	})
}

// getFrom is get with a descriptor that open reserves and makes.
func (s *diskFile) getFrom(open func(flags int) (*backing.File, error)) (*descriptor, error) {
	if fd := s.held(); fd != nil {
		return fd, nil
	}
	var err error
	for range openTries {
		s.mu.Lock()
		write, closed := s.write, s.closed
		s.mu.Unlock()
		if closed {
			return nil, unix.EBADF
		}
		flags := unix.O_RDONLY
		if write {
			flags = unix.O_RDWR
		}
		var disk *backing.File
		if disk, err = open(flags); err != nil || !s.reopened(disk, write) {
			s.v.descr.unreserve()
			if err == nil {
				_ = disk.Close() // somebody else was faster
			}
		}
		if fd := s.held(); fd != nil {
			return fd, nil
		}
		switch {
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE): // somebody is about to be done
			time.Sleep(time.Millisecond)
		case err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ESTALE):
			return nil, err
		}
	}
	if errors.Is(err, unix.ENOENT) {
		err = unix.ESTALE // the file is gone, from below the mount
	}
	return nil, err
}

// reopened takes over a descriptor, unless it is not needed any more.
func (s *diskFile) reopened(disk *backing.File, write bool) bool {
	d := &s.v.descr
	d.mu.Lock()
	defer d.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd != nil || s.closed || s.write != write {
		return false
	}
	s.fd, s.used = &descriptor{File: disk}, true
	s.at = d.files.PushBack(s)
	return true
}

func (s *diskFile) put(fd *descriptor) {
	s.mu.Lock()
	fd.users--
	free := fd.users == 0
	if fd.dead && free {
		_ = fd.Close() // one that can write has taken its place, or all is written out
	}
	s.mu.Unlock()
	if free {
		s.v.descr.tell()
	}
}

// replace puts a descriptor that can write in the place of one that can only
// read.
func (s *diskFile) replace(disk *backing.File) {
	d := &s.v.descr
	d.mu.Lock()
	defer d.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd == nil {
		d.open++
		s.at = d.files.PushBack(s)
	} else {
		s.retire()
	}
	s.fd, s.write, s.used = &descriptor{File: disk}, true, true
}

// retire closes the descriptor, as soon as nobody uses it. mu is held.
func (s *diskFile) retire() {
	if s.fd.dead = true; s.fd.users > 0 {
		return
	}
	if err := s.fd.Close(); err != nil && s.failed == nil {
		s.failed = err
	}
}

// close lets go of the file: nobody opens it again. The error is that of
// closing, now or before.
func (s *diskFile) close() error {
	d := &s.v.descr
	d.mu.Lock()
	defer d.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.fd != nil {
		s.retire()
		d.files.Remove(s.at)
		s.fd, s.at = nil, nil
		d.open--
		d.room.Broadcast()
	}
	return s.failed
}

// pin has a node's open file keep its descriptor, or get it back, before a name
// of it is removed: without a name it could not be opened again. unpin follows
// when the node knows that the name is gone. n may be nil. Volume.ns is locked.
func (v *Volume) pin(n *Node) (unpin func(), err error) {
	if n == nil || n.typ != unix.S_IFREG {
		return func() {}, nil
	}
	n.pins.Add(1) // first: a file that is opened from here on has its descriptor
	unpin = func() { n.pins.Add(-1); v.descr.tell() }
	if f := n.openFile(); f != nil {
		fd, err := f.disk.getLocked()
		switch {
		case err == nil:
			f.disk.put(fd)
		case !errors.Is(err, unix.EBADF): // its last handle is gone, with all written out
			unpin()
			return nil, err
		}
	}
	return unpin, nil
}

// use calls f with the descriptor.
func (s *diskFile) use(f func(d *backing.File) error) error {
	fd, err := s.get()
	if err != nil {
		return err
	}
	defer s.put(fd)
	return f(fd.File)
}

// useHeld is use for a file that has no place, with Volume.ns locked: ESTALE if
// it has one by now, and no descriptor.
func (s *diskFile) useHeld(f func(d *backing.File) error) error {
	fd := s.held()
	if fd == nil {
		return unix.ESTALE
	}
	defer s.put(fd)
	return f(fd.File)
}

// What follows is chunkfile.Disk.

func (s *diskFile) ReadAt(p []byte, off int64) (int, error) {
	fd, err := s.get()
	if err != nil {
		return 0, err
	}
	defer s.put(fd)
	return fd.ReadAt(p, off)
}

func (s *diskFile) WriteAt(p []byte, off int64) error {
	fd, err := s.get()
	if err != nil {
		return err
	}
	defer s.put(fd)
	return fd.WriteAt(p, off)
}

func (s *diskFile) Truncate(size int64) error {
	return s.use(func(d *backing.File) error { return d.Truncate(size) })
}

func (s *diskFile) Allocate(mode uint32, off, size int64) error {
	return s.use(func(d *backing.File) error { return d.Allocate(mode, off, size) })
}

func (s *diskFile) Punch(off, size int64) error {
	return s.use(func(d *backing.File) error { return d.Punch(off, size) })
}

func (s *diskFile) SeekData(off int64) (data int64, ok bool, err error) {
	err = s.use(func(d *backing.File) (err error) { data, ok, err = d.SeekData(off); return err })
	return data, ok, err
}

func (s *diskFile) Mtime() (ts unix.Timespec, err error) {
	err = s.use(func(d *backing.File) (err error) { ts, err = d.Mtime(); return err })
	return ts, err
}

func (s *diskFile) SetTimes(atime, mtime unix.Timespec) error {
	return s.use(func(d *backing.File) error { return d.SetTimes(atime, mtime) })
}

// Sync also tells what went wrong when a descriptor was closed for others. An
// error of writing back that no descriptor was told yet, the next one is told by
// the kernel.
func (s *diskFile) Sync() error { return s.sync((*backing.File).Sync) }

func (s *diskFile) Datasync() error { return s.sync((*backing.File).Datasync) }

func (s *diskFile) sync(how func(*backing.File) error) error {
	err := s.use(how)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		err, s.failed = s.failed, nil
	}
	return err
}
