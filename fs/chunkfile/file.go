package chunkfile

import (
	"fmt"
	"math"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/fs/journal"
)

// Disk is the store file. *backing.File is one, and its comments say what each
// call does; tests put others here, that fail.
type Disk interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) error
	Truncate(size int64) error
	Allocate(mode uint32, off, size int64) error
	Punch(off, size int64) error
	SeekData(off int64) (data int64, ok bool, err error)
	Mtime() (unix.Timespec, error)
	SetTimes(atime, mtime unix.Timespec) error
	Sync() error
	Datasync() error
}

// Owner is what a File needs from the volume that it belongs to. Calls come
// with the file locked; they must not call back into it.
type Owner interface {
	// Log puts operations into the journal: the next mount does them again.
	// promised bytes of the store file are certainly on the disk. at is their
	// place in the journal, epoch one in which, or before which, they are there.
	Log(mtime unix.Timespec, promised int64, ops ...journal.Op) (at journal.LSN, epoch uint32, err error)
	// Live reports whether operations logged in an epoch may be done again.
	Live(epoch uint32) bool
	// Durable returns the place in the journal up to which it is on the disk,
	// Commit has it on the disk up to a place.
	Durable() journal.LSN
	Commit(upTo journal.LSN) error
	// Covered reports whether the next mount knows that the store file may end
	// in something torn.
	Covered() bool
	// Direct calls write, which adds bytes to the end of the store file, with the
	// file covered. fence says that the disk has all that was logged before.
	Direct(fence bool, durable int64, write func() error) error
	// NewHeader puts a header for a new content where it lives and returns the
	// bytes that stand before the first chunk (Geometry.Base of them).
	NewHeader(sparse bool) ([]byte, error)
	// Header returns the operation that changes the header on the disk, and
	// PutHeader does it, where it is an OpHeader.
	Header(sparse bool) (journal.Op, error)
	PutHeader(block []byte) error
	// Emptied is called after the store file was cut to nothing.
	Emptied()
	// Through reports that a write is to be in the store file when it is
	// answered, with the time that the store file had (see holdTime).
	Through() bool
	// Synced is called when the store file is durable up to size bytes.
	Synced(size int64)
}

// Config describes a file as it is opened.
type Config struct {
	Disk   Disk
	Geo    dare.Geometry
	Codec  *dare.Codec // nil for an empty file that is only read
	Owner  Owner
	Size   int64 // bytes of the store file
	Sparse bool

	State

	// Lost is what Lost answered when the file was open before.
	Lost error
	// Pending is what the journal of a store that is only read has for the file.
	Pending []journal.Op
}

// State is what a file knows of what is on the disk for good. Whoever opens a
// file again in the same volume passes on what it said in the end.
type State struct {
	// Durable is how many bytes of the store file may be on the disk for good,
	// and must not be changed before the journal has the change; Unsynced says
	// that some of the others may not be.
	Durable  int64
	Unsynced bool
	// Promised is how many bytes of it certainly are: fewer after a crash are
	// damage.
	Promised int64
	// Logged is the place in the journal of the newest operation on the file,
	// 0: none.
	Logged journal.LSN
	// CutIn is the epoch of the newest truncate in the journal, 0: none. While it
	// is live the next mount would cut there once more.
	CutIn uint32
}

// File is an open file. It is safe for concurrent use. It owns neither its
// Disk nor its Codec.
type File struct {
	// turn is held around a write, and handed on in the order in which writes
	// came: mu alone lets a newcomer pass, and a write beyond the end before the
	// one that leads up to it leaves a hole that then is filled in place.
	turn chan struct{}
	mu   sync.RWMutex
	disk Disk
	geo  dare.Geometry
	code *dare.Codec
	own  Owner

	size     dare.PlainOff // plaintext bytes
	diskSize int64         // bytes of the store file
	lastOn   int64         // index of the chunk sealed as last on the disk, -1 if none is
	header   bool          // the header is on the disk
	sparse   bool          // the header says, or will say, that there are holes
	resign   bool          // the header on the disk does not say sparse yet
	ragged   bool          // the end on the disk is not that of the file, after a rollback

	pending  []pending // operations that count as done, in their order
	bytes    int64     // of them
	logged   journal.LSN
	durable  int64  // bytes of the store file that change only after the journal is durable
	promised int64  // bytes of the store file that a crash cannot take
	unsynced bool   // the store file has bytes that only its own fsync makes durable
	cutIn    uint32 // epoch of the newest truncate in the journal
	syncErr  error  // of an fsync: what it was for may be lost, whatever the next one says

	hot      hotChunk
	written  unix.Timespec // time of the newest write, if untold
	untold   bool          // the store file's mtime is not that of the newest write
	timeHeld bool          // and is put back: see holdTime
	failed   error         // of a flush in the background, for the next Flush or Fsync

	// What others may ask without waiting for a write or an fsync to end.
	pubSize    atomic.Int64
	pubPending atomic.Int64
	pubDirty   atomic.Pointer[unix.Timespec] // nil if memory holds nothing
}

