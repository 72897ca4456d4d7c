package pkcs11

import (
	"context"
	"errors"
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// classify gives a failure of the module its sentinel. Errors that have a kind
// already, and a caller's cancellation, stay as they are.
func classify(err error) error {
	var r rv
	if fault.Of(err) != fault.None || !errors.As(err, &r) {
		return err
	}
	return fmt.Errorf("%w: %w", sentinel(r), err)
}

func sentinel(r rv) *fault.Error {
	switch r {
	case rvPINIncorrect, rvPINInvalid, rvPINLenRange, rvPINExpired, rvPINLocked, rvUserNotLoggedIn, rvUserPINNotInitialized,
		rvUserOtherLoggedIn:
		return keywrap.ErrCredentials
	case rvKeyNotPermitted, rvActionProhibited:
		return keywrap.ErrDenied
	case rvKeyHandleInvalid, rvObjectHandleInvalid, rvWrapHandleInvalid, rvUnwrapHandleInvalid:
		return keywrap.ErrNotFound
	case rvMechanismInvalid, rvMechanismParamInvalid, rvFunctionNotSupported, rvKeySizeRange, rvKeyTypeInconsistent:
		return keywrap.ErrUnsupported
	case rvSessionCount:
		return keywrap.ErrThrottled
	}
	return keywrap.ErrUnavailable
}

// code is the service's error code for the trace: the return value's name, or
// what this package found out by itself.
func code(err error) string {
	var r rv
	switch {
	case err == nil:
		return ""
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return keywrap.NoAnswer
	case errors.As(err, &r):
		return r.Error()
	}
	return fault.Of(err).String()
}

var hints = []struct {
	err  error
	text string
}{
	{keywrap.ErrBadURI, "use pkcs11:token=LABEL;object=LABEL; the module and the PIN file are given with --pkcs11-module and --pkcs11-pin-file"},
	{rvPINLocked, "the token is locked: its security officer has to set a new PIN"},
	{rvPINIncorrect, "correct the PIN file (--pkcs11-pin-file, KMSFS_PKCS11_PIN_FILE); a wrong PIN is not tried twice"},
	{keywrap.ErrCredentials, "give the token's user PIN with --pkcs11-pin-file FILE (KMSFS_PKCS11_PIN_FILE)"},
	{errDown, "the module started before and does not now: see its own configuration and log"},
	{errNoToken, "is the token there, and is this the right module? pkcs11-tool --module MODULE -L lists the tokens"},
	{keywrap.ErrNotFound, "pkcs11-tool --module MODULE --login -O lists the token's objects"},
	{keywrap.ErrDisabled, "no version of the key may do this: see its attributes CKA_ENCRYPT and CKA_DECRYPT (CKA_WRAP, CKA_UNWRAP)"},
	{keywrap.ErrExpired, "the end date of the key has passed: make a new version, or change CKA_END_DATE"},
	{keywrap.ErrWrongKey, "was this version of the key deleted from the token, or the header taken from elsewhere?"},
	{keywrap.ErrCiphertext, "the file's header was damaged or moved, or belongs to another token's key of this name"},
	{keywrap.ErrDenied, "the token forbids this use of the key: see its attributes"},
	{keywrap.ErrUnsupported, "the key must be an AES key, and the token must have AES-GCM or AES key wrap"},
	{keywrap.ErrThrottled, "the token has no session left: end other programs, or lower --kms-concurrency"},
	{keywrap.ErrUnavailable, "check the token, its network connection, and the module's own log"},
}

func hint(err error) string {
	for _, h := range hints {
		if errors.Is(err, h.err) {
			return h.text
		}
	}
	return ""
}
