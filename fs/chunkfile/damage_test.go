package chunkfile_test

import (
	"bytes"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
)

const chunk4k = 4096

// written returns a closed file of n bytes, none of them 0.
func written(t testing.TB, base int, n int64) *stored {
	t.Helper()
	s := newStored(t, chunk4k, bases[base])
	if err := (op{kind: "write", size: n, fill: 1}).do(s.f); err != nil {
		t.Fatal(err)
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	return s
}

// readAll opens the file and reads it from one end to the other.
func (s *stored) readAll() ([]byte, error) {
	if err := s.open(); err != nil {
		return nil, err
	}
	return contents(s.f)
}

// TestCut cuts a file after every byte: no plaintext of a part of it is served.
func TestCut(t *testing.T) {
	for base := range bases {
		s := written(t, base, 2*chunk4k+10)
		whole := s.disk.b
		for n := 1; n < len(whole); n++ {
			s.disk.b = whole[:n]
			err := s.open()
			if !errors.Is(err, errHeader) && !chunkfile.IsDamage(err) {
				t.Fatalf("base %d: cut to %d of %d bytes: %v", bases[base], n, len(whole), err)
			}
		}
		for n := 1; n < 2*chunk4k; n++ {
			s.disk.b = append(bytes.Clone(whole), whole[len(whole)-n:]...)
			if err := s.open(); !chunkfile.IsDamage(err) {
				t.Fatalf("base %d: %d bytes added: %v", bases[base], n, err)
			}
		}
	}
}

// TestZeroedChunk blanks each chunk. A dense file does not take that for a
// hole; a sparse one does, but for its last chunk. (F-9)
func TestZeroedChunk(t *testing.T) {
	for base := range bases {
		for _, sparse := range []bool{false, true} {
			for i := range int64(3) {
				s := written(t, base, 2*chunk4k+10)
				at := int64(s.own.geo.Slot(i))
				clear(s.disk.b[at:min(at+chunk4k+32, int64(len(s.disk.b)))])
				s.setHeader(sparse)
				got, err := s.readAll()
				if !sparse || i == 2 {
					if fault.Of(err) != fault.Integrity {
						t.Errorf("base %d, sparse %v: chunk %d zeroed: %v", bases[base], sparse, i, err)
					}
					continue
				}
				want := op{fill: 1}.fillBytes(0, 2*chunk4k+10)
				clear(want[i*chunk4k : (i+1)*chunk4k])
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("base %d, sparse: chunk %d zeroed: %v, contents as wanted: %v", bases[base], i, err, bytes.Equal(got, want))
				}
			}
		}
	}
}

// TestNearlyZeroedChunk: one bit makes a hole a chunk, and a damaged one.
func TestNearlyZeroedChunk(t *testing.T) {
	for at := 0; at < chunk4k+32; at += 127 {
		s := written(t, 0, 2*chunk4k)
		slot := s.disk.b[s.own.geo.Slot(0):s.own.geo.Slot(1)]
		clear(slot)
		slot[at] = 0x10
		s.setHeader(true)
		if _, err := s.readAll(); fault.Of(err) != fault.Integrity {
			t.Errorf("all zero but byte %d: %v", at, err)
		}
	}
}

func (s *stored) setHeader(sparse bool) {
	if s.own.geo.Base == 1024 {
		copy(s.disk.b, header(sparse))
	} else {
		s.own.apart = header(sparse)
	}
}

// sparseOnDisk tells what the header says.
func (s *stored) sparseOnDisk(t *testing.T) bool {
	t.Helper()
	c, err := s.config()
	if err != nil {
		t.Fatal(err)
	}
	return c.Sparse
}

