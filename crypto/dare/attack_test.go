package dare_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"

	"github.com/minio/sio"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
)

// mustFail opens a slot that nobody sealed for this place.
func mustFail(t *testing.T, c *dare.Codec, slot []byte, index int64, last bool, what string) {
	t.Helper()
	out, err := c.Open(nil, slot, index, last)
	if !errors.Is(err, dare.ErrChunk) || fault.Of(err) != fault.Integrity {
		t.Errorf("%s: error = %v, want %v", what, err, dare.ErrChunk)
	}
	if out != nil {
		t.Errorf("%s: %d bytes released", what, len(out))
	}
}

// moveNonce does what turns a DARE 2.0 package with sequence number from into
// one with sequence number to, if both are under one key.
func moveNonce(pkg []byte, from, to uint32) []byte {
	pkg = bytes.Clone(pkg)
	tail := pkg[12:16]
	binary.LittleEndian.PutUint32(tail, binary.LittleEndian.Uint32(tail)^from^to)
	return pkg
}

// TestMovedChunk is the attack that the key per chunk exists for: with one key
// per file and the index as sequence number, whoever moves a chunk and fixes up
// its stored nonce has it accepted.
//
// F-4
func TestMovedChunk(t *testing.T) {
	const from, to = 3, 9
	plain := pattern(chunk4k)

	t.Run("control: one shared key", func(t *testing.T) {
		cfg := sio.Config{
			MinVersion: sio.Version20, MaxVersion: sio.Version20,
			CipherSuites: []byte{sio.AES_256_GCM}, Key: make([]byte, 32), SequenceNumber: from,
		}
		r, err := sio.EncryptReader(bytes.NewReader(plain), cfg)
		if err != nil {
			t.Fatal(err)
		}
		pkg, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		cfg.SequenceNumber = to
		if _, err := sio.DecryptBuffer(nil, pkg, cfg); err == nil {
			t.Error("the package opens elsewhere even without a new nonce")
		}
		got, err := sio.DecryptBuffer(nil, moveNonce(pkg, from, to), cfg)
		if err != nil || !bytes.Equal(got, plain) {
			t.Errorf("the attack no longer works on a shared key (%v): this test proves nothing now", err)
		}
	})
	for _, suite := range suites {
		t.Run(suite.String(), func(t *testing.T) {
			c := newCodec(t, 1, suite, chunk4k)
			for _, last := range []bool{false, true} {
				slot := seal(t, c, plain, from, last)
				mustFail(t, c, slot, to, last, "moved")
				mustFail(t, c, moveNonce(slot, from, to), to, last, "moved, nonce fixed up")
				mustFail(t, c, moveNonce(slot, 0, to), to, last, "moved, nonce fixed up from 0")
				mustFail(t, c, slot, from+1<<32, last, "moved by 2^32")
			}
		})
	}
}

// TestCutAtChunkBoundary: what a cut, or an extension, leaves at the end.
//
// F-4
func TestCutAtChunkBoundary(t *testing.T) {
	c := newCodec(t, 1, dare.AES256GCM, chunk4k)
	plain := pattern(chunk4k)
	mustFail(t, c, seal(t, c, plain, 5, false), 5, true, "middle chunk as the last")
	mustFail(t, c, seal(t, c, plain, 5, true), 5, false, "last chunk as a middle one")
	mustFail(t, c, seal(t, c, plain[:100], 5, true), 5, false, "short last chunk as a middle one")
}

// TestSwapBetweenFiles: another file's chunk at the same index.
func TestSwapBetweenFiles(t *testing.T) {
	a := newCodec(t, 1, dare.AES256GCM, chunk4k)
	b := newCodec(t, 2, dare.AES256GCM, chunk4k)
	for _, last := range []bool{false, true} {
		mustFail(t, b, seal(t, a, pattern(chunk4k), 0, last), 0, last, "other file")
	}
}

func TestEveryBit(t *testing.T) {
	for _, suite := range suites {
		c := newCodec(t, 1, suite, chunk4k)
		slot := seal(t, c, pattern(300), 2, true)
		for bit := range len(slot) * 8 {
			slot[bit/8] ^= 1 << (bit % 8)
			mustFail(t, c, slot, 2, true, "bit flipped")
			slot[bit/8] ^= 1 << (bit % 8)
		}
		full := seal(t, c, pattern(chunk4k), 2, false)
		for bit := range 32 * 8 { // header, first block
			full[bit/8] ^= 1 << (bit % 8)
			mustFail(t, c, full, 2, false, "bit flipped")
			full[bit/8] ^= 1 << (bit % 8)
		}
		if _, err := c.Open(nil, slot, 2, true); err != nil {
			t.Errorf("%v: the untouched slot does not open: %v", suite, err)
		}
	}
}

