package chunkfile_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
)

// op is one call on a file.
type op struct {
	kind string
	off  int64
	size int64
	mode uint32
	fill byte
}

func (o op) String() string {
	return fmt.Sprintf("%s(off %d, size %d, mode %d, fill %d)", o.kind, o.off, o.size, o.mode, o.fill)
}

// randomOps draws n operations on a file of up to about most bytes. Offsets
// like chunk boundaries.
func randomOps(r *rand.Rand, n, chunk int, most int64) []op {
	var out []op
	at := func() int64 {
		switch c := int64(chunk); r.IntN(3) {
		case 0:
			return max(0, r.Int64N(most/c+1)*c+int64(r.IntN(3)-1))
		case 1:
			return r.Int64N(min(most, 300))
		}
		return r.Int64N(most)
	}
	for range n {
		o := op{off: at(), size: at() + 1, fill: byte(1 + r.IntN(250))}
		switch k := r.IntN(100); {
		case k < 30:
			o.kind = "write"
		case k < 38:
			o.kind, o.size = "write", int64(1+r.IntN(200))
		case k < 50:
			o.kind = "append"
			if r.IntN(2) == 0 {
				o.size = int64(1 + r.IntN(200))
			}
		case k < 64:
			o.kind, o.size = "truncate", o.off
			if r.IntN(5) == 0 {
				o.size = 0
			}
		case k < 82:
			o.kind = "allocate"
			o.mode = []uint32{0, unix.FALLOC_FL_KEEP_SIZE,
				unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE,
				unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE}[r.IntN(6)]
		case k < 87:
			o.kind = "flush"
		case k < 93:
			o.kind = "fsync"
		default:
			o.kind = "reopen"
		}
		out = append(out, o)
	}
	return out
}

// fillBytes is what op writes at off: no two operations write the same, and no
// byte is 0.
func (o op) fillBytes(off, n int64) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte((off+int64(i))*7+int64(o.fill)*31)%255 + 1
	}
	return b
}

// model returns what is in a file of these bytes after the operation. b itself
// is left alone.
func (o op) model(b []byte) []byte {
	b = append([]byte(nil), b...)
	switch o.kind {
	case "write":
		b = writeAt(b, o.fillBytes(o.off, o.size), o.off)
	case "append":
		b = append(b, o.fillBytes(int64(len(b)), o.size)...)
	case "truncate":
		b = resize(b, o.size)
	case "allocate":
		end := o.off + o.size
		if o.mode&(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) != 0 {
			if from, to := min(o.off, int64(len(b))), min(end, int64(len(b))); from < to {
				clear(b[from:to])
			}
		}
		if o.mode&unix.FALLOC_FL_KEEP_SIZE == 0 && end > int64(len(b)) {
			b = resize(b, end)
		}
	}
	return b
}

// do performs the operation; reopen is the caller's.
func (o op) do(f *chunkfile.File) error {
	switch o.kind {
	case "write":
		_, err := f.WriteAt(o.fillBytes(o.off, o.size), o.off)
		return err
	case "append":
		_, err := f.WriteAt(o.fillBytes(f.Size(), o.size), f.Size())
		return err
	case "truncate":
		return f.Truncate(o.size)
	case "allocate":
		return f.Allocate(o.mode, o.off, o.size)
	case "flush":
		return f.Flush()
	case "fsync":
		return f.Fsync(o.fill%2 == 0, func() (bool, error) { return false, nil })
	}
	return nil
}

// contents reads the whole file.
func contents(f *chunkfile.File) ([]byte, error) {
	b := make([]byte, f.Size()+1)
	n, err := f.ReadAt(b, 0)
	return b[:n], err
}

// firstDiff returns where two byte strings differ first.
func firstDiff(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

var seedFlag = flag.Uint64("seed", 0, "seed of random tests, as a failure printed it; 0: a new one")

// startSeed prints and returns the seed of a test's random choices.
func startSeed(t testing.TB) uint64 {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("-seed=%d", seed)
	return seed
}

func newRand(seed, run uint64, base dare.CipherOff) *rand.Rand {
	return rand.New(rand.NewPCG(seed, run<<32+uint64(base)))
}

// rounds is how often a random test of one goroutine runs: it tells the race
// detector nothing new, and is slow under it.
func rounds(n uint64) uint64 {
	if raceEnabled {
		return 2
	}
	return n
}

// steps returns 1 to n, or some of them under the race detector.
func steps(r *rand.Rand, n int) (out []int) {
	for i := 1; i <= n; i++ {
		if !raceEnabled || r.IntN(5) == 0 {
			out = append(out, i)
		}
	}
	return out
}
