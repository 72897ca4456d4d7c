package nameenc

import "github.com/kmsfs/kmsfs/crypto/fault"

// What this package answers.
var (
	ErrName    = fault.New(fault.Invalid, "nameenc: not a valid name")
	ErrTooLong = fault.New(fault.TooLong, "nameenc: does not fit once encrypted")
	ErrAuth    = fault.New(fault.Integrity, "nameenc: fails authentication")
	ErrKey     = fault.New(fault.Invalid, "nameenc: key is not 32 bytes, or wiped")
)
