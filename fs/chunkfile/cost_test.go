package chunkfile_test

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/chunkfile"
)

// counted counts the calls on a disk.
type counted struct {
	chunkfile.Disk
	reads, writes int
	bytes         int64
	lowest        int64 // offset below which no write began, of the largest so far
	back          int   // writes that began before the end of an earlier one
	syncs         int
}

func (c *counted) Sync() error { c.syncs++; return c.Disk.Sync() }

func (c *counted) Datasync() error { c.syncs++; return c.Disk.Datasync() }

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.reads++
	return c.Disk.ReadAt(p, off)
}

func (c *counted) WriteAt(p []byte, off int64) error {
	c.writes++
	c.bytes += int64(len(p))
	if off < c.lowest {
		c.back++
	}
	c.lowest = max(c.lowest, off+int64(len(p)))
	return c.Disk.WriteAt(p, off)
}

// counting returns a new file whose disk counts.
func counting(t testing.TB, chunk int) (*chunkfile.File, *counted, *owner) {
	s := newStored(t, chunk, bases[0])
	c := &counted{Disk: s.disk}
	f, err := chunkfile.Open(chunkfile.Config{Disk: c, Geo: s.own.geo, Codec: s.codec, Owner: s.own})
	if err != nil {
		t.Fatal(err)
	}
	return f, c, s.own
}

// TestSequentialWrites: a request of 1 MiB is one write, whatever the chunk
// size, and no byte on the disk is written twice.
func TestSequentialWrites(t *testing.T) {
	for _, chunk := range []int{4 << 10, 32 << 10, 64 << 10} {
		for _, request := range []int{1 << 20, 128 << 10, 100_000} {
			t.Run(fmt.Sprintf("chunk=%d/request=%d", chunk, request), func(t *testing.T) {
				f, disk, own := counting(t, chunk)
				p, n := make([]byte, request), 16
				for i := range n {
					if _, err := f.WriteAt(p, int64(i*request)); err != nil {
						t.Fatal(err)
					}
				}
				if err := f.Flush(); err != nil {
					t.Fatal(err)
				}
				if disk.writes > n+1 || disk.reads > 0 || disk.back > 0 || own.records > 0 {
					t.Errorf("%d requests: %d writes, %d back, %d reads, %d records", n, disk.writes, disk.back, disk.reads, own.records)
				}
				if chunks := int64(n*request/chunk + 1); disk.bytes > int64(n*request)+32*chunks+1024 {
					t.Errorf("%d bytes written, of %d", disk.bytes, n*request)
				}
			})
		}
	}
}

