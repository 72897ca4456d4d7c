package nameenc

import (
	"encoding/binary"
	"fmt"
	"strings"
)

const (
	// AttrPrefix is what an encrypted attribute name follows in the store.
	AttrPrefix = "user.kmsfs.x."
	// MaxAttrName is the longest attribute name that can be encrypted, in
	// bytes, without its "user." prefix.
	MaxAttrName = (maxStoredAttr*3/4 - sivLen) / padTo * padTo
	// MaxAttrValue is the longest attribute value that can be encrypted.
	MaxAttrValue = maxStoredValue - nonceLen - sivLen

	maxStoredAttr  = 255 - len(AttrPrefix) // XATTR_NAME_MAX
	maxStoredValue = 64 << 10              // XATTR_SIZE_MAX
)

// EncryptAttrName encrypts the part after "user." of an extended attribute's
// name, the same at every call and for every file of the class. The result goes
// after AttrPrefix. It answers ErrTooLong beyond MaxAttrName bytes, and ErrName
// for "" and for a name with NUL.
func (c *Cipher) EncryptAttrName(name string) (string, error) {
	if err := checkAttrName(name); err != nil {
		return "", err
	}
	sealed, err := c.seal(c.attr, pad(name), []byte(labelAttrName))
	if err != nil {
		return "", err
	}
	return encoding.EncodeToString(sealed), nil
}

// DecryptAttrName is the inverse of EncryptAttrName. It answers ErrAuth for
// anything that EncryptAttrName does not make.
func (c *Cipher) DecryptAttrName(enc string) (string, error) {
	sealed, err := decode(enc, MaxAttrName+sivLen)
	if err != nil {
		return "", err
	}
	padded, err := c.open(c.attr, sealed, []byte(labelAttrName))
	if err != nil {
		return "", err
	}
	return unpad(padded)
}

// EncryptAttrValue encrypts the value of the attribute called name (without
// "user."), differently at each call; value may be empty. It answers what
// EncryptAttrName does, and ErrTooLong for a value beyond MaxAttrValue bytes.
func (c *Cipher) EncryptAttrValue(name string, value []byte) ([]byte, error) {
	if err := checkAttrName(name); err != nil {
		return nil, err
	}
	if len(value) > MaxAttrValue {
		return nil, fmt.Errorf("attribute value of %d bytes: %w", len(value), ErrTooLong)
	}
	nonce := make([]byte, nonceLen, nonceLen+sivLen+len(value))
	c.newNonce(nonce)
	sealed, err := c.seal(c.value, value, valueAD(name, nonce))
	if err != nil {
		return nil, err
	}
	return append(nonce, sealed...), nil
}

// DecryptAttrValue is the inverse of EncryptAttrValue. It answers ErrAuth for
// anything that EncryptAttrValue does not make for this name.
func (c *Cipher) DecryptAttrValue(name string, enc []byte) ([]byte, error) {
	if len(enc) < nonceLen+sivLen || len(enc) > maxStoredValue || checkAttrName(name) != nil {
		return nil, ErrAuth
	}
	return c.open(c.value, enc[nonceLen:], valueAD(name, enc[:nonceLen]))
}

// AttrValueLen returns the length of the value whose ciphertext has encLen
// bytes; false if no value has such a one.
func AttrValueLen(encLen int) (int, bool) {
	n := encLen - nonceLen - sivLen
	return n, n >= 0 && n <= MaxAttrValue
}

func valueAD(name string, nonce []byte) []byte {
	ad := make([]byte, 0, len(labelAttrValue)+8+len(name)+len(nonce))
	ad = append(ad, labelAttrValue...)
	ad = binary.BigEndian.AppendUint64(ad, uint64(len(name)))
	ad = append(ad, name...)
	return append(ad, nonce...)
}

func checkAttrName(name string) error {
	if len(name) > MaxAttrName {
		return fmt.Errorf("attribute name of %d bytes: %w", len(name), ErrTooLong)
	}
	if name == "" || strings.IndexByte(name, 0) >= 0 {
		return ErrName
	}
	return nil
}
