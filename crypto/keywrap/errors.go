package keywrap

import (
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/fault"
)

// The failures of a key service, one for each that a caller or a user acts on
// differently.
var (
	ErrDenied      = fault.New(fault.KeyDenied, "keywrap: access denied")
	ErrCredentials = fault.New(fault.KeyDenied, "keywrap: no valid credentials")
	ErrNotFound    = fault.New(fault.KeyMissing, "keywrap: key not found")
	ErrDisabled    = fault.New(fault.KeyMissing, "keywrap: key disabled")
	ErrPending     = fault.New(fault.KeyRevoked, "keywrap: key pending deletion")
	ErrExpired     = fault.New(fault.KeyExpired, "keywrap: key material expired")
	ErrCiphertext  = fault.New(fault.Integrity, "keywrap: wrapped key does not open under this key and encryption context")
	ErrWrongKey    = fault.New(fault.KeyRejected, "keywrap: wrapped key is not under the key it names")
	ErrUnavailable = fault.New(fault.KeyUnavailable, "keywrap: key service unavailable")
	ErrThrottled   = fault.New(fault.KeyUnavailable, "keywrap: key service throttles")
	ErrBadURI      = fault.New(fault.Invalid, "keywrap: no such kind of key URI")
	ErrUnsupported = fault.New(fault.Unsupported, "keywrap: key is not usable for this operation")
	ErrKeyLength   = fault.New(fault.Invalid, "keywrap: data key is not 32 bytes long")
)

// CallError tells about a failed call what its log line needs. It never holds
// key bytes. Err is a sentinel of this package, possibly joined with the
// service's own words.
type CallError struct {
	Op        string // "GenerateDataKey", "Decrypt", …
	Key       string // key URI
	RequestID string // the service's request id, "" if it gave none
	Hint      string // what to do, one sentence
	Err       error
}

func (e *CallError) Error() string {
	s := fmt.Sprintf("%s %s: %v", e.Op, e.Key, e.Err)
	if e.RequestID != "" {
		s += " (request " + e.RequestID + ")"
	}
	return s
}

// Unwrap returns Err.
func (e *CallError) Unwrap() error { return e.Err }
