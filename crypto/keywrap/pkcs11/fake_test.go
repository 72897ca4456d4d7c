package pkcs11

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"slices"
	"sync"
	"time"
)

// fakeModule is a PKCS#11 module in Go: the rules of the standard that this
// package relies on, and the failures that real tokens show seldom.
type fakeModule struct {
	mu       sync.Mutex
	up       bool
	tokens   map[uint]*fakeToken // by slot
	visible  map[uint]*fakeToken // as of C_Initialize
	sessions map[session]*fakeToken
	next     session
	busy     map[session]bool // calls under way, to see two on one session
	overlap  bool
	starts   int
	logins   int
	down     bool          // C_Initialize fails
	hang     chan struct{} // C_GenerateRandom waits for it, if set
}

type fakeToken struct {
	info     tokenInfo
	pin      string
	in       bool
	removed  bool
	tries    int
	max      int // sessions, 0 is any number
	open     int
	without  []uint // mechanisms that the token does not have
	ownIV    bool   // like CloudHSM
	zeroIV   bool   // a token that neither takes nor makes an IV
	zeroRand bool
	vague    bool // CKR_GENERAL_ERROR for what does not open, like SoftHSM
	broken   bool // CKR_GENERAL_ERROR for everything
	objects  map[object]*fakeObject
}

type fakeObject struct {
	attributes
	label string
	key   []byte
}

func newFake() *fakeModule {
	return &fakeModule{tokens: map[uint]*fakeToken{}, sessions: map[session]*fakeToken{}, busy: map[session]bool{}}
}

func (m *fakeModule) addToken(slot uint, label, pin string) *fakeToken {
	t := &fakeToken{info: tokenInfo{Label: label, Manufacturer: "fake", Model: "Go", Serial: "s" + label, LoginRequired: true},
		pin: pin, objects: map[object]*fakeObject{}}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tokens[slot] = t
	return t
}

func (m *fakeModule) addKey(t *fakeToken, label, id string, start time.Time) *fakeObject {
	o := &fakeObject{label: label, key: make([]byte, 32), attributes: attributes{AES: true, ID: id, Bytes: 32, Start: start,
		Encrypt: true, Decrypt: true, Wrap: true, Unwrap: true}}
	_, _ = rand.Read(o.key)
	m.mu.Lock()
	defer m.mu.Unlock()
	t.objects[object(len(t.objects)+1)] = o
	return o
}

// change runs f while no call is under way.
func (m *fakeModule) change(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
}

// remove takes a token out of its slot; putBack returns it.
func (m *fakeModule) remove(slot uint) *fakeToken {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.tokens[slot]
	delete(m.tokens, slot)
	t.removed, t.in = true, false
	return t
}

func (m *fakeModule) putBack(slot uint, t *fakeToken) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t.removed = false
	for s, of := range m.sessions {
		if of == t {
			delete(m.sessions, s)
		}
	}
	t.open = 0
	m.tokens[slot] = t
}

func (m *fakeModule) Initialize() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.up {
		return rvAlreadyInitialized
	}
	if m.down {
		return rvGeneralError
	}
	m.up, m.visible = true, map[uint]*fakeToken{}
	for slot, t := range m.tokens {
		m.visible[slot] = t
	}
	m.starts++
	return nil
}

func (m *fakeModule) Finalize() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.up {
		return rvNotInitialized
	}
	for _, t := range m.tokens {
		t.in, t.open = false, 0
	}
	m.up, m.sessions, m.next = false, map[session]*fakeToken{}, 0
	return nil
}

func (m *fakeModule) Slots() ([]uint, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.up {
		return nil, rvNotInitialized
	}
	var out []uint
	for slot, t := range m.visible {
		if !t.removed {
			out = append(out, slot)
		}
	}
	return out, nil
}

func (m *fakeModule) TokenInfo(slot uint) (tokenInfo, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.visible[slot]
	if t == nil || t.removed {
		return tokenInfo{}, rvTokenNotPresent
	}
	return t.info, nil
}

func (m *fakeModule) CanUse(slot uint, mechanism uint) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.visible[slot]
	if t == nil {
		return false, rvSlotInvalid
	}
	return !slices.Contains(t.without, mechanism), nil
}

func (m *fakeModule) OpenSession(slot uint) (session, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.visible[slot]
	switch {
	case !m.up:
		return 0, rvNotInitialized
	case t == nil || t.removed:
		return 0, rvTokenNotPresent
	case t.max > 0 && t.open >= t.max:
		return 0, rvSessionCount
	}
	t.open++
	m.next++
	m.sessions[m.next] = t
	return m.next, nil
}

func (m *fakeModule) CloseSession(s session) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.sessions[s]
	if t == nil {
		return rvSessionHandleInvalid
	}
	delete(m.sessions, s)
	if t.open--; t.open == 0 {
		t.in = false
	}
	return nil
}

// enter is the beginning of every call on a session; the result ends it.
func (m *fakeModule) enter(s session) (*fakeToken, func(), error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.sessions[s]
	switch {
	case !m.up:
		return nil, nil, rvNotInitialized
	case t == nil:
		return nil, nil, rvSessionHandleInvalid
	case t.removed:
		return nil, nil, rvDeviceRemoved
	case t.broken:
		return nil, nil, rvGeneralError
	}
	if m.busy[s] {
		m.overlap = true
	}
	m.busy[s] = true
	return t, func() { m.mu.Lock(); defer m.mu.Unlock(); m.busy[s] = false }, nil
}

