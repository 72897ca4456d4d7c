package pkcs11

import (
	"errors"
	"fmt"
	"time"
)

// The handles of PKCS#11. They mean something to one cryptoki until it is
// finalized.
type (
	session uint
	object  uint
)

// cryptoki is what this package uses of a PKCS#11 module, in the module's own
// terms. Methods fail with an rv. Calls on different sessions may run at the
// same time; those on one session may not.
type cryptoki interface {
	// Initialize is C_Initialize for use by several threads; a module that is
	// initialized already is as good.
	Initialize() error
	Finalize() error
	// Slots returns the slots that hold a token.
	Slots() ([]uint, error)
	TokenInfo(slot uint) (tokenInfo, error)
	// CanUse reports whether the token has the mechanism for both directions:
	// to encrypt and decrypt, or to wrap and unwrap.
	CanUse(slot uint, mechanism uint) (bool, error)
	// OpenSession opens a read-only session.
	OpenSession(slot uint) (session, error)
	CloseSession(s session) error
	// Login logs the user in. pin stays the caller's; nil is the token's own
	// way of asking.
	Login(s session, pin []byte) error
	// LoggedIn reports whether the session is a logged-in user's.
	LoggedIn(s session) (bool, error)
	// Find returns at most limit AES keys with this label and id; "" is any.
	Find(s session, label, id string, limit int) ([]object, error)
	Attributes(s session, o object) (attributes, error)
	// Random fills out, in place, from the token's generator.
	Random(s session, out []byte) error
	// EncryptGCM returns the IV that was used, which is iv unless the token
	// chose its own, and ciphertext and tag.
	EncryptGCM(s session, key object, iv, aad, plain []byte) (ivUsed, sealed []byte, err error)
	// DecryptGCM writes the plaintext to out and returns its length.
	DecryptGCM(s session, key object, iv, aad, sealed, out []byte) (int, error)
	// Wrap wraps secret, by way of a session object that is gone afterwards.
	Wrap(s session, key object, mechanism uint, secret []byte) ([]byte, error)
	// Unwrap writes the secret to out, likewise, and returns its length.
	Unwrap(s session, key object, mechanism uint, wrapped, out []byte) (int, error)
}

// tokenInfo is what CK_TOKEN_INFO says, without padding.
type tokenInfo struct {
	Label, Manufacturer, Model, Serial string
	LoginRequired, PINPad              bool
}

// attributes are those of a secret key that matter here.
type attributes struct {
	AES                            bool
	ID                             string
	Bytes                          uint      // length of the key, 0 if the token does not say
	Start, End                     time.Time // dates, zero if absent
	Encrypt, Decrypt, Wrap, Unwrap bool
	Extractable                    bool
}

// The mechanisms, by preference. PKCS#11 3.0, sections 6.13 and 6.14.
const (
	ckmAESGCM     = 0x1087
	ckmAESKeyWrap = 0x2109
	ckmAESKWP     = 0x210B
	ckmAESWrapPad = 0x210A
)

// rv is a return value of PKCS#11 other than CKR_OK.
type rv uint

const (
	rvHostMemory              rv = 0x02
	rvSlotInvalid             rv = 0x03
	rvGeneralError            rv = 0x05
	rvFunctionFailed          rv = 0x06
	rvArgumentsBad            rv = 0x07
	rvAttributeTypeInvalid    rv = 0x12
	rvActionProhibited        rv = 0x1B
	rvDeviceError             rv = 0x30
	rvDeviceMemory            rv = 0x31
	rvDeviceRemoved           rv = 0x32
	rvEncryptedDataInvalid    rv = 0x40
	rvEncryptedDataLenRange   rv = 0x41
	rvFunctionCanceled        rv = 0x50
	rvFunctionNotSupported    rv = 0x54
	rvKeyHandleInvalid        rv = 0x60
	rvKeySizeRange            rv = 0x62
	rvKeyTypeInconsistent     rv = 0x63
	rvKeyNotPermitted         rv = 0x68
	rvMechanismInvalid        rv = 0x70
	rvMechanismParamInvalid   rv = 0x71
	rvObjectHandleInvalid     rv = 0x82
	rvOperationActive         rv = 0x90
	rvOperationNotInitialized rv = 0x91
	rvPINIncorrect            rv = 0xA0
	rvPINInvalid              rv = 0xA1
	rvPINLenRange             rv = 0xA2
	rvPINExpired              rv = 0xA3
	rvPINLocked               rv = 0xA4
	rvSessionClosed           rv = 0xB0
	rvSessionCount            rv = 0xB1
	rvSessionHandleInvalid    rv = 0xB3
	rvTokenNotPresent         rv = 0xE0
	rvTokenNotRecognized      rv = 0xE1
	rvUnwrapHandleInvalid     rv = 0xF0
	rvUserAlreadyLoggedIn     rv = 0x100
	rvUserNotLoggedIn         rv = 0x101
	rvUserPINNotInitialized   rv = 0x102
	rvUserOtherLoggedIn       rv = 0x104
	rvWrappedKeyInvalid       rv = 0x110
	rvWrappedKeyLenRange      rv = 0x112
	rvWrapHandleInvalid       rv = 0x113
	rvBufferTooSmall          rv = 0x150
	rvNotInitialized          rv = 0x190
	rvAlreadyInitialized      rv = 0x191
)

