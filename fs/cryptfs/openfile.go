package cryptfs

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
	"github.com/kmsfs/kmsfs/fs/journal"
	"github.com/kmsfs/kmsfs/fs/placement"
)

// openFile is what all handles of one inode share: the store file, the key, and
// the chunks in memory. It is the chunkfile's Owner.
type openFile struct {
	v     *Volume
	n     *Node
	class *class
	cf    *chunkfile.File
	home  *Node // the directory that an unnamed file was made in

	suid    atomic.Bool  // the mode has bits that a write clears
	writers atomic.Int32 // handles that may write

	joining  sync.Mutex // held while an opener adds its descriptor or key
	disk     *diskFile
	writable atomic.Bool // disk can be written
	keyed    atomic.Bool // the secrets are at work

	idle atomic.Bool // no handle is left; it is open for what the journal has

	// mu guards what the chunkfile's calls back into Owner use.
	mu      sync.Mutex
	secrets secrets
	file    envelope.ID // of the header, also when the secrets are gone
	birth   uint64      // of the header
	covered uint32      // newest epoch in which the file's growth is on record
	apart   bool        // the header elsewhere may not be on the disk yet
	unsure  bool        // a sync of it was tried, and has not succeeded
}

// secrets is a file's key at work, with the header that it belongs to.
type secrets struct {
	header *envelope.Header
	key    *envelope.FileKey
	codec  *dare.Codec
}

func newSecrets(h *envelope.Header, k *envelope.FileKey) (secrets, error) {
	codec, err := dare.New(k.PRK(), dare.Suite(h.Suite), h.ChunkSize)
	if err != nil {
		k.Wipe()
		return secrets{}, err
	}
	return secrets{h, k, codec}, nil
}

func (s *secrets) wipe() {
	if s.key != nil {
		s.codec.Wipe()
		s.key.Wipe()
		*s = secrets{}
	}
}

// dataKeys returns the keys of a class's files. A write-only volume keeps none
// behind a file's last handle.
func (v *Volume) dataKeys(c *class) envelope.Class {
	ec := c.keys()
	if v.conf.WriteOnly {
		ec.Cache = 0
	}
	return ec
}

// newKey returns the key of a new file: one that was made ahead of need, with a
// file id that belongs to it, or else a new one from the key service.
func (v *Volume) newKey(ctx context.Context, c *class) (secrets, error) {
	fixed := envelope.Fixed{Suite: uint8(v.layout.Suite), ChunkSize: c.geo.ChunkSize, Store: v.layout.ID}
	h, k, err := v.keys.Create(ctx, v.dataKeys(c), keywrap.PurposeData, fixed, v.layout.HeaderSize)
	if err != nil {
		var id envelope.ID
		if failed := (*envelope.CreateError)(nil); errors.As(err, &failed) {
			id, err = failed.File, failed.Err
		}
		return secrets{}, v.keyError("new file", c, id, err)
	}
	c.keepSample(h)
	return newSecrets(h, k)
}

// unwrap asks for the key of a file whose header block is b. The header's
// fields are those of the store and the class, or it is no header of theirs.
func (v *Volume) unwrap(ctx context.Context, c *class, b []byte) (secrets, error) {
	h, err := envelope.Parse(b)
	if err != nil {
		return secrets{}, err
	}
	if h.Suite != uint8(v.layout.Suite) || h.ChunkSize != c.geo.ChunkSize || h.BlockSize != v.layout.HeaderSize {
		return secrets{}, fmt.Errorf("file %s: %w", h.File, ErrHeader)
	}
	k, err := v.keys.Open(ctx, v.dataKeys(c), keywrap.PurposeData, h)
	if err != nil {
		return secrets{}, v.keyError("", c, h.File, err)
	}
	c.keepSample(h)
	return newSecrets(h, k)
}

// keyError says whose key err is about, and remembers it for Health. What fails
// authentication is remembered by note.
func (v *Volume) keyError(what string, c *class, id envelope.ID, err error) error {
	if !isDamage(err) {
		v.failed(c.name, err)
	}
	return &FileError{What: what, Class: c.name, File: id, Err: err}
}

