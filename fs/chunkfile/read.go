package chunkfile

import (
	"bytes"
	"fmt"
	"runtime"
	"sync"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/fs/journal"
)

// ReadAt fills p from plaintext offset off. n < len(p) only at the end of the
// file, with a nil error. After an error the contents of p are undefined.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, ErrRange
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	if off >= int64(f.size) {
		return 0, nil
	}
	p = p[:min(int64(len(p)), int64(f.size)-off)]
	if len(p) == 0 {
		return 0, nil
	}
	first, _ := f.geo.Chunk(dare.PlainOff(off))
	end, _ := f.geo.Chunk(dare.PlainOff(off + int64(len(p)) - 1))
	for i := first; i <= end; {
		if f.hot.valid && f.hot.index == i {
			f.copyOut(p, off, i, f.hot.data)
			i++
			continue
		}
		run := end + 1
		if f.hot.valid && f.hot.index > i && f.hot.index < run {
			run = f.hot.index
		}
		run = min(run, i+f.maxRun())
		if err := f.readRun(p, off, i, run); err != nil {
			return 0, err
		}
		i = run
	}
	return len(p), nil
}

// maxRun bounds how many chunks are read from the store at once (1 MiB).
func (f *File) maxRun() int64 { return int64((1 << 20) / f.geo.ChunkSize) }

// copyOut copies the part of chunk i that [off, off+len(p)) covers.
func (f *File) copyOut(p []byte, off, i int64, data []byte) {
	start := i * int64(f.geo.ChunkSize)
	if start >= off {
		copy(p[start-off:], data)
	} else if from := off - start; from < int64(len(data)) {
		copy(p, data[from:])
	}
}

// readRun opens chunks [from, to), none of them hot, into p.
func (f *File) readRun(p []byte, off, from, to int64) error {
	buf := getBuf(int((to - from) * f.slotSize()))
	defer putBuf(buf)
	n, err := f.readDisk(*buf, f.slot(from))
	if err != nil {
		return err
	}
	raw := (*buf)[:n]
	return parallel(int(to-from), func(k int) error {
		i := from + int64(k)
		slot := raw[min(int64(len(raw)), int64(k)*f.slotSize()):min(int64(len(raw)), int64(k+1)*f.slotSize())]
		if dst := f.inside(p, off, i); dst != nil {
			_, err := f.open(dst[:0], slot, i)
			return err
		}
		tmp := getBuf(f.geo.ChunkSize)
		defer putBuf(tmp)
		data, err := f.open((*tmp)[:0], slot, i)
		if err == nil {
			f.copyOut(p, off, i, data)
		}
		clear(data)
		return err
	})
}

// inside returns the part of p that chunk i fills exactly, or nil if the
// request covers only a part of the chunk, or the disk has more of it than the
// file.
func (f *File) inside(p []byte, off, i int64) []byte {
	start := i*int64(f.geo.ChunkSize) - off
	n := int64(f.geo.ChunkLen(i, f.size))
	if start < 0 || start+n > int64(len(p)) || int64(f.onDiskLen(i)) > n {
		return nil
	}
	return p[start : start+n : start+n]
}

// open appends the plaintext of chunk i to dst. A zero slot is a hole only in a
// file whose header says so, and never the last chunk.
func (f *File) open(dst, slot []byte, i int64) ([]byte, error) {
	last := i == f.lastOn
	if f.sparse && !last && f.isHole(slot, i) {
		return append(dst, zeros[:f.geo.ChunkSize]...), nil
	}
	if f.code == nil {
		return nil, ErrNoKey
	}
	out, err := f.code.Open(dst, slot, i, last)
	if err == nil && len(out)-len(dst) != f.onDiskLen(i) {
		err = fmt.Errorf("chunk %d has another length: %w", i, dare.ErrChunk)
	}
	return out, err
}

// isHole reports whether chunk i is one that nobody has written: not reached by
// the store file yet, or a slot of zeros in it.
func (f *File) isHole(slot []byte, i int64) bool {
	if !f.onDisk(i) {
		return i < f.last(f.size)
	}
	return !f.resign && len(slot) == int(f.slotSize()) && isZero(slot)
}

// onDiskLen returns the plaintext length of chunk i as the disk has it.
func (f *File) onDiskLen(i int64) int {
	return int(min(f.diskSize-f.slot(i), f.slotSize())) - dare.Overhead
}

// readChunk appends chunk i, as the disk has it, to dst.
func (f *File) readChunk(dst []byte, i int64) ([]byte, error) {
	buf := getBuf(int(f.slotSize()))
	defer putBuf(buf)
	n, err := f.readDisk(*buf, f.slot(i))
	if err != nil {
		return nil, err
	}
	return f.open(dst, (*buf)[:n], i)
}

// readDisk reads the store file as it will be when what is pending is done.
func (f *File) readDisk(p []byte, off int64) (int, error) {
	n, err := f.disk.ReadAt(p, off)
	if err != nil || len(f.pending) == 0 {
		return n, err
	}
	clear(p[n:])
	for i := range f.pending {
		overlay(p, off, &f.pending[i].op)
	}
	return int(max(0, min(int64(len(p)), f.diskSize-off))), nil
}

// overlay does to p, the bytes of a store file from off on, what op does to the
// file.
func overlay(p []byte, off int64, op *journal.Op) {
	size := op.Size
	switch op.Kind {
	case journal.OpWrite:
		size = int64(len(op.Data))
	case journal.OpTruncate:
		size = max(0, off+int64(len(p))-op.Off)
	case journal.OpHeader:
		return // is no part of any chunk
	}
	from, to := max(off, op.Off), min(off+int64(len(p)), op.Off+size)
	if from >= to {
		return
	}
	if op.Kind == journal.OpWrite {
		copy(p[from-off:to-off], op.Data[from-op.Off:])
	} else {
		clear(p[from-off : to-off])
	}
}

var zeros [dare.MaxChunk + dare.Overhead]byte

func isZero(b []byte) bool {
	return len(b) == 0 || (b[0] == 0 && bytes.Equal(b, zeros[:len(b)]))
}

var bufs = sync.Pool{New: func() any { return new([]byte) }}

// getBuf returns a buffer of n bytes with undefined contents.
func getBuf(n int) *[]byte {
	b := bufs.Get().(*[]byte)
	if cap(*b) < n {
		*b = make([]byte, n)
	}
	*b = (*b)[:n]
	return b
}

func putBuf(b *[]byte) { bufs.Put(b) }

// parallel calls f for 0..n-1 on all processors and returns the error of the
// lowest index that failed. Few calls are not worth a goroutine.
func parallel(n int, f func(int) error) error {
	workers := min(runtime.GOMAXPROCS(0), runtime.NumCPU(), n/2)
	if workers < 2 {
		for i := range n {
			if err := f(i); err != nil {
				return err
			}
		}
		return nil
	}
	errs := make([]error, workers)
	var wg sync.WaitGroup
	part := func(w int) {
		for i := w * n / workers; i < (w+1)*n/workers; i++ {
			if errs[w] = f(i); errs[w] != nil {
				return
			}
		}
	}
	for w := 1; w < workers; w++ {
		wg.Go(func() { part(w) })
	}
	part(0)
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
