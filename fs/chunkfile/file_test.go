package chunkfile_test

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
)

func TestArguments(t *testing.T) {
	s := written(t, 0, 100)
	if err := s.open(); err != nil {
		t.Fatal(err)
	}
	most := int64(s.own.geo.MaxPlain())
	one := []byte{1}
	for _, c := range []struct {
		call string
		got  error
		want error
	}{
		{"write before the beginning", second(s.f.WriteAt(one, -1)), chunkfile.ErrRange},
		{"write beyond the largest size", second(s.f.WriteAt(one, most)), unix.EFBIG},
		{"write far beyond", second(s.f.WriteAt(one, math.MaxInt64)), unix.EFBIG},
		{"write nothing far beyond", second(s.f.WriteAt(nil, math.MaxInt64)), nil},
		{"read before the beginning", second(s.f.ReadAt(one, -1)), chunkfile.ErrRange},
		{"read far beyond", second(s.f.ReadAt(one, math.MaxInt64)), nil},
		{"cut to a negative size", s.f.Truncate(-1), chunkfile.ErrRange},
		{"grow beyond the largest size", s.f.Truncate(most + 1), unix.EFBIG},
		{"allocate nothing", s.f.Allocate(0, 0, 0), chunkfile.ErrRange},
		{"allocate before the beginning", s.f.Allocate(0, -1, 10), chunkfile.ErrRange},
		{"allocate too much", s.f.Allocate(0, 10, most), unix.EFBIG},
		{"punch without KEEP_SIZE", s.f.Allocate(unix.FALLOC_FL_PUNCH_HOLE, 0, 10), unix.EOPNOTSUPP},
		{"collapse", s.f.Allocate(unix.FALLOC_FL_COLLAPSE_RANGE, 0, 10), unix.EOPNOTSUPP},
		{"insert", s.f.Allocate(unix.FALLOC_FL_INSERT_RANGE, 0, 10), unix.EOPNOTSUPP},
		{"seek before the beginning", third(s.f.SeekData(-1)), unix.ENXIO},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("%s: %v, want %v", c.call, c.got, c.want)
		}
	}
	if got, err := contents(s.f); err != nil || len(got) != 100 {
		t.Errorf("%d bytes, %v, want 100", len(got), err)
	}
}

func second(_ int, err error) error  { return err }
func third(_ int64, err error) error { return err }

// TestNoKey: an empty file needs no key to be read, and none is made up to
// write it; one with contents does not open.
func TestNoKey(t *testing.T) {
	s := newStored(t, chunk4k, bases[0])
	c, err := s.config()
	if err != nil {
		t.Fatal(err)
	}
	c.Codec = nil
	f, err := chunkfile.Open(c)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := f.ReadAt(make([]byte, 10), 0); n != 0 || err != nil {
		t.Errorf("read: %d, %v", n, err)
	}
	for call, err := range map[string]error{
		"write": second(f.WriteAt([]byte{1}, 0)), "truncate": f.Truncate(1), "allocate": f.Allocate(0, 0, 1),
	} {
		if !errors.Is(err, chunkfile.ErrNoKey) {
			t.Errorf("%s: %v", call, err)
		}
	}
	if err := f.Truncate(0); err != nil {
		t.Errorf("cut to nothing: %v", err)
	}
	f.Upgrade(s.disk, s.codec)
	if _, err := f.WriteAt([]byte{1}, 0); err != nil {
		t.Errorf("write with a key: %v", err)
	}
	if err := f.Flush(); err != nil {
		t.Error(err)
	}
	c.Size = int64(len(s.disk.b))
	if _, err := chunkfile.Open(c); !errors.Is(err, chunkfile.ErrNoKey) {
		t.Errorf("open without a key: %v", err)
	}
}

// TestDirty: memory holds something until a flush succeeds, and a failure that
// nobody saw is told to the next who asks.
func TestDirty(t *testing.T) {
	s := newStored(t, chunk4k, bases[0])
	if _, dirty := s.f.Dirty(); dirty {
		t.Error("a new file is dirty")
	}
	before := time.Now().Add(-time.Second)
	if err := (op{kind: "write", size: 10}).do(s.f); err != nil {
		t.Fatal(err)
	}
	since, dirty := s.f.Dirty()
	if at := time.Unix(since.Unix()); !dirty || at.Before(before) || at.After(time.Now()) {
		t.Errorf("dirty = %v since %v", dirty, at)
	}
	s.fail, s.lasts, s.steps = 1, true, 0
	s.f.FlushLater()
	if _, dirty := s.f.Dirty(); !dirty {
		t.Error("clean after a flush that failed")
	}
	s.fail = 0
	if err := s.f.Flush(); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("the flush after a failure that nobody was told of: %v", err)
	}
	if err := s.f.Flush(); err != nil {
		t.Errorf("the flush after that: %v", err)
	}
	if _, dirty := s.f.Dirty(); dirty {
		t.Error("dirty after a flush")
	}
}

