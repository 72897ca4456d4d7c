package backing

import "github.com/kmsfs/kmsfs/crypto/fault"

var (
	// ErrLocked means that another process holds the lock.
	ErrLocked = fault.New(fault.Conflict, "backing: locked by another process")
	// ErrTooBig means that a small file is larger than its reader allows.
	ErrTooBig = fault.New(fault.BadFormat, "backing: file is larger than its format allows")
)
