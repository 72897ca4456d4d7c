package nameenc

import (
	"fmt"
	"strings"
)

// MaxTarget is the longest symlink target of Linux (PATH_MAX - 1), in bytes. A
// ciphertext of more than that many characters is no symlink's target: see
// IsLongTarget.
const MaxTarget = 4095

// IsLongTarget reports whether an encrypted target is too long to be one in the
// store: beyond 3,039 bytes of plaintext.
func IsLongTarget(enc string) bool { return len(enc) > MaxTarget }

// MaxStoredTarget is the longest encrypted target, in characters.
const MaxStoredTarget = (MaxTarget + nonceLen + sivLen + 2) / 3 * 4

// EncryptTarget encrypts a symlink's target, differently at each call. It
// answers ErrTooLong beyond MaxTarget bytes, and ErrName for "" and for a target
// with NUL.
func (c *Cipher) EncryptTarget(target string) (string, error) {
	if len(target) > MaxTarget {
		return "", fmt.Errorf("target of %d bytes: %w", len(target), ErrTooLong)
	}
	if !validTarget(target) {
		return "", ErrName
	}
	nonce := make([]byte, nonceLen, nonceLen+sivLen+len(target))
	c.newNonce(nonce)
	sealed, err := c.seal(c.link, []byte(target), linkAD(nonce))
	if err != nil {
		return "", err
	}
	return encoding.EncodeToString(append(nonce, sealed...)), nil
}

// DecryptTarget is the inverse of EncryptTarget. It answers ErrAuth for
// anything that EncryptTarget does not make.
func (c *Cipher) DecryptTarget(enc string) (string, error) {
	b, err := decode(enc, MaxTarget+nonceLen+sivLen)
	if err != nil {
		return "", err
	}
	if len(b) < nonceLen+sivLen+1 {
		return "", ErrAuth
	}
	plain, err := c.open(c.link, b[nonceLen:], linkAD(b[:nonceLen]))
	if err != nil {
		return "", err
	}
	if target := string(plain); validTarget(target) {
		return target, nil
	}
	return "", ErrAuth
}

// TargetLen returns the length of the target whose ciphertext has encLen
// characters, so that lstat needs no key; false if no target has such a one.
func TargetLen(encLen int) (int, bool) {
	n := encLen*3/4 - nonceLen - sivLen
	ok := n >= 1 && n <= MaxTarget && encoding.EncodedLen(n+nonceLen+sivLen) == encLen
	return n, ok
}

func linkAD(nonce []byte) []byte { return append([]byte(labelLink), nonce...) }

func validTarget(s string) bool { return s != "" && strings.IndexByte(s, 0) < 0 }
