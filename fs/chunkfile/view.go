package chunkfile

import "github.com/kmsfs/kmsfs/fs/journal"

// View is a store file as it will be when operations of the journal are done,
// for those who only read it. It is not changed after Look, and so safe for
// concurrent use if its disk is.
type View struct {
	disk interface {
		ReadAt([]byte, int64) (int, error)
	}
	size    int64
	pending []journal.Op
}

// Look returns the view of a store file of size bytes.
func Look(disk interface {
	ReadAt([]byte, int64) (int, error)
}, size int64, pending []journal.Op) *View {
	for _, op := range pending {
		size = sizeAfter(size, op)
	}
	return &View{disk, size, pending}
}

// Size returns the size of the store file in bytes.
func (v *View) Size() int64 { return v.size }

// ReadAt fills p from an offset of the store file. n < len(p) only at its end,
// with a nil error.
func (v *View) ReadAt(p []byte, off int64) (int, error) {
	n, err := v.disk.ReadAt(p, off)
	if err != nil {
		return n, err
	}
	if len(v.pending) > 0 {
		clear(p[n:])
		for i := range v.pending {
			overlay(p, off, &v.pending[i])
		}
		n = len(p)
	}
	return int(max(0, min(int64(n), v.size-off))), nil
}