var rvNames = map[rv]string{
	rvHostMemory: "HOST_MEMORY", rvSlotInvalid: "SLOT_ID_INVALID", rvGeneralError: "GENERAL_ERROR",
	rvFunctionFailed: "FUNCTION_FAILED", rvArgumentsBad: "ARGUMENTS_BAD", rvAttributeTypeInvalid: "ATTRIBUTE_TYPE_INVALID",
	rvActionProhibited: "ACTION_PROHIBITED", rvDeviceError: "DEVICE_ERROR", rvDeviceMemory: "DEVICE_MEMORY",
	rvDeviceRemoved: "DEVICE_REMOVED", rvEncryptedDataInvalid: "ENCRYPTED_DATA_INVALID",
	rvEncryptedDataLenRange: "ENCRYPTED_DATA_LEN_RANGE", rvFunctionCanceled: "FUNCTION_CANCELED",
	rvFunctionNotSupported: "FUNCTION_NOT_SUPPORTED", rvKeyHandleInvalid: "KEY_HANDLE_INVALID",
	rvKeySizeRange: "KEY_SIZE_RANGE", rvKeyTypeInconsistent: "KEY_TYPE_INCONSISTENT",
	rvKeyNotPermitted: "KEY_FUNCTION_NOT_PERMITTED", rvMechanismInvalid: "MECHANISM_INVALID",
	rvMechanismParamInvalid: "MECHANISM_PARAM_INVALID", rvObjectHandleInvalid: "OBJECT_HANDLE_INVALID",
	rvOperationActive: "OPERATION_ACTIVE", rvOperationNotInitialized: "OPERATION_NOT_INITIALIZED",
	rvPINIncorrect: "PIN_INCORRECT", rvPINInvalid: "PIN_INVALID", rvPINLenRange: "PIN_LEN_RANGE",
	rvPINExpired: "PIN_EXPIRED", rvPINLocked: "PIN_LOCKED", rvSessionClosed: "SESSION_CLOSED",
	rvSessionCount: "SESSION_COUNT", rvSessionHandleInvalid: "SESSION_HANDLE_INVALID",
	rvTokenNotPresent: "TOKEN_NOT_PRESENT", rvTokenNotRecognized: "TOKEN_NOT_RECOGNIZED",
	rvUnwrapHandleInvalid: "UNWRAPPING_KEY_HANDLE_INVALID", rvUserAlreadyLoggedIn: "USER_ALREADY_LOGGED_IN",
	rvUserNotLoggedIn: "USER_NOT_LOGGED_IN", rvUserPINNotInitialized: "USER_PIN_NOT_INITIALIZED",
	rvUserOtherLoggedIn: "USER_ANOTHER_ALREADY_LOGGED_IN", rvWrappedKeyInvalid: "WRAPPED_KEY_INVALID",
	rvWrappedKeyLenRange: "WRAPPED_KEY_LEN_RANGE", rvWrapHandleInvalid: "WRAPPING_KEY_HANDLE_INVALID",
	rvBufferTooSmall: "BUFFER_TOO_SMALL", rvNotInitialized: "CRYPTOKI_NOT_INITIALIZED",
	rvAlreadyInitialized: "CRYPTOKI_ALREADY_INITIALIZED",
}

// Error returns the standard's name, for example "CKR_PIN_INCORRECT".
func (r rv) Error() string {
	if name, ok := rvNames[r]; ok {
		return "CKR_" + name
	}
	return fmt.Sprintf("CKR_0x%08X", uint(r))
}

// is reports whether err is one of these return values.
func is(err error, values ...rv) bool {
	var r rv
	if !errors.As(err, &r) {
		return false
	}
	for _, v := range values {
		if r == v {
			return true
		}
	}
	return false
}

// stale reports whether err says that what was known of the token, its session
// or its objects holds no longer, so that looking again may help.
func stale(err error) bool {
	return is(err, rvSlotInvalid, rvDeviceRemoved, rvDeviceError, rvKeyHandleInvalid, rvObjectHandleInvalid, rvSessionClosed,
		rvSessionHandleInvalid, rvTokenNotPresent, rvTokenNotRecognized, rvUnwrapHandleInvalid, rvWrapHandleInvalid,
		rvUserNotLoggedIn, rvNotInitialized, rvOperationActive, rvOperationNotInitialized)
}
