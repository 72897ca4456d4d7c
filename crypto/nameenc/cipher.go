package nameenc

import (
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"sync"

	"github.com/tink-crypto/tink-go/v2/daead/subtle"

	"github.com/kmsfs/kmsfs/crypto/keymem"
)

const (
	nameKeyLen = 32
	recordLen  = 32
	sivLen     = 16 // what AES-SIV adds
	nonceLen   = 16

	labelName      = "kmsfs v1 name"
	labelLink      = "kmsfs v1 link"
	labelAttrName  = "kmsfs v1 xattr name"
	labelAttrValue = "kmsfs v1 xattr value"
	labelRecord    = "kmsfs v1 record"
)

// Cipher holds the sub-keys of one class's name key. It is safe for concurrent
// use, Wipe included; after Wipe every method answers ErrKey, and MAC panics.
type Cipher struct {
	mu     sync.RWMutex // held shared by every use, so that Wipe waits for it
	wiped  bool
	keys   []*keymem.Key
	name   *subtle.AESSIV
	link   *subtle.AESSIV
	attr   *subtle.AESSIV
	value  *subtle.AESSIV
	record *keymem.Key
	fixed  *[nonceLen]byte // nil outside tests: every nonce is fresh
}

// New derives the sub-keys of nameKey (32 bytes), which stays the caller's. The
// caller wipes the result.
func New(nameKey *keymem.Key) (*Cipher, error) {
	if nameKey == nil || nameKey.Len() != nameKeyLen {
		return nil, ErrKey
	}
	c := &Cipher{}
	for _, sub := range []struct {
		label string
		siv   **subtle.AESSIV
	}{
		{labelName, &c.name}, {labelLink, &c.link}, {labelAttrName, &c.attr}, {labelAttrValue, &c.value},
	} {
		key, err := c.derive(nameKey, sub.label, subtle.AESSIVKeySize)
		if err == nil {
			// AESSIV keeps the slice: its key stays in locked memory, and is gone
			// once Wipe zeroes it.
			*sub.siv, err = subtle.NewAESSIV(key.Bytes())
		}
		if err != nil {
			c.Wipe()
			return nil, fmt.Errorf("%s: %w", sub.label, err)
		}
	}
	var err error
	if c.record, err = c.derive(nameKey, labelRecord, recordLen); err != nil {
		c.Wipe()
		return nil, fmt.Errorf("%s: %w", labelRecord, err)
	}
	return c, nil
}

func (c *Cipher) derive(nameKey *keymem.Key, label string, n int) (*keymem.Key, error) {
	b, err := hkdf.Expand(sha256.New, nameKey.Bytes(), label, n)
	if err != nil {
		return nil, err
	}
	k := keymem.Take(b)
	c.keys = append(c.keys, k)
	return k, nil
}

// Wipe waits for running calls and zeroes the sub-keys. Further calls do
// nothing.
func (c *Cipher) Wipe() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wiped = true
	for _, k := range c.keys {
		k.Wipe()
	}
	c.keys = nil
}

// seal runs AES-SIV under a sub-key of c.
func (c *Cipher) seal(siv *subtle.AESSIV, plain, ad []byte) ([]byte, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.wiped { // the sub-keys' memory may hold other keys by now
		return nil, ErrKey
	}
	return siv.EncryptDeterministically(plain, ad)
}

// open is the inverse of seal; what fails is ErrAuth.
func (c *Cipher) open(siv *subtle.AESSIV, sealed, ad []byte) ([]byte, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.wiped {
		return nil, ErrKey
	}
	plain, err := siv.DecryptDeterministically(sealed, ad)
	if err != nil {
		return nil, ErrAuth
	}
	return plain, nil
}

// newNonce fills b, of nonceLen bytes.
func (c *Cipher) newNonce(b []byte) {
	if c.fixed != nil {
		copy(b, c.fixed[:])
		return
	}
	_, _ = rand.Read(b) // crypto/rand.Read never fails (Go 1.24)
}
