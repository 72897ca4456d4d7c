package dare

import (
	"fmt"
	"slices"
	"sync"

	"github.com/minio/sio"

	"github.com/kmsfs/kmsfs/crypto/keymem"
)

// finalFlag is the first bit of a package's nonce field: the stream ends here.
const finalFlag = 0x80

// Codec seals and opens the chunks of one file. It is safe for concurrent use
// until Wipe; afterwards every call answers ErrKey.
type Codec struct {
	prk       *keymem.Key
	suites    []byte // the one suite, as sio takes it
	chunkSize int
	nonce     *[12]byte // nil outside tests: every seal draws a fresh nonce
}

// New returns a codec for the file whose HKDF-SHA256 PRK is prk (32 bytes). It
// keeps a clone; prk stays the caller's. It answers ErrKey, ErrSuite or
// ErrChunkSize for arguments out of range.
func New(prk *keymem.Key, suite Suite, chunkSize int) (*Codec, error) {
	if prk == nil || prk.Len() != keyLen {
		return nil, ErrKey
	}
	if !suite.Valid() {
		return nil, fmt.Errorf("suite %d: %w", suite, ErrSuite)
	}
	if err := checkChunkSize(chunkSize); err != nil {
		return nil, err
	}
	return &Codec{prk: prk.Clone(), suites: []byte{suite.id()}, chunkSize: chunkSize}, nil
}

// Wipe zeroes the file's key. No call may be running.
func (c *Codec) Wipe() { c.prk.Wipe() }

// Seal appends chunk index, sealed, to dst: len(plain) + Overhead bytes. It
// does not reallocate if dst has that much spare capacity, writes nothing
// beyond, and keeps neither slice; plain and the spare capacity of dst must not
// overlap. A chunk that is not the last must be exactly the chunk size, the
// last 1 byte to the chunk size: ErrLength otherwise. The nonce is fresh and
// random.
func (c *Codec) Seal(dst, plain []byte, index int64, last bool) ([]byte, error) {
	if !c.fits(len(plain), last) {
		return nil, fmt.Errorf("%d bytes: %w", len(plain), ErrLength)
	}
	op := opPool.Get().(*op)
	defer op.release()
	if err := op.derive(c.prk, index, last); err != nil {
		return nil, err
	}
	op.out = slices.Grow(dst, len(plain)+Overhead)
	cfg := c.config(op)
	cfg.Nonce = c.nonce
	w, err := sio.EncryptWriter(op, cfg)
	if err != nil {
		return nil, fmt.Errorf("chunk %d: %w", index, err)
	}
	if _, err := w.Write(plain); err != nil {
		return nil, fmt.Errorf("chunk %d: %w", index, err)
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("chunk %d: %w", index, err)
	}
	return op.out, nil
}

// Open appends the plaintext of chunk index, of which slot is the whole sealed
// form, to dst. It does not reallocate if dst has len(slot) - Overhead bytes of
// spare capacity, and keeps neither slice; slot and that capacity must not
// overlap. It answers ErrChunk for anything but what Seal made with the same
// key, suite, chunk size, index and last; no plaintext is in dst then, but its
// spare capacity may have been written to.
func (c *Codec) Open(dst, slot []byte, index int64, last bool) ([]byte, error) {
	op := opPool.Get().(*op)
	defer op.release()
	if err := op.derive(c.prk, index, last); err != nil {
		return nil, err
	}
	// sio would take several packages, and reads the header unchecked: this is
	// the only place where a slot's shape is decided.
	if !c.shape(slot, last) {
		return nil, fmt.Errorf("chunk %d: malformed: %w", index, ErrChunk)
	}
	out, err := sio.DecryptBuffer(dst, slot, c.config(op))
	if err != nil {
		return nil, fmt.Errorf("chunk %d: %w", index, ErrChunk)
	}
	return out, nil
}

// shape reports whether slot is one whole package of the only kind there is,
// of a length that this chunk may have.
func (c *Codec) shape(slot []byte, last bool) bool {
	n := len(slot) - Overhead
	return c.fits(n, last) &&
		slot[0] == sio.Version20 &&
		slot[1] == c.suites[0] &&
		int(slot[2])|int(slot[3])<<8 == n-1 &&
		slot[4]&finalFlag != 0
}

// fits reports whether a chunk may hold n plaintext bytes.
func (c *Codec) fits(n int, last bool) bool {
	if last {
		return n >= 1 && n <= c.chunkSize
	}
	return n == c.chunkSize
}

func (c *Codec) config(op *op) sio.Config {
	return sio.Config{
		MinVersion:   sio.Version20, // 1.0 has no final flag
		MaxVersion:   sio.Version20,
		CipherSuites: c.suites,
		Key:          op.key[:],
	}
}

// op is the scratch space of one Seal or Open. It is pooled because sio's
// interfaces would move it to the heap each time.
type op struct {
	key [keyLen]byte
	out []byte
}

var opPool = sync.Pool{New: func() any { return new(op) }}

// release wipes the chunk key and lets go of the caller's slice.
func (o *op) release() {
	clear(o.key[:])
	o.out = nil
	opPool.Put(o)
}

// Write appends p to the sealed chunk; it is where sio's writer flushes to.
func (o *op) Write(p []byte) (int, error) {
	o.out = append(o.out, p...)
	return len(p), nil
}

// SlotLen returns how long the slot is that begins with b by its own, still
// unauthenticated, word; 0 if b is too short to say.
func SlotLen(b []byte) int {
	if len(b) < 4 {
		return 0
	}
	return int(b[2]) | int(b[3])<<8 + 1 + Overhead
}
