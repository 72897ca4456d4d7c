package chunkfile

import (
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
)

// WriteAt writes all of p at plaintext offset off, or fails. A write that fails
// leaves the size as it was, and of the bytes in its range some chunks new and
// the others old. Bytes may stay in memory until Flush.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, ErrRange
	}
	if len(p) == 0 {
		return 0, nil
	}
	if int64(len(p)) > int64(f.geo.MaxPlain())-off {
		return 0, unix.EFBIG
	}
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	f.mu.Lock()
	defer f.unlock()
	if f.code == nil {
		return 0, ErrNoKey
	}
	if err := f.settle(); err != nil {
		return 0, err
	}
	if err := f.holdTime(); err != nil {
		return 0, err
	}
	was := f.mark()
	if err := f.write(p, off); err != nil {
		f.rollback(was)
		return 0, err
	}
	return len(p), nil
}

// holdTime remembers the store file's time before a write that goes through. The
// kernel keeps the time of such writes, and tells it if it has moved; the next
// flush puts it back otherwise.
func (f *File) holdTime() error {
	if !f.own.Through() {
		f.timeHeld = false
		return nil
	}
	if f.timeHeld && f.untold {
		return nil
	}
	mtime, err := f.disk.Mtime()
	if err == nil {
		f.written, f.untold, f.timeHeld = mtime, true, true
	}
	return err
}

func (f *File) write(p []byte, off int64) error {
	end := dare.PlainOff(off) + dare.PlainOff(len(p))
	if end > f.size {
		if err := f.grow(dare.PlainOff(off), end); err != nil {
			return err
		}
	}
	if err := f.put(p, off); err != nil {
		return err
	}
	if !f.timeHeld {
		f.written, f.untold = now(), true
		return nil
	}
	if err := f.evict(); err != nil {
		return err
	}
	return f.finish()
}

// mark is what a growth changes and rollback puts back.
type mark struct {
	size             dare.PlainOff
	diskSize, lastOn int64
	sparse           bool
}

func (f *File) mark() mark { return mark{f.size, f.diskSize, f.lastOn, f.sparse} }

// rollback takes a growth back after a failure. Memory is as before at once.
// Where the growth reached the disk, the end is sealed again as soon as that
// succeeds (settle), and the file takes no writes until then.
func (f *File) rollback(was mark) {
	if f.size == was.size {
		return
	}
	last := f.last(was.size)
	f.size = was.size
	if f.hot.valid && f.hot.index > last {
		clear(f.hot.data)
		f.hot.valid = false
	} else if f.hot.valid && f.hot.index == last {
		f.fit(last)
	}
	if !was.sparse && (f.resign || !f.header) { // the disk was not told
		f.sparse, f.resign = false, false
	}
	if f.diskSize == was.diskSize && f.lastOn == was.lastOn {
		return // the growth was in memory only
	}
	f.ragged, f.written = true, now()
	if f.lastOn > last {
		f.lastOn = -1
	}
	_ = f.settle() // the next caller tries again, and tells
}

// grow makes the file end bytes long before a write at from: the chunk that was
// last is filled up and becomes a middle one, and chunks between it and the
// write become holes. A write that begins in an earlier chunk fills it up
// itself: zeros in its place would be something that the file never had, and a
// crash could leave them.
func (f *File) grow(from, end dare.PlainOff) error {
	old := f.last(f.size)
	first, _ := f.geo.Chunk(from)
	switch {
	case old < 0 || f.last(end) == old:
	case first < old: // all of it is about to be overwritten, and not before what comes first
		if err := f.evict(); err != nil {
			return err
		}
	default:
		if err := f.load(old); err != nil {
			return err
		}
		f.size = end
		f.fit(old)
		f.hot.dirty = true // it must be sealed again, as not the last
	}
	f.size = end
	if first > old+1 {
		f.setSparse()
	}
	return nil
}

func (f *File) setSparse() {
	if !f.sparse {
		f.sparse = true
		f.resign = f.header
	}
}

