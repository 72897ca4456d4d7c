package cryptfs

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
	"github.com/kmsfs/kmsfs/fs/journal"
	"github.com/kmsfs/kmsfs/fs/record"
)

// clockSlack is how far the clock may have been set back while the store was
// written.
const clockSlack = 10 * time.Minute

// recovery finishes what a crash left: what the journal has is done in place,
// files that were growing are brought to a whole state, and what never got
// whole goes. (docs/format.md, section 9)
type recovery struct {
	v     *Volume
	found *journal.Found
	since unix.StatxTimestamp // objects not changed since then are on the disk

	want map[envelope.ID][]journal.Entry
	inos map[uint64]bool

	mu      sync.Mutex
	files   map[inoKey]bool // done, or being done
	left    map[envelope.ID]bool
	partial bool // something could not be read, and may be one of left
	group   *errgroup.Group
}

func (v *Volume) recover(ctx context.Context, f *journal.Found) error {
	if len(f.Epochs) == 0 {
		return nil
	}
	v.log.Warn("the store was not unmounted cleanly: finishing what was being written", "records", len(f.Entries))
	if f.Damage != nil {
		v.log.Error("journal: files that were being written may be damaged", "error", f.Damage, "audit", true)
	}
	r := &recovery{
		v: v, found: f, want: map[envelope.ID][]journal.Entry{}, inos: map[uint64]bool{},
		files: map[inoKey]bool{}, left: map[envelope.ID]bool{},
	}
	since := f.Since.Add(-clockSlack)
	r.since = unix.StatxTimestamp{Sec: since.Unix()}
	for _, e := range f.Entries {
		r.want[e.File] = append(r.want[e.File], e)
		r.inos[e.Ino], r.left[e.File] = true, true
	}
	if err := r.run(ctx); err != nil {
		return err
	}
	if err := v.root.SyncFS(); err != nil {
		return err
	}
	if len(v.loose.broken) > 0 {
		v.loose.epochs = f.Epochs
		v.journal.Resume()
		return v.Checkpoint() // with their records alone: those of other files must not be done once more
	}
	return v.journal.Recovered()
}

// skip goes on without something that cannot be read: it is no reason to refuse
// the rest. What the journal has for files that were not seen stays there.
func (r *recovery) skip(entry string, err error) {
	r.v.log.Error("recovery cannot read a part of the store", "entry", entry, "error", err, "audit", true)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.partial = true
}

// run looks at what was changed lately and at files that the journal knows by
// their inode numbers, and then, if some of those are not there (the store was
// copied), at all.
func (r *recovery) run(ctx context.Context) error {
	for _, all := range []bool{false, true} {
		var wctx context.Context
		r.group, wctx = errgroup.WithContext(ctx)
		r.group.SetLimit(4 * runtime.GOMAXPROCS(0))
		err := r.dir(wctx, r.v.root, true, all)
		if werr := r.group.Wait(); werr != nil {
			err = werr
		}
		if err != nil || len(r.left) == 0 {
			return err
		}
	}
	if r.partial { // else the rest was removed
		for id := range r.left {
			r.v.broke(id, r.want[id])
		}
	}
	return nil
}

// broke keeps a file's records in the journal, until mend.
func (v *Volume) broke(id envelope.ID, entries []journal.Entry) {
	v.loose.mu.Lock()
	defer v.loose.mu.Unlock()
	v.loose.broken[id] = entries
}

func (r *recovery) recent(st backing.Stat) bool { return st.Ctime.Sec >= r.since.Sec }

