package envelope

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// Parse decodes a header block. The block is exactly what Encode returned, so
// its length is part of what is checked. Parse authenticates nothing: that is
// FileKey.Check's. The result shares no memory with block. Every header has one
// encoding: what Parse accepts, Encode gives back byte for byte.
//
// Errors: ErrVersion for another format version, ErrFormat for everything else
// that no writer of this version makes.
func Parse(block []byte) (*Header, error) {
	if !ValidHeaderSize(len(block)) {
		return nil, fmt.Errorf("block of %d bytes: %w", len(block), ErrFormat)
	}
	h := new(Header)
	if err := h.parseFixed(block); err != nil {
		return nil, err
	}
	at := h.fixedLen() + commitmentLen
	count, length := int(block[at]), int(binary.BigEndian.Uint16(block[at+2:]))
	first := at + countsLen
	end := first + length
	switch {
	case count < 1 || count > MaxRecipients:
		return nil, fmt.Errorf("%d recipients: %w", count, ErrFormat)
	case block[at+1] != 0:
		return nil, fmt.Errorf("reserved byte is not zero: %w", ErrFormat)
	case end > len(block):
		return nil, fmt.Errorf("%d bytes of recipients in a block of %d: %w", length, len(block), ErrFormat)
	}
	padding := block[end:]
	if h.Shared {
		var err error
		if padding, err = h.parseBranch(padding); err != nil {
			return nil, err
		}
	}
	if !allZero(padding) {
		return nil, fmt.Errorf("padding is not zero: %w", ErrFormat)
	}
	rest := fieldReader{b: bytes.Clone(block[first:end])}
	h.Recipients = make([]Recipient, count)
	for i := range h.Recipients {
		if !rest.recipient(&h.Recipients[i]) {
			return nil, fmt.Errorf("recipient %d: %w", i, ErrFormat)
		}
	}
	if len(rest.b) != 0 {
		return nil, fmt.Errorf("%d bytes after the last recipient: %w", len(rest.b), ErrFormat)
	}
	return h, nil
}

// parseFixed reads the bytes up to the recipients. block has a valid size.
func (h *Header) parseFixed(block []byte) error {
	if string(block[:len(magic)]) != magic {
		return fmt.Errorf("no magic: %w", ErrFormat)
	}
	version := binary.BigEndian.Uint16(block[offVersion:])
	if version < FormatVersion || version > BirthVersion {
		return fmt.Errorf("format version %d, this program reads %d to %d: %w", version, FormatVersion, BirthVersion, ErrVersion)
	}
	flags, size := binary.BigEndian.Uint16(block[offFlags:]), binary.BigEndian.Uint32(block[offBlock:])
	// Version and flag say the same, so that neither alone changes what follows.
	if flags&^(flagSparse|flagShared) != 0 || version != BirthVersion && (flags&flagShared != 0) != (version == SharedVersion) {
		return fmt.Errorf("flags %#x in version %d: %w", flags, version, ErrFormat)
	}
	if size != uint32(len(block)) {
		return fmt.Errorf("header of %d bytes in a block of %d: %w", size, len(block), ErrFormat)
	}
	h.Suite = block[offSuite]
	h.Sparse = flags&flagSparse != 0
	h.Shared = flags&flagShared != 0
	h.BlockSize = len(block)
	if shift := block[offChunk]; shift > 31 {
		return fmt.Errorf("chunk size 2^%d: %w", shift, ErrFormat)
	} else if shift != 0 {
		h.ChunkSize = 1 << shift
	}
	copy(h.Store[:], block[offStore:])
	copy(h.File[:], block[offFile:])
	if version == BirthVersion {
		if h.Birth = binary.BigEndian.Uint64(block[offBirth:]); h.Birth == 0 {
			return fmt.Errorf("version %d without a birth: %w", version, ErrFormat)
		}
	}
	copy(h.Commitment[:], block[h.fixedLen():])
	if h.Fixed.check() != nil {
		return fmt.Errorf("cipher suite %d, chunk size %d, flags %#x: %w", h.Suite, h.ChunkSize, flags, ErrFormat)
	}
	return nil
}

// parseBranch reads what follows the recipients of a shared key and returns the
// bytes after it.
func (h *Header) parseBranch(b []byte) ([]byte, error) {
	if len(b) < trailerLen {
		return nil, fmt.Errorf("%d bytes for the branch: %w", len(b), ErrFormat)
	}
	copy(h.Branch[:], b)
	copy(h.Sealed[:], b[len(h.Branch):])
	if h.checkBranch() != nil {
		return nil, fmt.Errorf("branch has no id: %w", ErrFormat)
	}
	return b[trailerLen:], nil
}

// fieldReader cuts length-prefixed fields off b.
type fieldReader struct{ b []byte }

// field cuts off a field after a length of lenSize (1 or 2) bytes.
func (r *fieldReader) field(lenSize int) ([]byte, bool) {
	if len(r.b) < lenSize {
		return nil, false
	}
	n := int(r.b[0])
	if lenSize == 2 {
		n = int(binary.BigEndian.Uint16(r.b))
	}
	end := lenSize + n
	if end > len(r.b) {
		return nil, false
	}
	f := r.b[lenSize:end:end]
	r.b = r.b[end:]
	return f, true
}

func (r *fieldReader) recipient(to *Recipient) bool {
	class, ok1 := r.field(1)
	key, ok2 := r.field(2)
	blob, ok3 := r.field(2)
	material, ok4 := r.field(1)
	if !ok1 || !ok2 || !ok3 || !ok4 {
		return false
	}
	to.Class = string(class)
	to.Wrapped.Key = string(key)
	to.Wrapped.Blob = blob
	to.Wrapped.Material = string(material)
	return to.check() == nil
}

var zeros [MaxHeader]byte

func allZero(b []byte) bool { return bytes.Equal(b, zeros[:len(b)]) }
