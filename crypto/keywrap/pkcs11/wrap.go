package pkcs11

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// The lengths of a wrapped key's parts, in bytes: see the package comment.
const (
	maxID       = 64
	ivLen       = 12
	tagLen      = 16
	sealedLen   = keywrap.DataKeyLen + tagLen
	secretLen   = keywrap.DataKeyLen + sha256.Size
	minWrapped  = secretLen + 8
	maxWrapped  = secretLen + 24
	noneID      = "none"
	aadLabel    = "kmsfs pkcs11 data key v1"
	scratchSize = 128 // room for what a module writes before it knows better
)

// form is the first byte of a wrapped key.
type form byte

const (
	formGCM form = 1
	formKW  form = 2
	formKWP form = 3
	formPad form = 4
)

// mechanisms are the forms by preference.
var mechanisms = []struct {
	form form
	ckm  uint
}{{formGCM, ckmAESGCM}, {formKW, ckmAESKeyWrap}, {formKWP, ckmAESKWP}, {formPad, ckmAESWrapPad}}

func (f form) mechanism() uint {
	for _, m := range mechanisms {
		if m.form == f {
			return m.ckm
		}
	}
	return 0
}

// wrappedKey is the parsed form of keywrap.Wrapped.Blob.
type wrappedKey struct {
	form form
	id   string // CKA_ID
	iv   []byte // form GCM
	body []byte
}

func (w *wrappedKey) encode() []byte {
	out := append([]byte{byte(w.form), byte(len(w.id))}, w.id...)
	return append(append(out, w.iv...), w.body...)
}

// parseWrapped answers keywrap.ErrCiphertext for what encode does not make. The
// result refers to blob.
func parseWrapped(blob []byte) (*wrappedKey, error) {
	if len(blob) < 2 || int(blob[1]) > maxID || len(blob) < 2+int(blob[1]) {
		return nil, keywrap.ErrCiphertext
	}
	w := &wrappedKey{form: form(blob[0]), id: string(blob[2 : 2+blob[1]]), body: blob[2+blob[1]:]}
	switch w.form {
	case formGCM:
		if len(w.body) != ivLen+sealedLen {
			return nil, keywrap.ErrCiphertext
		}
		w.iv, w.body = w.body[:ivLen], w.body[ivLen:]
	case formKW, formKWP, formPad:
		if len(w.body) < minWrapped || len(w.body) > maxWrapped || len(w.body)%8 != 0 {
			return nil, keywrap.ErrCiphertext
		}
	default:
		return nil, keywrap.ErrCiphertext
	}
	return w, nil
}

// material returns the key-material id of a CKA_ID.
func material(id string) string {
	if id == "" {
		return noneID
	}
	return hex.EncodeToString([]byte(id))
}

// associatedData encodes the encryption context so that no two have one form.
func associatedData(ec keywrap.Context) []byte {
	pairs := ec.Map()
	var out []byte
	add := func(s string) {
		out = append(binary.BigEndian.AppendUint32(out, uint32(len(s))), s...)
	}
	add(aadLabel)
	for _, k := range slices.Sorted(maps.Keys(pairs)) {
		add(k)
		add(pairs[k])
	}
	return out
}

// generate returns a fresh data key of the token's generator.
func (u *use) generate() (*keymem.Key, error) {
	buf := make([]byte, keywrap.DataKeyLen)
	defer clear(buf)
	if err := u.random(buf); err != nil {
		return nil, err
	}
	return keymem.Take(buf), nil
}

// random fills buf from the token's generator. A module that claims to have
// done so and has not is caught where that costs nothing.
func (u *use) random(buf []byte) error {
	if err := u.lib.Random(u.session, buf); err != nil {
		return err
	}
	if zero(buf) {
		return fmt.Errorf("%w: the token's random generator gives zeros", keywrap.ErrUnavailable)
	}
	return nil
}

func zero(b []byte) bool { return subtle.ConstantTimeCompare(b, make([]byte, len(b))) == 1 }

// wrap wraps a data key under version v.
func (u *use) wrap(v *version, ec keywrap.Context, plain []byte) ([]byte, error) {
	w := &wrappedKey{form: v.form, id: v.ID}
	aad := associatedData(ec)
	var err error
	if w.form == formGCM {
		w.iv, w.body, err = u.seal(v, aad, plain)
	} else {
		w.body, err = u.wrapSecret(v, aad, plain)
	}
	if err != nil {
		return nil, err
	}
	blob := w.encode()
	if _, err := parseWrapped(blob); err != nil {
		return nil, fmt.Errorf("%w: the token makes wrapped keys of an unknown length", keywrap.ErrUnsupported)
	}
	return blob, nil
}