// TestSparse: a file says that it is sparse when it gets its first hole, not
// before, and until it is cut to nothing. (F-10)
func TestSparse(t *testing.T) {
	punch := uint32(unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE)
	for _, c := range []struct {
		name   string
		ops    []op
		sparse bool
	}{
		{"write past a short end", []op{{kind: "write", size: 10}, {kind: "write", off: chunk4k + 5, size: 10}}, false},
		{"write past a full end", []op{{kind: "write", size: chunk4k}, {kind: "write", off: chunk4k + 5, size: 10}}, false},
		{"grow to a chunk boundary", []op{{kind: "write", size: 10}, {kind: "truncate", size: 2 * chunk4k}}, false},
		{"grow within a chunk", []op{{kind: "write", size: 10}, {kind: "truncate", size: chunk4k}}, false},
		{"grow from nothing within a chunk", []op{{kind: "truncate", size: 100}}, false},
		{"punch less than a chunk", []op{{kind: "write", size: 3 * chunk4k}, {kind: "allocate", off: 1, size: 2*chunk4k - 2, mode: punch}}, false},
		{"punch the last chunk", []op{{kind: "write", size: 3 * chunk4k}, {kind: "allocate", off: 2 * chunk4k, size: 2 * chunk4k, mode: punch}}, false},
		{"write past a chunk", []op{{kind: "write", size: 10}, {kind: "write", off: 2*chunk4k + 5, size: 10}}, true},
		{"write past a chunk of nothing", []op{{kind: "write", off: chunk4k, size: 10}}, true},
		{"grow past a chunk", []op{{kind: "write", size: 10}, {kind: "truncate", size: 2*chunk4k + 1}}, true},
		{"grow from nothing", []op{{kind: "truncate", size: chunk4k + 1}}, true},
		{"punch a chunk", []op{{kind: "write", size: 3 * chunk4k}, {kind: "allocate", off: 1, size: 2*chunk4k - 1, mode: punch}}, true},
		{"zero a chunk", []op{{kind: "write", size: 3 * chunk4k}, {kind: "allocate", off: chunk4k, size: chunk4k, mode: unix.FALLOC_FL_ZERO_RANGE}}, true},
		{"filled up again", []op{{kind: "truncate", size: chunk4k + 1}, {kind: "write", size: chunk4k + 1}}, true},
		{"cut to nothing and written", []op{{kind: "truncate", size: 3 * chunk4k}, {kind: "truncate"}, {kind: "write", size: 2 * chunk4k}}, false},
	} {
		for base := range bases {
			s := newStored(t, chunk4k, bases[base])
			var want []byte
			for _, o := range c.ops {
				o.fill = 3
				if err := o.do(s.f); err != nil {
					t.Fatalf("%s: %v: %v", c.name, o, err)
				}
				want = o.model(want)
			}
			if err := s.close(); err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			if got := s.sparseOnDisk(t); got != c.sparse {
				t.Errorf("%s, base %d: sparse = %v, want %v", c.name, bases[base], got, c.sparse)
			}
			if got, err := s.readAll(); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s, base %d: read: %v, contents as wanted: %v", c.name, bases[base], err, bytes.Equal(got, want))
			}
		}
	}
}

// TestSparseNotKept: a write past the end that fails makes no file sparse.
func TestSparseNotKept(t *testing.T) {
	s := newStored(t, chunk4k, bases[0])
	if err := (op{kind: "write", size: 10}).do(s.f); err != nil {
		t.Fatal(err)
	}
	s.fail, s.lasts, s.steps = 1, true, 0
	if err := (op{kind: "write", off: 5 * chunk4k, size: 10}).do(s.f); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("write on a full disk: %v", err)
	}
	s.fail = 0
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	if s.sparseOnDisk(t) {
		t.Error("the header says sparse")
	}
}

// TestHeaderBeforeHole: at no moment of punching is there a hole in a file whose
// header does not say sparse. (F-10)
func TestHeaderBeforeHole(t *testing.T) {
	for base := range bases {
		for kill := 1; ; kill++ {
			s := written(t, base, 4*chunk4k)
			if err := s.open(); err != nil {
				t.Fatal(err)
			}
			s.steps, s.kill, s.prefix = 0, kill, func(_ int64, n int) int { return n }
			err := (op{kind: "allocate", off: chunk4k, size: chunk4k, mode: unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE}).do(s.f)
			if err == nil {
				err = s.close() // it is done in place when the journal is on the disk
			}
			if !s.dead {
				if err != nil || kill < 4 {
					t.Errorf("base %d: punched in %d steps: %v", bases[base], kill-1, err)
				}
				break
			}
			s.dead = false
			slot := s.disk.b[s.own.geo.Slot(1):s.own.geo.Slot(2)]
			if hole := bytes.Equal(slot, make([]byte, len(slot))); hole && !s.sparseOnDisk(t) {
				t.Errorf("base %d: a hole in a dense file after step %d", bases[base], kill)
			}
		}
	}
}

