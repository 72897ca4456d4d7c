package envelope

import (
	"crypto/hmac"
	"crypto/sha256"
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

const headerKeyInfo = "kmsfs v1 header"

// FileKey is the secret of one file (or of one name or store key). Whoever got
// it from Create or Open owns it and wipes it after its last use; until then
// its methods are safe for concurrent use.
type FileKey struct{ prk *keymem.Key }

// newFileKey derives the key of a file from its data key and wipes that.
// Errors: ErrDataKey if the service gave something else than a data key.
func newFileKey(dek *keymem.Key, store, file ID) (*FileKey, error) {
	if dek == nil {
		return nil, fmt.Errorf("no data key: %w", ErrDataKey)
	}
	defer dek.Wipe()
	secret := dek.Bytes()
	if len(secret) != keywrap.DataKeyLen {
		return nil, fmt.Errorf("data key of %d bytes: %w", len(secret), ErrDataKey)
	}
	var salt [2 * len(ID{})]byte
	copy(salt[:], store[:])
	copy(salt[len(ID{}):], file[:])
	var prk [sha256.Size]byte
	hmacSHA256(&prk, salt[:], secret) // HKDF-Extract (RFC 5869, section 2.2)
	return &FileKey{prk: keymem.Take(prk[:])}, nil
}

// PRK returns the key that the file's other keys are expanded from. It stays
// k's.
func (k *FileKey) PRK() *keymem.Key { return k.prk }

// commitment panics on a wiped key: a commitment under no key would be one that
// anybody can make.
func (k *FileKey) commitment(f *Fixed) (sum [sha256.Size]byte) {
	prk := k.prk.Bytes()
	if len(prk) == 0 {
		panic("envelope: file key used after Wipe")
	}
	// HKDF-Expand of one block (RFC 5869, section 2.3).
	var hk [sha256.Size]byte
	defer clear(hk[:])
	hmacSHA256(&hk, prk, []byte(headerKeyInfo+"\x01"))
	var b [fixedLen + 8]byte
	hmacSHA256(&sum, hk[:], f.authenticated(b[:0]))
	return sum
}

// Commit sets h.Commitment from the fields before it. Whoever changes one of
// them, such as Sparse, commits again before Encode. k must not be wiped.
func (k *FileKey) Commit(h *Header) { h.Commitment = k.commitment(&h.Fixed) }

// Check answers ErrCommitment unless k made h.Commitment for exactly h's fixed
// fields. It takes the same time wherever the two differ.
func (k *FileKey) Check(h *Header) error {
	if h.Fixed.check() != nil || k.prk.Len() == 0 {
		return fmt.Errorf("file %v: %w", h.File, ErrCommitment)
	}
	want := k.commitment(&h.Fixed)
	if !hmac.Equal(h.Commitment[:], want[:]) {
		return fmt.Errorf("file %v: %w", h.File, ErrCommitment)
	}
	return nil
}

// Wipe zeroes the key. Further calls do nothing; no other method may run at the
// same time or later, except Check, which then fails.
func (k *FileKey) Wipe() {
	if k != nil {
		k.prk.Wipe()
	}
}
