package chunkfile

import (
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/fs/journal"
)

// Flush brings what memory holds to the store file, without waiting for the
// disk, and gives the store file the time of the newest write. It also answers
// an earlier failure that nobody was told of.
func (f *File) Flush() error {
	f.mu.Lock()
	defer f.unlock()
	err := f.flush()
	if f.failed != nil {
		err, f.failed = f.failed, nil
	}
	return err
}

// FlushLater is Flush for a caller who cannot tell the writer: a failure is
// kept for the next Flush or Fsync.
func (f *File) FlushLater() {
	f.mu.Lock()
	defer f.unlock()
	if err := f.flush(); err != nil && f.failed == nil {
		f.failed = err
	}
}

// FlushAt is Flush by a caller who knows the time of the newest write.
func (f *File) FlushAt(mtime unix.Timespec) error {
	f.mu.Lock()
	defer f.unlock()
	f.written, f.untold = mtime, true
	err := f.flushAs(true)
	if err != nil && f.failed == nil {
		f.failed = err // whoever asks may not be the writer
	}
	return err
}

// FlushNow is FlushAt by a caller who has just written.
func (f *File) FlushNow() error { return f.FlushAt(now()) }

func (f *File) flush() error { return f.flushAs(f.timeHeld || f.hot.valid && f.hot.dirty) }

// flushAs is flush; late says that the store file's own time would not be that
// of the newest write.
func (f *File) flushAs(late bool) error {
	if err := f.settle(); err != nil {
		return err
	}
	if err := f.evict(); err != nil {
		return err
	}
	if err := f.finish(); err != nil { // what evict could not do
		return err
	}
	if f.untold && (late || len(f.pending) > 0) { // the write just done was not the user's, or is to come
		if err := f.disk.SetTimes(unix.Timespec{Nsec: unix.UTIME_OMIT}, f.written); err != nil {
			return err
		}
	}
	f.untold = false
	return nil
}

// Fsync makes the file durable: Flush, before (what the owner must make durable
// first, such as a header elsewhere), then what is in the journal and the store
// file itself, each if there is anything. dataOnly is fdatasync(2)'s; before
// answers whether the store file has attributes to be made durable as well.
//
// A failure is told by every later Fsync too: the kernel forgets what it could
// not write, and calls the file clean.
func (f *File) Fsync(dataOnly bool, before func() (meta bool, err error)) error {
	f.mu.Lock()
	defer f.unlock()
	err := f.flush()
	if f.failed != nil {
		err, f.failed = f.failed, nil
	}
	if err == nil {
		err = f.syncErr
	}
	if err != nil {
		return err
	}
	meta, err := before()
	if err != nil {
		return err
	}
	if err := f.sync(meta || f.unsynced && !dataOnly); err != nil {
		f.syncErr = err
		return err
	}
	f.own.Synced(f.diskSize)
	return nil
}

func (f *File) sync(meta bool) error {
	switch {
	case meta:
		if err := f.disk.Sync(); err != nil {
			return err
		}
	case f.unsynced:
		if err := f.disk.Datasync(); err != nil {
			return err
		}
	}
	if f.logged > f.own.Durable() {
		if err := f.own.Commit(f.logged); err != nil {
			return err
		}
	}
	f.durable, f.promised, f.unsynced = f.diskSize, f.diskSize, false
	_ = f.finish() // what fails on the disk is in the journal, and is done again
	return nil
}

