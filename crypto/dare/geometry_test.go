package dare_test

import (
	"errors"
	"math"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/fault"
)

// F-6 F-7
func TestGeometryWorkedSizes(t *testing.T) {
	g := dare.Geometry{ChunkSize: 32 << 10, Base: 1024}
	for _, tc := range []struct {
		plain  dare.PlainOff
		cipher dare.CipherOff
		chunks int64
	}{
		{0, 0, 0},
		{1, 1024 + 33, 1},
		{32767, 1024 + 32799, 1},
		{32768, 1024 + 32800, 1},
		{32769, 1024 + 32800 + 33, 2},
		{65536, 1024 + 65600, 2},
		{65537, 1024 + 65600 + 33, 3},
	} {
		if got := g.CipherSize(tc.plain); got != tc.cipher {
			t.Errorf("CipherSize(%d) = %d, want %d", tc.plain, got, tc.cipher)
		}
		if got, err := g.PlainSize(tc.cipher); got != tc.plain || err != nil {
			t.Errorf("PlainSize(%d) = %d, %v, want %d", tc.cipher, got, err, tc.plain)
		}
		if got := g.Chunks(tc.plain); got != tc.chunks {
			t.Errorf("Chunks(%d) = %d, want %d", tc.plain, got, tc.chunks)
		}
	}
	if i, within := g.Chunk(32768 + 5); i != 1 || within != 5 {
		t.Errorf("Chunk = %d, %d, want 1, 5", i, within)
	}
	if got := g.Slot(2); got != 1024+2*32800 {
		t.Errorf("Slot(2) = %d", got)
	}
}

func TestChunkLen(t *testing.T) {
	g := dare.Geometry{ChunkSize: 4096}
	for _, tc := range []struct {
		index int64
		size  dare.PlainOff
		want  int
	}{
		{0, 0, 0}, {-1, 10, 0}, {0, 1, 1}, {0, 4096, 4096}, {1, 4096, 0},
		{0, 4097, 4096}, {1, 4097, 1}, {2, 4097, 0}, {1, 8192, 4096}, {1 << 60, 8192, 0},
	} {
		if got := g.ChunkLen(tc.index, tc.size); got != tc.want {
			t.Errorf("ChunkLen(%d, %d) = %d, want %d", tc.index, tc.size, got, tc.want)
		}
	}
}

// F-8
func TestImpossibleSizes(t *testing.T) {
	g := dare.Geometry{ChunkSize: 4096, Base: 512}
	for _, tc := range []struct {
		cipher dare.CipherOff
		want   dare.PlainOff
	}{
		{-1, 0}, {math.MinInt64, 0}, {1, 0}, {511, 0}, {512, 0}, {513, 0}, {512 + 32, 0},
		{512 + 4128 + 1, 4096}, {512 + 4128 + 32, 4096}, {512 + 2*4128 + 16, 8192},
	} {
		got, err := g.PlainSize(tc.cipher)
		if got != tc.want || !errors.Is(err, dare.ErrSize) || fault.Of(err) != fault.Integrity {
			t.Errorf("PlainSize(%d) = %d, %v, want %d and %v", tc.cipher, got, err, tc.want, dare.ErrSize)
		}
	}
}

func TestLimits(t *testing.T) {
	for _, base := range []dare.CipherOff{0, 16, 512, 1024, 8192} {
		for size := dare.MinChunk; size <= dare.MaxChunk; size *= 2 {
			g := dare.Geometry{ChunkSize: size, Base: base}
			top := g.MaxPlain()
			c := g.CipherSize(top)
			if c <= 0 {
				t.Fatalf("%+v: CipherSize(MaxPlain) = %d", g, c)
			}
			if back, err := g.PlainSize(c); back != top || err != nil {
				t.Errorf("%+v: PlainSize(%d) = %d, %v, want %d", g, c, back, err, top)
			}
			// One byte more costs 1 or 1 + Overhead: it must not fit.
			if room := math.MaxInt64 - int64(c); room >= 1+dare.Overhead || (room >= 1 && int64(top)%int64(size) != 0) {
				t.Errorf("%+v: MaxPlain leaves %d bytes", g, room)
			}
			if got := g.CipherSize(top + 1); got != math.MaxInt64 {
				t.Errorf("%+v: CipherSize(MaxPlain+1) = %d", g, got)
			}
			if got := g.Slot(math.MaxInt64); got != math.MaxInt64 {
				t.Errorf("%+v: Slot(max) = %d", g, got)
			}
			if got := g.Slot(g.Chunks(top) - 1); got <= 0 || got >= c {
				t.Errorf("%+v: last slot at %d of %d", g, got, c)
			}
		}
	}
}

func TestGeometryCheck(t *testing.T) {
	for _, tc := range []struct {
		g    dare.Geometry
		want error
	}{
		{dare.Geometry{ChunkSize: 4096}, nil},
		{dare.Geometry{ChunkSize: 65536, Base: 8192}, nil},
		{dare.Geometry{ChunkSize: 4096, Base: dare.MaxBase}, nil},
		{dare.Geometry{}, dare.ErrChunkSize},
		{dare.Geometry{ChunkSize: 2048}, dare.ErrChunkSize},
		{dare.Geometry{ChunkSize: 4097}, dare.ErrChunkSize},
		{dare.Geometry{ChunkSize: 131072}, dare.ErrChunkSize},
		{dare.Geometry{ChunkSize: 4096, Base: -1}, dare.ErrBase},
		{dare.Geometry{ChunkSize: 4096, Base: dare.MaxBase + 1}, dare.ErrBase},
	} {
		if err := tc.g.Check(); !errors.Is(err, tc.want) {
			t.Errorf("%+v: %v, want %v", tc.g, err, tc.want)
		}
	}
}
