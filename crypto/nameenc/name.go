package nameenc

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"
)

const (
	// MaxName is the longest plaintext name, in bytes, as on Linux.
	MaxName = 255
	// MaxStored is the longest ciphertext name that is stored as such, in
	// bytes; see IsLong.
	MaxStored = 254

	padTo    = 16
	maxNamed = (MaxName+padTo-1)/padTo*padTo + sivLen // sealed bytes of the longest name
)

// DirID is the random identity of a directory.
type DirID [16]byte

// encoding has one text for every byte string, and decode takes no other.
var encoding = base64.RawURLEncoding.Strict()

// CheckName answers ErrName for what no directory entry is called: "", ".",
// "..", and anything with '/' or NUL in it; and ErrTooLong beyond MaxName
// bytes. All other bytes are allowed, invalid UTF-8 included.
func CheckName(name string) error {
	switch {
	case len(name) > MaxName:
		return fmt.Errorf("name of %d bytes: %w", len(name), ErrTooLong)
	case name == "", name == ".", name == "..", strings.ContainsAny(name, "/\x00"):
		return ErrName
	}
	return nil
}

// EncryptName returns the ciphertext of a name in directory dir: 43 to 363
// characters of base64url, the same at every call. It may be longer than
// MaxStored. It answers what CheckName does.
func (c *Cipher) EncryptName(dir DirID, name string) (string, error) {
	if err := CheckName(name); err != nil {
		return "", err
	}
	sealed, err := c.seal(c.name, pad(name), dir[:])
	if err != nil {
		return "", err
	}
	return encoding.EncodeToString(sealed), nil
}

// DecryptName is the inverse of EncryptName. It answers ErrAuth for anything
// that EncryptName does not make for this directory.
func (c *Cipher) DecryptName(dir DirID, enc string) (string, error) {
	sealed, err := decode(enc, maxNamed)
	if err != nil {
		return "", err
	}
	padded, err := c.open(c.name, sealed, dir[:])
	if err != nil {
		return "", err
	}
	name, err := unpad(padded)
	if err != nil {
		return "", err
	}
	if CheckName(name) != nil { // only a holder of the key makes such a name
		return "", ErrAuth
	}
	return name, nil
}

// IsLong reports whether a ciphertext name is too long to be stored as such.
func IsLong(enc string) bool { return len(enc) > MaxStored }

// LongHash returns what stands in for a long ciphertext name: SHA-256 of it in
// base64url, 43 characters. It is stored as ".kmsfs.l." + hash, with the full
// name in ".kmsfs.n." + hash.
func LongHash(enc string) string {
	sum := sha256.Sum256([]byte(enc))
	return encoding.EncodeToString(sum[:])
}

// pad appends NUL up to a multiple of padTo. s has no NUL and is not empty.
func pad(s string) []byte {
	out := make([]byte, (len(s)+padTo-1)/padTo*padTo)
	copy(out, s)
	return out
}

// unpad is the inverse of pad; anything that pad does not make is ErrAuth.
func unpad(b []byte) (string, error) {
	s := bytes.TrimRight(b, "\x00")
	if len(b)%padTo != 0 || len(s) == 0 || len(b)-len(s) >= padTo || bytes.IndexByte(s, 0) >= 0 {
		return "", ErrAuth
	}
	return string(s), nil
}

// decode reverses encoding for at most limit bytes.
func decode(enc string, limit int) ([]byte, error) {
	// The decoder skips line breaks, strict or not: a second spelling.
	if len(enc) > encoding.EncodedLen(limit) || strings.ContainsAny(enc, "\r\n") {
		return nil, ErrAuth
	}
	b, err := encoding.DecodeString(enc)
	if err != nil {
		return nil, ErrAuth
	}
	return b, nil
}
