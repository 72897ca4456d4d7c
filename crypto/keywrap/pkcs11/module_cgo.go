//go:build pkcs11 && cgo

package pkcs11

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	p11 "github.com/miekg/pkcs11"
)

// modules are the loaded shared libraries of this process, by real path.
var modules struct {
	mu     sync.Mutex
	loaded map[string]*loaded
}

type loaded struct {
	lib  *library
	uses int
}

// New returns a Provider on the module o.Module, which it loads and initializes
// if this process has not yet. The token is not asked before the first call.
// Errors: ErrNoModule, ErrModule.
func New(o Options) (*Provider, error) {
	if o.Module == "" {
		return nil, ErrNoModule
	}
	// A path without a slash would be searched for (dlopen(3)): a library of
	// that name in LD_LIBRARY_PATH is not what the user named.
	path, err := filepath.Abs(o.Module)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrModule, err)
	}
	lib, err := load(path)
	if err != nil {
		return nil, err
	}
	return newProvider(lib, func() { unload(path) }, o), nil
}

func load(path string) (*library, error) {
	modules.mu.Lock()
	defer modules.mu.Unlock()
	if l := modules.loaded[path]; l != nil {
		l.uses++
		return l.lib, nil
	}
	ctx := p11.New(path)
	if ctx == nil {
		return nil, fmt.Errorf("%w: %s is no shared library with C_GetFunctionList", ErrModule, path)
	}
	lib, err := newLibrary(&module{ctx: ctx, direct: directOf(ctx)})
	if err != nil {
		ctx.Destroy()
		return nil, fmt.Errorf("%w: %s: C_Initialize: %w", ErrModule, path, err)
	}
	if modules.loaded == nil {
		modules.loaded = map[string]*loaded{}
	}
	modules.loaded[path] = &loaded{lib: lib, uses: 1}
	return lib, nil
}

// unload finalizes a module after its last Provider. The library stays mapped:
// vendors' threads and exit handlers may still run in it.
func unload(path string) {
	modules.mu.Lock()
	defer modules.mu.Unlock()
	l := modules.loaded[path]
	if l.uses--; l.uses == 0 {
		l.lib.close()
		delete(modules.loaded, path)
	}
}

// module is the cryptoki of a shared library. What carries no secret goes
// through miekg/pkcs11, the rest through direct.
type module struct {
	ctx    *p11.Ctx
	direct direct
}

// failure turns an error of miekg/pkcs11 into an rv.
func failure(err error) error {
	var e p11.Error
	if errors.As(err, &e) {
		return rv(e)
	}
	return err
}

func (m *module) Initialize() error { return failure(m.ctx.Initialize()) }
func (m *module) Finalize() error   { return failure(m.ctx.Finalize()) }

func (m *module) Slots() ([]uint, error) {
	slots, err := m.ctx.GetSlotList(true)
	return slots, failure(err)
}

func (m *module) TokenInfo(slot uint) (tokenInfo, error) {
	i, err := m.ctx.GetTokenInfo(slot)
	if err != nil {
		return tokenInfo{}, failure(err)
	}
	trim := func(s string) string { return strings.TrimRight(s, " \x00") }
	return tokenInfo{Label: trim(i.Label), Manufacturer: trim(i.ManufacturerID), Model: trim(i.Model), Serial: trim(i.SerialNumber),
		LoginRequired: i.Flags&p11.CKF_LOGIN_REQUIRED != 0,
		PINPad:        i.Flags&p11.CKF_PROTECTED_AUTHENTICATION_PATH != 0}, nil
}

func (m *module) CanUse(slot uint, mechanism uint) (bool, error) {
	info, err := m.ctx.GetMechanismInfo(slot, []*p11.Mechanism{p11.NewMechanism(mechanism, nil)})
	if err = failure(err); is(err, rvMechanismInvalid) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	want := uint(p11.CKF_WRAP | p11.CKF_UNWRAP)
	if mechanism == ckmAESGCM {
		want = p11.CKF_ENCRYPT | p11.CKF_DECRYPT
	}
	return info.Flags&want == want, nil
}

