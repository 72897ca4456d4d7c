package pkcs11

import "github.com/kmsfs/kmsfs/crypto/fault"

// The failures of opening a module. Failures of a key are those of package
// keywrap.
var (
	ErrModule   = fault.New(fault.KeyUnavailable, "pkcs11: module cannot be loaded")
	ErrNoModule = fault.New(fault.Invalid, "pkcs11: no module was given")
	ErrClosed   = fault.New(fault.Invalid, "pkcs11: closed")
)