// about says that err is about the file, and counts it if it is damage.
func (f *openFile) about(err error) error {
	if err == nil {
		return nil
	}
	e := &FileError{Class: f.class.name, Ino: f.n.key.ino, Err: err}
	f.mu.Lock()
	if h := f.secrets.header; h != nil {
		e.File = h.File
	}
	f.mu.Unlock()
	return f.v.note(f.n, e)
}

// openEntry is placement.Open.
func (v *Volume) openEntry(dir *backing.Dir, entry string, flags int) (*backing.File, error) {
	return placement.Open(dir, entry, flags)
}

// lifted is placement.Lifted.
func lifted(d *backing.Dir, f func() error) error { return placement.Lifted(d, f) }

// spot is a file's place in the store while an operation looks at it.
type spot struct {
	refs []*dirRef
	dirs []*backing.Dir
}

func (s *spot) add(r *dirRef) { s.refs, s.dirs = append(s.refs, r), append(s.dirs, r.Dir) }

func (s *spot) release() {
	for _, r := range s.refs {
		r.release()
	}
}

// spots opens the directories in which a node has a name. Those that cannot be
// opened are left out.
func (v *Volume) spots(n, home *Node) *spot {
	n.linksMu.Lock()
	parents := make([]*Node, 0, len(n.links))
	for _, l := range n.links {
		parents = append(parents, l.parent)
	}
	n.linksMu.Unlock()
	if len(parents) == 0 && home != nil {
		parents = append(parents, home)
	}
	s := &spot{}
	seen := map[*Node]bool{}
	for _, p := range parents {
		if !seen[p] {
			seen[p] = true
			if r, err := v.use(p); err == nil {
				s.add(r)
			}
		}
	}
	return s
}

// errChanged means that the store file is not what was looked at any more.
var errChanged = errors.New("cryptfs: file changed while it was opened")

// opener is what attach needs of somebody who opened a store file.
type opener struct {
	disk     *backing.File
	writable bool
	sec      secrets
	size     int64  // of the store file
	home     *Node  // for an unnamed file
	gen      uint64 // Node.gen from before disk was looked at
	cut      bool   // cut the store file to nothing, if nobody has it open
}

// drop lets go of what the opener holds.
func (o *opener) drop() {
	o.sec.wipe()
	_ = o.disk.Close() // nothing was written through it
}

// attach gives a node its open file, or takes the one that is there by now. The
// handle count goes up by one. Whatever happens, the opener is used up;
// errChanged says to look again.
func (v *Volume) attach(n *Node, o *opener) (*openFile, error) {
	n.opening.Lock()
	defer n.opening.Unlock()
	if f := n.openFile(); f != nil {
		if f.idle.Load() && o.cut {
			if err := f.finish(); err != nil {
				o.drop()
				return nil, err
			}
			return v.attachNew(n, o)
		}
		n.handles++
		f.rest(false)
		f.join(o.disk, o.writable, o.sec)
		return f, nil
	}
	return v.attachNew(n, o)
}

