package dare_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/dare"
)

// FuzzOpen: no slot makes Open panic or answer anything but the plaintext of
// what Seal made, and ErrChunk. The key is fixed, so nothing but the seeds (and
// what Seal makes of the input) may open.
func FuzzOpen(f *testing.F) {
	for _, v := range loadVectors(f) {
		f.Add(v.slot, v.index, v.last, v.suite == dare.AES256GCM)
	}
	f.Fuzz(func(t *testing.T, slot []byte, index int64, last, aes bool) {
		suite := dare.ChaCha20Poly1305
		if aes {
			suite = dare.AES256GCM
		}
		c := newCodec(t, 1, suite, chunk4k)
		plain, err := c.Open(nil, slot, index, last)
		switch {
		case err == nil:
			c.SetNonce([12]byte(slot[4:16]))
			if again := seal(t, c, plain, index, last); !bytes.Equal(again, slot) {
				t.Error("a slot opens that Seal does not make")
			}
		case index < 0 && !errors.Is(err, dare.ErrIndex), index >= 0 && !errors.Is(err, dare.ErrChunk):
			t.Errorf("Open: %v", err)
		case plain != nil:
			t.Error("bytes released with an error")
		}
		if index < 0 || len(slot) == 0 || len(slot) > chunk4k {
			return
		}
		sealed := seal(t, newCodec(t, 2, suite, chunk4k), slot, index, true)
		got, err := newCodec(t, 2, suite, chunk4k).Open(nil, sealed, index, true)
		if err != nil || !bytes.Equal(got, slot) {
			t.Errorf("round trip: %v", err)
		}
	})
}

// FuzzGeometry: sizes round-trip, grow together, and agree with the slots.
func FuzzGeometry(f *testing.F) {
	for _, size := range []int64{0, 1, 4095, 4096, 4097, 1 << 20, 1 << 62, 1<<63 - 1, -1} {
		f.Add(size, uint8(0), uint32(0))
		f.Add(size, uint8(3), uint32(1024))
	}
	f.Fuzz(func(t *testing.T, n int64, shift uint8, base uint32) {
		g := dare.Geometry{ChunkSize: dare.MinChunk << (shift % 5), Base: dare.CipherOff(base % (dare.MaxBase + 1))}
		if err := g.Check(); err != nil {
			t.Fatal(err)
		}
		checkStoreSize(t, g, dare.CipherOff(n))
		if size := dare.PlainOff(n); size >= 0 && size <= g.MaxPlain() {
			checkPlainSize(t, g, size)
		}
	})
}

func checkPlainSize(t *testing.T, g dare.Geometry, size dare.PlainOff) {
	c := g.CipherSize(size)
	if back, err := g.PlainSize(c); back != size || err != nil {
		t.Errorf("%+v: PlainSize(CipherSize(%d) = %d) = %d, %v", g, size, c, back, err)
	}
	if size < g.MaxPlain() && g.CipherSize(size+1) <= c {
		t.Errorf("%+v: CipherSize does not grow at %d", g, size)
	}
	if size == 0 {
		return
	}
	last := g.Chunks(size) - 1
	n := g.ChunkLen(last, size)
	if n < 1 || n > g.ChunkSize || g.Slot(last)+dare.CipherOff(n+dare.Overhead) != c {
		t.Errorf("%+v: size %d: last slot at %d has %d bytes, store size %d", g, size, g.Slot(last), n, c)
	}
	if i, within := g.Chunk(size - 1); i != last || within != n-1 {
		t.Errorf("%+v: Chunk(%d) = %d, %d, want %d, %d", g, size-1, i, within, last, n-1)
	}
	if got := g.ChunkLen(last+1, size); got != 0 {
		t.Errorf("%+v: a chunk of %d bytes behind the last", g, got)
	}
}

func checkStoreSize(t *testing.T, g dare.Geometry, size dare.CipherOff) {
	plain, err := g.PlainSize(size)
	if plain < 0 || plain > g.MaxPlain() {
		t.Errorf("%+v: PlainSize(%d) = %d", g, size, plain)
	}
	c := g.CipherSize(plain)
	switch {
	case err == nil && c != size:
		t.Errorf("%+v: store size %d has plaintext size %d, which has %d", g, size, plain, c)
	case err != nil && !errors.Is(err, dare.ErrSize):
		t.Errorf("%+v: PlainSize(%d): %v", g, size, err)
	case err != nil && size > 0 && c >= size:
		t.Errorf("%+v: PlainSize(%d) = %d, which is not below", g, size, plain)
	case err != nil && size > 0 && plain < g.MaxPlain() && g.CipherSize(plain+1) <= size:
		t.Errorf("%+v: PlainSize(%d) = %d is not the nearest", g, size, plain)
	}
}
