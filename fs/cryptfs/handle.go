package cryptfs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
)

// Handle is an open regular file. It is safe for concurrent use until Release.
type Handle struct {
	f     *openFile
	write bool
	once  sync.Once
}

type openMode struct {
	read  bool
	write bool
	cut   bool // to nothing
}

// Open opens a regular file. flags are open(2)'s; O_TRUNC is honoured. killPriv
// clears setuid and setgid bits if the file is cut.
func (v *Volume) Open(ctx context.Context, n *Node, flags int, killPriv bool) (*Handle, error) {
	access := flags & unix.O_ACCMODE
	m := openMode{read: access != unix.O_WRONLY, write: access != unix.O_RDONLY, cut: flags&unix.O_TRUNC != 0}
	h, err := v.open(ctx, n, m)
	if err != nil {
		return nil, v.note(n, err)
	}
	if m.cut && killPriv {
		if err := v.change(n, SetAttr{KillPriv: true}, false); err != nil {
			h.Release()
			return nil, err
		}
	}
	return h, nil
}

func (v *Volume) open(ctx context.Context, n *Node, m openMode) (*Handle, error) {
	switch n.typ {
	case unix.S_IFREG:
	case unix.S_IFDIR:
		return nil, unix.EISDIR
	default:
		return nil, unix.ENXIO
	}
	write := m.write || m.cut
	if v.conf.WriteOnly && m.read && !m.cut {
		return nil, ErrWriteOnly
	}
	if write {
		if err := v.mayWrite(ctx, n); err != nil {
			return nil, err
		}
	}
	f, err := v.get(ctx, n, m)
	if err != nil {
		return nil, err
	}
	if m.cut && f.cf.Size() > 0 {
		if err := f.cf.Truncate(0); err != nil {
			_ = v.closeHandle(f)
			return nil, err
		}
	}
	if write {
		var st backing.Stat
		err := f.disk.use(func(d *backing.File) (err error) { st, err = d.Stat(); return err })
		f.suid.Store(err != nil || st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0)
	}
	return newHandle(f, write), nil
}

// mayWrite answers ErrClassMismatch for a file in a directory whose class the
// policy and the record disagree about.
func (v *Volume) mayWrite(ctx context.Context, n *Node) error {
	if err := v.mayChange(); err != nil {
		return err
	}
	l, ok := n.where()
	if !ok {
		return nil
	}
	_, err := v.loadForWrite(ctx, l.parent)
	return err
}

// join takes one more handle of a file that is open in a way that will do; nil
// if it is not. gen is for attach.
func (v *Volume) join(n *Node, write bool) (f *openFile, gen uint64) {
	n.opening.Lock()
	defer n.opening.Unlock()
	if f := n.openFile(); f != nil && !f.idle.Load() && (!write || f.writable.Load() && f.keyed.Load()) {
		n.handles++
		return f, n.gen
	}
	return nil, n.gen
}

// observeJoin tells of a key that one more opener uses. A refusal gives the
// handle back.
func (v *Volume) observeJoin(ctx context.Context, f *openFile) error {
	if v.conf.Observe == nil {
		return nil
	}
	f.mu.Lock()
	keyed := f.secrets.header != nil
	var h envelope.Header
	if keyed {
		h = *f.secrets.header // a rewrap may give it other recipients
	}
	f.mu.Unlock()
	if !keyed { // an empty file, which has no key
		return nil
	}
	err := v.conf.Observe(ctx, envelope.Use{Op: "open", Class: f.class.name, Purpose: keywrap.PurposeData,
		File: h.File, Branch: h.Branch, Key: h.Recipients[0].Wrapped.Key, Source: envelope.SourceOpen})
	if err != nil {
		_ = v.closeHandle(f)
		return fmt.Errorf("file %s: use of its key: %w", h.File, err)
	}
	return nil
}

// openTries bounds how often an open looks again because somebody else changed
// the file meanwhile.
const openTries = 100

