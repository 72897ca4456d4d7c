package pkcs11

import (
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// errNoToken means that no slot holds the token, as far as the module knows.
var errNoToken = fmt.Errorf("%w: no such token", keywrap.ErrUnavailable)

// errDown means that the module could not be started again.
var errDown = fmt.Errorf("%w: the module does not start", keywrap.ErrUnavailable)

// use is one operation's hold on a token: a session of its own, logged in. It
// is valid while the library's lock is held for reading.
type use struct {
	lib     *library
	slot    uint
	session session
	token   *token
}

// token is what is known of one token since generation. The anchor session is
// not used for anything: with it open, the login outlives the other sessions.
type token struct {
	generation uint64
	slot       uint
	info       tokenInfo
	forms      []form // by preference

	mu     sync.Mutex
	anchor session
	ready  bool      // the anchor is open and logged in
	gone   bool      // to be looked for again; its sessions are not reused
	idle   []session // logged in, at most as many as there were calls at once
}

// tokenOf returns the token that key names. The library's lock is held.
func (p *Provider) tokenOf(key URI) (*token, error) {
	select1 := key
	select1.Object, select1.ID = "", ""
	id := select1.String()
	if key.SlotID != nil {
		id += fmt.Sprintf(";slot-id=%d", *key.SlotID)
	}
	p.mu.Lock()
	t := p.tokens[id]
	p.mu.Unlock()
	if t != nil && t.generation == p.lib.generation && !t.isGone() {
		return t, nil
	}
	t, err := p.findToken(key)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := p.tokens[id]; now != nil && now.generation == t.generation && now.slot == t.slot && !now.isGone() {
		return now, nil // somebody else was faster; one token has one login
	}
	p.tokens[id] = t
	return t, nil
}

func (p *Provider) findToken(key URI) (*token, error) {
	slots, err := p.lib.Slots()
	if err != nil {
		return nil, err
	}
	var found *token
	for _, slot := range slots {
		info, err := p.lib.TokenInfo(slot)
		if err != nil || !key.matches(slot, info) {
			continue // a reader whose card is being pulled concerns nobody else
		}
		if found != nil {
			return nil, bad("two tokens match: add serial=")
		}
		found = &token{generation: p.lib.generation, slot: slot, info: info}
	}
	if found == nil {
		return nil, errNoToken
	}
	for _, m := range mechanisms {
		if p.withoutGCM && m.form == formGCM {
			continue
		}
		ok, err := p.lib.CanUse(found.slot, m.ckm)
		if err != nil {
			return nil, err
		}
		if ok {
			found.forms = append(found.forms, m.form)
		}
	}
	if len(found.forms) == 0 {
		return nil, fmt.Errorf("%w: the token has neither AES-GCM nor AES key wrap", keywrap.ErrUnsupported)
	}
	return found, nil
}

func (t *token) isGone() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.gone
}

// session returns a logged-in session for the caller alone.
func (t *token) session(p *Provider) (session, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.login(p); err != nil {
		return 0, err
	}
	if n := len(t.idle); n > 0 {
		s := t.idle[n-1]
		t.idle = t.idle[:n-1]
		return s, nil
	}
	return p.lib.OpenSession(t.slot)
}

// login opens the anchor session and logs in, once. t.mu is held, so that a
// token sees one login at a time: each wrong one brings it closer to its lock.
func (t *token) login(p *Provider) error {
	if t.ready {
		return nil
	}
	s, err := p.lib.OpenSession(t.slot)
	if err != nil {
		return err
	}
	if t.info.LoginRequired {
		if err := p.login(s, t.info); err != nil {
			_ = p.lib.CloseSession(s)
			return err
		}
	}
	t.anchor, t.ready = s, true
	return nil
}

// release takes a session back after an operation that ended with err. After a
// failure of the token it is closed: nobody knows what is active in it.
func (t *token) release(lib *library, s session, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var r rv
	failed := errors.As(err, &r)
	if stale(err) && !t.gone {
		t.gone = true
		for _, idle := range append(t.idle, t.anchor) {
			_ = lib.CloseSession(idle)
		}
		t.idle = nil
	}
	if failed || t.gone {
		_ = lib.CloseSession(s) // it may be closed already
		return
	}
	t.idle = append(t.idle, s)
}

// login logs in with the PIN as it is now. A PIN that this token refused is not
// tried again, since a few wrong tries lock a token for good.
func (p *Provider) login(s session, info tokenInfo) error {
	if p.pin == nil {
		if info.PINPad {
			return loginError(p.lib.Login(s, nil))
		}
		return fmt.Errorf("%w: the token needs a PIN", keywrap.ErrCredentials)
	}
	pin, err := p.pin()
	defer func() { clear(pin[:cap(pin)]) }()
	if err != nil {
		return fmt.Errorf("%w: %w", keywrap.ErrCredentials, err)
	}
	if len(pin) == 0 {
		return fmt.Errorf("%w: the PIN is empty", keywrap.ErrCredentials)
	}
	mac := hmac.New(sha256.New, p.rejectKey.Bytes())
	mac.Write(pin)
	sum := [sha256.Size]byte(mac.Sum(nil))
	id := info.Label + "\x00" + info.Serial
	p.pinMu.Lock()
	before, known := p.rejected[id]
	p.pinMu.Unlock()
	if known && hmac.Equal(before[:], sum[:]) {
		return fmt.Errorf("%w: the token refused this PIN before: %w", keywrap.ErrCredentials, rvPINIncorrect)
	}
	err = p.lib.Login(s, pin)
	if is(err, rvPINIncorrect, rvPINInvalid, rvPINLenRange, rvPINLocked) {
		p.pinMu.Lock()
		p.rejected[id] = sum
		p.pinMu.Unlock()
	}
	return loginError(err)
}

func loginError(err error) error {
	if is(err, rvUserAlreadyLoggedIn) {
		return nil // this process was, by way of another Provider
	}
	return err
}

// newRejectKey is the key under which refused PINs are remembered.
func newRejectKey() *keymem.Key { return keymem.Random(sha256.Size) }
