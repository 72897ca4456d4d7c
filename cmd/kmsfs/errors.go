package main

import (
	"errors"

	"github.com/kmsfs/kmsfs/crypto/fault"
)

// Failures that only the command line has. exit.go gives each its exit code.
var (
	errUsage          = fault.New(fault.Invalid, "kmsfs: usage")
	errNoStore        = fault.New(fault.Invalid, "kmsfs: no store")
	errNotTrusted     = fault.New(fault.KeyRejected, "kmsfs: store not trusted")
	errKnownStores    = fault.New(fault.BadFormat, "kmsfs: known-stores file")
	errNoFUSE         = fault.New(fault.Unsupported, "kmsfs: no FUSE")
	errBusy           = fault.New(fault.Conflict, "kmsfs: busy")
	errNotAMount      = fault.New(fault.Invalid, "kmsfs: not a kmsfs mount")
	errNeedPassphrase = fault.New(fault.KeyDenied, "kmsfs: passphrase needed")
	errDamage         = fault.New(fault.Integrity, "kmsfs: damage found")
	errDisk           = fault.New(fault.None, "kmsfs: the disk failed")
	errUnwell         = fault.New(fault.Invalid, "kmsfs: errors found")
	errNoPolicy       = fault.New(fault.Unsupported, "kmsfs: no key policy")
	errFailedOfLate   = fault.New(fault.KeyUnavailable, "kmsfs: keys failed of late")
	errKeyNeeded      = fault.New(fault.Forbidden, "kmsfs: something depends on the key")
	errKeysNotUsable  = fault.New(fault.KeyUnavailable, "kmsfs: keys not available")
)

// cliError is an error as a person reads it: text says what is wrong, hint
// what to do. The cause decides the exit code; it is not printed.
type cliError struct {
	text  string
	hint  string
	cause error
}

func (e *cliError) Error() string { return e.text }
func (e *cliError) Unwrap() error { return e.cause }

// fail returns an error of the given cause with its own words and hint.
func fail(cause error, text, hint string) error {
	return &cliError{text: text, hint: hint, cause: cause}
}

// usage returns a usage error (exit code 2).
func usage(text, hint string) error { return fail(errUsage, text, hint) }

// hint adds the next action to an error that keeps its words and exit code.
// An error that has a hint already keeps that one.
func hint(err error, text string) error {
	var e *cliError
	if err == nil || errors.As(err, &e) && e.hint != "" {
		return err
	}
	return &cliError{text: err.Error(), hint: text, cause: err}
}

// remoteError is the failure of the mount's background process, as it told it
// through the readiness pipe. It was translated there.
type remoteError struct {
	Code int    `json:"code"`
	Text string `json:"error"`
	Hint string `json:"hint"`
}

func (e *remoteError) Error() string { return e.Text }