// TestPutOff: an overwrite that the disk refuses half-way counts as done: it is
// read as new, nothing is written on top of it, and it is done again.
func TestPutOff(t *testing.T) {
	s := newStored(t, chunk4k, bases[0])
	for _, o := range []op{{kind: "write", size: 2 * chunk4k, fill: 1}, {kind: "flush"}, {kind: "write", size: 10, fill: 9}} {
		if err := o.do(s.f); err != nil {
			t.Fatal(err)
		}
	}
	s.steps, s.fail, s.lasts, s.spares = 0, 2, true, true // after the journal
	if err := s.f.Flush(); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("flush: %v", err)
	}
	want := append(op{fill: 9}.fillBytes(0, 10), op{fill: 1}.fillBytes(0, 2*chunk4k)[10:]...)
	// Another chunk takes the memory, so that the first comes from the disk.
	if err := (op{kind: "write", off: chunk4k, size: 10, fill: 2}).do(s.f); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("write while something is pending: %v", err)
	}
	if got, err := contents(s.f); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read while something is pending: %v, contents as wanted: %v", err, bytes.Equal(got, want))
	}
	if s.f.Pending() == 0 {
		t.Error("nothing is said to be pending")
	}
	s.fail = 0
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	if got, err := s.readAll(); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after close: %v, contents as wanted: %v", err, bytes.Equal(got, want))
	}
}

// TestTimes: the store file's mtime is the time of the last write, not of the
// flush.
func TestTimes(t *testing.T) {
	s, disk, _ := onDisk(t, chunk4k, 1024)
	if err := (op{kind: "write", size: 10}).do(s.f); err != nil {
		t.Fatal(err)
	}
	since, _ := s.f.Dirty()
	time.Sleep(30 * time.Millisecond)
	if err := s.f.Flush(); err != nil {
		t.Fatal(err)
	}
	st, err := disk.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if st.Mtime.Sec != since.Sec || st.Mtime.Nsec != uint32(since.Nsec) {
		t.Errorf("mtime = %v, want %v", st.Mtime, since)
	}
}

// TestConcurrent: readers see each chunk before or after a write, never torn,
// while one writer appends, overwrites and cuts. It is the race detector's.
func TestConcurrent(t *testing.T) {
	s, _, _ := onDisk(t, chunk4k, 1024)
	if err := uniform(s.f, 0); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	errs := make(chan error, 4)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			p := make([]byte, chunk4k)
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				at := int64(i % 8 * chunk4k)
				m, err := s.f.ReadAt(p, at)
				if err != nil {
					errs <- err
					return
				}
				for k := 1; k < m; k++ { // a chunk is one byte all over
					if p[k] != p[0] && p[k] != 0 {
						errs <- fmt.Errorf("chunk at %d: byte %d is %d, the first %d", at, k, p[k], p[0])
						return
					}
				}
				if _, err := s.f.SeekHole(at); err != nil && !errors.Is(err, unix.ENXIO) {
					errs <- err
					return
				}
				_, _ = s.f.Dirty()
				_ = s.f.Size()
			}
		})
	}
	err := uniform(s.f, 400)
	close(stop)
	wg.Wait()
	close(errs)
	for rerr := range errs {
		t.Error(rerr)
	}
	if err != nil {
		t.Error(err)
	}
}

// uniform writes whole chunks of one byte each, in many ways.
func uniform(f *chunkfile.File, steps int) error {
	fill := func(n int) []byte {
		p := make([]byte, n*chunk4k)
		for i := range p {
			p[i] = byte(i/chunk4k + 1)
		}
		return p
	}
	if _, err := f.WriteAt(fill(8), 0); err != nil {
		return err
	}
	for i := range steps {
		var err error
		switch at := int64(i * 5 % 8 * chunk4k); i % 8 {
		case 0:
			err = f.Truncate(3 * chunk4k)
		case 1:
			_, err = f.WriteAt(fill(4), 4*chunk4k)
		case 2:
			err = f.Allocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, chunk4k, 2*chunk4k)
		case 3:
			err = f.Fsync(true, func() (bool, error) { return false, nil })
		case 4:
			f.FlushLater()
		default:
			_, err = f.WriteAt(fill(1), at)
		}
		if err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return nil
}

func TestIsDamage(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{fmt.Errorf("x: %w", chunkfile.ErrSize), true},
		{fault.New(fault.Integrity, "x"), true},
		{fault.New(fault.BadFormat, "x"), true},
		{fault.New(fault.KeyDenied, "x"), false},
		{unix.EIO, false},
		{nil, false},
	} {
		if got := chunkfile.IsDamage(c.err); got != c.want {
			t.Errorf("IsDamage(%v) = %v, want %v", c.err, got, c.want)
		}
	}
}