// get returns a node's open file with one handle more, opening the store file
// if need be.
func (v *Volume) get(ctx context.Context, n *Node, m openMode) (*openFile, error) {
	err := errChanged
	for range openTries {
		f, gen := v.join(n, m.write || m.cut)
		if f != nil {
			return f, v.observeJoin(ctx, f)
		}
		if f, err = v.openStored(ctx, n, m, gen); !errors.Is(err, errChanged) {
			return f, err
		}
	}
	return nil, errors.Join(unix.EBUSY, err)
}

// openStored opens the store file and gets its key. The key service is asked
// before anything is changed: a file that is to be cut keeps its contents if
// there is no key for the new ones.
func (v *Volume) openStored(ctx context.Context, n *Node, m openMode, gen uint64) (*openFile, error) {
	defer v.descr.opening()()
	o := &opener{writable: m.write || m.cut, gen: gen}
	disk, st, block, err := v.openDisk(n, o.writable, !m.cut)
	if err != nil {
		return nil, v.changedSince(n, gen, err)
	}
	mended, err := v.mend(ctx, n, block)
	if mended {
		err = errChanged
	}
	if err != nil {
		_ = disk.Close() // nothing was written through it
		return nil, err
	}
	o.disk, o.size, o.cut = disk, st.Size, m.cut && st.Size > 0
	switch {
	case block != nil && v.conf.WriteOnly:
		err = ErrWriteOnly
	case block != nil:
		v.lookAhead(n)
		o.sec, err = v.unwrap(ctx, n.class, block)
	case m.write:
		o.sec, err = v.newKey(ctx, n.class)
	}
	if err != nil {
		o.drop()
		return nil, v.changedSince(n, gen, err)
	}
	return v.attach(n, o)
}

// changedSince replaces damage that was seen in a file while somebody else was
// writing it.
func (v *Volume) changedSince(n *Node, gen uint64, err error) error {
	if !chunkfile.IsDamage(err) {
		return err
	}
	n.opening.Lock()
	defer n.opening.Unlock()
	if n.gen != gen || n.openFile() != nil {
		return errChanged
	}
	return err
}

// cutDisk cuts a store file that nobody has open to nothing.
func (v *Volume) cutDisk(n *Node, disk *backing.File) error {
	var id envelope.ID
	if v.place.Sidecar(id[:]) != "" {
		if _, err := disk.ReadAt(id[:], 0); err != nil {
			return err
		}
	}
	if err := disk.Truncate(0); err != nil {
		return err
	}
	v.doom(n, nil, id)
	return nil
}

// openDisk opens a node's store file and reads its header block, if it is not
// empty and header is set.
func (v *Volume) openDisk(n *Node, write, header bool) (disk *backing.File, st backing.Stat, block []byte, err error) {
	v.ns.RLock()
	defer v.ns.RUnlock()
	flags := unix.O_RDONLY
	if write {
		flags = unix.O_RDWR
	}
	if _, named := n.where(); !named {
		return v.openGhost(n, flags, header)
	}
	if disk, err = v.openPlaced(n, flags); err != nil {
		return nil, st, nil, err
	}
	st, err = disk.Stat()
	if err == nil && st.Size > 0 && header {
		at := v.spots(n, nil)
		block, err = v.readBlock(disk, at.dirs, st)
		at.release()
	}
	if err != nil {
		_ = disk.Close()
		return nil, st, nil, &FileError{Class: n.class.name, Ino: n.key.ino, Err: err}
	}
	return disk, st, block, nil
}

// openPlaced opens a node's store file, if it has a place, and is there. The
// caller has v.ns locked.
func (v *Volume) openPlaced(n *Node, flags int) (*backing.File, error) {
	first := error(unix.ESTALE)
	for i, l := range n.places() { // one of them may be where even its owner cannot look
		disk, err := v.openLink(l, flags)
		if err == nil {
			var st backing.Stat
			if st, err = disk.Stat(); err == nil && keyOf(st) == n.key {
				return disk, nil
			}
			_ = disk.Close()
			err = cmp.Or(err, error(unix.ESTALE))
		}
		if i == 0 || errors.Is(first, unix.EACCES) {
			first = err
		}
	}
	return nil, first
}

