package chunkfile_test

import (
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
	"github.com/kmsfs/kmsfs/fs/journal"
)

const benchSize = 64 << 20

// benchFile returns a file on the disk, of n bytes.
func benchFile(b *testing.B, n int64) *chunkfile.File {
	dir, err := backing.OpenRoot(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	disk, err := dir.Open("f", unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	redo, err := dir.Open("redo", unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _, _, _ = disk.Close(), redo.Close(), dir.Close() })
	s := newStored(b, 32<<10, bases[0])
	f, err := chunkfile.Open(chunkfile.Config{Disk: disk, Geo: s.own.geo, Codec: s.codec, Owner: &benchOwner{owner: s.own, disk: redo}})
	if err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 1<<20)
	for off := int64(0); off < n; off += int64(len(p)) {
		if _, err := f.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Flush(); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.ResetTimer()
	return f
}

func BenchmarkWrite1MiB(b *testing.B) {
	f := benchFile(b, 0)
	p := make([]byte, 1<<20)
	b.SetBytes(int64(len(p)))
	for i := range b.N {
		if i%(benchSize>>20) == 0 {
			if err := f.Truncate(0); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := f.WriteAt(p, int64(i%(benchSize>>20))<<20); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRead1MiB(b *testing.B) {
	f := benchFile(b, benchSize)
	p := make([]byte, 1<<20)
	b.SetBytes(int64(len(p)))
	for i := range b.N {
		if _, err := f.ReadAt(p, int64(i%(benchSize>>20))<<20); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRead4KiB(b *testing.B) {
	f := benchFile(b, benchSize)
	p := make([]byte, 4<<10)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		if _, err := f.ReadAt(p, rand.Int64N(benchSize>>12)<<12); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOverwrite4KiB(b *testing.B) {
	f := benchFile(b, benchSize)
	p := make([]byte, 4<<10)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		if _, err := f.WriteAt(p, rand.Int64N(benchSize>>12)<<12); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOverwrite1MiB(b *testing.B) {
	f := benchFile(b, benchSize)
	p := make([]byte, 1<<20)
	b.SetBytes(int64(len(p)))
	for i := range b.N {
		if _, err := f.WriteAt(p, int64(i%(benchSize>>20))<<20); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAppend100(b *testing.B) {
	f := benchFile(b, 0)
	p := make([]byte, 100)
	b.SetBytes(int64(len(p)))
	off := int64(0)
	for b.Loop() {
		if off > benchSize {
			if err := f.Truncate(0); err != nil {
				b.Fatal(err)
			}
			off = 0
		}
		if _, err := f.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
		off += int64(len(p))
	}
}

// benchOwner writes operations to a file, as a journal does.
type benchOwner struct {
	*owner
	disk *backing.File
	end  int64
}

func (o *benchOwner) Log(_ unix.Timespec, _ int64, ops ...journal.Op) (journal.LSN, uint32, error) {
	for _, op := range ops {
		if err := o.disk.WriteAt(op.Data, o.end); err != nil {
			return 0, 0, err
		}
		o.end = (o.end + int64(len(op.Data))) % (32 << 20)
	}
	return 1, 1, nil
}

func (o *benchOwner) Direct(_ bool, _ int64, write func() error) error { return write() }
func (o *benchOwner) Durable() journal.LSN                             { return 1 }
