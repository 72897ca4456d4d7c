package dare

import (
	"fmt"
	"math"
)

// PlainOff is an offset or size in a plaintext, in bytes.
type PlainOff int64

// CipherOff is an offset or size in a store file, in bytes.
type CipherOff int64

const (
	// Overhead is what sealing adds to a chunk: package header and tag.
	Overhead = headerLen + tagLen
	// MinChunk and MaxChunk bound the chunk size, in plaintext bytes.
	MinChunk = 4 << 10
	MaxChunk = 64 << 10
	// MaxBase bounds the bytes before slot 0.
	MaxBase = 64 << 10

	headerLen = 16
	tagLen    = 16
)

// Geometry maps plaintext to store file. It is valid if Check returns nil; the
// other methods assume so. Offsets, sizes and indexes given to them are not
// negative unless the method says otherwise.
type Geometry struct {
	ChunkSize int       // plaintext bytes of every chunk but the last
	Base      CipherOff // bytes before slot 0
}

// Check answers ErrChunkSize or ErrBase for a geometry that no store has.
func (g Geometry) Check() error {
	if err := checkChunkSize(g.ChunkSize); err != nil {
		return err
	}
	if g.Base < 0 || g.Base > MaxBase {
		return fmt.Errorf("base %d: %w", g.Base, ErrBase)
	}
	return nil
}

func checkChunkSize(n int) error {
	if n < MinChunk || n > MaxChunk || n&(n-1) != 0 {
		return fmt.Errorf("chunk size %d: %w", n, ErrChunkSize)
	}
	return nil
}

func (g Geometry) slotSize() int64 { return int64(g.ChunkSize) + Overhead }

// Slot returns the store offset at which chunk index begins, or the largest
// CipherOff where that does not fit.
func (g Geometry) Slot(index int64) CipherOff {
	if index > (math.MaxInt64-int64(g.Base))/g.slotSize() {
		return math.MaxInt64
	}
	return g.Base + CipherOff(index*g.slotSize())
}

// Chunk returns the chunk that holds the plaintext byte at off, and the byte's
// place within it.
func (g Geometry) Chunk(off PlainOff) (index int64, within int) {
	c := int64(g.ChunkSize)
	return int64(off) / c, int(int64(off) % c)
}

// Chunks returns the number of chunks of a plaintext of this size, 0 for 0.
func (g Geometry) Chunks(size PlainOff) int64 {
	if size <= 0 {
		return 0
	}
	return (int64(size)-1)/int64(g.ChunkSize) + 1
}

// ChunkLen returns the plaintext bytes of chunk index in a plaintext of this
// size: the chunk size, less for the last chunk, 0 beyond it.
func (g Geometry) ChunkLen(index int64, size PlainOff) int {
	last := g.Chunks(size) - 1
	switch {
	case index < 0 || index > last:
		return 0
	case index < last:
		return g.ChunkSize
	}
	return int(int64(size) - last*int64(g.ChunkSize))
}

// CipherSize returns the size of the store file of a plaintext of this size: 0
// for 0 (an empty file has no header), and the largest CipherOff for a size
// above MaxPlain.
func (g Geometry) CipherSize(size PlainOff) CipherOff {
	switch {
	case size <= 0:
		return 0
	case size > g.MaxPlain():
		return math.MaxInt64
	}
	return g.Base + CipherOff(int64(size)+g.Chunks(size)*Overhead)
}

// PlainSize is the inverse of CipherSize. For a size that no plaintext has it
// returns ErrSize, and as the value the nearest plaintext size below (0 if
// there is none), so that stat can answer.
func (g Geometry) PlainSize(size CipherOff) (PlainOff, error) {
	if size == 0 {
		return 0, nil
	}
	if size <= g.Base {
		return 0, fmt.Errorf("%d bytes: %w", size, ErrSize)
	}
	body := int64(size - g.Base)
	full, rest := body/g.slotSize(), body%g.slotSize()
	plain := PlainOff(full * int64(g.ChunkSize))
	switch {
	case rest == 0:
		return plain, nil
	case rest <= Overhead:
		return plain, fmt.Errorf("%d bytes: %w", size, ErrSize)
	}
	return plain + PlainOff(rest-Overhead), nil
}

// MaxPlain returns the largest plaintext size whose CipherSize fits a
// CipherOff. Larger files are the caller's EFBIG.
func (g Geometry) MaxPlain() PlainOff {
	body := math.MaxInt64 - int64(g.Base)
	full, rest := body/g.slotSize(), body%g.slotSize()
	return PlainOff(full*int64(g.ChunkSize) + max(rest-Overhead, 0))
}
