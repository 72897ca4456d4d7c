package chunkfile_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
)

// TestModel runs random operations on a file on the disk and on bytes in memory.
func TestModel(t *testing.T) {
	for _, c := range []struct {
		chunk int
		most  int64
	}{{4096, 300}, {4096, 60_000}, {65536, 400_000}} {
		for _, base := range bases {
			t.Run(fmt.Sprintf("chunk=%d/most=%d/base=%d", c.chunk, c.most, base), func(t *testing.T) {
				t.Parallel()
				seed := startSeed(t)
				for run := range rounds(4) {
					runModel(t, newRand(seed, run, base), c.chunk, c.most, base)
				}
			})
		}
	}
}

// onDisk is a stored file whose disk is real.
func onDisk(t *testing.T, chunk int, base dare.CipherOff) (*stored, *backing.File, func() error) {
	dir, err := backing.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dir.Close() })
	disk, err := dir.Open("f", unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = disk.Close() })
	s := newStored(t, chunk, base)
	open := func() error {
		size, err := disk.Size()
		if err != nil {
			return err
		}
		s.disk.b = make([]byte, size)
		if _, err := disk.ReadAt(s.disk.b, 0); err != nil {
			return err
		}
		c, err := s.config()
		if err != nil {
			return err
		}
		c.Disk = disk
		s.f, err = chunkfile.Open(c)
		return err
	}
	if err := open(); err != nil {
		t.Fatal(err)
	}
	return s, disk, open
}

func runModel(t *testing.T, r *rand.Rand, chunk int, most int64, base dare.CipherOff) {
	s, _, open := onDisk(t, chunk, base)
	var want []byte
	for i, o := range randomOps(r, 60, chunk, most) {
		var err error
		if o.kind == "reopen" {
			if err = s.close(); err == nil {
				err = open()
			}
		} else {
			err = o.do(s.f)
		}
		if err != nil {
			t.Fatalf("step %d, %v: %v", i, o, err)
		}
		want = o.model(want)
		if err := same(r, s.f, want); err != nil {
			t.Fatalf("step %d, %v: %v", i, o, err)
		}
	}
}

// same compares all of the file, a random part of it, and its holes.
func same(r *rand.Rand, f *chunkfile.File, want []byte) error {
	if f.Size() != int64(len(want)) {
		return fmt.Errorf("size = %d, want %d", f.Size(), len(want))
	}
	got, err := contents(f)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("contents differ from byte %d on", firstDiff(got, want))
	}
	off := r.Int64N(int64(len(want)) + 10)
	p := make([]byte, r.IntN(len(want)+10))
	n, err := f.ReadAt(p, off)
	if rest := want[min(off, int64(len(want))):]; err != nil || !bytes.Equal(p[:n], rest[:min(len(p), len(rest))]) {
		return fmt.Errorf("read of %d bytes at %d: %d, %v", len(p), off, n, err)
	}
	return holes(f, want, off)
}

// holes: what SEEK_DATA leaps over and what SEEK_HOLE calls a hole is zeros, and
// both move on.
func holes(f *chunkfile.File, want []byte, off int64) error {
	size := int64(len(want))
	if off >= size {
		_, derr := f.SeekData(off)
		_, herr := f.SeekHole(off)
		if !errors.Is(derr, unix.ENXIO) || !errors.Is(herr, unix.ENXIO) {
			return fmt.Errorf("seek at %d of %d: %v, %v", off, size, derr, herr)
		}
		return nil
	}
	for off < size {
		data, err := f.SeekData(off)
		if errors.Is(err, unix.ENXIO) {
			data = size
		} else if err != nil || data < off || data >= size {
			return fmt.Errorf("SeekData(%d) = %d, %v", off, data, err)
		}
		if i := bytes.IndexFunc(want[off:data], func(c rune) bool { return c != 0 }); i >= 0 {
			return fmt.Errorf("data at %d is in a hole, %d to %d", off+int64(i), off, data)
		}
		if data == size {
			return nil
		}
		hole, err := f.SeekHole(data)
		if err != nil || hole <= data || hole > size {
			return fmt.Errorf("SeekHole(%d) = %d, %v", data, hole, err)
		}
		off = hole
	}
	return nil
}