// attachNew gives a node that has none its open file. n.opening is held.
func (v *Volume) attachNew(n *Node, o *opener) (*openFile, error) {
	err := error(nil)
	switch {
	case o.cut:
		n.gen++
		o.size, err = 0, v.cutDisk(n, o.disk)
	case n.gen != o.gen:
		err = errChanged
	}
	if err != nil {
		o.drop()
		return nil, err
	}
	f := &openFile{v: v, n: n, class: n.class, home: o.home, secrets: o.sec}
	f.disk = v.newDiskFile(n, o.disk, o.writable)
	f.writable.Store(o.writable)
	f.keyed.Store(o.sec.key != nil)
	c := chunkfile.Config{Disk: v.fence(f.disk), Geo: n.class.geo, Codec: o.sec.codec, Owner: f, Size: o.size}
	if h := o.sec.header; h != nil {
		c.Sparse, f.file = h.Sparse, h.File
		if o.size > 0 {
			f.birth, f.covered = h.Birth, uint32(h.Birth>>32)
			c.Pending = v.overlay(h)
		}
	}
	c.State = v.resume(n.key, o.size)
	c.Lost = v.lostSync(n.key)
	f.apart = v.takeApart(n.key) && o.size > 0 // an empty file needs no header
	f.unsure = f.apart
	if f.cf, err = chunkfile.Open(c); err != nil {
		o.sec.wipe()
		_ = f.disk.close() // nothing was written through it
		return nil, err
	}
	n.handles = 1
	n.mu.Lock()
	n.file = f
	n.mu.Unlock()
	v.files.Lock()
	v.files.open[f] = struct{}{}
	v.files.Unlock()
	if v.resume(n.key, o.size).Durable != c.Durable { // a checkpoint began, and missed it
		f.cf.Protect()
	}
	return f, nil
}

// join adds a second opener's descriptor and key to an open file, where it
// lacks them.
func (f *openFile) join(disk *backing.File, writable bool, sec secrets) {
	f.joining.Lock()
	defer f.joining.Unlock()
	needDisk := writable && !f.writable.Load()
	needKey := sec.key != nil && !f.keyed.Load()
	if needKey {
		f.mu.Lock()
		f.secrets, f.file = sec, sec.header.File
		f.mu.Unlock()
	} else {
		sec.wipe()
	}
	if needDisk {
		f.disk.replace(disk)
	}
	if needDisk || needKey {
		f.cf.Upgrade(f.v.fence(f.disk), f.secrets.codec)
		f.writable.Store(f.writable.Load() || needDisk)
		f.keyed.Store(f.keyed.Load() || needKey)
	}
	if !needDisk {
		_ = disk.Close() // nothing was written through it
	}
}

// maxIdle bounds the files that stay open for the journal only.
const maxIdle = 64

// closeHandle lets go of one handle; the last one writes out and wipes. What the
// journal has to have on the disk first is done in place by and by: until then
// the file stays open, without its key.
func (v *Volume) closeHandle(f *openFile) error {
	n := f.n
	n.opening.Lock()
	defer n.opening.Unlock()
	if n.openFile() != f { // the volume was closed meanwhile
		return nil
	}
	n.handles--
	if n.handles > 0 {
		return nil
	}
	err := f.cf.Flush()
	if err != nil || f.cf.Pending() == 0 || v.files.idle.Load() >= maxIdle {
		if ferr := f.finish(); err == nil {
			err = ferr
		}
		return err
	}
	n.gen++
	f.cf.Wipe()
	f.mu.Lock()
	f.secrets.wipe()
	f.mu.Unlock()
	f.keyed.Store(false)
	f.rest(true)
	return nil
}

// rest says whether the file is open for the journal only. Its node stays then,
// also when the kernel has forgotten it: whoever opens the file finds this.
// n.opening is held.
func (f *openFile) rest(idle bool) {
	if f.idle.Swap(idle) == idle {
		return
	}
	if idle {
		f.v.nodes.hold(f.n)
		f.v.files.idle.Add(1)
	} else {
		f.v.files.idle.Add(-1)
		f.v.Forget(f.n, 1)
	}
}

// finish writes out and closes. n.opening is held.
func (f *openFile) finish() error {
	v, n := f.v, f.n
	err := f.close()
	defer f.rest(false)
	if f.writable.Load() {
		n.gen++
	}
	n.mu.Lock()
	n.file = nil
	n.mu.Unlock()
	_, named := n.where()
	v.files.Lock()
	delete(v.files.open, f)
	v.files.Unlock()
	if err != nil {
		v.log.Error("file could not be written out; it is repaired when it is opened again, or by the next mount", "ino", n.key.ino, "error", err)
		if named {
			v.abandon(f)
		}
	}
	f.cf.Wipe()
	f.mu.Lock()
	f.secrets.wipe()
	f.mu.Unlock()
	if cerr := f.disk.close(); err == nil {
		err = cerr
	}
	if !named {
		v.forgetKey(n)
	}
	return err
}