func (m *fakeModule) Login(s session, pin []byte) error {
	t, leave, err := m.enter(s)
	if err != nil {
		return err
	}
	defer leave()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.logins++
	switch {
	case t.in:
		return rvUserAlreadyLoggedIn
	case t.tries >= 3:
		return rvPINLocked
	case string(pin) != t.pin:
		t.tries++
		return rvPINIncorrect
	}
	t.in, t.tries = true, 0
	return nil
}

func (m *fakeModule) LoggedIn(s session) (bool, error) {
	t, leave, err := m.enter(s)
	if err != nil {
		return false, err
	}
	defer leave()
	return t.in, nil
}

func (m *fakeModule) Find(s session, label, id string, limit int) ([]object, error) {
	t, leave, err := m.enter(s)
	if err != nil {
		return nil, err
	}
	defer leave()
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []object
	for h, o := range t.objects {
		if t.in && (label == "" || label == o.label) && (id == "" || id == o.ID) && len(out) < limit {
			out = append(out, h)
		}
	}
	return out, nil
}

func (m *fakeModule) object(s session, h object) (*fakeToken, fakeObject, func(), error) {
	t, leave, err := m.enter(s)
	if err != nil {
		return nil, fakeObject{}, nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	o := t.objects[h]
	if o == nil || !t.in {
		defer func() { m.busy[s] = false }()
		return nil, fakeObject{}, nil, rvKeyHandleInvalid
	}
	return t, *o, leave, nil
}

func (m *fakeModule) Attributes(s session, h object) (attributes, error) {
	_, o, leave, err := m.object(s, h)
	if err != nil {
		return attributes{}, err
	}
	defer leave()
	return o.attributes, nil
}

func (m *fakeModule) Random(s session, out []byte) error {
	t, leave, err := m.enter(s)
	if err != nil {
		return err
	}
	defer leave()
	if hang := m.hang; hang != nil {
		<-hang
	}
	if t.zeroRand {
		clear(out)
		return nil
	}
	_, err = rand.Read(out)
	return err
}

func gcm(key []byte) cipher.AEAD {
	b, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	a, err := cipher.NewGCM(b)
	if err != nil {
		panic(err)
	}
	return a
}

func (m *fakeModule) EncryptGCM(s session, h object, iv, aad, plain []byte) ([]byte, []byte, error) {
	t, o, leave, err := m.object(s, h)
	if err != nil {
		return nil, nil, err
	}
	defer leave()
	if !o.Encrypt {
		return nil, nil, rvKeyNotPermitted
	}
	iv = slices.Clone(iv)
	if t.ownIV || t.zeroIV {
		if !zero(iv) {
			return nil, nil, rvMechanismParamInvalid
		}
		if !t.zeroIV {
			_, _ = rand.Read(iv)
		}
	}
	return iv, gcm(o.key).Seal(nil, iv, plain, aad), nil
}

func (t *fakeToken) refuse() error {
	if t.vague {
		return rvGeneralError
	}
	return rvEncryptedDataInvalid
}

func (m *fakeModule) DecryptGCM(s session, h object, iv, aad, sealed, out []byte) (int, error) {
	t, o, leave, err := m.object(s, h)
	if err != nil {
		return 0, err
	}
	defer leave()
	if !o.Decrypt {
		return 0, rvKeyNotPermitted
	}
	plain, err := gcm(o.key).Open(nil, iv, sealed, aad)
	if err != nil {
		return 0, t.refuse()
	}
	return copy(out, plain), nil
}

// Wrap and Unwrap are AES key wrap (RFC 3394).
func (m *fakeModule) Wrap(s session, h object, _ uint, secret []byte) ([]byte, error) {
	_, o, leave, err := m.object(s, h)
	if err != nil {
		return nil, err
	}
	defer leave()
	if !o.attributes.Wrap {
		return nil, rvKeyNotPermitted
	}
	b, _ := aes.NewCipher(o.key)
	out := append(slices.Repeat([]byte{0xa6}, 8), secret...)
	n := uint64(len(secret) / 8)
	for j := range uint64(6) {
		for i := uint64(1); i <= n; i++ {
			block := append(slices.Clone(out[:8]), out[8*i:8*i+8]...)
			b.Encrypt(block, block)
			binary.BigEndian.PutUint64(out, binary.BigEndian.Uint64(block)^(n*j+i))
			copy(out[8*i:], block[8:])
		}
	}
	return out, nil
}

func (m *fakeModule) Unwrap(s session, h object, _ uint, wrapped, out []byte) (int, error) {
	t, o, leave, err := m.object(s, h)
	if err != nil {
		return 0, err
	}
	defer leave()
	if !o.attributes.Unwrap {
		return 0, rvKeyNotPermitted
	}
	b, _ := aes.NewCipher(o.key)
	w := slices.Clone(wrapped)
	n := uint64(len(w)/8 - 1)
	for j := 5; j >= 0; j-- {
		for i := n; i >= 1; i-- {
			block := binary.BigEndian.AppendUint64(nil, binary.BigEndian.Uint64(w)^(n*uint64(j)+i))
			block = append(block, w[8*i:8*i+8]...)
			b.Decrypt(block, block)
			copy(w, block[:8])
			copy(w[8*i:], block[8:])
		}
	}
	if subtle.ConstantTimeCompare(w[:8], slices.Repeat([]byte{0xa6}, 8)) != 1 {
		if t.vague {
			return 0, rvGeneralError
		}
		return 0, rvWrappedKeyInvalid
	}
	return copy(out, w[8:]), nil
}
