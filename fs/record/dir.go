package record

import (
	"encoding/binary"
	"fmt"
)

// Version is the format version that every record carries.
const Version = 1

const (
	dirMagic = "kmsfsdir"
	// MaxDir bounds a directory record, in bytes.
	MaxDir   = 8 + 2 + 16 + 1 + maxClass + MACLen
	maxClass = 32
	// MACLen is the length of every MAC (HMAC-SHA256), in bytes.
	MACLen = 32
)

// Dir is a directory's record: who it is, and the class of its files.
type Dir struct {
	ID    [16]byte
	Class string
	MAC   [MACLen]byte // under the class's name key, over Body
}

// Body returns the bytes that the MAC covers.
func (d *Dir) Body() []byte {
	b := append([]byte(nil), dirMagic...)
	b = binary.BigEndian.AppendUint16(b, Version)
	b = append(b, d.ID[:]...)
	b = append(b, byte(len(d.Class)))
	return append(b, d.Class...)
}

// Encode returns the record as it is stored. Class has 1 to 32 bytes.
func (d *Dir) Encode() []byte { return append(d.Body(), d.MAC[:]...) }

// ParseDir reads a directory record; errors are ErrFormat and ErrNewer.
func ParseDir(b []byte) (*Dir, error) {
	const head = len(dirMagic) + 2 + 16 + 1
	if len(b) < 10 || string(b[:8]) != dirMagic {
		return nil, fmt.Errorf("directory record of %d bytes: %w", len(b), ErrFormat)
	}
	if v := binary.BigEndian.Uint16(b[8:]); v != Version {
		return nil, versionError("directory record", int64(v))
	}
	if len(b) < head+MACLen || len(b) > MaxDir {
		return nil, fmt.Errorf("directory record of %d bytes: %w", len(b), ErrFormat)
	}
	d := &Dir{ID: [16]byte(b[10:26])}
	n := int(b[26])
	if len(b) != head+n+MACLen || n == 0 {
		return nil, fmt.Errorf("directory record: class of %d bytes: %w", n, ErrFormat)
	}
	d.Class = string(b[head : head+n])
	d.MAC = [MACLen]byte(b[head+n:])
	return d, nil
}

func versionError(what string, v int64) error {
	if v > Version {
		return fmt.Errorf("%s of format %d: %w", what, v, ErrNewer)
	}
	return fmt.Errorf("%s of format %d: %w", what, v, ErrFormat)
}