func (u *use) seal(v *version, aad, plain []byte) (iv, sealed []byte, err error) {
	iv = make([]byte, ivLen)
	if err := u.random(iv); err != nil {
		return nil, nil, err
	}
	iv, sealed, err = u.lib.EncryptGCM(u.session, v.object, iv, aad, plain)
	if is(err, rvMechanismParamInvalid, rvArgumentsBad) {
		// CloudHSM makes the IV itself and insists on a zeroed buffer for it.
		iv, sealed, err = u.lib.EncryptGCM(u.session, v.object, make([]byte, ivLen), aad, plain)
	}
	if err != nil {
		return nil, nil, err
	}
	if len(iv) != ivLen || zero(iv) { // a constant IV would be the end of GCM
		return nil, nil, fmt.Errorf("%w: the token tells no IV", keywrap.ErrUnsupported)
	}
	return iv, sealed, nil
}

func (u *use) wrapSecret(v *version, aad, plain []byte) ([]byte, error) {
	secret := make([]byte, 0, secretLen)
	defer func() { clear(secret[:cap(secret)]) }()
	sum := sha256.Sum256(aad)
	secret = append(append(secret, plain...), sum[:]...)
	return u.lib.Wrap(u.session, v.object, v.form.mechanism(), secret)
}

// unwrap opens w under version v. keywrap.ErrCiphertext means that the token
// works and w is not under this key and context.
func (u *use) unwrap(v *version, ec keywrap.Context, w *wrappedKey) (*keymem.Key, error) {
	out := make([]byte, scratchSize)
	defer clear(out)
	aad := associatedData(ec)
	if w.form == formGCM {
		n, err := u.lib.DecryptGCM(u.session, v.object, w.iv, aad, w.body, out)
		if err != nil {
			return nil, u.unwrapError(v, w.form, err)
		}
		if n != keywrap.DataKeyLen {
			return nil, keywrap.ErrCiphertext
		}
		return keymem.Copy(out[:n]), nil
	}
	n, err := u.lib.Unwrap(u.session, v.object, w.form.mechanism(), w.body, out)
	if err != nil {
		return nil, u.unwrapError(v, w.form, err)
	}
	sum := sha256.Sum256(aad)
	if n != secretLen || subtle.ConstantTimeCompare(out[keywrap.DataKeyLen:n], sum[:]) != 1 {
		return nil, keywrap.ErrCiphertext
	}
	return keymem.Copy(out[:keywrap.DataKeyLen]), nil
}

// unwrapError tells a wrapped key that does not open from a token that does not
// work. Some modules say the same of both (SoftHSM: CKR_GENERAL_ERROR); then the
// key is tried on something that must open.
func (u *use) unwrapError(v *version, f form, err error) error {
	switch {
	case is(err, rvEncryptedDataInvalid, rvEncryptedDataLenRange, rvWrappedKeyInvalid, rvWrappedKeyLenRange):
		return keywrap.ErrCiphertext
	case !is(err, rvGeneralError, rvFunctionFailed, rvArgumentsBad, rvBufferTooSmall):
		return err
	}
	if again := u.trial(v, f); again != nil {
		return err
	}
	return keywrap.ErrCiphertext
}

// trial wraps and unwraps a value of no use, in a session of its own: the one
// at hand may be spoilt.
func (u *use) trial(v *version, f form) error {
	if !v.wraps(f) {
		return nil // it cannot be tried; its session answered, so the token is there
	}
	s, err := u.lib.OpenSession(u.slot)
	if err != nil {
		return err
	}
	defer func() { _ = u.lib.CloseSession(s) }()
	t := *u
	t.session = s
	probe := *v
	probe.form = f
	plain := make([]byte, keywrap.DataKeyLen)
	blob, err := t.wrap(&probe, keywrap.Context{}, plain)
	if err != nil {
		return err
	}
	w, err := parseWrapped(blob)
	if err != nil {
		return err
	}
	out := make([]byte, scratchSize)
	if f == formGCM {
		_, err = u.lib.DecryptGCM(s, v.object, w.iv, associatedData(keywrap.Context{}), w.body, out)
	} else {
		_, err = u.lib.Unwrap(s, v.object, f.mechanism(), w.body, out)
	}
	return err
}