// dir recovers a directory and what is below it.
func (r *recovery) dir(ctx context.Context, d *backing.Dir, top, all bool) error {
	if err := errors.Join(ctx.Err(), r.v.held()); err != nil {
		return err
	}
	var entries []backing.Entry
	err := lifted(d, func() (err error) { entries, err = d.ReadDir(); return err })
	if err != nil {
		r.skip("what is in a directory", err)
		return nil
	}
	for _, e := range entries {
		switch {
		case top && e.Name == metaDir:
		case isTemp(e.Name):
			r.v.clearTemp(d, e)
		case isInternal(e.Name):
		default:
			if err := r.entry(ctx, d, e, all); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *recovery) entry(ctx context.Context, d *backing.Dir, e backing.Entry, all bool) error {
	if e.Type != unix.S_IFDIR && e.Type != unix.S_IFREG && e.Type != 0 {
		return nil
	}
	st, err := d.Stat(e.Name)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		r.skip(e.Name, err)
		return nil
	}
	switch st.Type() {
	case unix.S_IFDIR:
		return r.subdir(ctx, d, e.Name, st, all)
	case unix.S_IFREG:
		if st.Size == 0 || !all && !r.recent(st) && !r.inos[st.Ino] || !r.claim(st) {
			return nil
		}
		own, err := d.OpenDir(".")
		if err != nil {
			return err
		}
		r.group.Go(func() error {
			defer func() { _ = own.Close() }()
			return r.file(ctx, own, e.Name, st)
		})
	}
	return nil
}

// claim reports whether a file is looked at under this name: not if it has
// others, and was looked at.
func (r *recovery) claim(st backing.Stat) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := keyOf(st)
	if r.files[k] {
		return false
	}
	r.files[k] = true
	return true
}

// subdir recovers a directory. One whose record did not get to the disk was
// never synced, and neither was anything in it.
func (r *recovery) subdir(ctx context.Context, d *backing.Dir, entry string, st backing.Stat, all bool) error {
	sub, err := d.OpenDir(entry)
	if err != nil {
		r.skip(entry, err)
		return nil
	}
	defer func() { _ = sub.Close() }()
	rec := error(nil)
	if r.recent(st) {
		rec = lifted(sub, func() error { _, _, err := readDirRecord(sub); return err })
	}
	if rec == nil || !errors.Is(rec, ErrDirRecord) {
		return r.dir(ctx, sub, false, all)
	}
	if err := r.v.quarantine(d, entry); err != nil { // a full disk: it can be removed all the same
		r.v.log.Error("directory without a record after a crash could not be moved to the quarantine", "entry", entry, "error", err)
		return nil
	}
	r.v.log.Warn("directory without a record after a crash: moved to the quarantine", "entry", entry)
	r.v.counters.repairs.Add(1)
	return nil
}

// needs reports whether a file may have been written just before the crash. If
// that one cannot be read nothing tells how it has to end, now or later.
func (r *recovery) needs(st backing.Stat) bool { return r.recent(st) || r.inos[st.Ino] }

// file recovers a file that may need it.
func (r *recovery) file(ctx context.Context, d *backing.Dir, entry string, st backing.Stat) error {
	v := r.v
	unread := func(err error) error {
		if r.needs(st) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("recovery: store file %s, which was being written: %w", entry, err)
		}
		r.skip(entry, err)
		return nil
	}
	f, err := v.openEntry(d, entry, unix.O_RDWR)
	if err != nil {
		return unread(err)
	}
	defer func() { _ = f.Close() }()
	block, err := v.readBlock(f, []*backing.Dir{d}, st)
	var h *envelope.Header
	if err == nil {
		h, err = envelope.Parse(block)
	}
	if chunkfile.IsDamage(err) {
		if r.recent(st) {
			return r.headless(d, entry, f)
		}
		return nil // damage of another kind, for fsck
	}
	if err != nil {
		return unread(err)
	}
	entries := r.want[h.File]
	if len(entries) == 0 && !r.found.Live(h.Birth) {
		return nil
	}
	r.mu.Lock()
	delete(r.left, h.File)
	r.mu.Unlock()
	did, err := r.finish(ctx, &torn{dir: d, entry: entry, disk: f, head: h, entries: entries})
	switch {
	case err != nil && ctx.Err() != nil:
		return ctx.Err()
	case err != nil && v.journal.Err() != nil:
		return err
	case err != nil:
		v.log.Error("file could not be repaired", "file", h.File, "entry", entry, "error", err, "audit", true)
	case did != "":
		v.counters.repairs.Add(1)
		v.log.Warn("file repaired after a crash", "file", h.File, "entry", entry, "did", did)
	}
	return nil
}