// TestRepairLost: repair does not touch a file that has less than an fsync
// promised. (F-35)
func TestRepairLost(t *testing.T) {
	for _, n := range []int{1100, 1024 + chunk4k + 32, 1024, 1} {
		s := written(t, 0, 2*chunk4k)
		s.disk.b = s.disk.b[:n:n]
		before := bytes.Clone(s.disk.b)
		c, _ := s.config() // the header may be cut
		c.Promised = int64(s.own.geo.CipherSize(2 * chunk4k))
		if _, err := chunkfile.Repair(c); !errors.Is(err, chunkfile.ErrLost) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
		if !bytes.Equal(s.disk.b, before) {
			t.Errorf("cut to %d bytes: repair changed the file", n)
		}
	}
}

// TestRepairSays: what repair did is told, and nothing is told of a whole file.
func TestRepairSays(t *testing.T) {
	for _, c := range []struct {
		cut, durable, size int64
		did                string
	}{
		{0, 2 * chunk4k, 2*chunk4k + 10, ""},
		{1, chunk4k, 2 * chunk4k, "sealed its end"},
		{42, chunk4k, 2 * chunk4k, "sealed its end"},
		{43, 0, chunk4k, "sealed its end"},
		{10 + 32 + 2*(chunk4k+32), 0, 0, "the file had no whole chunk and is empty now"},
	} {
		s := written(t, 0, 2*chunk4k+10)
		s.disk.b = s.disk.b[:int64(len(s.disk.b))-c.cut]
		conf, err := s.config()
		if err != nil {
			t.Fatal(err)
		}
		if c.durable > 0 {
			conf.Promised = int64(s.own.geo.CipherSize(dare.PlainOff(c.durable)))
		}
		did, err := chunkfile.Repair(conf)
		size, serr := s.own.geo.PlainSize(dare.CipherOff(len(s.disk.b)))
		if did != c.did || int64(size) != c.size || err != nil || serr != nil {
			t.Errorf("cut by %d: %q, %d, %v, %v, want %q, %d", c.cut, did, size, err, serr, c.did, c.size)
		}
		if _, err := s.readAll(); err != nil {
			t.Errorf("cut by %d: after repair: %v", c.cut, err)
		}
	}
}

// TestRepairHugeHole: repair does not read through a hole.
func TestRepairHugeHole(t *testing.T) {
	s, disk, _ := onDisk(t, chunk4k, 1024)
	for _, o := range []op{{kind: "write", size: 3 * chunk4k, fill: 1}, {kind: "truncate", size: 1 << 40}} {
		if err := o.do(s.f); err != nil {
			t.Fatal(err)
		}
	}
	size, err := disk.Size()
	if err != nil {
		t.Fatal(err)
	}
	if err := disk.Truncate(size - 1); err != nil {
		t.Fatal(err)
	}
	reads := &counted{Disk: disk}
	if _, err := chunkfile.Repair(chunkfile.Config{Disk: reads, Geo: s.own.geo, Codec: s.codec, Owner: s.own, Size: size - 1, Sparse: true}); err != nil {
		t.Error(err)
	}
	if size, err = disk.Size(); err != nil || size != int64(s.own.geo.CipherSize(3*chunk4k)) {
		t.Errorf("repaired to a store file of %d bytes, %v, want %d", size, err, s.own.geo.CipherSize(3*chunk4k))
	}
	if reads.reads > 20 {
		t.Errorf("%d reads", reads.reads)
	}
}
