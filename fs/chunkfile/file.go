package chunkfile

import (
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/fs/record"
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
	SetTimes(atime, mtime unix.Timespec) error
	Sync() error
	Datasync() error
}

// Owner is what a File needs from the volume that it belongs to. Calls come
// with the file locked; they must not call back into it.
type Owner interface {
	// Begin is called before every change of the store file; it enters the file
	// in the writing list, once.
	Begin() error
	// Redo makes ops replayable before they are done in place; the record
	// replaces the one before. No ops: nothing is to be replayed any more.
	Redo(ops []record.Op) error
	// Header puts the header where it lives and returns the bytes that stand
	// before the first chunk (Geometry.Base of them).
	Header(sparse bool) ([]byte, error)
	// Emptied is called after the store file was cut to nothing.
	Emptied()
	// Tight reports that the store is so full that writes should show it now;
	// n is the number of plaintext bytes just written.
	Tight(n int) bool
	// Synced is called when size bytes of plaintext are durable.
	Synced(size int64) error
}

// Config describes a file as it is opened.
type Config struct {
	Disk   Disk
	Geo    dare.Geometry
	Codec  *dare.Codec // nil for an empty file that is only read
	Owner  Owner
	Size   int64 // bytes of the store file
	Sparse bool
}

// File is an open file. It is safe for concurrent use. It owns neither its
// Disk nor its Codec.
type File struct {
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
	stale    bool          // the redo record of the moment must go before the file grows
	pending  []record.Op   // operations that count as done, but failed on the disk
	ragged   bool          // the end on the disk is not that of the file, after a rollback

	hot     hotChunk
	written unix.Timespec // time of the newest write, if untold
	untold  bool          // the store file's mtime is not that of the newest write
	failed  error         // of a flush in the background, for the next Flush or Fsync

	// What others may ask without waiting for a write or an fsync to end.
	pubSize  atomic.Int64
	pubDirty atomic.Pointer[unix.Timespec] // nil if memory holds nothing
}

// unlock publishes the state and lets go of mu.
func (f *File) unlock() {
	f.publish()
	f.mu.Unlock()
}

func (f *File) publish() {
	f.pubSize.Store(int64(f.size))
	if (!f.hot.valid || !f.hot.dirty) && len(f.pending) == 0 && !f.ragged {
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
	f := &File{disk: c.Disk, geo: c.Geo, code: c.Codec, own: c.Owner, diskSize: c.Size, sparse: c.Sparse, lastOn: -1}
	size, err := c.Geo.PlainSize(dare.CipherOff(c.Size))
	if err != nil {
		return nil, fmt.Errorf("store file of %d bytes: %w", c.Size, ErrSize)
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

func now() (ts unix.Timespec) {
	// The kernel stamps files with the coarse clock; a finer one would make
	// files of this mount look newer than files written after them elsewhere.
	_ = unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &ts)
	return ts
}
