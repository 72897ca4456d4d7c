package keyring

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"strconv"

	"golang.org/x/crypto/argon2"

	"github.com/kmsfs/kmsfs/crypto/keymem"
)

const (
	kdfArgon2id  = "argon2id"
	cipherAESGCM = "AES256-GCM"
	nonceLen     = 12
	tagLen       = 16
	minSalt      = 16
	maxSalt      = 64
	maxPasses    = 16
	maxMemoryKiB = 1 << 20 // 1 GiB
	maxThreads   = 16
)

// protection says how the passphrase becomes the key of the sealed body. All of
// it is authenticated with the body.
type protection struct {
	KDF       string `json:"kdf"`
	Salt      []byte `json:"salt"`
	Passes    uint32 `json:"time"`
	MemoryKiB uint32 `json:"memory_kib"`
	Threads   uint8  `json:"threads"`
	Cipher    string `json:"cipher"`
}

// workFactors are those of new files: the second recommended option of RFC
// 9106, section 4. Tests lower them.
var workFactors = protection{Passes: 3, MemoryKiB: 64 << 10, Threads: 4}

func newProtection() *protection {
	p := workFactors
	p.KDF, p.Cipher = kdfArgon2id, cipherAESGCM
	p.Salt = make([]byte, minSalt)
	_, _ = rand.Read(p.Salt) // crypto/rand.Read never fails (Go 1.24)
	return &p
}

// check bounds the work that a file can ask for, before any of it is done.
func (p *protection) check() error {
	switch {
	case p.KDF != kdfArgon2id:
		return fmt.Errorf("key derivation %.20q: %w", p.KDF, ErrFormat)
	case p.Cipher != cipherAESGCM:
		return fmt.Errorf("cipher %.20q: %w", p.Cipher, ErrFormat)
	case len(p.Salt) < minSalt || len(p.Salt) > maxSalt:
		return fmt.Errorf("salt of %d bytes: %w", len(p.Salt), ErrFormat)
	case p.Passes < 1 || p.Passes > maxPasses,
		p.Threads < 1 || p.Threads > maxThreads,
		p.MemoryKiB < 8*uint32(p.Threads) || p.MemoryKiB > maxMemoryKiB:
		return fmt.Errorf("work factors %d, %d KiB, %d: %w", p.Passes, p.MemoryKiB, p.Threads, ErrFormat)
	}
	return nil
}

func (p *protection) equal(o *protection) bool {
	return p != nil && o != nil && bytes.Equal(p.associatedData(), o.associatedData())
}

func (p *protection) associatedData() []byte {
	return joinStrings("kmsfs keyring body v1", p.KDF, string(p.Salt),
		strconv.Itoa(int(p.Passes)), strconv.Itoa(int(p.MemoryKiB)), strconv.Itoa(int(p.Threads)), p.Cipher)
}

// derive returns the key of the sealed body. The caller owns it; pass stays the
// caller's.
func (p *protection) derive(pass []byte) *keymem.Key {
	return keymem.Take(argon2.IDKey(pass, p.Salt, p.Passes, p.MemoryKiB, p.Threads, 32))
}

func bodyCipher(key *keymem.Key) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key.Bytes())
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// seal encrypts body under key with a random nonce, which comes first in the
// result.
func (p *protection) seal(key *keymem.Key, body []byte) ([]byte, error) {
	nonce := make([]byte, nonceLen, nonceLen+len(body)+tagLen)
	_, _ = rand.Read(nonce)
	return p.sealWithNonce(key, nonce, body)
}

func (p *protection) sealWithNonce(key *keymem.Key, nonce, body []byte) ([]byte, error) {
	aead, err := bodyCipher(key)
	if err != nil {
		return nil, err
	}
	return aead.Seal(nonce, nonce, body, p.associatedData()), nil
}

// open is the inverse of seal. The caller wipes the result.
func (p *protection) open(key *keymem.Key, sealed []byte) ([]byte, error) {
	if len(sealed) < nonceLen+tagLen {
		return nil, fmt.Errorf("sealed body of %d bytes: %w", len(sealed), ErrFormat)
	}
	aead, err := bodyCipher(key)
	if err != nil {
		return nil, err
	}
	body, err := aead.Open(nil, sealed[:nonceLen], sealed[nonceLen:], p.associatedData())
	if err != nil {
		return nil, ErrPassphrase
	}
	return body, nil
}

// joinStrings is an unambiguous encoding of a list: each string after its
// length as uint32, big-endian.
func joinStrings(list ...string) []byte {
	var out []byte
	for _, s := range list {
		out = binary.BigEndian.AppendUint32(out, uint32(len(s)))
		out = append(out, s...)
	}
	return out
}
