package envelope

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"unicode"
	"unicode/utf8"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

const (
	// FormatVersion is the version of a header whose recipients hold the data
	// key itself, SharedVersion of one whose recipients hold a branch key,
	// BirthVersion of either with a birth. They are the versions that this
	// package reads and writes.
	FormatVersion = 1
	SharedVersion = 2
	BirthVersion  = 3
	// SealedLen is the length of a data key wrapped under a branch key, in bytes.
	SealedLen = 40
	// MinHeader, MaxHeader and DefaultHeader are sizes of a header block in
	// bytes. A size is a power of two.
	MinHeader     = 512
	MaxHeader     = 8192
	DefaultHeader = 1024
	// MaxRecipients bounds the wrapped copies of a data key, and so the calls
	// that one header can cause (CVE-2024-23680).
	MaxRecipients = 8

	// Bounds of a recipient's fields, in bytes. The key URI's and the wrapped
	// key's are those of the AWS KMS API.
	MaxClass    = 255
	MaxKeyURI   = 2048
	MaxBlob     = 6144
	MaxMaterial = 255

	minChunk = 4 << 10
	maxChunk = 64 << 10
)

const (
	magic = "kmsfs\x00"

	offVersion = 6
	offSuite   = 8
	offChunk   = 9
	offFlags   = 10
	offBlock   = 12
	offStore   = 16
	offFile    = 32
	offBirth   = 48 // version 3 only
	fixedLen   = 48 // without a birth

	// After the fixed part, of 48 or 56 bytes: commitment, number of recipients
	// (1 byte), 0, bytes of all recipients (2), recipients.
	commitmentLen = 32
	countsLen     = 4

	flagSparse = 1 << 0
	flagShared = 1 << 1
	// trailerLen is what follows the recipients of a shared key.
	trailerLen = len(ID{}) + SealedLen
	// recipientLens is what the four length fields of a recipient take.
	recipientLens = 1 + 2 + 2 + 1
)

// Fixed is the authenticated part of a header. ChunkSize is 0, and Suite any
// value, for a key without contents (purposes names and store); neither is 0
// for a file's.
type Fixed struct {
	Suite     uint8  // cipher of the chunks; this package does not interpret it
	ChunkSize int    // plaintext bytes of a chunk, a power of two from 4 KiB to 64 KiB
	Sparse    bool   // all-zero slots are holes
	Shared    bool   // the data key is wrapped under a branch key; set by Parse and Create
	BlockSize int    // size of the header block in bytes; set by Parse and Create
	Birth     uint64 // of the contents of a file: journal epoch<<32 | serial; 0: none
	Store     ID
	File      ID // file id, or the id of the name key or the store
}

// Recipient is one wrapped copy of the data key. Nothing in it is authenticated
// by the header.
type Recipient struct {
	Class   string // class whose policy governs the key; part of the encryption context
	Wrapped keywrap.Wrapped
}

// Header is a decoded header block. It holds nothing secret.
type Header struct {
	Fixed
	Commitment [32]byte
	Recipients []Recipient // of the data key or, if Shared, of the branch key

	// If Shared, else zero. Neither is authenticated by the header, but only
	// the right ones give the data key that it commits to.
	Branch ID              // id of the branch key
	Sealed [SealedLen]byte // data key, wrapped under the branch key for this file
}

// wrapID returns the id that the key service knows the wrapped key by.
func (h *Header) wrapID() ID {
	if h.Shared {
		return h.Branch
	}
	return h.File
}

// ValidHeaderSize reports whether n is a size that a header block may have.
func ValidHeaderSize(n int) bool {
	return n >= MinHeader && n <= MaxHeader && n&(n-1) == 0
}

func validChunkSize(n int) bool { return n >= minChunk && n <= maxChunk && n&(n-1) == 0 }

// check answers ErrInvalid for a fixed part that Parse would refuse.
func (f *Fixed) check() error {
	switch {
	case f.ChunkSize == 0 && !f.Sparse && !f.Shared && f.Birth == 0:
	case f.ChunkSize == 0:
		return fmt.Errorf("sparse, shared or born without contents: %w", ErrInvalid)
	case f.Suite == 0:
		return fmt.Errorf("chunk size %d without a cipher suite: %w", f.ChunkSize, ErrInvalid)
	case !validChunkSize(f.ChunkSize):
		return fmt.Errorf("chunk size %d: %w", f.ChunkSize, ErrInvalid)
	}
	if !ValidHeaderSize(f.BlockSize) {
		return fmt.Errorf("header size %d: %w", f.BlockSize, ErrInvalid)
	}
	return nil
}

func (f *Fixed) version() uint16 {
	switch {
	case f.Birth != 0:
		return BirthVersion
	case f.Shared:
		return SharedVersion
	}
	return FormatVersion
}

// fixedLen returns the length of the fixed part in bytes.
func (f *Fixed) fixedLen() int {
	if f.Birth != 0 {
		return fixedLen + 8
	}
	return fixedLen
}