// openLink opens the store file at a place. The mount's users were let in by
// the kernel, whose path to the file may be another one.
func (v *Volume) openLink(l link, flags int) (*backing.File, error) {
	dir, err := v.use(l.parent)
	if err != nil {
		return nil, err
	}
	defer dir.release()
	var disk *backing.File
	err = lifted(dir.Dir, func() (err error) { disk, err = v.openEntry(dir.Dir, l.entry, flags); return err })
	return disk, err
}

// readBlock reads a header. A file with names in directories that are not known
// yet may have its sidecar there: then it is brought here.
func (v *Volume) readBlock(disk *backing.File, dirs []*backing.Dir, st backing.Stat) ([]byte, error) {
	block, err := v.place.Read(disk, dirs)
	if err == nil || st.Nlink < 2 || v.place.Sidecar(make([]byte, idLen)) == "" || fault.Of(err) != fault.Integrity {
		return block, err
	}
	b := make([]byte, idLen)
	if n, rerr := disk.ReadAt(b, 0); rerr != nil || n < idLen {
		return nil, err
	}
	name := v.place.Sidecar(b)
	found := v.walk(func(d *backing.Dir, e backing.Entry) bool {
		if e.Name != name {
			return true
		}
		if block, err = d.ReadFile(name, v.layout.HeaderSize); err == nil && !v.conf.ReadOnly {
			for _, to := range dirs {
				_ = d.Link(name, to, name)
			}
		}
		return false
	})
	if found != nil {
		return nil, found
	}
	return block, err
}

// walk calls f for every entry of the store, by descriptor, until f returns
// false. Directories that vanish meanwhile are passed over.
func (v *Volume) walk(f func(d *backing.Dir, e backing.Entry) bool) error {
	_, err := walkDir(v.root, true, f)
	return err
}

func walkDir(d *backing.Dir, top bool, f func(d *backing.Dir, e backing.Entry) bool) (more bool, err error) {
	entries, err := d.ReadDir()
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		if top && e.Name == metaDir {
			continue
		}
		if !f(d, e) {
			return false, nil
		}
		if e.Type != unix.S_IFDIR && e.Type != 0 {
			continue
		}
		sub, err := d.OpenDir(e.Name)
		if err != nil {
			continue
		}
		more, err := walkDir(sub, false, f)
		_ = sub.Close()
		if err != nil || !more {
			return more, err
		}
	}
	return true, nil
}

// ReadAt fills p from off. n < len(p) only at the end of the file, and then
// with a nil error.
func (h *Handle) ReadAt(p []byte, off int64) (int, error) {
	n, err := h.f.cf.ReadAt(p, off)
	h.f.v.counters.read.Add(uint64(n))
	if err != nil {
		return 0, h.f.about(err)
	}
	return n, nil
}

// WriteAt writes all of p at off, or fails. killPriv clears setuid and setgid
// bits first.
func (h *Handle) WriteAt(p []byte, off int64, killPriv bool) (int, error) {
	if !h.write {
		return 0, unix.EBADF
	}
	if killPriv && h.f.suid.Load() {
		if err := h.f.v.change(h.f.n, SetAttr{KillPriv: true}, false); err != nil {
			return 0, err
		}
		h.f.suid.Store(false)
	}
	h.f.v.journal.Throttle(context.Background())
	n, err := h.f.cf.WriteAt(p, off)
	h.f.v.counters.written.Add(uint64(n))
	if err != nil {
		return 0, h.f.about(err)
	}
	return n, nil
}

// Truncate sets the plaintext size.
func (h *Handle) Truncate(size int64) error {
	h.f.v.journal.Throttle(context.Background())
	return h.f.cf.Truncate(size)
}

// Allocate is fallocate(2); see chunkfile.
func (h *Handle) Allocate(mode uint32, off, size int64) error {
	if !h.write {
		return unix.EBADF
	}
	h.f.v.journal.Throttle(context.Background())
	return h.f.about(h.f.cf.Allocate(mode, off, size))
}

