package keywrap

import "context"

// Check describes a call to be tried without effect.
type Check struct {
	Op  string // OpGenerate, OpEncrypt, OpDecrypt, OpReEncrypt or OpDescribe
	Key string // key URI or alias; unused where Wrapped names the key
	// Wrapped is for OpDecrypt and OpReEncrypt. Without a Blob only the key's
	// state and the right to use it are checked.
	Wrapped   Wrapped
	Context   Context // encryption context; of the source for OpReEncrypt
	ToKey     string  // OpReEncrypt: destination
	ToContext Context // OpReEncrypt
}

// The operations of a Provider, as Check.Op and CallError.Op name them.
const (
	OpGenerate  = "GenerateDataKey"
	OpEncrypt   = "Encrypt"
	OpDecrypt   = "Decrypt"
	OpReEncrypt = "ReEncrypt"
	OpDescribe  = "Describe"
)

// Checker tells whether a call would succeed now. Providers implement it.
type Checker interface {
	// Check returns nil if the call that c describes would succeed, and else
	// the *CallError that the call would fail with. No key is made, and none
	// leaves the service; the service's audit log may show the question.
	Check(ctx context.Context, c Check) error
}

// CheckWith is p's own Check, or ErrUnsupported for a Provider without one.
func CheckWith(ctx context.Context, p Provider, c Check) error {
	if k, ok := p.(Checker); ok {
		return k.Check(ctx, c)
	}
	return &CallError{Op: c.Op, Key: c.KeyURI(), Err: ErrUnsupported, Hint: "this key service cannot be asked without a real call"}
}

// KeyURI returns the key that the call would use: Wrapped.Key for OpDecrypt and
// OpReEncrypt if it is given, else Key.
func (c Check) KeyURI() string {
	if (c.Op == OpDecrypt || c.Op == OpReEncrypt) && c.Wrapped.Key != "" {
		return c.Wrapped.Key
	}
	return c.Key
}
