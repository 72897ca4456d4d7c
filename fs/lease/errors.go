package lease

import "github.com/kmsfs/kmsfs/crypto/fault"

var (
	// ErrHeld means that somebody alive has the store. The error's text names them.
	ErrHeld = fault.New(fault.Conflict, "lease: the store is in use on another machine")
	// ErrLost means that the lease is another's now, or that for so long nothing
	// could be written to it that it may be.
	ErrLost = fault.New(fault.Conflict, "lease: another machine may have taken the store over")
)
