package envelope

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// ID names a store, a file, a directory or a name key. It is random, unique,
// and not secret. The zero ID names nothing.
type ID [16]byte

// NewID returns a fresh random ID.
func NewID() ID {
	var id ID
	_, _ = rand.Read(id[:]) // crypto/rand.Read never fails (Go 1.24)
	return id
}

// ParseID is the inverse of ID.String. It accepts 32 lower-case hexadecimal
// digits and nothing else, so that an ID has one spelling, and answers
// ErrInvalid otherwise.
func ParseID(s string) (ID, error) {
	var id ID
	if len(s) != 2*len(id) {
		return ID{}, fmt.Errorf("id of %d characters: %w", len(s), ErrInvalid)
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil || id.String() != s {
		return ID{}, fmt.Errorf("id is not lower-case hexadecimal: %w", ErrInvalid)
	}
	return id, nil
}

// String returns the ID as 32 lower-case hexadecimal digits.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// IsZero reports whether id names nothing.
func (id ID) IsZero() bool { return id == ID{} }

// MarshalText returns what String returns.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText parses as ParseID does.
func (id *ID) UnmarshalText(text []byte) error {
	v, err := ParseID(string(text))
	if err == nil {
		*id = v
	}
	return err
}
