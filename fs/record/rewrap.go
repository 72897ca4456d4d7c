package record

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/envelope"
)

const (
	rewrapMagic = "kmsfsrwp"
	rewrapHead  = 8 + 4 + 4 // magic, version, count
	// MaxRewrap bounds a rewrap batch, in bytes: it is the value of an extended
	// attribute as well.
	MaxRewrap = 60 << 10
	// MaxRewrapFiles bounds the files of a batch.
	MaxRewrapFiles = 64
)

// Rewrapped is a file with the header block that it gets.
type Rewrapped struct {
	Path  string // in the store, "/" between elements
	Block []byte // of the store's header size
}

// Size returns what the file takes in a batch, in bytes.
func (r *Rewrapped) Size() int { return 2 + len(r.Path) + 2 + 2 + len(trimmed(r.Block)) }

// FitsRewrap reports whether files go into one batch.
func FitsRewrap(files []Rewrapped) bool {
	n := rewrapHead + sha256.Size
	for i := range files {
		n += files[i].Size()
	}
	return n <= MaxRewrap && len(files) <= MaxRewrapFiles
}

// EncodeRewrap returns a batch. FitsRewrap is true of it, and every block has a
// valid header size. A SHA-256 at the end tells a torn batch from a whole one;
// it is no authentication (docs/format.md, F-55).
func EncodeRewrap(files []Rewrapped) []byte {
	b := append(make([]byte, 0, MaxRewrap), rewrapMagic...)
	b = binary.BigEndian.AppendUint32(b, Version)
	b = binary.BigEndian.AppendUint32(b, uint32(len(files)))
	for _, f := range files {
		block := trimmed(f.Block)
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(f.Path))), f.Path...)
		b = binary.BigEndian.AppendUint16(b, uint16(len(f.Block)))
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(block))), block...)
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

// trimmed is a block without the padding at its end.
func trimmed(block []byte) []byte { return bytes.TrimRight(block, "\x00") }

// ParseRewrap reads a batch. Errors are ErrFormat, which is also that of a batch
// that a crash tore, and ErrNewer.
func ParseRewrap(b []byte) ([]Rewrapped, error) {
	if len(b) < rewrapHead+sha256.Size || len(b) > MaxRewrap || string(b[:8]) != rewrapMagic {
		return nil, fmt.Errorf("rewrap batch of %d bytes: %w", len(b), ErrFormat)
	}
	body := b[:len(b)-sha256.Size]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], b[len(body):]) {
		return nil, fmt.Errorf("rewrap batch is torn: %w", ErrFormat)
	}
	if v := binary.BigEndian.Uint32(b[8:]); v != Version {
		return nil, versionError("rewrap batch", int64(v))
	}
	count := int(binary.BigEndian.Uint32(b[12:]))
	if count < 1 || count > MaxRewrapFiles {
		return nil, fmt.Errorf("rewrap batch of %d files: %w", count, ErrFormat)
	}
	rest := body[rewrapHead:]
	out := make([]Rewrapped, 0, count)
	for range count {
		f, n, ok := parseRewrapped(rest)
		if !ok {
			return nil, fmt.Errorf("rewrap batch, file %d: %w", len(out), ErrFormat)
		}
		out, rest = append(out, f), rest[n:]
	}
	if len(rest) > 0 {
		return nil, fmt.Errorf("rewrap batch: %d bytes behind the last file: %w", len(rest), ErrFormat)
	}
	return out, nil
}

// parseRewrapped reads one file from the beginning of b and returns how many
// bytes it took.
func parseRewrapped(b []byte) (f Rewrapped, n int, ok bool) {
	field := func(extra int) (size int, out []byte, ok bool) {
		if len(b)-n < 2+extra {
			return 0, nil, false
		}
		size = int(binary.BigEndian.Uint16(b[n:]))
		length := size
		if extra > 0 {
			length = int(binary.BigEndian.Uint16(b[n+2:]))
		}
		n += 2 + extra
		if len(b)-n < length {
			return 0, nil, false
		}
		n += length
		return size, b[n-length : n], true
	}
	_, path, ok := field(0)
	if !ok || len(path) == 0 {
		return f, 0, false
	}
	size, block, ok := field(2)
	if !ok || !envelope.ValidHeaderSize(size) || len(block) > size || len(block) > 0 && block[len(block)-1] == 0 {
		return f, 0, false
	}
	f = Rewrapped{Path: string(path), Block: make([]byte, size)}
	copy(f.Block, block)
	return f, n, true
}