// put writes p at off, within the size. Whole chunks but the last are sealed
// from p; others go through the hot chunk.
func (f *File) put(p []byte, off int64) error {
	cs := int64(f.geo.ChunkSize)
	last := f.last(f.size)
	for len(p) > 0 {
		i, within := f.geo.Chunk(dare.PlainOff(off))
		if within == 0 {
			if whole := min(int64(len(p))/cs, last-i, f.maxRun()); whole > 0 {
				if err := f.putWhole(i, p[:whole*cs]); err != nil {
					return err
				}
				p, off = p[whole*cs:], off+whole*cs
				continue
			}
		}
		n := min(int64(len(p)), cs-int64(within))
		covers := within == 0 && n == int64(f.geo.ChunkLen(i, f.size))
		if err := f.heat(i, covers); err != nil {
			return err
		}
		copy(f.hot.data[within:], p[:n])
		f.hot.dirty = true
		p, off = p[n:], off+n
	}
	return nil
}

// putWhole seals the chunks from i on that p covers exactly, none of them the
// last. A dirty hot chunk just before them goes out in the same write.
func (f *File) putWhole(i int64, p []byte) error {
	cs := f.geo.ChunkSize
	n := int64(len(p) / cs)
	parts := make([][]byte, 0, n+1)
	from := i
	switch {
	case f.hot.valid && f.hot.index >= i && f.hot.index < i+n: // overwritten below
	case f.hot.valid && f.hot.dirty && f.hot.index == i-1:
		parts, from = append(parts, f.hot.data), i-1
	default:
		if err := f.evict(); err != nil {
			return err
		}
	}
	for k := range n {
		parts = append(parts, p[int(k)*cs:int(k+1)*cs])
	}
	if err := f.sealRun(from, parts); err != nil {
		return err
	}
	if f.hot.valid && f.hot.index >= from && f.hot.index < i+n {
		f.hot.valid, f.hot.dirty = false, false // not before: it may be all there is of it
	}
	return nil
}

// heat makes chunk i hot, with its length in the file as it is now. fresh says
// that all of it is about to be overwritten.
func (f *File) heat(i int64, fresh bool) error {
	if f.hot.valid && f.hot.index == i {
		f.fit(i)
		return nil
	}
	if !fresh && f.onDisk(i) {
		return f.load(i)
	}
	if err := f.evict(); err != nil {
		return err
	}
	f.hot = hotChunk{index: i, data: f.hot.data[:0], valid: true}
	f.fit(i)
	return nil
}

// onDisk reports whether the store file has any byte of chunk i.
func (f *File) onDisk(i int64) bool { return f.slot(i) < f.diskSize }

// load makes chunk i hot with its contents from the disk.
func (f *File) load(i int64) error {
	if f.hot.valid && f.hot.index == i {
		f.fit(i)
		return nil
	}
	if err := f.evict(); err != nil {
		return err
	}
	f.hot.valid = false
	if f.hot.data == nil {
		f.hot.data = make([]byte, 0, f.hotCap(i))
	}
	data, err := f.readChunk(f.hot.data[:0], i)
	if err != nil {
		return err
	}
	f.hot = hotChunk{index: i, data: data, valid: true}
	f.fit(i)
	return nil
}

// hotCap is what a hot chunk is given at first: little for a small file.
func (f *File) hotCap(i int64) int {
	if i == 0 && f.size < dare.PlainOff(f.geo.ChunkSize) {
		return int(f.size)
	}
	return f.geo.ChunkSize
}

// fit gives the hot chunk its length in the file, with zeros where it is too
// short.
func (f *File) fit(i int64) {
	want, n := f.geo.ChunkLen(i, f.size), len(f.hot.data)
	switch {
	case n < want:
		f.hot.data = append(f.hot.data, zeros[:want-n]...)
		f.hot.dirty = true
	case n > want:
		clear(f.hot.data[want:])
		f.hot.data = f.hot.data[:want]
		f.hot.dirty = true
	}
}

// evict seals the hot chunk if it is dirty. It stays hot, and clean.
func (f *File) evict() error {
	if !f.hot.valid || !f.hot.dirty {
		return nil
	}
	if err := f.sealRun(f.hot.index, [][]byte{f.hot.data}); err != nil {
		return err
	}
	f.hot.dirty = false
	return nil
}
