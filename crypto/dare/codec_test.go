package dare_test

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/keymem"
)

const (
	chunk4k = 4 << 10
	sio64k  = 64 << 10
)

var suites = []dare.Suite{dare.AES256GCM, dare.ChaCha20Poly1305}

// testPRK is the PRK of test file number id.
func testPRK(id byte) []byte {
	sum := sha256.Sum256([]byte{'p', 'r', 'k', id})
	return sum[:]
}

func newCodec(t testing.TB, id byte, suite dare.Suite, chunkSize int) *dare.Codec {
	t.Helper()
	prk := keymem.Take(testPRK(id))
	defer prk.Wipe()
	c, err := dare.New(prk, suite, chunkSize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Wipe)
	return c
}

func seal(t testing.TB, c *dare.Codec, plain []byte, index int64, last bool) []byte {
	t.Helper()
	slot, err := c.Seal(nil, plain, index, last)
	if err != nil {
		t.Fatalf("Seal(%d bytes, %d, %v): %v", len(plain), index, last, err)
	}
	return slot
}

// pattern returns n bytes without a short period.
func pattern(n int) []byte {
	out := make([]byte, n)
	x := uint32(2463534242)
	for i := range out {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		out[i] = byte(x)
	}
	return out
}

func TestRoundTrip(t *testing.T) {
	for _, suite := range suites {
		for size := dare.MinChunk; size <= dare.MaxChunk; size *= 2 {
			c := newCodec(t, 1, suite, size)
			for _, n := range []int{1, 15, 16, 17, size - 1, size} {
				for _, index := range []int64{0, 1, 1 << 40, math.MaxInt64} {
					plain := pattern(n)
					slot := seal(t, c, plain, index, true)
					if got, want := len(slot), n+dare.Overhead; got != want {
						t.Fatalf("slot of %d bytes, want %d", got, want)
					}
					got, err := c.Open(nil, slot, index, true)
					if err != nil || !bytes.Equal(got, plain) {
						t.Fatalf("%v, chunk size %d, %d bytes at %d: %v", suite, size, n, index, err)
					}
				}
			}
			if got, err := c.Open(nil, seal(t, c, pattern(size), 7, false), 7, false); err != nil || !bytes.Equal(got, pattern(size)) {
				t.Fatalf("middle chunk: %v", err)
			}
		}
	}
}

// F-4
func TestChunkKeyIsHKDF(t *testing.T) {
	c := newCodec(t, 1, dare.AES256GCM, chunk4k)
	seen := map[string]bool{}
	for _, index := range []int64{0, 1, 255, 256, 1 << 32, math.MaxInt64} {
		for _, last := range []bool{false, true} {
			info := binary.BigEndian.AppendUint64([]byte("kmsfs v1 chunk"), uint64(index))
			info = append(info, 0)
			if last {
				info[len(info)-1] = 1
			}
			want, err := hkdf.Expand(sha256.New, testPRK(1), string(info), 32)
			if err != nil {
				t.Fatal(err)
			}
			got, err := c.ChunkKey(index, last)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("key of chunk %d, last %v, is not HKDF-Expand's (%v)", index, last, err)
			}
			if seen[string(got)] {
				t.Errorf("chunk %d, last %v, shares its key", index, last)
			}
			seen[string(got)] = true
		}
	}
}

func TestBuffers(t *testing.T) {
	c := newCodec(t, 1, dare.AES256GCM, chunk4k)
	plain := pattern(1000)
	guard := bytes.Repeat([]byte{0xA5}, 200<<10)
	buf := append(bytes.Clone(guard[:0]), guard...)
	dst := append(buf[:0], "head"...)
	slot, err := c.Seal(dst, plain, 0, true)
	if err != nil {
		t.Fatal(err)
	}
	if &slot[0] != &buf[0] || string(slot[:4]) != "head" {
		t.Error("Seal does not append in place")
	}
	if !bytes.Equal(buf[len(slot):], guard[len(slot):]) {
		t.Error("Seal writes beyond the slot")
	}
	out := append(bytes.Clone(guard[:0]), guard...)
	back, err := c.Open(append(out[:0], "head"...), slot[4:], 0, true)
	if err != nil || !bytes.Equal(back[4:], plain) || string(back[:4]) != "head" {
		t.Fatalf("Open: %v", err)
	}
	if &back[0] != &out[0] || !bytes.Equal(out[len(back):], guard[len(back):]) {
		t.Error("Open does not append in place, or writes beyond")
	}
	exact := make([]byte, 0, len(plain)+dare.Overhead)
	if slot, err = c.Seal(exact, plain, 0, true); err != nil || &slot[0] != &exact[:1][0] {
		t.Errorf("Seal reallocates a buffer that is just large enough (%v)", err)
	}
	exact = make([]byte, 0, len(plain))
	if back, err = c.Open(exact, slot, 0, true); err != nil || &back[0] != &exact[:1][0] {
		t.Errorf("Open reallocates a buffer that is just large enough (%v)", err)
	}
}

