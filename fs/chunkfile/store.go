package chunkfile

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/fs/record"
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
		if err := f.store(0, block, false); err != nil {
			return nil, err
		}
	}
	f.header, f.resign = true, false
	return nil, nil
}

// store writes bytes to the store file; end says that the file ends with them.
// What replaces bytes in place is in a redo record first. What is new goes
// before it, so that a full disk shows before anything is replaced, and is
// taken away again if it fails.
func (f *File) store(off int64, data []byte, end bool) error {
	ops := []record.Op{{Kind: record.OpWrite, Off: off, Data: data}}
	if after := off + int64(len(data)); end && f.diskSize > after {
		ops = append(ops, record.Op{Kind: record.OpTruncate, Off: after})
		if err := f.inPlace(ops...); err != nil {
			return err
		}
		f.diskSize = after
		return nil
	}
	over := min(int64(len(data)), max(0, f.diskSize-off))
	if over == int64(len(data)) {
		return f.inPlace(ops...)
	}
	if err := f.ready(off, over); err != nil {
		return err
	}
	if over > 0 {
		if err := f.redo(ops); err != nil {
			return err
		}
	} else if f.stale {
		if err := f.redo(nil); err != nil {
			return err
		}
	}
	if err := f.disk.WriteAt(data[over:], off+over); err != nil {
		f.giveUp(over > 0)
		return err
	}
	f.diskSize = off + int64(len(data))
	if over > 0 {
		if err := f.disk.WriteAt(data[:over], off); err != nil {
			f.putOff(ops)
		}
	}
	return nil
}

// giveUp takes new bytes at the end away again that did not all fit. recorded
// says that the redo record has them, with bytes in place that are not replaced
// yet: it goes last, because doing it is as good as not having begun.
func (f *File) giveUp(recorded bool) {
	f.stale = f.stale || recorded
	if f.disk.Truncate(f.diskSize) != nil {
		f.putOff([]record.Op{{Kind: record.OpTruncate, Off: f.diskSize}})
	} else if f.stale {
		_ = f.redo(nil) // else before the file grows next
	}
}

// inPlace does operations that change bytes in place. When it returns nil they
// count as done: they are in the redo record, and in pending if they failed on
// the disk.
func (f *File) inPlace(ops ...record.Op) error {
	var size int64
	if op := ops[0]; op.Kind == record.OpWrite {
		size = int64(len(op.Data))
	}
	if err := f.ready(ops[0].Off, size); err != nil {
		return err
	}
	if err := f.redo(ops); err != nil {
		return err
	}
	if err := apply(f.disk, ops); err != nil {
		f.putOff(ops)
	}
	return nil
}

// ready prepares a change: the file is in the writing list, nothing before it
// is half done, and what it writes in place has its room: overwriting a hole
// can meet a full disk, when it is too late to call the change off.
func (f *File) ready(off, size int64) error {
	if err := f.own.Begin(); err != nil {
		return err
	}
	if err := f.finish(); err != nil {
		return err
	}
	if !f.sparse || size == 0 {
		return nil
	}
	err := f.disk.Allocate(unix.FALLOC_FL_KEEP_SIZE, off, size)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	return err
}

// putOff keeps operations that failed on the disk, to be done again. Until that
// succeeds the file takes no writes, and reads show them as done.
func (f *File) putOff(ops []record.Op) {
	f.pending, f.written = nil, now()
	for _, op := range ops {
		op.Data = append([]byte(nil), op.Data...)
		f.pending = append(f.pending, op)
	}
}

// finish does what is pending.
func (f *File) finish() error {
	if len(f.pending) == 0 {
		return nil
	}
	if err := apply(f.disk, f.pending); err != nil {
		return err
	}
	f.pending = nil
	return nil
}

// settle brings the disk to the state that memory takes for granted: what is
// pending is done, and after a rollback the end is sealed as the end.
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

// redo replaces the redo record.
func (f *File) redo(ops []record.Op) error {
	if err := f.own.Redo(ops); err != nil {
		return err
	}
	f.stale = false
	for _, op := range ops {
		f.stale = f.stale || op.Kind == record.OpTruncate
	}
	return nil
}

// Apply does the operations of a redo record on a store file that nobody has
// open. It is idempotent. An empty file stays empty: it was cut to nothing
// after the operations were done, or while they were.
func Apply(disk Disk, ops []record.Op) error {
	var b [1]byte
	if n, err := disk.ReadAt(b[:], 0); err != nil || n == 0 {
		return err
	}
	return apply(disk, ops)
}

func apply(disk Disk, ops []record.Op) error {
	for _, op := range ops {
		var err error
		switch op.Kind {
		case record.OpWrite:
			err = disk.WriteAt(op.Data, op.Off)
		case record.OpPunch:
			err = disk.Punch(op.Off, op.Size)
		case record.OpTruncate:
			err = disk.Truncate(op.Off)
		}
		if err != nil {
			return fmt.Errorf("redo: %w", err)
		}
	}
	return nil
}
