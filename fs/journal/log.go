package journal

import (
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// Options are limits of a Log. Zero values stand for the defaults.
type Options struct {
	Segment int64            // bytes of a segment after which a checkpoint is due; 32 MiB
	Age     time.Duration    // since an epoch's first use, after which one is due; 20 s
	Now     func() time.Time // the clock; time.Now
	// Held is asked before each change of the segments, with locks of the log
	// held. An error, which must last, stops the log for good, as that error: the
	// segments may be another's. nil: nobody else can have them.
	Held func() error
}

const (
	defaultSegment = 32 << 20
	defaultAge     = 20 * time.Second
	reserve        = 1 << 20 // bytes allocated ahead of the end
)

// Log is the journal of one store, open for the one writer. Methods are safe
// for concurrent use.
//
// Locks are taken in the order checkpoint, gate, sync, mu.
type Log struct {
	meta *backing.Dir
	key  *keymem.Key
	o    Options
	wrap func(i int, f file) file // for tests; nil

	checkpoint sync.Mutex   // Checkpoint, Recovered, Close
	gate       sync.RWMutex // held shared by Direct
	sync       sync.Mutex   // at most one fdatasync: the kernel tells a failure once

	mu         sync.Mutex
	dir        *backing.Dir // nil: not made yet
	files      [2]file
	placed     bool      // both files and their names are on the disk
	chain      *chain    //
	cur        uint32    // the current epoch, 0: none has begun
	last       uint32    // the greatest epoch of any header
	oldest     uint32    // the oldest live epoch
	begun      time.Time // of cur
	since      time.Time // when oldest began
	firstUse   time.Time // of cur, zero: none
	mac        [macLen]byte
	end        int64 // of the records of cur
	reserved   int64 // bytes of cur's file that are allocated, as far as known
	resume     bool  // another process began cur
	recovering bool
	closed     bool
	lsn        LSN

	durable  atomic.Uint64 // LSN
	syncs    atomic.Uint64
	failed   atomic.Pointer[error]
	pressure pressure
}

// Open opens the journal for the one writer, who holds the store's lock, and
// tells what the last one left. Until Recovered, what is appended continues
// that. Nothing is written before the first Append, Direct or Epoch, except
// that what Found holds is written once more in place and synced, so that
// recovery may rely on it. meta is the store's own directory and stays open
// until Close; the key is copied.
func Open(meta *backing.Dir, key *keymem.Key, o Options) (*Log, *Found, error) {
	return open(meta, key, o, nil)
}

func open(meta *backing.Dir, key *keymem.Key, o Options, wrap func(int, file) file) (*Log, *Found, error) {
	if o.Segment <= 0 {
		o.Segment = defaultSegment
	}
	if o.Age <= 0 {
		o.Age = defaultAge
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	l := &Log{meta: meta, key: key.Clone(), o: o, wrap: wrap, chain: newChain(key)}
	l.pressure.init()
	found, err := l.load()
	if err != nil {
		l.release()
		return nil, nil, fmt.Errorf("journal: %w", err)
	}
	return l, found, nil
}

// load opens what there is and takes up its state.
func (l *Log) load() (*Found, error) {
	dir, err := l.meta.OpenDir(dirName)
	if errors.Is(err, unix.ENOENT) {
		return &Found{}, nil
	}
	if err != nil {
		return nil, err
	}
	l.dir = dir
	for i, name := range fileNames {
		if err := l.openFile(i, name, unix.O_RDWR); err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, err
		}
	}
	st, err := readState(&l.files, l.key)
	if err != nil {
		return nil, err
	}
	l.last = st.last
	if len(st.found.Epochs) == 0 {
		return &st.found, nil
	}
	n := st.newest
	l.cur, l.oldest = n.epoch, st.found.Epochs[0]
	l.begun, l.since = n.begun, st.found.Since
	l.mac, l.end = n.mac, n.end
	l.resume, l.recovering = true, true
	return &st.found, l.secure(st)
}

func (l *Log) openFile(i int, name string, flags int) error {
	f, err := l.dir.Open(name, flags, 0o600)
	if err != nil {
		return err
	}
	l.files[i] = f
	if l.wrap != nil {
		l.files[i] = l.wrap(i, f)
	}
	return nil
}

// secure brings the live segments to the disk. Their last writer may have been
// killed before it synced them, or after a sync failed: then the kernel holds
// pages that it takes for clean and the disk does not have. Writing the same
// bytes over themselves makes it write them, and cannot harm those that are
// there.
func (l *Log) secure(st *state) error {
	for i, f := range l.files {
		if !st.secures(i) {
			continue
		}
		w := &window{f: f, size: st.ends[i]}
		for off := int64(0); off < w.size; off += windowLen {
			b, err := w.at(off, int(min(windowLen, w.size-off)))
			if err == nil {
				err = f.WriteAt(b, off)
			}
			if err != nil {
				return err
			}
		}
		l.syncs.Add(1)
		if err := f.Datasync(); err != nil {
			return err
		}
	}
	return nil
}

// Epoch returns the current epoch. If none has begun it begins one, which is
// on the disk when Epoch returns. Asking is no use of the epoch: a file's birth
// counts as one when Direct or Append follows.
func (l *Log) Epoch() (uint32, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.ready(); err != nil {
		return 0, err
	}
	return l.cur, nil
}

// LastEpoch returns the greatest epoch that has begun, 0 if none has.
func (l *Log) LastEpoch() uint32 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// Beyond begins an epoch later than all those up to epoch, of a log in which
// none has begun. It is for a store that lost its journal: files of it were born
// in epochs that must not come again.
func (l *Log) Beyond(epoch uint32) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch err := l.Err(); {
	case l.closed:
		return ErrClosed
	case err != nil:
		return err
	case l.cur != 0:
		return ErrBegun
	}
	l.last = max(l.last, epoch)
	return l.begin()
}