// F-2
func TestArguments(t *testing.T) {
	prk := keymem.Random(32)
	defer prk.Wipe()
	short := keymem.Random(31)
	defer short.Wipe()
	for _, tc := range []struct {
		prk   *keymem.Key
		suite dare.Suite
		chunk int
		want  error
	}{
		{short, dare.AES256GCM, chunk4k, dare.ErrKey},
		{nil, dare.AES256GCM, chunk4k, dare.ErrKey},
		{prk, 0, chunk4k, dare.ErrSuite},
		{prk, 3, chunk4k, dare.ErrSuite},
		{prk, dare.AES256GCM, 0, dare.ErrChunkSize},
		{prk, dare.AES256GCM, 2048, dare.ErrChunkSize},
		{prk, dare.AES256GCM, 5000, dare.ErrChunkSize},
		{prk, dare.AES256GCM, 128 << 10, dare.ErrChunkSize},
		{prk, dare.AES256GCM, -4096, dare.ErrChunkSize},
	} {
		if _, err := dare.New(tc.prk, tc.suite, tc.chunk); !errors.Is(err, tc.want) {
			t.Errorf("New(%v, %d, %d): %v, want %v", tc.prk, tc.suite, tc.chunk, err, tc.want)
		}
	}
	c := newCodec(t, 1, dare.AES256GCM, chunk4k)
	for _, tc := range []struct {
		n     int
		index int64
		last  bool
		want  error
	}{
		{0, 0, true, dare.ErrLength},
		{0, 0, false, dare.ErrLength},
		{chunk4k + 1, 0, true, dare.ErrLength},
		{chunk4k - 1, 0, false, dare.ErrLength},
		{chunk4k + 1, 0, false, dare.ErrLength},
		{chunk4k, -1, false, dare.ErrIndex},
	} {
		if _, err := c.Seal(nil, pattern(tc.n), tc.index, tc.last); !errors.Is(err, tc.want) {
			t.Errorf("Seal(%d bytes, %d, %v): %v, want %v", tc.n, tc.index, tc.last, err, tc.want)
		}
	}
	if _, err := c.Open(nil, make([]byte, 100), -1, true); !errors.Is(err, dare.ErrIndex) {
		t.Errorf("Open at -1: %v, want %v", err, dare.ErrIndex)
	}
}

func TestSuiteNames(t *testing.T) {
	for _, s := range suites {
		if got, err := dare.ParseSuite(s.String()); err != nil || got != s || !s.Valid() {
			t.Errorf("ParseSuite(%q) = %v, %v", s, got, err)
		}
	}
	if got := fmt.Sprint(dare.AES256GCM, dare.ChaCha20Poly1305, dare.Suite(0)); got != "aes-256-gcm chacha20-poly1305 unknown" {
		t.Errorf("names = %q", got)
	}
	for _, name := range []string{"", "unknown", "AES-256-GCM"} {
		if _, err := dare.ParseSuite(name); !errors.Is(err, dare.ErrSuite) {
			t.Errorf("ParseSuite(%q): %v, want %v", name, err, dare.ErrSuite)
		}
	}
	if dare.Suite(0).Valid() || dare.Suite(3).Valid() {
		t.Error("an unknown suite is valid")
	}
}

// TestConcurrentSealAndOpen seals neighbouring slots of one buffer at once, as
// the file layer does; it is for the race detector.
func TestConcurrentSealAndOpen(t *testing.T) {
	c := newCodec(t, 1, dare.AES256GCM, chunk4k)
	g := dare.Geometry{ChunkSize: chunk4k}
	const chunks = 32
	plain := pattern(chunks * chunk4k)
	store := make([]byte, g.CipherSize(dare.PlainOff(len(plain))))
	each := func(do func(i int64, lo, hi dare.CipherOff) error) {
		var wg sync.WaitGroup
		for i := range int64(chunks) {
			wg.Go(func() {
				if err := do(i, g.Slot(i), min(g.Slot(i+1), dare.CipherOff(len(store)))); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	each(func(i int64, lo, _ dare.CipherOff) error {
		_, err := c.Seal(store[:lo], plain[i*chunk4k:(i+1)*chunk4k], i, i == chunks-1)
		return err
	})
	back := make([]byte, len(plain))
	each(func(i int64, lo, hi dare.CipherOff) error {
		_, err := c.Open(back[:i*chunk4k], store[lo:hi], i, i == chunks-1)
		return err
	})
	if !bytes.Equal(back, plain) {
		t.Error("round trip differs")
	}
}

func benchmark(b *testing.B, do func(b *testing.B, c *dare.Codec, plain []byte)) {
	for _, suite := range suites {
		for _, kib := range []int{4, 16, 32, 64} {
			b.Run(fmt.Sprintf("%v/%dKiB", suite, kib), func(b *testing.B) {
				b.SetBytes(int64(kib) << 10)
				b.ReportAllocs()
				do(b, newCodec(b, 1, suite, kib<<10), pattern(kib<<10))
			})
		}
	}
}

func BenchmarkSeal(b *testing.B) {
	benchmark(b, func(b *testing.B, c *dare.Codec, plain []byte) {
		dst := make([]byte, 0, len(plain)+dare.Overhead)
		for b.Loop() {
			if _, err := c.Seal(dst, plain, 1, false); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkOpen(b *testing.B) {
	benchmark(b, func(b *testing.B, c *dare.Codec, plain []byte) {
		slot := seal(b, c, plain, 1, false)
		dst := make([]byte, 0, len(plain))
		for b.Loop() {
			if _, err := c.Open(dst, slot, 1, false); err != nil {
				b.Fatal(err)
			}
		}
	})
}