// Settle does in place what the journal has on the disk by now, and protects
// all of the store file from changes that the journal does not have: a
// checkpoint makes it durable next. What cannot be done goes into the journal
// again, and an end that is not sealed is: only a live epoch lets the next mount
// mend it. After an error the epoch before must not be done.
func (f *File) Settle() error {
	f.mu.Lock()
	defer f.unlock()
	if !f.sealedEnd() && (f.code == nil || f.flush() != nil) {
		if err := f.own.Direct(false, f.promised, func() error { return nil }); err != nil {
			return err
		}
	}
	err := f.finish()
	f.durable = max(f.durable, f.diskSize)
	if f.lastOn < 0 && f.diskSize > 0 && f.code != nil {
		// The end is in memory. Until it goes out the next mount has to know that
		// the disk's is not sealed as the end, and the epoch that says so is over.
		if err := f.own.Direct(false, f.promised, func() error { return nil }); err != nil {
			return err
		}
	}
	if len(f.pending) == 0 || f.pending[0].at > f.own.Durable() {
		return err
	}
	for i := range f.pending {
		p := &f.pending[i]
		if p.at, _, err = f.own.Log(f.written, f.promised, p.op); err != nil {
			return err
		}
		f.logged = max(f.logged, p.at)
	}
	return nil
}

// sealedEnd reports whether the store file ends in a chunk sealed as the last.
func (f *File) sealedEnd() bool {
	return f.diskSize == 0 || f.lastOn >= 0 && f.diskSize <= f.slot(f.lastOn)+f.slotSize()
}

// Apply does in place what the journal has on the disk by now.
func (f *File) Apply() error {
	f.mu.Lock()
	defer f.unlock()
	return f.finish()
}

// Protect is Settle's protection alone.
func (f *File) Protect() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.durable = max(f.durable, f.diskSize)
}

// Truncate sets the plaintext size. What is added reads as zeros and is a hole
// where a whole chunk of it fits. A failure leaves the size as it was.
func (f *File) Truncate(size int64) error {
	if size < 0 {
		return ErrRange
	}
	if size > int64(f.geo.MaxPlain()) {
		return unix.EFBIG
	}
	f.mu.Lock()
	defer f.unlock()
	if size == 0 { // whatever is half done goes as well
		return f.empty()
	}
	if err := f.settle(); err != nil {
		return err
	}
	switch {
	case dare.PlainOff(size) > f.size:
		return f.extend(dare.PlainOff(size))
	case dare.PlainOff(size) < f.size:
		return f.shrink(dare.PlainOff(size))
	}
	if err := f.flush(); err != nil {
		return err
	}
	return f.disk.SetTimes(unix.Timespec{Nsec: unix.UTIME_OMIT}, now())
}

// extend grows the file by zeros. The last chunk is always a real one.
func (f *File) extend(size dare.PlainOff) error {
	if f.code == nil {
		return ErrNoKey
	}
	was := f.mark()
	err := f.stretch(size)
	if err != nil {
		f.rollback(was)
	}
	return err
}

func (f *File) stretch(size dare.PlainOff) error {
	old, last := f.last(f.size), f.last(size)
	if err := f.grow(size-1, size); err != nil {
		return err
	}
	if err := f.heat(last, last > old); err != nil {
		return err
	}
	f.hot.dirty = true
	f.written, f.untold = now(), true
	return f.flush()
}

// shrink cuts the file, not to nothing: the chunk that becomes the last is
// sealed as such and what follows it goes, in one step that a crash cannot
// halve. What is only in memory is cut there.
func (f *File) shrink(size dare.PlainOff) error {
	last := f.last(size)
	if f.hot.valid && f.hot.index < last {
		if err := f.evict(); err != nil {
			return err
		}
	}
	data := f.hot.data
	if !f.hot.valid || f.hot.index != last {
		var err error
		if data, err = f.readChunk(nil, last); err != nil {
			return err
		}
	}
	data = data[:f.geo.ChunkLen(last, size)]
	end := f.slot(last) + int64(len(data)) + dare.Overhead
	onDisk := f.diskSize > end
	if onDisk {
		sealed, err := f.code.Seal(nil, data, last, true)
		if err != nil {
			return err
		}
		err = f.change(
			journal.Op{Kind: journal.OpWrite, Off: f.slot(last), Data: sealed},
			journal.Op{Kind: journal.OpTruncate, Off: end})
		if err != nil {
			return err
		}
		f.lastOn = last
	}
	if !f.hot.valid || f.hot.index != last {
		clear(f.hot.data)
		f.hot.data = data
	}
	f.size = size
	f.hot.index, f.hot.valid = last, true
	f.fit(last)
	f.hot.dirty = !onDisk
	f.written, f.untold = now(), !onDisk
	return nil
}

