package salvage

import "github.com/kmsfs/kmsfs/crypto/fault"

var (
	// ErrNoHeader means a file without anything that its key could be read from.
	ErrNoHeader = fault.New(fault.Integrity, "salvage: no header")
	// ErrNotEmpty means that the output is there already, and not an empty directory.
	ErrNotEmpty = fault.New(fault.Conflict, "salvage: output is not an empty directory")
	// ErrInside means that the output lies in what is to be salvaged.
	ErrInside = fault.New(fault.Invalid, "salvage: output lies in the source")
	// ErrRecord means that the store record, or what it depends on, fails
	// authentication.
	ErrRecord = fault.New(fault.Integrity, "salvage: store record fails authentication")
	// errNotLast means that the chunk at the end is not sealed as the last.
	errNotLast = fault.New(fault.Integrity, "salvage: the last chunk is not the file's last")
	// ErrName means that a name cannot be decrypted.
	ErrName = fault.New(fault.Integrity, "salvage: name is lost")
	// ErrTarget means that a symlink's target cannot be decrypted.
	ErrTarget = fault.New(fault.Integrity, "salvage: target of a symlink is lost")
)