// close brings everything to the store file.
func (f *openFile) close() error {
	v := f.v
	if v.journal == nil {
		return nil
	}
	v.lose(f)
	if !f.idle.Load() {
		if err := f.cf.Flush(); err != nil {
			return err
		}
	}
	if f.cf.Pending() > 0 {
		if err := v.journal.Commit(v.journal.Last()); err != nil {
			return err
		}
		if err := f.cf.Apply(); err != nil {
			return err
		}
	}
	v.leave(f)
	return nil
}

// abandon keeps in the journal what is to be done for a file that is closed and
// could not be brought to the disk: what is pending, and an end that may not be
// sealed as the end. Without it the next checkpoint would call the file done.
func (v *Volume) abandon(f *openFile) {
	if v.journal == nil {
		return
	}
	ops, promised := f.cf.Left()
	mtime, _ := f.disk.Mtime() // the zero time, if that fails too
	var entries []journal.Entry
	for _, op := range ops {
		e := f.entry(journal.Ops)
		e.Mtime, e.Durable, e.Ops = mtime, promised, []journal.Op{op}
		entries = append(entries, e)
	}
	grow := f.entry(journal.Grow)
	grow.Durable = promised
	if grow.Birth != 0 { // else it has no header, and no contents
		v.broke(grow.File, append(entries, grow))
	}
}

// forgetKey takes an unlinked inode out of the table when its last handle goes:
// its number may come again.
func (v *Volume) forgetKey(n *Node) {
	v.nodes.mu.Lock()
	defer v.nodes.mu.Unlock()
	v.nodes.remove(n)
}

// entry returns a journal record about the file.
func (f *openFile) entry(kind journal.Kind) journal.Entry {
	f.mu.Lock()
	defer f.mu.Unlock()
	return journal.Entry{Kind: kind, File: f.file, Birth: f.birth, Ino: f.n.key.ino}
}

// Log implements chunkfile.Owner.
func (f *openFile) Log(mtime unix.Timespec, promised int64, ops ...journal.Op) (journal.LSN, uint32, error) {
	e := f.entry(journal.Ops)
	e.Mtime, e.Durable, e.Ops = mtime, promised, ops
	at, err := f.v.journal.Append(e)
	if err != nil {
		return 0, 0, err
	}
	epoch, err := f.v.journal.Epoch() // that of the record, or a later one
	for _, op := range ops {
		if op.Kind == journal.OpHeader || op.Off == 0 && f.v.place.Body() {
			f.v.headed(f.n.key, epoch)
		}
	}
	return at, epoch, err
}

// Live implements chunkfile.Owner.
func (f *openFile) Live(epoch uint32) bool { return epoch >= f.v.journal.Oldest() }

// Durable implements chunkfile.Owner.
func (f *openFile) Durable() journal.LSN {
	if f.v.journal == nil {
		return 0
	}
	return f.v.journal.Durable()
}

// Commit implements chunkfile.Owner.
func (f *openFile) Commit(upTo journal.LSN) error { return f.v.journal.Commit(upTo) }

// Covered implements chunkfile.Owner.
func (f *openFile) Covered() bool {
	epoch, err := f.v.journal.Epoch()
	return err == nil && f.covered == epoch
}

// Direct implements chunkfile.Owner.
func (f *openFile) Direct(fence bool, durable int64, write func() error) error {
	if fence {
		f.covered = 0
	}
	return f.v.journal.Direct(&f.covered, func() journal.Entry {
		e := f.entry(journal.Grow)
		e.Durable, e.Fence = durable, fence
		return e
	}, write)
}

