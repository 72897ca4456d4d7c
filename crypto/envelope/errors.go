package envelope

import (
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/fault"
)

// The failures of this package. Those of the key service pass through as
// *keywrap.CallError.
var (
	ErrFormat       = fault.New(fault.BadFormat, "envelope: not a valid header")
	ErrVersion      = fault.New(fault.BadFormat, "envelope: header of another format version; a newer kmsfs may read it")
	ErrDoesNotFit   = fault.New(fault.TooLong, "envelope: recipients do not fit into the header")
	ErrCommitment   = fault.New(fault.Integrity, "envelope: header does not match its data key")
	ErrSealed       = fault.New(fault.Integrity, "envelope: data key does not open under the branch key of its header")
	ErrShared       = fault.New(fault.Unsupported, "envelope: a key wrapped under a shared branch key cannot change its class")
	ErrForeignStore = fault.New(fault.Integrity, "envelope: header belongs to another store")
	ErrForeignClass = fault.New(fault.Integrity, "envelope: header has no recipient of this class")
	ErrNotAllowed   = fault.New(fault.KeyRejected, "envelope: key is not one that the class allows")
	ErrDataKey      = fault.New(fault.Integrity, "envelope: key service returned no valid data key")
	ErrInvalid      = fault.New(fault.Invalid, "envelope: invalid argument")
	ErrClosed       = fault.New(fault.Conflict, "envelope: key manager is closed")
)

// CreateError is the failure of a Create that was to choose the file id: it
// tells which one the key service was asked for, to find its record of the call.
type CreateError struct {
	File ID
	Err  error
}

func (e *CreateError) Error() string { return fmt.Sprintf("new file %s: %v", e.File, e.Err) }

// Unwrap returns Err.
func (e *CreateError) Unwrap() error { return e.Err }
