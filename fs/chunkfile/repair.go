package chunkfile

import (
	"errors"
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/journal"
)

// Repair brings a file that a crash caught in the middle of growing to a whole
// state: it keeps the chunks from the beginning up to the first that is not
// whole, and seals the last of them as the last. c.Promised bytes of the store
// file are known to be on the disk: less than their chunks is ErrLost, and the
// file is left as it is. What the journal has for the file is done before, by
// the caller. It answers what it did, in words ("" for nothing).
//
// The change is in the journal and on the disk before Repair returns, so that a
// crash in the middle leaves a file that Repair brings to the same state.
func Repair(c Config) (did string, err error) {
	c.Durable = c.Size
	f := newFile(c)
	f.header = true
	known := int64(0) // chunks that a promise covers
	if size, err := c.Geo.PlainSize(dare.CipherOff(c.Promised)); err == nil {
		known = f.geo.Chunks(size)
	}
	end, data, last, err := f.lastWhole(max(0, known-1))
	if err != nil {
		return "", err
	}
	if end < known-1 || c.Promised > 0 && end < 0 {
		return "", fmt.Errorf("chunk %d of %d: %w", end+1, known, ErrLost)
	}
	if end < 0 {
		if c.Size == 0 {
			return "", nil
		}
		return "the file had no whole chunk and is empty now", f.empty()
	}
	return f.endAt(end, data, last)
}

// lastWhole returns the last chunk of those that follow each other whole, from
// chunk from on, with its contents and whether it is sealed as the last; -1 if
// there is none. Holes count where the file may have them, but not as an end.
func (f *File) lastWhole(from int64) (end int64, data []byte, last bool, err error) {
	end = from - 1
	slot := make([]byte, f.slotSize())
	for i := from; f.slot(i) < f.diskSize; i++ {
		n, err := f.readDisk(slot, f.slot(i))
		if err != nil {
			return 0, nil, false, err
		}
		if f.sparse && isZero(slot[:n]) {
			if i == from && from > 0 { // what is promised goes on to be there
				end, data = i, append([]byte(nil), zeros[:f.geo.ChunkSize]...)
			}
			if i, err = f.hole(i); err != nil {
				return 0, nil, false, err
			}
			continue
		}
		next, isLast := f.asEnd(slot[:n], i)
		if next == nil {
			break
		}
		end, data, last = i, next, isLast
		if isLast {
			break
		}
	}
	if end >= 0 && data == nil { // the promise itself is broken
		return -1, nil, false, nil
	}
	return end, data, last, nil
}

// hole returns the last chunk of the hole that chunk i is in.
func (f *File) hole(i int64) (int64, error) {
	data, ok, err := f.disk.SeekData(f.slot(i))
	if err != nil {
		return i, err
	}
	if !ok {
		return f.geo.Chunks(dare.PlainOff(f.geo.MaxPlain())), nil
	}
	return max(i, (data-int64(f.geo.Base))/f.slotSize()-1), nil
}

// asEnd opens a slot as a middle chunk or as the last, which may be shorter than
// what the disk has in its place; nil if it is neither.
func (f *File) asEnd(slot []byte, i int64) (data []byte, last bool) {
	if len(slot) == int(f.slotSize()) {
		if data, err := f.code.Open(nil, slot, i, false); err == nil {
			return data, false
		}
	}
	if n := dare.SlotLen(slot); n > 0 && n <= len(slot) {
		if data, err := f.code.Open(nil, slot[:n], i, true); err == nil {
			return data, true
		}
	}
	return nil, false
}

// endAt makes chunk i, with this content, the end of the file.
func (f *File) endAt(i int64, data []byte, last bool) (string, error) {
	end := f.slot(i) + int64(len(data)) + dare.Overhead
	if last && end == f.diskSize {
		return "", nil
	}
	ops := []journal.Op{{Kind: journal.OpTruncate, Off: end}}
	did := "cut what was torn off its end"
	if !last {
		sealed, err := f.code.Seal(nil, data, i, true)
		if err != nil {
			return "", err
		}
		ops = append([]journal.Op{{Kind: journal.OpWrite, Off: f.slot(i), Data: sealed}}, ops...)
		did = "sealed its end"
	}
	if err := f.change(ops...); err != nil {
		return "", err
	}
	return did, f.drain()
}

// IsDamage reports whether err says that bytes of the file are damaged, as
// opposed to unreadable for now.
func IsDamage(err error) bool {
	var kind = fault.Of(err)
	return kind == fault.Integrity || kind == fault.BadFormat || errors.Is(err, ErrSize)
}