// ready begins an epoch if none has begun. l.mu is held.
func (l *Log) ready() error {
	if l.closed {
		return ErrClosed
	}
	if err := l.Err(); err != nil {
		return err
	}
	if l.cur != 0 {
		return nil
	}
	return l.begin()
}

// begin begins the next epoch; none before it is live. l.mu is held.
func (l *Log) begin() error {
	if err := l.place(); err != nil {
		return err
	}
	now := l.o.Now()
	if l.last == math.MaxUint32 {
		return ErrEpochs
	}
	mac, err := l.writeHeader(newHeader(l.last+1, l.last+1, now, now))
	if err != nil {
		return err
	}
	l.turnTo(l.last+1, mac, now)
	l.oldest, l.since = l.cur, now
	return nil
}

// turnTo makes epoch, whose header is on the disk, the current one. l.mu is held.
func (l *Log) turnTo(epoch uint32, mac [macLen]byte, now time.Time) {
	l.cur, l.last = epoch, epoch
	l.mac, l.end, l.reserved, l.resume = mac, headerLen, reserve, false
	l.begun, l.firstUse = now, time.Time{}
}

// place makes the directory and both files, with their names on the disk and
// some room. The second is made with the first so that a checkpoint does not
// need room of a disk that is full. l.mu is held.
func (l *Log) place() error {
	if l.placed {
		return nil
	}
	if l.dir == nil {
		if err := l.meta.Mkdir(dirName, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("journal: %w", err)
		}
		dir, err := l.meta.OpenDir(dirName)
		if err != nil {
			return fmt.Errorf("journal: %w", err)
		}
		l.dir = dir
	}
	for i, name := range fileNames {
		if l.files[i] == nil {
			if err := l.openFile(i, name, unix.O_RDWR|unix.O_CREAT); err != nil {
				return fmt.Errorf("journal: %w", err)
			}
		}
		// Room makes overwriting possible on a disk that is full; there may be
		// none, or the file system may not know how.
		_ = l.files[i].Allocate(unix.FALLOC_FL_KEEP_SIZE, 0, reserve)
	}
	// Also if they were there: whoever made them may have been killed before.
	if err := errors.Join(l.dir.Sync(), l.meta.Sync()); err != nil {
		return l.abort(err)
	}
	l.placed = true
	return nil
}

// writeHeader makes a header durable at the beginning of its file, which holds
// no live epoch. It needs no lock but whatever keeps others from that file.
func (l *Log) writeHeader(h *header) (mac [macLen]byte, err error) {
	f := l.files[h.epoch%2]
	b, mac := h.encode(l.key)
	if err := f.WriteAt(b, 0); err != nil {
		return mac, errors.Join(fmt.Errorf("journal: begin epoch %d: %w", h.epoch, err), l.unbegin(f))
	}
	l.syncs.Add(1)
	if err := f.Datasync(); err != nil {
		return mac, l.abort(err)
	}
	return mac, nil
}