// empty cuts the file to nothing: no header, no chunk. The key stays in memory,
// and a later write puts another header in its place, so that nothing in the
// journal is about what comes then. It takes no space: a crash leaves the file
// as it was or empty.
func (f *File) empty() error {
	if err := f.disk.Truncate(0); err != nil { // also where it is empty: mtime
		return err
	}
	clear(f.hot.data)
	f.hot = hotChunk{data: f.hot.data[:0]}
	f.size, f.diskSize, f.lastOn = 0, 0, -1
	f.header, f.sparse, f.resign, f.untold = false, false, false, false
	f.pending, f.bytes, f.ragged = nil, 0, false
	f.durable, f.promised, f.cutIn, f.unsynced = 0, 0, 0, true
	f.own.Emptied()
	return nil
}

// Allocate is fallocate(2): mode 0 and FALLOC_FL_KEEP_SIZE take space,
// FALLOC_FL_PUNCH_HOLE and FALLOC_FL_ZERO_RANGE make zeros. Other modes are
// EOPNOTSUPP.
func (f *File) Allocate(mode uint32, off, size int64) error {
	if off < 0 || size <= 0 {
		return ErrRange
	}
	if size > int64(f.geo.MaxPlain())-off {
		return unix.EFBIG
	}
	f.mu.Lock()
	defer f.unlock()
	if f.code == nil {
		return ErrNoKey
	}
	if err := f.flush(); err != nil {
		return err
	}
	keep := mode&unix.FALLOC_FL_KEEP_SIZE != 0
	end := dare.PlainOff(off + size)
	switch mode &^ unix.FALLOC_FL_KEEP_SIZE {
	case 0:
		if err := f.reserve(end); err != nil {
			return err
		}
	case unix.FALLOC_FL_PUNCH_HOLE:
		if !keep {
			return unix.EOPNOTSUPP
		}
		return f.zero(dare.PlainOff(off), min(end, f.size))
	case unix.FALLOC_FL_ZERO_RANGE:
		if err := f.zero(dare.PlainOff(off), min(end, f.size)); err != nil {
			return err
		}
	default:
		return unix.EOPNOTSUPP
	}
	if keep || end <= f.size {
		return nil
	}
	return f.extend(end)
}

// reserve takes space in the store for a file of this plaintext size.
func (f *File) reserve(size dare.PlainOff) error {
	n := int64(f.geo.CipherSize(max(size, f.size)))
	if n <= f.diskSize {
		return nil
	}
	return f.disk.Allocate(unix.FALLOC_FL_KEEP_SIZE, 0, n)
}

// zero makes [from, to) read as zeros: whole chunks but the last become holes,
// the rest is overwritten.
func (f *File) zero(from, to dare.PlainOff) error {
	if from >= to {
		return nil
	}
	cs := dare.PlainOff(f.geo.ChunkSize)
	last := f.last(f.size)
	a := (from + cs - 1) / cs
	b := to / cs
	if b > dare.PlainOff(last) {
		b = dare.PlainOff(last)
	}
	if a >= b { // no whole chunk
		return f.zeroBytes(from, to)
	}
	if err := f.zeroBytes(from, a*cs); err != nil {
		return err
	}
	if err := f.zeroBytes(b*cs, to); err != nil {
		return err
	}
	return f.punch(int64(a), int64(b))
}

func (f *File) zeroBytes(from, to dare.PlainOff) error {
	for from < to {
		n := min(int64(to-from), int64(len(zeros)))
		if err := f.put(zeros[:n], int64(from)); err != nil {
			return err
		}
		from += dare.PlainOff(n)
	}
	f.written, f.untold = now(), true
	return f.flush()
}

