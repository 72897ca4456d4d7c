package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// Options configure a Provider.
type Options struct {
	// Module is the path of the PKCS#11 module, the vendor's shared library.
	Module string
	// PIN returns the user PIN, for every login: at the first use and after the
	// token was away. Its result is wiped. A nil PIN is for tokens that ask on
	// a device of their own or need no login.
	PIN func() ([]byte, error)
	// PINFile is where PIN reads from, to compare with a URI's pin-source; ""
	// if that is no file.
	PINFile string
	// Sessions bounds the calls at the token at the same time; 0 is 16.
	Sessions int
}

const (
	defaultSessions = 16
	closeWait       = 5 * time.Second // for calls under way at Close
)

// Provider is the keywrap.Provider of "pkcs11:…" URIs. Methods are safe for
// concurrent use. Calls of a module cannot be interrupted: where a caller's
// context ends first, the call goes on, and what it brings is wiped.
//
// A token that was taken away and put back is found again by the next call,
// with a new login. Processes forked without exec must not use the Provider;
// Go programs make none.
type Provider struct {
	lib        *library
	unload     func()
	module     string
	pin        func() ([]byte, error)
	pinFile    string
	now        func() time.Time
	withoutGCM bool // in tests: as if the token had none

	calls   chan struct{} // one place for each session
	running sync.WaitGroup

	mu     sync.Mutex // taken before a token's
	closed bool
	tokens map[string]*token // by what of a URI selects a token

	pinMu     sync.Mutex                // taken after a token's
	rejected  map[string][hmacSize]byte // PINs that a token refused
	rejectKey *keymem.Key               // of the HMACs in rejected
}

const hmacSize = 32

var (
	_ keywrap.Provider = (*Provider)(nil)
	_ keywrap.Checker  = (*Provider)(nil)
)

// newProvider returns a Provider on a library; unload is called by Close.
func newProvider(lib *library, unload func(), o Options) *Provider {
	n := o.Sessions
	if n <= 0 {
		n = defaultSessions
	}
	return &Provider{lib: lib, unload: unload, module: o.Module, pin: o.PIN, pinFile: o.PINFile, now: time.Now,
		calls: make(chan struct{}, n), tokens: map[string]*token{}, rejected: map[string][hmacSize]byte{},
		rejectKey: newRejectKey()}
}

// Close logs out by closing every session, and gives the module back. Calls
// under way have a few seconds to end; if one hangs in the module, the module
// is left as it is. Later calls fail with ErrClosed.
func (p *Provider) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	p.mu.Unlock()
	ended := make(chan struct{})
	go func() { p.running.Wait(); close(ended) }()
	select {
	case <-ended:
		p.closeSessions()
		p.rejectKey.Wipe()
		p.unload()
	case <-time.After(closeWait):
	}
	return nil
}

func (p *Provider) closeSessions() {
	p.lib.mu.RLock()
	defer p.lib.mu.RUnlock()
	for _, t := range p.tokens {
		if t.generation != p.lib.generation || t.gone {
			continue
		}
		for _, s := range t.idle {
			_ = p.lib.CloseSession(s)
		}
		if t.ready {
			_ = p.lib.CloseSession(t.anchor)
		}
	}
	clear(p.tokens)
}

// begin counts a call, unless the Provider is closed.
func (p *Provider) begin() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return ErrClosed
	}
	p.running.Add(1)
	return nil
}

// run marks c as sent and calls f, which may hang in the module, and returns its result, or ctx's
// end if that comes first; then drop gets what f returns.
func run[T any](ctx context.Context, p *Provider, c *call, f func() (T, error), drop func(T)) (T, error) {
	var none T
	if err := ctx.Err(); err != nil {
		return none, ended(err)
	}
	select {
	case p.calls <- struct{}{}:
	case <-ctx.Done():
		return none, ended(ctx.Err())
	}
	if err := p.begin(); err != nil {
		<-p.calls
		return none, err
	}
	c.sent = true
	type result struct {
		value T
		err   error
	}
	done, abandoned := make(chan result), make(chan struct{})
	go func() {
		defer func() { <-p.calls; p.running.Done() }()
		v, err := f()
		select {
		case done <- result{v, err}:
		case <-abandoned:
			if err == nil {
				drop(v)
			}
		}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		close(abandoned)
		return none, ended(ctx.Err())
	}
}

// ended is what a call answers whose context ended: the caller's cancellation
// is no failure of the service, a deadline is.
func ended(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: %w", keywrap.ErrUnavailable, err)
	}
	return err
}

// with calls f with a session on key's token. If the token, its session or its
// objects turn out to be others than they were, it looks again and calls f once
// more.
func (p *Provider) with(key URI, f func(u *use) error) error {
	generation, err := p.once(key, f)
	restart := errors.Is(err, errNoToken) || errors.Is(err, errDown)
	if err == nil || !stale(err) && !restart {
		return err
	}
	if restart || is(err, rvNotInitialized, rvDeviceRemoved, rvTokenNotPresent, rvTokenNotRecognized, rvSlotInvalid) {
		p.lib.restart(generation, p.now())
	}
	_, err = p.once(key, f)
	return err
}

func (p *Provider) once(key URI, f func(u *use) error) (generation uint64, err error) {
	p.lib.mu.RLock()
	defer p.lib.mu.RUnlock()
	generation = p.lib.generation
	if p.lib.failed != nil {
		return generation, fmt.Errorf("%w: C_Initialize: %w", errDown, p.lib.failed)
	}
	t, err := p.tokenOf(key)
	if err != nil {
		return generation, err
	}
	s, err := t.session(p)
	if err != nil {
		if stale(err) {
			t.drop()
		}
		return generation, err
	}
	err = f(&use{lib: p.lib, slot: t.slot, session: s, token: t})
	t.release(p.lib, s, err)
	return generation, err
}

// drop makes the next call look for the token again.
func (t *token) drop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.gone = true
}

// lookup finds the versions of key. Where there are none it looks closer: a
// token that forgot the login hides private keys instead of saying so, and
// SoftHSM does not notice by itself that a token is gone.
func (u *use) lookup(key URI) ([]*version, error) {
	list, err := u.versions(key, u.token.forms)
	if !errors.Is(err, keywrap.ErrNotFound) {
		return list, err
	}
	if info, infoErr := u.lib.TokenInfo(u.slot); infoErr != nil || !key.matches(u.slot, info) {
		return nil, rvTokenNotPresent
	}
	if u.token.info.LoginRequired {
		in, infoErr := u.lib.LoggedIn(u.session)
		if infoErr != nil {
			return nil, infoErr
		}
		if !in {
			return nil, rvUserNotLoggedIn
		}
	}
	return nil, err
}