// TestOtherStreams: valid streams of sio, under the right chunk key, that are
// not what Seal makes.
//
// F-3
func TestOtherStreams(t *testing.T) {
	c := newCodec(t, 1, dare.AES256GCM, chunk4k)
	key, err := c.ChunkKey(0, true)
	if err != nil {
		t.Fatal(err)
	}
	stream := func(plain []byte, change func(*sio.Config)) []byte {
		cfg := sio.Config{
			MinVersion: sio.Version20, MaxVersion: sio.Version20,
			CipherSuites: []byte{sio.AES_256_GCM}, Key: key,
		}
		if change != nil {
			change(&cfg)
		}
		r, err := sio.EncryptReader(bytes.NewReader(plain), cfg)
		if err != nil {
			t.Fatal(err)
		}
		out, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if _, err := c.Open(nil, stream(pattern(100), nil), 0, true); err != nil {
		t.Fatalf("sio's own stream does not open: %v", err)
	}
	v1 := func(cfg *sio.Config) { cfg.MinVersion, cfg.MaxVersion = sio.Version10, sio.Version10 }
	chacha := func(cfg *sio.Config) { cfg.CipherSuites = []byte{sio.CHACHA20_POLY1305} }
	mustFail(t, c, stream(pattern(100), v1), 0, true, "version 1.0")
	mustFail(t, c, stream(pattern(100), chacha), 0, true, "other suite")
	mustFail(t, c, stream(pattern(chunk4k+1), nil), 0, true, "longer than a chunk")
	mustFail(t, c, stream(pattern(sio64k+1), nil), 0, true, "two packages")
	mustFail(t, c, stream(pattern(sio64k), nil), 0, true, "a 64 KiB package in a 4 KiB store")
	one := stream(pattern(100), nil)
	mustFail(t, c, append(bytes.Clone(one), one...), 0, true, "two streams")
	mustFail(t, c, append(bytes.Clone(one), 0), 0, true, "trailing byte")
	mustFail(t, c, append(bytes.Clone(one), stream(pattern(chunk4k), nil)...), 0, true, "trailing package")
	for n := range len(one) {
		mustFail(t, c, one[:n], 0, true, "cut")
	}
	mustFail(t, c, make([]byte, len(one)), 0, true, "zeros")
	mustFail(t, c, nil, 0, true, "nothing")

	// The first package of a longer stream: right key, no final flag.
	big := newCodec(t, 1, dare.AES256GCM, sio64k)
	mustFail(t, big, stream(pattern(sio64k+1), nil)[:sio64k+dare.Overhead], 0, true, "first of two packages")
	mustFail(t, big, stream(pattern(sio64k+1), nil), 0, true, "two packages")
}

// TestFreshNonce: two seals of one plaintext share no nonce and no ciphertext.
//
// F-5
func TestFreshNonce(t *testing.T) {
	c := newCodec(t, 1, dare.AES256GCM, chunk4k)
	seen := map[string]bool{}
	for range 200 {
		slot := seal(t, c, pattern(64), 0, true)
		nonce := string(slot[4:16])
		if seen[nonce] {
			t.Fatal("nonce repeats")
		}
		seen[nonce] = true
	}
}

// TestReleasesNothingOnFailure: plaintext of a forged chunk is not left in the
// caller's buffer.
func TestReleasesNothingOnFailure(t *testing.T) {
	for _, suite := range suites {
		c := newCodec(t, 1, suite, chunk4k)
		plain := bytes.Repeat([]byte("SECRET"), 300)
		slot := seal(t, c, plain, 0, true)
		slot[len(slot)-1] ^= 1
		buf := make([]byte, 0, chunk4k)
		if _, err := c.Open(buf, slot, 0, true); !errors.Is(err, dare.ErrChunk) {
			t.Fatalf("error = %v", err)
		}
		if bytes.Contains(buf[:cap(buf)], []byte("SECRET")) {
			t.Errorf("%v: unauthenticated plaintext in the buffer", suite)
		}
	}
}

func TestWipedCodecRefuses(t *testing.T) {
	prk := keymem.Random(32)
	c, err := dare.New(prk, dare.AES256GCM, chunk4k)
	if err != nil {
		t.Fatal(err)
	}
	prk.Wipe() // the codec has a clone
	slot := seal(t, c, pattern(10), 0, true)
	before := keymem.Live()
	c.Wipe()
	if got := keymem.Live(); got != before-1 {
		t.Errorf("Live = %d, want %d", got, before-1)
	}
	if _, err := c.Seal(nil, pattern(10), 0, true); !errors.Is(err, dare.ErrKey) {
		t.Errorf("Seal after Wipe: %v, want %v", err, dare.ErrKey)
	}
	if _, err := c.Open(nil, slot, 0, true); !errors.Is(err, dare.ErrKey) {
		t.Errorf("Open after Wipe: %v, want %v", err, dare.ErrKey)
	}
}