// NewHeader implements chunkfile.Owner. A header elsewhere may still be needed
// until the disk has it that the file was cut: what the journal has for the old
// contents counts by that one's birth.
func (f *openFile) NewHeader(sparse bool) ([]byte, error) {
	epoch, err := f.v.journal.Epoch()
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	h := f.secrets.header
	if f.birth != 0 && !f.v.place.Body() {
		if err := f.disk.Datasync(); err != nil {
			return nil, err
		}
	}
	f.v.spare(h.File)
	f.birth = uint64(epoch)<<32 | uint64(f.v.births.Add(1))
	f.covered, f.file = epoch, h.File
	h.Birth, h.Sparse = f.birth, sparse
	f.secrets.key.Commit(h)
	block, err := h.Encode(f.v.layout.HeaderSize)
	if err != nil {
		return nil, err
	}
	return f.place(block)
}

// place puts a header block where it lives. f.mu is held.
func (f *openFile) place(block []byte) ([]byte, error) {
	if err := f.v.held(); err != nil {
		return nil, err
	}
	f.apart = true
	fd, err := f.disk.get()
	if err != nil {
		return nil, err
	}
	defer f.disk.put(fd)
	f.v.ns.RLock()
	defer f.v.ns.RUnlock()
	var before []byte
	err = f.withDirs(func(dirs []*backing.Dir) (err error) {
		before, err = f.v.place.Write(fd.File, dirs, f.file, block)
		return err
	})
	return before, err
}

// withDirs calls do with the directories of the names that the mount knows. If it
// knows none, and the store file has one, as a file with several names may, it
// looks for that: a header beside it must not be lost. v.ns is locked.
func (f *openFile) withDirs(do func([]*backing.Dir) error) error {
	at := f.v.spots(f.n, f.home)
	defer at.release()
	if len(at.dirs) > 0 || f.v.place.Sidecar(f.file[:]) == "" || f.removed() {
		return do(at.dirs)
	}
	err := error(unix.ESTALE)
	werr := f.v.walk(func(d *backing.Dir, e backing.Entry) bool {
		if isInternal(e.Name) {
			return true
		}
		if st, serr := d.Stat(e.Name); serr != nil || keyOf(st) != f.n.key {
			return true
		}
		err = do([]*backing.Dir{d})
		return false
	})
	return errors.Join(err, werr)
}

func (f *openFile) isApart() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.apart
}

// Header implements chunkfile.Owner.
func (f *openFile) Header(sparse bool) (journal.Op, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := f.secrets.header
	if h.Sparse != sparse {
		h.Sparse = sparse
		f.secrets.key.Commit(h)
	}
	block, err := h.Encode(f.v.layout.HeaderSize)
	if f.v.place.Body() {
		return journal.Op{Kind: journal.OpWrite, Data: block}, err
	}
	return journal.Op{Kind: journal.OpHeader, Data: block}, err
}

// PutHeader implements chunkfile.Owner.
func (f *openFile) PutHeader(block []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.place(block)
	return err
}

// Emptied implements chunkfile.Owner: an empty file has no sidecar.
func (f *openFile) Emptied() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.covered, f.apart = 0, false
	if h := f.secrets.header; h != nil {
		f.v.doom(f.n, f.home, h.File)
	}
}

func (v *Volume) removeSidecars(n, home *Node, id envelope.ID) {
	name := v.place.Sidecar(id[:])
	if name == "" || v.held() != nil {
		return
	}
	v.ns.RLock()
	defer v.ns.RUnlock()
	at := v.spots(n, home)
	defer at.release()
	for _, d := range at.dirs {
		v.removeUnshared(d, name, n.key.ino)
	}
}

// Through implements chunkfile.Owner: the kernel holds back what programs write,
// and once it has written it out does not ask for more.
func (f *openFile) Through() bool { return true }

// Synced implements chunkfile.Owner. The promise is not synced itself: after a
// crash without it the bytes are there, and only somebody's cutting them off
// would not be noticed.
func (f *openFile) Synced(size int64) {
	if !f.Covered() {
		return
	}
	e := f.entry(journal.Promise)
	e.Durable = size
	_, _ = f.v.journal.Append(e)
}
