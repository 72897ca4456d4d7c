package rewrap

import "github.com/kmsfs/kmsfs/crypto/fault"

var (
	// ErrKeysChanged means that the store names other keys than the caller has
	// pinned.
	ErrKeysChanged = fault.New(fault.KeyRejected, "rewrap: the store's keys are not those pinned on this machine")
	// ErrLocked means that another process has the store mounted.
	ErrLocked = fault.New(fault.Conflict, "rewrap: store is in use by another process")
	// ErrUnfinished means that a crash left files of the store half written.
	ErrUnfinished = fault.New(fault.Conflict, "rewrap: the store was not unmounted cleanly")
	// ErrChanged means that a file is not what it was when it was looked at.
	ErrChanged = fault.New(fault.Conflict, "rewrap: file changed meanwhile")
	// ErrHeader means a header that is none of this store's.
	ErrHeader = fault.New(fault.BadFormat, "rewrap: not a header of this store")
	// ErrKey means a key that may not be a recipient of the class.
	ErrKey = fault.New(fault.KeyRejected, "rewrap: key is not among the class's keys")
	// ErrPath means a path that leads nowhere in the store, or is too long.
	ErrPath = fault.New(fault.Invalid, "rewrap: no path of a store file")
)