// Committed returns the part of a header block that a rewrap leaves as it is:
// the fixed part and the commitment to it. It checks nothing; a block that is
// too short gives nil.
func Committed(block []byte) []byte {
	n := fixedLen + commitmentLen
	if len(block) >= offVersion+2 && binary.BigEndian.Uint16(block[offVersion:]) == BirthVersion {
		n += 8
	}
	if len(block) < n {
		return nil
	}
	return block[:n]
}

// authenticated appends the bytes that the commitment covers to dst. f passes
// check.
func (f *Fixed) authenticated(dst []byte) []byte {
	var b [fixedLen + 8]byte
	copy(b[:], magic)
	binary.BigEndian.PutUint16(b[offVersion:], f.version())
	b[offSuite] = f.Suite
	if f.ChunkSize != 0 {
		b[offChunk] = byte(bits.Len(uint(f.ChunkSize)) - 1)
	}
	var flags uint16
	if f.Sparse {
		flags |= flagSparse
	}
	if f.Shared {
		flags |= flagShared
	}
	binary.BigEndian.PutUint16(b[offFlags:], flags)
	binary.BigEndian.PutUint32(b[offBlock:], uint32(f.BlockSize))
	copy(b[offStore:], f.Store[:])
	copy(b[offFile:], f.File[:])
	binary.BigEndian.PutUint64(b[offBirth:], f.Birth)
	return append(dst, b[:f.fixedLen()]...)
}

func (r *Recipient) size() int {
	return recipientLens + len(r.Class) + len(r.Wrapped.Key) + len(r.Wrapped.Blob) + len(r.Wrapped.Material)
}

// check answers ErrDoesNotFit for a field over its bound and ErrInvalid for one
// that Parse would refuse for another reason.
func (r *Recipient) check() error {
	w := &r.Wrapped
	if len(r.Class) > MaxClass || len(w.Key) > MaxKeyURI || len(w.Blob) > MaxBlob || len(w.Material) > MaxMaterial {
		return fmt.Errorf("recipient %.64q of class %.64q: %w", w.Key, r.Class, ErrDoesNotFit)
	}
	if r.Class == "" || w.Key == "" || len(w.Blob) == 0 || !printable(r.Class) || !printable(w.Key) || !printable(w.Material) {
		return fmt.Errorf("recipient %.64q of class %.64q: %w", w.Key, r.Class, ErrInvalid)
	}
	return nil
}

// printable keeps control characters out of logs and terminals, to which these
// fields go before anything has authenticated them.
func printable(s string) bool {
	for _, r := range s {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}

// size returns the bytes that h takes without padding.
func (h *Header) size() int {
	n := h.fixedLen() + commitmentLen + countsLen + h.recipientsSize()
	if h.Shared {
		n += trailerLen
	}
	return n
}

func (h *Header) recipientsSize() (n int) {
	for i := range h.Recipients {
		n += h.Recipients[i].size()
	}
	return n
}

// checkBranch answers ErrInvalid for a branch that Parse would refuse.
func (h *Header) checkBranch() error {
	switch {
	case h.Shared && h.Branch.IsZero():
		return fmt.Errorf("shared key without a branch: %w", ErrInvalid)
	case !h.Shared && (!h.Branch.IsZero() || h.Sealed != [SealedLen]byte{}):
		return fmt.Errorf("branch of a key that is not shared: %w", ErrInvalid)
	}
	return nil
}

// Encode returns the header block of size bytes. size must be h.BlockSize,
// which the commitment covers. Errors: ErrDoesNotFit if the recipients are too
// many or too long for the block, ErrInvalid for fields that no header has.
func (h *Header) Encode(size int) ([]byte, error) {
	if size != h.BlockSize {
		return nil, fmt.Errorf("header of %d bytes in a block of %d: %w", h.BlockSize, size, ErrInvalid)
	}
	if err := h.Fixed.check(); err != nil {
		return nil, err
	}
	if err := h.checkBranch(); err != nil {
		return nil, err
	}
	if len(h.Recipients) == 0 {
		return nil, fmt.Errorf("no recipient: %w", ErrInvalid)
	}
	n := h.size()
	if len(h.Recipients) > MaxRecipients || n > size {
		return nil, fmt.Errorf("%d recipients, %d bytes in a block of %d: %w", len(h.Recipients), n, size, ErrDoesNotFit)
	}
	b := h.authenticated(make([]byte, 0, size))
	b = append(b, h.Commitment[:]...)
	b = append(b, byte(len(h.Recipients)), 0)
	b = binary.BigEndian.AppendUint16(b, uint16(h.recipientsSize()))
	for i := range h.Recipients {
		r := &h.Recipients[i]
		if err := r.check(); err != nil {
			return nil, err
		}
		b = append(append(b, byte(len(r.Class))), r.Class...)
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(r.Wrapped.Key))), r.Wrapped.Key...)
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(r.Wrapped.Blob))), r.Wrapped.Blob...)
		b = append(append(b, byte(len(r.Wrapped.Material))), r.Wrapped.Material...)
	}
	if h.Shared {
		b = append(append(b, h.Branch[:]...), h.Sealed[:]...)
	}
	return b[:size], nil // the rest of the fresh array is the padding
}
