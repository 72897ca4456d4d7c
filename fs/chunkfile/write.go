package chunkfile

import (
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/fs/record"
)

// WriteAt writes all of p at plaintext offset off, or fails; a write that fails
// leaves the size as it was. Bytes may stay in memory until Flush.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || int64(len(p)) > int64(f.geo.MaxPlain())-off {
		return 0, ErrRange
	}
	if len(p) == 0 {
		return 0, nil
	}
	f.mu.Lock()
	defer f.unlock()
	if f.code == nil {
		return 0, ErrNoKey
	}
	old := f.size
	end := dare.PlainOff(off) + dare.PlainOff(len(p))
	err := f.settle()
	if err == nil && end > old {
		err = f.grow(dare.PlainOff(off), end)
	}
	if err == nil {
		err = f.put(p, off)
	}
	if err == nil {
		f.written, f.untold = now(), true
		if f.own.Tight(len(p)) {
			err = f.flush()
		}
	}
	if err != nil {
		f.rollback(old)
		return 0, err
	}
	return len(p), nil
}

// rollback takes a growth back after a failure. What the growth put on the disk
// goes first, so that a full disk has room for the rest.
func (f *File) rollback(old dare.PlainOff) {
	if f.size <= old {
		return
	}
	if last := f.last(old); last >= 0 && f.diskSize > f.slot(last+1) && f.disk.Truncate(f.slot(last+1)) == nil {
		f.diskSize = f.slot(last + 1)
		if f.lastOn > last {
			f.lastOn = -1
		}
	}
	if err := f.shrink(old); err != nil && f.failed == nil {
		f.failed = fmt.Errorf("undo a failed write: %w", err)
	}
}

// grow makes the file end bytes long before a write at from: the chunk that was
// last is filled up and becomes a middle one, and chunks between it and the
// write become holes.
func (f *File) grow(from, end dare.PlainOff) error {
	if end > f.geo.MaxPlain() {
		return ErrRange
	}
	old := f.last(f.size)
	first, _ := f.geo.Chunk(from)
	last := f.last(end)
	if old >= 0 && last > old {
		if err := f.load(old); err != nil {
			return err
		}
		f.size = end
		f.fill(old)
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
	if f.hot.valid && f.hot.index >= i && f.hot.index < i+n {
		f.hot.valid = false // overwritten
	}
	var parts [][]byte
	from := i
	if f.hot.valid && f.hot.dirty && f.hot.index == i-1 {
		parts, from = append(parts, f.hot.data), i-1
	} else if err := f.evict(); err != nil {
		return err
	}
	for k := range n {
		parts = append(parts, p[int(k)*cs:int(k+1)*cs])
	}
	if err := f.sealRun(from, parts); err != nil {
		return err
	}
	f.hot.valid = false
	return nil
}

// heat makes chunk i hot, with its length in the file as it is now. fresh says
// that all of it is about to be overwritten.
func (f *File) heat(i int64, fresh bool) error {
	if f.hot.valid && f.hot.index == i {
		f.fill(i)
		return nil
	}
	if !fresh && f.onDisk(i) {
		return f.load(i)
	}
	if err := f.evict(); err != nil {
		return err
	}
	f.hot = hotChunk{index: i, data: f.hot.data[:0], valid: true}
	f.fill(i)
	return nil
}

// onDisk reports whether the store file has any byte of chunk i.
func (f *File) onDisk(i int64) bool { return f.slot(i) < f.diskSize }

// load makes chunk i hot with its contents from the disk.
func (f *File) load(i int64) error {
	if f.hot.valid && f.hot.index == i {
		f.fill(i)
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
	f.fill(i)
	return nil
}

// hotCap is what a hot chunk is given at first: little for a small file.
func (f *File) hotCap(i int64) int {
	if i == 0 && f.size < dare.PlainOff(f.geo.ChunkSize) {
		return int(f.size)
	}
	return f.geo.ChunkSize
}

// fill lengthens the hot chunk with zeros to its length in the file.
func (f *File) fill(i int64) {
	want := f.geo.ChunkLen(i, f.size)
	if n := len(f.hot.data); n < want {
		f.hot.data = append(f.hot.data, zeros[:want-n]...)
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
	if err := f.store(f.slot(from)-int64(len(prefix)), *buf); err != nil {
		return err
	}
	f.header = true
	end := from + int64(len(parts)) - 1
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
	if f.header && !f.resign {
		return nil, nil
	}
	if err := f.own.Begin(); err != nil {
		return nil, err
	}
	block, err := f.own.Header(f.sparse)
	if err != nil {
		return nil, err
	}
	if !f.header && from == 0 {
		return block, nil
	}
	if len(block) > 0 {
		if err := f.store(0, block); err != nil {
			return nil, err
		}
	}
	f.header, f.resign = true, false
	return nil, nil
}

// store writes bytes to the store file. What replaces bytes in place is in a
// redo record first. What is new goes first, so that a full disk shows before
// anything is replaced, and is taken away again if it fails.
func (f *File) store(off int64, data []byte) error {
	if err := f.own.Begin(); err != nil {
		return err
	}
	over := min(int64(len(data)), max(0, f.diskSize-off))
	op := record.Op{Kind: record.OpWrite, Off: off, Data: data}
	if over > 0 {
		if err := f.redo([]record.Op{op}); err != nil {
			return err
		}
	} else if f.cuts { // the record of a cut must not undo this growth
		if err := f.redo(nil); err != nil {
			return err
		}
	}
	if fresh := data[over:]; len(fresh) > 0 {
		if err := f.disk.WriteAt(fresh, off+over); err != nil {
			_ = f.disk.Truncate(f.diskSize) // what stays is cut by repair
			if over > 0 {
				_ = f.redo(nil) // the operation did not happen
			}
			return err
		}
	}
	f.diskSize = max(f.diskSize, off+int64(len(data)))
	if over > 0 {
		if err := f.disk.WriteAt(data[:over], off); err != nil {
			op.Data = append([]byte(nil), data...)
			f.pending = []record.Op{op}
			return err
		}
	}
	return nil
}

func (f *File) redo(ops []record.Op) error {
	if err := f.own.Redo(ops); err != nil {
		return err
	}
	f.cuts = false
	for _, op := range ops {
		f.cuts = f.cuts || op.Kind == record.OpTruncate
	}
	return nil
}

// settle does again what failed half-way in place; until it succeeds the file
// takes no writes.
func (f *File) settle() error {
	if len(f.pending) == 0 {
		return nil
	}
	if err := Apply(f.disk, f.pending); err != nil {
		return err
	}
	f.pending = nil
	return nil
}
