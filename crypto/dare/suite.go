package dare

import (
	"fmt"

	"github.com/minio/sio"
)

// Suite is the cipher of a file's chunks. The values are stored in headers.
type Suite uint8

// The suites. The zero Suite is none.
const (
	AES256GCM        Suite = 1
	ChaCha20Poly1305 Suite = 2
)

var suiteNames = map[Suite]string{
	AES256GCM:        "aes-256-gcm",
	ChaCha20Poly1305: "chacha20-poly1305",
}

// Valid reports whether s is one of the suites above.
func (s Suite) Valid() bool { return s == AES256GCM || s == ChaCha20Poly1305 }

// String returns "aes-256-gcm", "chacha20-poly1305", or "unknown".
func (s Suite) String() string {
	if name, ok := suiteNames[s]; ok {
		return name
	}
	return "unknown"
}

// ParseSuite is the inverse of String. It answers ErrSuite for other names.
func ParseSuite(name string) (Suite, error) {
	for s, n := range suiteNames {
		if n == name {
			return s, nil
		}
	}
	return 0, fmt.Errorf("%q: %w", name, ErrSuite)
}

// id returns the suite's byte in a DARE header. s is valid.
func (s Suite) id() byte {
	if s == ChaCha20Poly1305 {
		return sio.CHACHA20_POLY1305
	}
	return sio.AES_256_GCM
}
