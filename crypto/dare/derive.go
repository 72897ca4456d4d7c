package dare

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/keymem"
)

const (
	keyLen     = 32
	chunkLabel = "kmsfs v1 chunk"
	infoLen    = len(chunkLabel) + 8 + 1
)

// derive sets o.key to the key of one chunk,
// HKDF-Expand-SHA256(prk, chunkLabel || uint64be(index) || last, 32).
//
// For 32 bytes of output that is one HMAC (RFC 5869, section 2.3):
// HMAC-SHA256(prk, info || 0x01). It is spelled out here (RFC 2104) because
// crypto/hkdf leaves the padded PRK in garbage that nobody can wipe, at every
// chunk, and takes three times as long; a test holds it to crypto/hkdf.
func (o *op) derive(prk *keymem.Key, index int64, last bool) error {
	if index < 0 {
		return fmt.Errorf("chunk %d: %w", index, ErrIndex)
	}
	var inner [sha256.BlockSize + infoLen + 1]byte
	var outer [sha256.BlockSize + sha256.Size]byte
	defer clear(inner[:])
	defer clear(outer[:])
	if copy(inner[:], prk.Bytes()) != keyLen { // nil after Wipe
		return ErrKey
	}
	for i := range sha256.BlockSize {
		outer[i] = inner[i] ^ 0x5c
		inner[i] ^= 0x36
	}
	msg := inner[sha256.BlockSize:]
	binary.BigEndian.PutUint64(msg[copy(msg, chunkLabel):], uint64(index))
	if last {
		msg[infoLen-1] = 1
	}
	msg[infoLen] = 1 // HKDF's block counter
	sum := sha256.Sum256(inner[:])
	copy(outer[sha256.BlockSize:], sum[:])
	o.key = sha256.Sum256(outer[:])
	return nil
}
