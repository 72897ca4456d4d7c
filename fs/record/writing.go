package record

import (
	"encoding/binary"
	"fmt"
)

const (
	// WritingLen is the length of one slot of the writing list, in bytes.
	WritingLen   = 128
	writingMagic = "kmsfswrl"
)

// Writing is one slot of the writing list: a file whose end on the disk need
// not be sealed at this moment. An all-zero slot is free.
type Writing struct {
	Slot    int // place in the list, covered by the MAC
	File    [16]byte
	Ino     uint64 // inode number in the store, a hint where to look
	Durable int64  // plaintext bytes that the last fsync promised
	MAC     [MACLen]byte
}

// Body returns the bytes that the MAC covers.
func (w *Writing) Body() []byte {
	b := make([]byte, 0, WritingLen)
	b = append(b, writingMagic...)
	b = binary.BigEndian.AppendUint32(b, Version)
	b = binary.BigEndian.AppendUint32(b, uint32(w.Slot))
	b = append(b, w.File[:]...)
	b = binary.BigEndian.AppendUint64(b, w.Ino)
	b = binary.BigEndian.AppendUint64(b, uint64(w.Durable))
	return append(b, make([]byte, WritingLen-MACLen-len(b))...)
}

// Encode returns the slot as it is stored.
func (w *Writing) Encode() []byte { return append(w.Body(), w.MAC[:]...) }

// ParseWriting reads the slot numbered slot. A free slot is nil without error;
// errors are ErrFormat and ErrNewer.
func ParseWriting(b []byte, slot int) (*Writing, error) {
	if len(b) != WritingLen {
		return nil, fmt.Errorf("writing list slot of %d bytes: %w", len(b), ErrFormat)
	}
	if allZero(b) {
		return nil, nil
	}
	if v := binary.BigEndian.Uint32(b[8:]); string(b[:8]) == writingMagic && v > Version {
		return nil, versionError("writing list slot", int64(v))
	}
	w := &Writing{
		Slot: slot, File: [16]byte(b[16:32]),
		Ino: binary.BigEndian.Uint64(b[32:]), Durable: int64(binary.BigEndian.Uint64(b[40:])),
		MAC: [MACLen]byte(b[WritingLen-MACLen:]),
	}
	if string(w.Encode()) != string(b) || w.Durable < 0 {
		return nil, fmt.Errorf("writing list slot %d: %w", slot, ErrFormat)
	}
	return w, nil
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