// headless empties a file that was new: it has contents, and not even a whole
// header. Nothing of it was promised to anybody; what there is goes to the
// quarantine first.
func (r *recovery) headless(d *backing.Dir, entry string, f *backing.File) error {
	err := r.v.quarantineCopy(entry, f)
	if err == nil {
		err = r.v.fence(f).Truncate(0)
	}
	if err != nil { // a full disk: it can be removed all the same
		r.v.log.Error("file without a whole header after a crash could not be emptied", "entry", entry, "error", err)
		return nil
	}
	r.v.counters.repairs.Add(1)
	r.v.log.Warn("file repaired after a crash", "entry", entry, "did", "it had no whole header and is empty now")
	return nil
}

// torn is a file that was being written at the crash.
type torn struct {
	dir     *backing.Dir
	entry   string
	disk    *backing.File
	head    *envelope.Header
	entries []journal.Entry // of its id
}

// finish does a file's operations and, if it was growing, repairs its end. If
// the disk does not let it, or its key is not to be had, that is done at another
// time: the journal keeps it.
func (r *recovery) finish(ctx context.Context, t *torn) (string, error) {
	v, h := r.v, t.head
	grow, mtime, growing := history(t.entries, h)
	owner := &repairOwner{v: v, file: h.File, birth: h.Birth, disk: t.disk, dirs: []*backing.Dir{t.dir}}
	ops := redo(t.entries, h.Birth)
	if err := chunkfile.Apply(v.fence(t.disk), owner.PutHeader, ops...); err != nil {
		v.broke(h.File, t.entries)
		return "", err
	}
	did := ""
	if len(ops) > 0 {
		did = "did what the journal had"
		if err := t.disk.SetTimes(unix.Timespec{Nsec: unix.UTIME_OMIT}, mtime); err != nil {
			v.broke(h.File, t.entries)
			return "", err
		}
	}
	if !growing && !r.found.Live(h.Birth) {
		return did, nil
	}
	cut, err := r.repair(ctx, t, owner, grow.Durable)
	if err != nil && !chunkfile.IsDamage(err) {
		v.broke(h.File, []journal.Entry{grow})
	}
	if cut != "" {
		did = cut
	}
	return did, err
}

// history says what a file's records tell of it: a record of its growth with
// what is promised, the time of its newest write, and whether it was growing.
func history(entries []journal.Entry, h *envelope.Header) (grow journal.Entry, mtime unix.Timespec, growing bool) {
	grow = journal.Entry{Kind: journal.Grow, File: h.File, Birth: h.Birth}
	for _, e := range entries {
		if e.Birth != h.Birth {
			continue
		}
		grow.Ino, grow.Durable = e.Ino, e.Durable
		growing = growing || e.Kind == journal.Grow
		if e.Kind == journal.Ops {
			mtime = e.Mtime
		}
		for _, op := range e.Ops {
			switch op.Kind {
			case journal.OpWrite:
				growing = growing || op.Off+int64(len(op.Data)) >= e.Durable // its end, perhaps not as the end
			case journal.OpTruncate:
				grow.Durable = min(grow.Durable, op.Off)
			}
		}
	}
	return grow, mtime, growing
}

func (r *recovery) repair(ctx context.Context, t *torn, owner *repairOwner, promised int64) (string, error) {
	v := r.v
	cl, err := v.classAt(ctx, t.dir)
	if err != nil {
		return "", err
	}
	st, err := t.disk.Stat()
	if err != nil {
		return "", err
	}
	block, err := v.place.Read(t.disk, []*backing.Dir{t.dir}) // what was done may have changed it
	if err != nil {
		return "", err
	}
	sec, err := v.unwrap(ctx, cl, block)
	if err != nil {
		return "", err
	}
	defer sec.wipe()
	return chunkfile.Repair(chunkfile.Config{
		Disk: v.fence(t.disk), Geo: cl.geo, Codec: sec.codec, Size: st.Size, Sparse: sec.header.Sparse, Owner: owner,
		State: chunkfile.State{Promised: promised},
	})
}

