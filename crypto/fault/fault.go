// Package fault names the kinds of failure that callers of kmsfs tell apart.
//
// Every exported sentinel of the module is made by New. Two places translate
// a kind for the outside: fs/fusefs/errno.go (errno) and cmd/kmsfs/exit.go
// (exit code); docs/semantics.md and docs/cli.md hold the tables.
package fault

import "errors"

// Kind says how a caller must act on an error. The zero Kind is no kind.
type Kind uint8

// The kinds of failure.
const (
	None           Kind = iota
	Integrity           // bytes failed authentication: chunk, header, commitment, size, name, record
	BadFormat           // bytes that no writer of this format makes
	KeyDenied           // the key service refuses: no permission, or no usable credentials
	KeyMissing          // the key is disabled or does not exist
	KeyRevoked          // the key is pending deletion
	KeyExpired          // imported key material has expired
	KeyRejected         // the key is not one that the class or the store allows
	KeyUnavailable      // the key service throttles, times out or cannot be reached
	Forbidden           // the policy forbids the operation
	CrossClass          // the operation would cross a class boundary
	Unsupported         // the operation does not exist here
	Invalid             // an argument is wrong
	TooLong             // a name or value does not fit
	Conflict            // somebody else changed or holds the object
	kindCount
)

var kindNames = [kindCount]string{
	None: "none", Integrity: "integrity", BadFormat: "bad-format", KeyDenied: "key-denied",
	KeyMissing: "key-missing", KeyRevoked: "key-revoked", KeyExpired: "key-expired",
	KeyRejected: "key-rejected", KeyUnavailable: "key-unavailable", Forbidden: "forbidden",
	CrossClass: "cross-class", Unsupported: "unsupported", Invalid: "invalid",
	TooLong: "too-long", Conflict: "conflict",
}

// String returns the kind's name as docs/format.md and the test vectors
// spell it, for example "key-denied".
func (k Kind) String() string {
	if k < kindCount {
		return kindNames[k]
	}
	return "unknown"
}

// Kinds returns every kind except None, in order.
func Kinds() []Kind {
	out := make([]Kind, 0, kindCount-1)
	for k := Integrity; k < kindCount; k++ {
		out = append(out, k)
	}
	return out
}

// ParseKind is the inverse of Kind.String; ok is false for an unknown name.
func ParseKind(name string) (k Kind, ok bool) {
	for i, n := range kindNames {
		if n == name {
			return Kind(i), true
		}
	}
	return None, false
}

// Error is a sentinel with a kind. Compare with errors.Is; read the kind with Of.
type Error struct {
	kind Kind
	text string
}

// New returns a sentinel. text is "package: what is wrong".
func New(kind Kind, text string) *Error { return &Error{kind, text} }

// Error returns the text given to New.
func (e *Error) Error() string { return e.text }

// Kind returns the kind given to New.
func (e *Error) Kind() Kind { return e.kind }

// Of returns the kind of the first *Error in err's tree, or None.
func Of(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.kind
	}
	return None
}