// unlock publishes the state and lets go of mu.
func (f *File) unlock() {
	f.publish()
	f.mu.Unlock()
}

func (f *File) publish() {
	f.pubSize.Store(int64(f.size))
	f.pubPending.Store(f.bytes + int64(len(f.pending))) // a hole or a cut has no bytes
	if (!f.hot.valid || !f.hot.dirty) && !f.ragged {
		f.pubDirty.Store(nil)
		return
	}
	if old := f.pubDirty.Load(); old == nil || *old != f.written {
		ts := f.written
		f.pubDirty.Store(&ts)
	}
}

type hotChunk struct {
	index int64
	data  []byte
	valid bool
	dirty bool
}

// Open returns the file in the form that Config describes, with its last chunk
// opened and checked: a file that was cut, even at a chunk boundary, is an
// Integrity error here, before any of it is served.
func Open(c Config) (*File, error) {
	f := newFile(c)
	size, err := c.Geo.PlainSize(dare.CipherOff(f.diskSize))
	if err != nil {
		return nil, fmt.Errorf("store file of %d bytes: %w", f.diskSize, ErrSize)
	}
	f.size = size
	defer f.publish()
	if size == 0 {
		return f, nil
	}
	if c.Codec == nil {
		return nil, ErrNoKey
	}
	f.header = true
	f.lastOn = f.last(size)
	if err := f.load(f.lastOn); err != nil {
		return nil, err
	}
	return f, nil
}

func newFile(c Config) *File {
	f := &File{
		turn: make(chan struct{}, 1),
		disk: c.Disk, geo: c.Geo, code: c.Codec, own: c.Owner, diskSize: c.Size, sparse: c.Sparse, lastOn: -1,
		durable: c.Durable, unsynced: c.Unsynced, promised: c.Promised, logged: c.Logged, cutIn: c.CutIn, syncErr: c.Lost,
	}
	for _, op := range c.Pending {
		f.pending = append(f.pending, pending{op: op, at: math.MaxUint64, wait: true}) // for ever
		f.diskSize = sizeAfter(f.diskSize, op)
	}
	return f
}

// last returns the index of the last chunk of a file of this size, -1 for 0.
func (f *File) last(size dare.PlainOff) int64 { return f.geo.Chunks(size) - 1 }

func (f *File) slot(i int64) int64 { return int64(f.geo.Slot(i)) }

func (f *File) slotSize() int64 { return int64(f.geo.ChunkSize) + dare.Overhead }

// Upgrade gives the file a descriptor that can write and, where it had none, a
// codec.
func (f *File) Upgrade(disk Disk, code *dare.Codec) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.disk = disk
	if f.code == nil {
		f.code = code
	}
}

// Size returns the plaintext size in bytes. It does not wait.
func (f *File) Size() int64 { return f.pubSize.Load() }

// Dirty reports whether memory holds what the store file does not, and the time
// of the newest write then, which the store file does not show. It does not
// wait.
func (f *File) Dirty() (since unix.Timespec, dirty bool) {
	if ts := f.pubDirty.Load(); ts != nil {
		return *ts, true
	}
	return unix.Timespec{}, false
}

// Pending returns about how many bytes of operations are in the journal, and not
// in the store file yet: 0 only if there are none. It does not wait.
func (f *File) Pending() int64 { return f.pubPending.Load() }

func now() (ts unix.Timespec) {
	// The kernel stamps files with the coarse clock; a finer one would make
	// files of this mount look newer than files written after them elsewhere.
	_ = unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &ts)
	return ts
}