// unbegin takes back a header whose write failed, should the part that counts
// have been written. The error is of the sync.
func (l *Log) unbegin(f file) error {
	size, err := f.Size()
	if err != nil || f.WriteAt(make([]byte, min(headerLen, size)), 0) != nil {
		return nil // then it is an epoch without records, in which nothing is born
	}
	l.syncs.Add(1)
	if err := f.Datasync(); err != nil {
		return l.abort(err)
	}
	return nil
}

var bufs = sync.Pool{New: func() any { return new([]byte) }}

// Append writes a record of e at the end of the segment, from where it survives
// the process but not a power cut; see Commit. It never waits for a checkpoint,
// and syncs only to begin an epoch. After an error the record does not count,
// and the log goes on unless it is aborted.
func (l *Log) Append(e Entry) (LSN, error) {
	lsn, _, err := l.append(&e)
	return lsn, err
}

// append is Append that tells the record's epoch as well.
func (l *Log) append(e *Entry) (LSN, uint32, error) {
	buf := bufs.Get().(*[]byte)
	defer bufs.Put(buf)
	record, err := appendEntry((*buf)[:0], e)
	if err != nil {
		return 0, 0, err
	}
	*buf = record
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.ready(); err != nil {
		return 0, 0, err
	}
	if err := l.put(record); err != nil {
		return 0, 0, err
	}
	l.use()
	return l.lsn, l.cur, nil
}

// put writes a record, its MAC still zero, at the end. l.mu is held, and an
// epoch has begun.
func (l *Log) put(record []byte) error {
	if l.resume {
		// What follows must not chain like what the process before wrote here
		// and never had on the disk: equal records would bring that back.
		r := appendRecordHead(nil, resume, resumeLen)
		r = append(r, make([]byte, resumeLen)...)
		_, _ = rand.Read(r[recordHead:])
		if err := l.write(r); err != nil {
			return err
		}
		l.resume = false
	}
	return l.write(record)
}

func (l *Log) write(record []byte) error {
	f := l.files[l.cur%2]
	n := int64(len(record))
	if l.end+n+headerLen > l.reserved {
		err := f.Allocate(unix.FALLOC_FL_KEEP_SIZE, l.end, n+reserve)
		switch {
		case err == nil:
			l.reserved = l.end + n + reserve
		case errors.Is(err, unix.EOPNOTSUPP):
			l.reserved = math.MaxInt64
		}
	}
	mac := l.chain.next(l.mac, record)
	copy(record[8:recordHead], mac[:])
	if err := f.WriteAt(record, l.end); err != nil {
		l.blank(f, n)
		return fmt.Errorf("journal: %w", err)
	}
	l.mac, l.end = mac, l.end+n
	l.lsn++
	return nil
}

// blank makes sure that a record whose write failed does not count, should all
// of it have been written. Best effort: such a write is not known to happen,
// and the next record goes over it.
func (l *Log) blank(f file, n int64) {
	if size, err := f.Size(); err == nil && size > l.end {
		_ = f.WriteAt(make([]byte, min(recordHead, n, size-l.end)), l.end)
	}
}

// use notes that the current epoch is not empty. l.mu is held.
func (l *Log) use() {
	if l.firstUse.IsZero() {
		l.firstUse = l.o.Now()
	}
}

// Direct calls write, which may change store files in place, while no
// checkpoint can come between: what it writes is on the disk before the epoch
// that is current at the call is done. covered is the newest epoch in which the
// file's growth is on record: that of its birth, or of its last Grow. If that
// is not the current one, an entry of grow is made durable first, and covered
// set. Only the caller touches covered. write must not call Direct, Checkpoint,
// Recovered or Close.
func (l *Log) Direct(covered *uint32, grow func() Entry, write func() error) error {
	l.gate.RLock()
	defer l.gate.RUnlock()
	l.mu.Lock()
	err := l.ready()
	epoch := l.cur
	if err == nil {
		l.use()
	}
	l.mu.Unlock()
	if err != nil {
		return err
	}
	if *covered != epoch {
		e := grow()
		lsn, epoch, err := l.append(&e)
		if err != nil {
			return err
		}
		if err := l.Commit(lsn); err != nil {
			return err
		}
		*covered = epoch
	}
	return write()
}

// Last returns the LSN of the newest record.
func (l *Log) Last() LSN {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lsn
}

// Oldest returns the oldest live epoch, 0 if there is none.
func (l *Log) Oldest() uint32 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.oldest
}