// Seek is lseek(2) with SEEK_DATA or SEEK_HOLE.
func (h *Handle) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case unix.SEEK_DATA:
		return h.f.cf.SeekData(off)
	case unix.SEEK_HOLE:
		return h.f.cf.SeekHole(off)
	}
	return 0, unix.EINVAL
}

func newHandle(f *openFile, write bool) *Handle {
	if write {
		f.writers.Add(1)
	}
	return &Handle{f: f, write: write}
}

// Writers reports whether the file is open for writing, by this handle or another.
func (h *Handle) Writers() bool { return h.f.writers.Load() > 0 }

// Size returns the file's size, without those writes that are under way. It does
// not wait.
func (h *Handle) Size() int64 { return h.f.cf.Size() }

// Writable reports whether the handle may write.
func (h *Handle) Writable() bool { return h.write }

// Ino returns the file's inode number.
func (h *Handle) Ino() uint64 { return h.f.n.key.ino }

// Flush brings what is in memory to the store file.
func (h *Handle) Flush() error { return h.f.about(h.f.cf.Flush()) }

// WrittenNow is Flush by a caller who has just written, past any cache.
func (h *Handle) WrittenNow() error { return h.f.about(h.f.cf.FlushNow()) }

// WrittenOut is Flush by a caller who knows when the newest write was.
func (h *Handle) WrittenOut(mtime Time) error {
	return h.f.about(h.f.cf.FlushAt(unix.Timespec{Sec: mtime.Sec, Nsec: int64(mtime.Nsec)}))
}

// Fsync makes the file durable, and the records that its name depends on. Once
// the journal is stopped it fails, whatever there is to be made durable.
func (h *Handle) Fsync(dataOnly bool) error {
	f := h.f
	if f.v.conf.ReadOnly {
		return nil
	}
	if err := f.v.journal.Err(); err != nil {
		return f.about(err)
	}
	return f.about(f.cf.Fsync(dataOnly, f.syncApart))
}

// syncApart makes durable what a file needs outside itself, and answers whether
// it has attributes that are not durable.
func (f *openFile) syncApart() (meta bool, err error) {
	v := f.v
	v.ns.RLock()
	defer v.ns.RUnlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if l, ok := f.n.where(); ok {
		if err := v.syncRecords(l.parent); err != nil {
			return false, err
		}
	}
	if f.apart {
		err := f.withDirs(f.syncHeader)
		if err != nil && !f.removed() { // whose header went with the last name
			return false, err
		}
		meta, f.apart = !v.place.Body(), false
	}
	return v.takeMeta(f.n.key) || meta, nil // from here on a failure is the caller's, for ever
}

// syncHeader makes a header durable that lives elsewhere. After a sync that
// failed it is written once more: what the kernel could not write it takes for
// written. f.mu is held.
func (f *openFile) syncHeader(dirs []*backing.Dir) error {
	v := f.v
	if f.unsure && v.place.Sidecar(f.file[:]) != "" && f.secrets.header != nil {
		block, err := f.secrets.header.Encode(v.layout.HeaderSize)
		if err == nil {
			err = v.held()
		}
		if err == nil {
			_, err = v.place.Write(nil, dirs, f.file, block) // a sidecar takes no store file
		}
		if err != nil {
			return err
		}
	}
	f.unsure = true
	if err := v.place.Sync(dirs, f.file); err != nil {
		return err
	}
	f.unsure = false
	return nil
}

// removed reports whether the file has no name in the store. v.ns is locked.
func (f *openFile) removed() bool {
	var st backing.Stat
	err := f.disk.useHeld(func(d *backing.File) (err error) { st, err = d.Stat(); return err })
	return err == nil && st.Nlink == 0
}

// Release lets go of the handle. What could not be written by now is in the log;
// a caller who must know calls Flush before.
func (h *Handle) Release() {
	h.once.Do(func() {
		if h.write {
			h.f.writers.Add(-1)
		}
		if err := h.f.v.closeHandle(h.f); err != nil {
			h.f.v.log.Error("close failed", "ino", h.f.n.key.ino, "error", err)
		}
	})
}
