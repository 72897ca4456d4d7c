package envelope

import "github.com/kmsfs/kmsfs/crypto/fault"

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
