package keyring

import "github.com/kmsfs/kmsfs/crypto/fault"

// The failures of keyring files. Failures of a key are those of package keywrap.
var (
	ErrPassphrase      = fault.New(fault.KeyDenied, "keyring: wrong passphrase, or the file was changed")
	ErrNeedPassphrase  = fault.New(fault.KeyDenied, "keyring: the file is protected and no passphrase was given")
	ErrEmptyPassphrase = fault.New(fault.Invalid, "keyring: empty passphrase")
	ErrFormat          = fault.New(fault.BadFormat, "keyring: not a keyring file of a known version")
	ErrPermissions     = fault.New(fault.Forbidden, "keyring: group or others have access to the file")
	ErrNoFile          = fault.New(fault.KeyMissing, "keyring: no such file")
	ErrUnreadable      = fault.New(fault.KeyUnavailable, "keyring: file cannot be read")
	ErrExists          = fault.New(fault.Conflict, "keyring: exists already")
	ErrLocked          = fault.New(fault.Conflict, "keyring: another process is changing the file")
	ErrName            = fault.New(fault.Invalid, "keyring: key names are 1 to 63 of a-z 0-9 . _ -, the first a letter or digit")
	ErrWindow          = fault.New(fault.Invalid, "keyring: the waiting period before deletion is 7 to 30 days")
	ErrNotPending      = fault.New(fault.Invalid, "keyring: key is not pending deletion")
	ErrFull            = fault.New(fault.TooLong, "keyring: no room for more")
	ErrClosed          = fault.New(fault.Invalid, "keyring: closed")
)
