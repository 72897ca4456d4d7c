package audit

import "github.com/kmsfs/kmsfs/crypto/fault"

// What this package fails with. Operating-system errors are wrapped in
// ErrNotLogged by Write, and pass through elsewhere.
var (
	// ErrLocked: another process writes this log.
	ErrLocked = fault.New(fault.Conflict, "audit: log is in use by another process")
	// ErrNotLogged: the event is not in the log, and Options.Required says that
	// it must be.
	ErrNotLogged = fault.New(fault.Forbidden, "audit: event could not be logged")
	// ErrFile: the path cannot be a log: not a regular file, a symbolic link,
	// or writable by others.
	ErrFile = fault.New(fault.Invalid, "audit: not usable as a log file")
	// ErrClosed: the log was closed.
	ErrClosed = fault.New(fault.Conflict, "audit: log is closed")
	// ErrNoLog: Verify or Walk found no file at the path.
	ErrNoLog = fault.New(fault.Invalid, "audit: no such log")

	errLine = fault.New(fault.BadFormat, "audit: not a line of the log")
)