// TestSmallAppends: appends of 100 bytes seal each chunk once.
func TestSmallAppends(t *testing.T) {
	const chunk, appends = 64 << 10, 20_000
	f, disk, own := counting(t, chunk)
	for i := range appends {
		if _, err := f.WriteAt(make([]byte, 100), int64(i*100)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	if chunks := appends*100/chunk + 1; disk.writes > chunks || disk.reads > 0 || own.records > 0 {
		t.Errorf("%d writes, %d reads, %d records for %d chunks", disk.writes, disk.reads, own.records, chunks)
	}
}

// TestAppendsSynced appends with an fsync after each. Each costs one sync, the
// file's own at first and then the journal's, and seals one chunk.
func TestAppendsSynced(t *testing.T) {
	f, disk, own := counting(t, 64<<10)
	for i := range 2000 {
		own.syncs, disk.syncs = 0, 0
		if _, err := f.WriteAt(make([]byte, 100), int64(i*100)); err != nil {
			t.Fatal(err)
		}
		if err := f.Fsync(true, func() (bool, error) { return false, nil }); err != nil {
			t.Fatal(err)
		}
		if n := own.syncs + disk.syncs; n != 1 || i > 0 && disk.syncs > 0 {
			t.Fatalf("append %d: %d syncs of the journal, %d of the file", i, own.syncs, disk.syncs)
		}
	}
	if own.grows != 0 || disk.writes > 2*2000 {
		t.Errorf("%d records of growth, %d writes", own.grows, disk.writes)
	}
}

// TestFsyncCost: no fsync costs more syncs than the file's own would, whatever
// was written before.
func TestFsyncCost(t *testing.T) {
	f, disk, own := counting(t, 4<<10)
	size := int64(0)
	for i, w := range []struct{ off, n int64 }{
		{0, 10}, {0, 10}, {10, 5000}, {100, 4096}, {5010, 100_000}, {3000, 50_000}, {105_010, 3}, {20_000, 1},
	} {
		own.syncs, disk.syncs = 0, 0
		if _, err := f.WriteAt(make([]byte, w.n), w.off); err != nil {
			t.Fatal(err)
		}
		size = max(size, w.off+w.n)
		if err := f.Fsync(true, func() (bool, error) { return false, nil }); err != nil {
			t.Fatal(err)
		}
		if n := own.syncs + disk.syncs; n != 1 {
			t.Errorf("write %d: %d syncs of the journal, %d of the file", i, own.syncs, disk.syncs)
		}
		if err := f.Fsync(true, func() (bool, error) { return false, nil }); err != nil || own.syncs+disk.syncs != 1 {
			t.Errorf("fsync of nothing after write %d: %d syncs, %v", i, own.syncs+disk.syncs, err)
		}
	}
}

// TestSmallOverwrites: writes within one chunk seal it once, and others once
// each.
func TestSmallOverwrites(t *testing.T) {
	f, disk, own := counting(t, 64<<10)
	if _, err := f.WriteAt(make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	disk.writes, disk.reads = 0, 0
	for i := range 32 { // two chunks
		if _, err := f.WriteAt(make([]byte, 4096), int64(i*4096)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	if disk.writes != 2 || disk.reads > 2 || own.records != 2 {
		t.Errorf("%d writes, %d reads, %d records, want 2 each", disk.writes, disk.reads, own.records)
	}
}

// TestSequentialReads: a request of 1 MiB is one read.
func TestSequentialReads(t *testing.T) {
	f, disk, _ := counting(t, 32<<10)
	p := make([]byte, 1<<20)
	for i := range int64(4) {
		if _, err := f.WriteAt(p, i<<20); err != nil {
			t.Fatal(err)
		}
	}
	disk.reads = 0
	for i := range int64(4) {
		if n, err := f.ReadAt(p, i<<20); n != len(p) || err != nil {
			t.Fatal(n, err)
		}
	}
	if disk.reads > 4 {
		t.Errorf("%d reads", disk.reads)
	}
}

// TestSeekLeaps: looking for data does not read through a hole.
func TestSeekLeaps(t *testing.T) {
	s, disk, _ := onDisk(t, chunk4k, 1024)
	c := &counted{Disk: disk}
	s.f.Upgrade(c, nil)
	for _, o := range []op{{kind: "write", size: 10, fill: 1}, {kind: "truncate", size: 1 << 40}, {kind: "write", off: 1 << 39, size: 10, fill: 1}} {
		if err := o.do(s.f); err != nil {
			t.Fatal(err)
		}
	}
	c.reads = 0
	for _, w := range []struct{ off, data, hole int64 }{
		{0, 0, chunk4k}, {chunk4k, 1 << 39, chunk4k}, {1 << 39, 1 << 39, 1<<39 + chunk4k}, {1<<39 + chunk4k, 1<<40 - chunk4k, 1<<39 + chunk4k},
	} {
		data, err := s.f.SeekData(w.off)
		if data != w.data || err != nil {
			t.Errorf("SeekData(%d) = %d, %v, want %d", w.off, data, err, w.data)
		}
		hole, err := s.f.SeekHole(w.off)
		if hole != w.hole || err != nil {
			t.Errorf("SeekHole(%d) = %d, %v, want %d", w.off, hole, err, w.hole)
		}
	}
	if c.reads > 50 {
		t.Errorf("%d reads", c.reads)
	}
	if _, err := s.f.SeekData(1 << 40); err != unix.ENXIO {
		t.Errorf("SeekData at the end: %v", err)
	}
}

// TestSeekOverPending: looking for data behind a large hole does not read the
// hole, also while the journal has something that the disk has not.
func TestSeekOverPending(t *testing.T) {
	const chunk, chunks = 4 << 10, 20_000
	f, disk, _ := counting(t, chunk)
	p := make([]byte, chunk)
	for _, i := range []int64{0, chunks / 2, chunks - 1} {
		if _, err := f.WriteAt(p, i*chunk); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Fsync(false, func() (bool, error) { return false, nil }); err != nil {
		t.Fatal(err)
	}
	for _, i := range []int64{0, chunks / 4} { // over what is durable, and into the hole
		if _, err := f.WriteAt(p, i*chunk); err != nil {
			t.Fatal(err)
		}
		if err := f.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if f.Pending() == 0 {
		t.Fatal("nothing is pending")
	}
	disk.reads = 0
	for from, want := range map[int64]int64{1: chunks / 4, chunks/4 + 1: chunks / 2, chunks/2 + 1: chunks - 1} {
		if got, err := f.SeekData(from * chunk); err != nil || got != want*chunk {
			t.Errorf("data from chunk %d: %d, %v; want chunk %d", from, got/chunk, err, want)
		}
	}
	if disk.reads > 20 {
		t.Errorf("%d reads", disk.reads)
	}
}
