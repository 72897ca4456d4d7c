package chunkfile

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/fs/journal"
)

// sealRun seals consecutive chunks, the first of index from, and stores them.
func (f *File) sealRun(from int64, parts [][]byte) error {
	final := f.last(f.size)
	size := 0
	for _, p := range parts {
		size += len(p) + dare.Overhead
	}
	prefix, err := f.prefix(from)
	if err != nil {
		return err
	}
	buf := getBuf(len(prefix) + size)
	defer putBuf(buf)
	copy(*buf, prefix)
	out := (*buf)[len(prefix):]
	err = parallel(len(parts), func(k int) error {
		at := int64(k) * f.slotSize()
		_, err := f.code.Seal(out[at:at], parts[k], from+int64(k), from+int64(k) == final)
		return err
	})
	if err != nil {
		return err
	}
	end := from + int64(len(parts)) - 1
	if err := f.store(f.slot(from)-int64(len(prefix)), *buf, end == final); err != nil {
		return err
	}
	f.header = true
	switch {
	case end == final:
		f.lastOn = final
	case f.lastOn >= from && f.lastOn <= end:
		f.lastOn = -1
	}
	return nil
}

// prefix puts the header on the disk where it is missing or says too little. It
// returns what must stand before the first chunk if the caller's write, of
// chunk from, can take that along.
func (f *File) prefix(from int64) ([]byte, error) {
	switch {
	case !f.header:
		block, err := f.own.NewHeader(f.sparse)
		if err != nil || from == 0 {
			return block, err
		}
		if len(block) > 0 {
			if err := f.append(0, block); err != nil {
				return nil, err
			}
		}
	case f.resign:
		op, err := f.own.Header(f.sparse)
		if err == nil {
			err = f.change(op)
		}
		if err != nil {
			return nil, err
		}
	}
	f.header, f.resign = true, false
	return nil, nil
}

// smallGrowth is how many new bytes may go through the journal, where that
// saves a sync.
const smallGrowth = 512 << 10

// store writes bytes to the store file; end says that the file ends with them.
// What is new goes before what replaces bytes in place, so that a full disk
// shows before anything is replaced, and is taken away again if it fails. The
// slot that the old end is in goes through the journal whole: a crash may have
// what the journal has, and nothing of the rest.
func (f *File) store(off int64, data []byte, end bool) error {
	after := off + int64(len(data))
	write := journal.Op{Kind: journal.OpWrite, Off: off, Data: data}
	over := f.overlap(off, int64(len(data)))
	switch {
	case end && f.diskSize > after:
		return f.change(write, journal.Op{Kind: journal.OpTruncate, Off: after})
	case over == int64(len(data)), f.growsInJournal(off, over, int64(len(data))):
		return f.change(write)
	}
	was := f.diskSize
	if err := f.append(off+over, data[over:]); err != nil {
		return err
	}
	if over == 0 {
		return nil
	}
	write.Data = data[:over]
	err := f.change(write)
	if err != nil {
		f.giveUp(was)
	}
	return err
}

// overlap returns how many of n bytes at off lie in slots that have bytes on the
// disk.
func (f *File) overlap(off, n int64) int64 {
	if off >= f.diskSize {
		return 0
	}
	slots := (f.diskSize - int64(f.geo.Base) + f.slotSize() - 1) / f.slotSize()
	return min(n, f.slot(slots)-off)
}

// growsInJournal says that a write of n bytes, over of them in place, had better
// go through the journal as a whole: because it has to be synced anyway, or
// would have to be to cover the file. A file's first bytes never do: the journal
// knows files by their headers.
func (f *File) growsInJournal(off, over, n int64) bool {
	if f.diskSize == 0 || f.bytes+n > smallGrowth {
		return false
	}
	return over > 0 && off < f.durable || len(f.pending) > 0 || !f.own.Covered() || f.cutIn != 0 && f.own.Live(f.cutIn)
}

// append writes new bytes at the end of the store file.
func (f *File) append(off int64, data []byte) error {
	if err := f.finish(); err != nil {
		return err
	}
	fence := f.cutIn != 0 && f.own.Live(f.cutIn)
	if fence { // or the next mount would cut the file there once more
		if err := f.drain(); err != nil {
			return err
		}
		if err := f.disk.Sync(); err != nil {
			f.syncErr = err
			return err
		}
	}
	f.unsynced = true
	err := f.own.Direct(fence, f.promised, func() error { return f.disk.WriteAt(data, off) })
	if err != nil {
		f.giveUp(f.diskSize)
		return err
	}
	if fence {
		f.cutIn = 0
	}
	f.diskSize = off + int64(len(data))
	return nil
}

// giveUp takes new bytes at the end away again that did not all fit.
func (f *File) giveUp(size int64) {
	f.diskSize = size
	if f.disk.Truncate(size) != nil {
		f.putOff(pending{op: journal.Op{Kind: journal.OpTruncate, Off: size}})
	}
}

// maxPending bounds what a file keeps in memory until the journal is durable, in
// bytes and in operations.
const (
	maxPending = 4 << 20
	maxOps     = 256
)

