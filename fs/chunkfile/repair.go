package chunkfile

import (
	"errors"
	"fmt"
	"sort"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/record"
)

// Repair brings a file that a crash caught in the middle of writing to a whole
// state: it cuts a torn chunk off the end and seals what is then the end as the
// last chunk. Redo operations are done before, by the caller. It answers what
// it did, in words ("" for nothing), and the plaintext size. Less than durable
// bytes is ErrLost, and the file is left as it is.
//
// A crash in the middle of Repair leaves a file that Repair brings to the same
// state.
func Repair(c Config, durable int64) (did string, size int64, err error) {
	f := &File{disk: c.Disk, geo: c.Geo, code: c.Codec, own: c.Owner, diskSize: c.Size, sparse: c.Sparse, lastOn: -1, header: true}
	count := int64(0) // slots with any bytes
	if body := c.Size - int64(c.Geo.Base); body > 0 {
		count = (body + f.slotSize() - 1) / f.slotSize()
	}
	buf := make([]byte, f.slotSize())
	for i := count - 1; i >= 0; i-- {
		n, err := f.disk.ReadAt(buf, f.slot(i))
		if err != nil {
			return "", 0, err
		}
		slot := buf[:n]
		if isZero(slot) {
			if i, err = f.dataBefore(i); err != nil {
				return "", 0, err
			}
			continue
		}
		data, last := f.asEnd(slot, i)
		if data == nil {
			continue // torn, or a hole: not an end
		}
		size := i*int64(c.Geo.ChunkSize) + int64(len(data))
		if size < durable {
			return "", 0, fmt.Errorf("%d bytes of %d: %w", size, durable, ErrLost)
		}
		return f.endAt(i, slot, data, last)
	}
	if durable > 0 {
		return "", 0, fmt.Errorf("no whole chunk, of %d bytes: %w", durable, ErrLost)
	}
	if c.Size == 0 {
		return "", 0, nil
	}
	return "the file had no whole chunk and is empty now", 0, f.empty()
}

// dataBefore returns an index, at most i, such that no chunk from it to i has
// data: behind a torn end there may be a hole of any size.
func (f *File) dataBefore(i int64) (int64, error) {
	var first error
	k := sort.Search(int(i), func(k int) bool {
		data, ok, err := f.disk.SeekData(f.slot(int64(k)))
		if err != nil && first == nil {
			first = err
		}
		return !ok || data >= f.slot(i)
	})
	return int64(k), first
}

// asEnd opens a slot as the last chunk or as a middle one; nil if it is neither.
func (f *File) asEnd(slot []byte, i int64) (data []byte, last bool) {
	for _, last := range []bool{true, false} {
		if data, err := f.code.Open(nil, slot, i, last); err == nil {
			return data, last
		}
	}
	return nil, false
}

// endAt makes chunk i the end of the file.
func (f *File) endAt(i int64, slot, data []byte, last bool) (string, int64, error) {
	f.size = dare.PlainOff(i*int64(f.geo.ChunkSize) + int64(len(data)))
	end := f.slot(i) + int64(len(slot))
	if last && end == f.diskSize {
		return "", int64(f.size), nil
	}
	ops := []record.Op{{Kind: record.OpTruncate, Off: end}}
	did := "cut a torn chunk off its end"
	if !last {
		sealed, err := f.code.Seal(nil, data, i, true)
		if err != nil {
			return "", 0, err
		}
		ops = append(ops, record.Op{Kind: record.OpWrite, Off: f.slot(i), Data: sealed})
		did = "sealed its end"
	}
	if err := f.inPlace(ops...); err != nil {
		return "", 0, err
	}
	return did, int64(f.size), f.finish()
}

// IsDamage reports whether err says that bytes of the file are damaged, as
// opposed to unreadable for now.
func IsDamage(err error) bool {
	var kind = fault.Of(err)
	return kind == fault.Integrity || kind == fault.BadFormat || errors.Is(err, ErrSize)
}