// idOf returns the file id in an entry's header, zero if it has none.
func (v *Volume) idOf(d *backing.Dir, entry string) envelope.ID {
	f, err := v.openEntry(d, entry, unix.O_RDONLY)
	if err != nil {
		return envelope.ID{}
	}
	defer func() { _ = f.Close() }()
	block, err := v.place.Read(f, []*backing.Dir{d})
	if err != nil {
		return envelope.ID{}
	}
	h, err := envelope.Parse(block)
	if err != nil {
		return envelope.ID{}
	}
	return h.File
}

// classAt returns the class of files in a directory, checked.
func (v *Volume) classAt(ctx context.Context, dir *backing.Dir) (*class, error) {
	cl, _, _, err := v.dirAt(ctx, dir)
	return cl, err
}

// dirAt reads and checks a directory's record without a node.
func (v *Volume) dirAt(ctx context.Context, dir *backing.Dir) (*class, *record.Dir, *nameenc.Cipher, error) {
	d, _, err := readDirRecord(dir)
	if err != nil {
		return nil, nil, nil, err
	}
	cl := v.classes[d.Class]
	if cl == nil {
		return nil, d, nil, fmt.Errorf("class of the directory's record: %w", ErrNoClass)
	}
	cipher, err := v.names(ctx, cl)
	if err != nil {
		return cl, d, nil, err
	}
	return cl, d, cipher, checkDirRecord(cipher, d)
}

// repairOwner lets Repair use the journal for a file that has no node.
type repairOwner struct {
	unlogged
	v     *Volume
	file  envelope.ID
	birth uint64
	disk  *backing.File
	dirs  []*backing.Dir
}

func (o *repairOwner) Log(mtime unix.Timespec, promised int64, ops ...journal.Op) (journal.LSN, uint32, error) {
	st, err := o.disk.Stat()
	if err != nil {
		return 0, 0, err
	}
	at, err := o.v.journal.Append(journal.Entry{
		Kind: journal.Ops, File: o.file, Birth: o.birth, Ino: st.Ino, Durable: promised, Mtime: mtime, Ops: ops,
	})
	return at, 0, err
}

func (o *repairOwner) Durable() journal.LSN          { return o.v.journal.Durable() }
func (o *repairOwner) Commit(upTo journal.LSN) error { return o.v.journal.Commit(upTo) }

func (o *repairOwner) PutHeader(block []byte) error {
	if err := o.v.held(); err != nil {
		return err
	}
	_, err := o.v.place.Write(o.disk, o.dirs, o.file, block)
	return err
}

// unlogged is the owner of a file that is only read, or that nobody sees before
// it is whole: nothing of it goes into the journal.
type unlogged struct{}

var errNoHeader = errors.New("cryptfs: headers of this file are not written")

func (unlogged) Log(unix.Timespec, int64, ...journal.Op) (journal.LSN, uint32, error) {
	return 0, 0, nil
}
func (unlogged) Live(uint32) bool                                 { return false }
func (unlogged) Durable() journal.LSN                             { return 0 }
func (unlogged) Commit(journal.LSN) error                         { return nil }
func (unlogged) Covered() bool                                    { return true }
func (unlogged) Direct(_ bool, _ int64, write func() error) error { return write() }
func (unlogged) NewHeader(bool) ([]byte, error)                   { return nil, errNoHeader }
func (unlogged) Header(bool) (journal.Op, error)                  { return journal.Op{}, errNoHeader }
func (unlogged) PutHeader([]byte) error                           { return errNoHeader }
func (unlogged) Emptied()                                         {}
func (unlogged) Through() bool                                    { return false }
func (unlogged) Synced(int64)                                     {}

// isTemp reports whether an entry is a temporary: something that was never
// given its name.
func isTemp(entry string) bool {
	return len(entry) > len(backing.TempPrefix) && entry[:len(backing.TempPrefix)] == backing.TempPrefix
}

// clearTemp removes a temporary. A directory goes only if nothing but the
// store's own records is in it.
func (v *Volume) clearTemp(d *backing.Dir, e backing.Entry) {
	if e.Type == unix.S_IFDIR {
		if checkEmpty(d, e.Name) == nil {
			removeDir(d, e.Name)
		}
		return
	}
	_ = d.Unlink(e.Name)
}