func (m *module) OpenSession(slot uint) (session, error) {
	s, err := m.ctx.OpenSession(slot, p11.CKF_SERIAL_SESSION)
	return session(s), failure(err)
}

func (m *module) CloseSession(s session) error {
	return failure(m.ctx.CloseSession(p11.SessionHandle(s)))
}

func (m *module) LoggedIn(s session) (bool, error) {
	info, err := m.ctx.GetSessionInfo(p11.SessionHandle(s))
	return info.State == p11.CKS_RO_USER_FUNCTIONS || info.State == p11.CKS_RW_USER_FUNCTIONS, failure(err)
}

func (m *module) Find(s session, label, id string, limit int) ([]object, error) {
	template := []*p11.Attribute{p11.NewAttribute(p11.CKA_CLASS, p11.CKO_SECRET_KEY)}
	if label != "" {
		template = append(template, p11.NewAttribute(p11.CKA_LABEL, label))
	}
	if id != "" {
		template = append(template, p11.NewAttribute(p11.CKA_ID, []byte(id)))
	}
	sh := p11.SessionHandle(s)
	if err := m.ctx.FindObjectsInit(sh, template); err != nil {
		return nil, failure(err)
	}
	var out []object
	var err error
	for len(out) < limit {
		var found []p11.ObjectHandle
		if found, _, err = m.ctx.FindObjects(sh, limit-len(out)); err != nil || len(found) == 0 {
			break
		}
		for _, o := range found {
			out = append(out, object(o))
		}
	}
	if final := m.ctx.FindObjectsFinal(sh); err == nil {
		err = final
	}
	return out, failure(err)
}

// kinds are the attributes that Attributes reads.
var kinds = []uint{p11.CKA_KEY_TYPE, p11.CKA_ID, p11.CKA_VALUE_LEN, p11.CKA_START_DATE, p11.CKA_END_DATE, p11.CKA_ENCRYPT,
	p11.CKA_DECRYPT, p11.CKA_WRAP, p11.CKA_UNWRAP, p11.CKA_EXTRACTABLE}

// values reads attributes of an object. An attribute that the object does not
// have, or cannot tell, is left out: SoftHSM 2.6 answers CKR_GENERAL_ERROR for
// the dates of a private object.
func (m *module) values(s session, o object, kinds []uint) (map[uint][]byte, error) {
	template := make([]*p11.Attribute, len(kinds))
	for i, kind := range kinds {
		template[i] = p11.NewAttribute(kind, nil)
	}
	list, err := m.ctx.GetAttributeValue(p11.SessionHandle(s), p11.ObjectHandle(o), template)
	out := map[uint][]byte{}
	err = failure(err)
	if is(err, rvAttributeTypeInvalid, rvGeneralError) && len(kinds) > 1 { // the whole list fails for one: one by one
		failed := 0
		for _, kind := range kinds {
			one, single := m.values(s, o, []uint{kind})
			if single != nil && !is(single, rvAttributeTypeInvalid, rvGeneralError) {
				return nil, single
			}
			if single != nil {
				failed++
			}
			out[kind] = one[kind]
		}
		if failed == len(kinds) {
			return nil, err
		}
		return out, nil
	}
	for _, a := range list {
		out[a.Type] = a.Value
	}
	return out, err
}