// punch makes holes of chunks [a, b), none of them the last.
func (f *File) punch(a, b int64) error {
	f.setSparse()
	if _, err := f.prefix(-1); err != nil {
		return err
	}
	off, end := f.slot(a), min(f.slot(b), f.diskSize)
	if off >= end {
		return nil
	}
	if err := f.change(journal.Op{Kind: journal.OpPunch, Off: off, Size: end - off}); err != nil {
		return err
	}
	if f.hot.valid && f.hot.index >= a && f.hot.index < b {
		f.hot.valid = false
	}
	return nil
}

// SeekData and SeekHole are lseek(2)'s SEEK_DATA and SEEK_HOLE: the first data,
// or hole, at or after off. ENXIO if there is none.
func (f *File) SeekData(off int64) (int64, error) { return f.seek(off, false) }

// SeekHole answers the size where there is no hole before it.
func (f *File) SeekHole(off int64) (int64, error) { return f.seek(off, true) }

func (f *File) seek(off int64, hole bool) (int64, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if off < 0 || off >= int64(f.size) {
		return 0, unix.ENXIO
	}
	if !f.sparse {
		if hole {
			return int64(f.size), nil
		}
		return off, nil
	}
	last := f.last(f.size)
	for i, _ := f.geo.Chunk(dare.PlainOff(off)); i < last; {
		isHole, err := f.holeAt(i)
		if err != nil {
			return 0, err
		}
		if isHole == hole {
			return max(off, i*int64(f.geo.ChunkSize)), nil
		}
		i++
		if isHole {
			if i, err = f.leap(i, last); err != nil {
				return 0, err
			}
		}
	}
	if hole {
		return int64(f.size), nil
	}
	return max(off, last*int64(f.geo.ChunkSize)), nil
}

// leap returns the first chunk from i to last that may be other than a hole,
// without reading the chunks between.
func (f *File) leap(i, last int64) (int64, error) {
	if i >= last {
		return i, nil
	}
	to := last
	if f.onDisk(i) {
		data, ok, err := f.disk.SeekData(f.slot(i))
		if err != nil {
			return i, err
		}
		if ok {
			to = min(to, (data-int64(f.geo.Base))/f.slotSize())
		}
	}
	for _, p := range f.pending { // what the disk does not show yet
		if p.op.Kind == journal.OpWrite && p.op.Off+int64(len(p.op.Data)) > f.slot(i) {
			to = min(to, (p.op.Off-int64(f.geo.Base))/f.slotSize())
		}
	}
	if f.hot.valid && f.hot.index >= i {
		to = min(to, f.hot.index)
	}
	return max(i, to), nil
}

// holeAt reports whether chunk i, not the last, is a hole.
func (f *File) holeAt(i int64) (bool, error) {
	if f.hot.valid && f.hot.index == i {
		return false, nil
	}
	buf := getBuf(int(f.slotSize()))
	defer putBuf(buf)
	n, err := f.readDisk(*buf, f.slot(i))
	return err == nil && f.isHole((*buf)[:n], i), err
}

// State tells what of the store file is durable.
func (f *File) State() State {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return State{f.durable, f.unsynced, f.promised, f.logged, f.cutIn}
}

// Left returns the operations that are not done in place yet, in their order,
// and how many bytes of the store file a crash cannot take.
func (f *File) Left() (ops []journal.Op, promised int64) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	for _, p := range f.pending {
		ops = append(ops, p.op)
	}
	return ops, f.promised
}

// Lost returns why an fsync failed, after which none succeeds; nil if none did.
func (f *File) Lost() error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.syncErr
}

// Wipe clears plaintext from memory, and lets go of the codec. Until Upgrade
// gives another only Apply and Settle may follow.
func (f *File) Wipe() {
	f.mu.Lock()
	defer f.unlock()
	clear(f.hot.data[:cap(f.hot.data)])
	f.hot, f.code = hotChunk{}, nil
}