// change does operations that change bytes in place. When it returns nil they
// count as done: they are in the journal, and in pending until the journal is on
// the disk, if they change what is durable, or if they failed on the disk.
func (f *File) change(ops ...journal.Op) error {
	if err := f.finish(); err != nil {
		return err
	}
	if err := f.room(ops[0]); err != nil {
		return err
	}
	at, epoch, err := f.own.Log(now(), f.promised, ops...)
	if err != nil {
		return err
	}
	f.logged = at
	wait := false
	for _, op := range ops {
		wait = wait || f.protected(op)
	}
	for _, op := range ops {
		if len(f.pending) > 0 || wait && f.own.Durable() < at || f.apply(op) != nil {
			f.putOff(pending{op: op, at: at, wait: wait})
		}
		f.diskSize = sizeAfter(f.diskSize, op)
		if op.Kind == journal.OpTruncate {
			f.cutIn = epoch
			f.durable, f.promised = min(f.durable, op.Off), min(f.promised, op.Off)
		}
	}
	if f.bytes > maxPending || len(f.pending) > maxOps {
		_ = f.drain() // they are in the journal: what fails now is told by the next change, before it does anything
	}
	return nil
}

// protected reports whether an operation changes bytes that are durable.
func (f *File) protected(op journal.Op) bool {
	return op.Off < f.durable || op.Kind == journal.OpHeader && f.durable > 0
}

// sizeAfter returns the size of a store file of size bytes after an operation.
func sizeAfter(size int64, op journal.Op) int64 {
	switch op.Kind {
	case journal.OpWrite:
		return max(size, op.Off+int64(len(op.Data)))
	case journal.OpTruncate:
		return op.Off
	}
	return size
}

// room takes the space of what an operation writes: behind the end, or over a
// hole, a full disk would show when it is too late to call the change off.
func (f *File) room(op journal.Op) error {
	end := op.Off + int64(len(op.Data))
	if op.Kind != journal.OpWrite || !f.sparse && end <= f.diskSize {
		return nil
	}
	err := f.disk.Allocate(unix.FALLOC_FL_KEEP_SIZE, op.Off, end-op.Off)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	return err
}

// pending is an operation that counts as done. wait: not before the journal is
// on the disk up to at.
type pending struct {
	op   journal.Op
	at   journal.LSN
	wait bool
}

// putOff keeps an operation for later. Reads show it as done.
func (f *File) putOff(p pending) {
	p.op.Data = append([]byte(nil), p.op.Data...)
	f.pending = append(f.pending, p)
	f.bytes += int64(len(p.op.Data))
	if f.written == (unix.Timespec{}) {
		f.written = now()
	}
}

// drain does all that is pending, with the journal synced for it.
func (f *File) drain() error {
	if f.logged > f.own.Durable() {
		if err := f.own.Commit(f.logged); err != nil {
			return err
		}
	}
	return f.finish()
}

// finish does what is pending, in its order, as far as the journal is on the
// disk. The error is the disk's. The store file keeps the time that it has by
// now: it is that of the write, or one that somebody set since.
func (f *File) finish() error {
	if len(f.pending) == 0 {
		return nil
	}
	durable, n := f.own.Durable(), 0
	for n < len(f.pending) && (!f.pending[n].wait || f.pending[n].at <= durable) {
		n++
	}
	if n == 0 {
		return nil
	}
	mtime, err := f.disk.Mtime()
	if err != nil {
		return err
	}
	done := 0
	for done < n && err == nil {
		if err = f.apply(f.pending[done].op); err == nil {
			f.bytes -= int64(len(f.pending[done].op.Data))
			done++
		}
	}
	if done > 0 {
		_ = f.disk.SetTimes(unix.Timespec{Nsec: unix.UTIME_OMIT}, mtime)
	}
	if f.pending = f.pending[done:]; len(f.pending) == 0 {
		f.pending = nil
	}
	return err
}

func (f *File) apply(op journal.Op) error {
	return Apply(f.disk, f.own.PutHeader, op)
}

// settle brings the disk to the state that memory takes for granted: what is
// pending is done as far as may be, and after a rollback the end is sealed as
// the end.
func (f *File) settle() error {
	if err := f.finish(); err != nil {
		return err
	}
	switch {
	case !f.ragged:
		return nil
	case f.size == 0:
		return f.empty()
	}
	if err := f.load(f.last(f.size)); err != nil {
		return err
	}
	f.hot.dirty = true
	if err := f.evict(); err != nil {
		return err
	}
	f.ragged = false
	return nil
}

// Apply does operations of the journal on a store file, in their order. It is
// idempotent. putHeader puts a header where headers live.
func Apply(disk Disk, putHeader func(block []byte) error, ops ...journal.Op) error {
	for _, op := range ops {
		var err error
		switch op.Kind {
		case journal.OpWrite:
			err = disk.WriteAt(op.Data, op.Off)
		case journal.OpPunch:
			err = disk.Punch(op.Off, op.Size)
		case journal.OpTruncate:
			err = disk.Truncate(op.Off)
		case journal.OpHeader:
			err = putHeader(op.Data)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