func (m *module) Attributes(s session, o object) (attributes, error) {
	get, err := m.values(s, o, kinds)
	yes := func(kind uint) bool { return bytes.Equal(get[kind], []byte{1}) }
	return attributes{
		AES:     len(get[p11.CKA_KEY_TYPE]) > 0 && number(get[p11.CKA_KEY_TYPE]) == p11.CKK_AES,
		ID:      string(get[p11.CKA_ID]),
		Bytes:   number(get[p11.CKA_VALUE_LEN]),
		Start:   date(get[p11.CKA_START_DATE]),
		End:     date(get[p11.CKA_END_DATE]),
		Encrypt: yes(p11.CKA_ENCRYPT), Decrypt: yes(p11.CKA_DECRYPT),
		Wrap: yes(p11.CKA_WRAP), Unwrap: yes(p11.CKA_UNWRAP),
		Extractable: yes(p11.CKA_EXTRACTABLE),
	}, err
}

// date reads a CK_DATE, "YYYYMMDD"; a module's way of saying "none" is zero.
func date(b []byte) time.Time {
	t, err := time.Parse("20060102", string(b))
	if err != nil {
		return time.Time{}
	}
	return t
}

func (m *module) EncryptGCM(s session, key object, iv, aad, plain []byte) ([]byte, []byte, error) {
	params := p11.NewGCMParams(iv, aad, 8*tagLen)
	defer params.Free()
	mechanism := []*p11.Mechanism{p11.NewMechanism(ckmAESGCM, params)}
	if err := m.ctx.EncryptInit(p11.SessionHandle(s), mechanism, p11.ObjectHandle(key)); err != nil {
		return nil, nil, failure(err)
	}
	sealed, err := m.ctx.Encrypt(p11.SessionHandle(s), plain)
	if err != nil {
		return nil, nil, failure(err)
	}
	return params.IV(), sealed, nil
}

func (m *module) DecryptGCM(s session, key object, iv, aad, sealed, out []byte) (int, error) {
	params := p11.NewGCMParams(iv, aad, 8*tagLen)
	defer params.Free()
	mechanism := []*p11.Mechanism{p11.NewMechanism(ckmAESGCM, params)}
	if err := m.ctx.DecryptInit(p11.SessionHandle(s), mechanism, p11.ObjectHandle(key)); err != nil {
		return 0, failure(err)
	}
	return m.direct.decrypt(s, sealed, out)
}

func (m *module) Login(s session, pin []byte) error  { return m.direct.login(s, pin) }
func (m *module) Random(s session, out []byte) error { return m.direct.random(s, out) }

func (m *module) Wrap(s session, key object, mechanism uint, secret []byte) ([]byte, error) {
	temp, err := m.direct.create(s, secret)
	if err != nil {
		return nil, err
	}
	defer m.destroy(s, temp)
	out, err := m.ctx.WrapKey(p11.SessionHandle(s), []*p11.Mechanism{p11.NewMechanism(mechanism, nil)},
		p11.ObjectHandle(key), p11.ObjectHandle(temp))
	return out, failure(err)
}

func (m *module) Unwrap(s session, key object, mechanism uint, wrapped, out []byte) (int, error) {
	temp, err := m.ctx.UnwrapKey(p11.SessionHandle(s), []*p11.Mechanism{p11.NewMechanism(mechanism, nil)},
		p11.ObjectHandle(key), wrapped, []*p11.Attribute{
			p11.NewAttribute(p11.CKA_CLASS, p11.CKO_SECRET_KEY),
			p11.NewAttribute(p11.CKA_KEY_TYPE, p11.CKK_GENERIC_SECRET),
			p11.NewAttribute(p11.CKA_TOKEN, false),
			p11.NewAttribute(p11.CKA_PRIVATE, true),
			p11.NewAttribute(p11.CKA_SENSITIVE, false),
			p11.NewAttribute(p11.CKA_EXTRACTABLE, true),
		})
	if err != nil {
		return 0, failure(err)
	}
	defer m.destroy(s, object(temp))
	return m.direct.value(s, object(temp), out)
}

// destroy deletes a session object. If it cannot, the object goes with its
// session.
func (m *module) destroy(s session, o object) {
	_ = m.ctx.DestroyObject(p11.SessionHandle(s), p11.ObjectHandle(o))
}
