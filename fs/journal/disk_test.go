package journal_test

import (
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/journal"
)

// memory is a file that exists only here.
type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(m)) {
		return 0, nil
	}
	return copy(p, m[off:]), nil
}
func (m memory) Size() (int64, error)              { return int64(len(m)), nil }
func (memory) WriteAt([]byte, int64) error         { return io.ErrClosedPipe }
func (memory) Truncate(int64) error                { return io.ErrClosedPipe }
func (memory) Allocate(uint32, int64, int64) error { return io.ErrClosedPipe }
func (memory) Datasync() error                     { return io.ErrClosedPipe }
func (memory) Close() error                        { return nil }

// disk is what is under the segments of one store: the files themselves stand
// for the kernel's memory, and disk knows what of them would outlast a power
// cut.
type disk struct {
	mu      sync.Mutex
	durable [2][]byte
	pending [2][]change

	syncing  time.Duration // how long a sync takes
	failSync error         // of every sync
	full     int           // writes until one fails half-way with ENOSPC; 0: never
}

// change is a write, or a cut at off where data is nil.
type change struct {
	off  int64
	data []byte
}

func (d *disk) wrap(i int, f journal.File) journal.File { return &diskFile{f, d, i} }

type diskFile struct {
	journal.File
	d *disk
	i int
}

func (f *diskFile) WriteAt(p []byte, off int64) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if f.d.full > 0 {
		if f.d.full--; f.d.full == 0 {
			if half := p[:len(p)/2]; len(half) > 0 {
				f.d.pending[f.i] = append(f.d.pending[f.i], change{off, append([]byte{}, half...)})
				_ = f.File.WriteAt(half, off)
			}
			return unix.ENOSPC
		}
	}
	f.d.pending[f.i] = append(f.d.pending[f.i], change{off, append([]byte{}, p...)})
	return f.File.WriteAt(p, off)
}

func (f *diskFile) Truncate(size int64) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.d.pending[f.i] = append(f.d.pending[f.i], change{off: size})
	return f.File.Truncate(size)
}

// Datasync makes durable what was written before it began. If it fails, the
// kernel takes what it could not write for clean.
func (f *diskFile) Datasync() error {
	d := f.d
	d.mu.Lock()
	now := d.pending[f.i]
	d.pending[f.i] = nil
	err, wait := d.failSync, d.syncing
	d.mu.Unlock()
	time.Sleep(wait)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range now {
		d.durable[f.i] = c.on(d.durable[f.i])
	}
	return nil
}

func (c change) on(b []byte) []byte {
	if c.data == nil {
		if int64(len(b)) > c.off {
			b = b[:c.off:c.off]
		}
		return b
	}
	if end := c.off + int64(len(c.data)); int64(len(b)) < end {
		b = append(b, make([]byte, end-int64(len(b)))...)
	}
	copy(b[c.off:], c.data)
	return b
}

// cut is a power cut: of the writes that were not synced some are on the disk,
// some not, and some in part, in sectors of 512 bytes.
func (d *disk) cut(t testing.TB, s *store, r *rand.Rand) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.durable {
		b := append([]byte{}, d.durable[i]...)
		for _, c := range d.pending[i] {
			if r.IntN(4) > 0 {
				b = c.torn(r).on(b)
			}
		}
		d.durable[i], d.pending[i] = b, nil
		err := os.WriteFile(filepath.Join(s.path, "journal", strconv.Itoa(i)), b, 0o600)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
}

// torn returns a part of a write: from one sector border to another.
func (c change) torn(r *rand.Rand) change {
	if c.data == nil || r.IntN(2) == 0 {
		return c
	}
	border := func() int {
		off := (c.off + r.Int64N(int64(len(c.data))+512)) / 512 * 512
		return int(max(0, min(off-c.off, int64(len(c.data)))))
	}
	from, to := border(), border()
	if from > to {
		from, to = to, from
	}
	if from == to {
		return change{c.off, []byte{}}
	}
	return change{c.off + int64(from), c.data[from:to]}
}

// file returns the bytes of a segment's file.
func (s *store) file(t testing.TB, i int) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.path, "journal", strconv.Itoa(i)))
	check(t, err)
	return b
}
