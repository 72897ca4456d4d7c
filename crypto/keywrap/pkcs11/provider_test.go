package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keywraptest"
)

const fakeKey = "pkcs11:token=hsm;object=phi"

var (
	sample = keywrap.Context{Store: strings.Repeat("0a", 16), Class: "phi", Purpose: keywrap.PurposeData, ID: strings.Repeat("0b", 16)}
	day    = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
)

// newFakeProvider returns a Provider on a fake module with the token "hsm" in
// slot 7 and one key, "phi".
func newFakeProvider(t *testing.T) (*Provider, *fakeModule, *fakeToken) {
	t.Helper()
	m := newFake()
	tok := m.addToken(7, "hsm", "1234")
	m.addKey(tok, "phi", "\x01", day)
	lib, err := newLibrary(m)
	if err != nil {
		t.Fatal(err)
	}
	p := newProvider(lib, lib.close, Options{Module: "/lib/fake.so", PIN: func() ([]byte, error) { return []byte("1234"), nil }})
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		if m.overlap {
			t.Error("two calls used one session at the same time")
		}
	})
	return p, m, tok
}

// fakeSetup runs the contract suite on a fake token.
func fakeSetup(p *Provider, m *fakeModule, tok *fakeToken) keywraptest.Setup {
	n := 0
	each := func(key string, f func(*fakeObject)) {
		u, _ := Parse(key)
		m.change(func() {
			for _, o := range tok.objects {
				if o.label == u.Object {
					f(o)
				}
			}
		})
	}
	return keywraptest.Setup{
		Provider: p,
		NewKey: func(testing.TB) string {
			n++
			m.addKey(tok, fmt.Sprintf("key %d", n), "\x01", day)
			return fmt.Sprintf("pkcs11:token=hsm;object=key%%20%d", n)
		},
		NewAlias: func(_ testing.TB, key string) string {
			return strings.Replace(key, "token=hsm", "slot-id=7", 1) + "?module-name=fake"
		},
		Disable: func(_ testing.TB, key string) {
			each(key, func(o *fakeObject) { o.Encrypt, o.Decrypt, o.Wrap, o.Unwrap = false, false, false, false })
		},
		Enable: func(_ testing.TB, key string) {
			each(key, func(o *fakeObject) { o.Encrypt, o.Decrypt, o.Wrap, o.Unwrap = true, true, true, true })
		},
		Rotate: func(_ testing.TB, key string) {
			u, _ := Parse(key)
			m.addKey(tok, u.Object, "\x02", day)
		},
		Unknown:    "pkcs11:token=hsm;object=unknown",
		NotCovered: notCovered,
	}
}

var notCovered = map[string]string{
	keywraptest.CasePending:    "PKCS#11 has no waiting period before deletion",
	keywraptest.CaseCancelled:  "PKCS#11 has no waiting period before deletion",
	keywraptest.CaseCheckState: "PKCS#11 has no waiting period before deletion; TestCheckAndTrace shows a disabled key",
}

func TestContractFake(t *testing.T) {
	for name, set := range map[string]func(*fakeToken){
		"AES-GCM":               func(*fakeToken) {},
		"AES-GCM, token's IV":   func(tok *fakeToken) { tok.ownIV = true },
		"AES-GCM, vague errors": func(tok *fakeToken) { tok.vague = true },
		"AES key wrap":          func(tok *fakeToken) { tok.without = []uint{ckmAESGCM, ckmAESKWP} },
		"AES key wrap, vague":   func(tok *fakeToken) { tok.without, tok.vague = []uint{ckmAESGCM, ckmAESKWP, ckmAESWrapPad}, true },
	} {
		t.Run(name, func(t *testing.T) {
			p, m, tok := newFakeProvider(t)
			set(tok)
			keywraptest.Run(t, fakeSetup(p, m, tok))
		})
	}
}

func generate(t *testing.T, p *Provider, key string) keywrap.DataKey {
	t.Helper()
	dk, err := p.GenerateDataKey(context.Background(), key, sample)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(dk.Plain.Wipe)
	return dk
}

func wantOpen(t *testing.T, p *Provider, dk keywrap.DataKey) {
	t.Helper()
	got, err := p.Decrypt(context.Background(), dk.Wrapped, sample)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Wipe()
	if !got.Equal(dk.Plain) {
		t.Error("another data key")
	}
}

// wantErr wants a failure of GenerateDataKey, with a hint.
func wantErr(t *testing.T, p *Provider, key string, want *fault.Error) {
	t.Helper()
	dk, err := p.GenerateDataKey(context.Background(), key, sample)
	if err == nil {
		dk.Plain.Wipe()
	}
	checkErr(t, err, want)
}

func checkErr(t *testing.T, err error, want *fault.Error) {
	t.Helper()
	var ce *keywrap.CallError
	if !errors.Is(err, want) || !errors.As(err, &ce) || fault.Of(err) != want.Kind() {
		t.Fatalf("got %v, want %v", err, want)
	}
	if ce.Hint == "" || ce.RequestID == "" && want != keywrap.ErrBadURI {
		t.Errorf("hint %q, request id %q: %v", ce.Hint, ce.RequestID, err)
	}
}

func TestVersions(t *testing.T) {
	p, m, tok := newFakeProvider(t)
	now := day.AddDate(0, 6, 0)
	p.now = func() time.Time { return now }
	material := func() string { return generate(t, p, fakeKey).Wrapped.Material }
	first := generate(t, p, fakeKey)
	steps := []struct {
		what, id string
		start    time.Time
		want     string
	}{
		{"a larger id on the same day", "\x02", day, "02"},
		{"an id that is larger as a number", "\x01\x00", day, "0100"},
		{"leading zeros do not count", "\x00\x00\x03", day, "0100"},
		{"a later date with a smaller id", "\x00", day.AddDate(0, 1, 0), "00"},
		{"no date is the oldest", "\xff\xff", time.Time{}, "00"},
		{"a date in the future waits", "\x10", day.AddDate(1, 0, 0), "00"},
	}
	for _, s := range steps {
		m.addKey(tok, "phi", s.id, s.start)
		if got := material(); got != s.want {
			t.Errorf("%s: version %s wraps, want %s", s.what, got, s.want)
		}
	}
	now = day.AddDate(1, 0, 0)
	if got := material(); got != "10" {
		t.Errorf("on its first day: version %s wraps, want 10", got)
	}
	newest := generate(t, p, fakeKey)
	wantOpen(t, p, first)

	m.change(func() {
		for _, o := range tok.objects {
			if o.ID == "\x10" {
				o.Encrypt, o.Wrap = false, false
			}
		}
	})
	if got := material(); got != "00" {
		t.Errorf("after the newest lost its right to encrypt: version %s wraps, want 00", got)
	}
	wantOpen(t, p, newest)

	m.change(func() {
		for _, o := range tok.objects {
			o.End = day.AddDate(1, 0, 1)
		}
	})
	wantOpen(t, p, first)
	now = day.AddDate(1, 0, 2)
	wantErr(t, p, fakeKey, keywrap.ErrExpired)
	_, err := p.Decrypt(context.Background(), first.Wrapped, sample)
	checkErr(t, err, keywrap.ErrExpired)
}

func TestVersionsNobodyCanTellApart(t *testing.T) {
	p, m, tok := newFakeProvider(t)
	dk := generate(t, p, fakeKey)
	m.addKey(tok, "phi", "\x01", day)
	wantErr(t, p, fakeKey, keywrap.ErrUnsupported)
	_, err := p.Decrypt(context.Background(), dk.Wrapped, sample)
	checkErr(t, err, keywrap.ErrUnsupported)

	m.addKey(tok, "no id", "", day)
	dk = generate(t, p, "pkcs11:token=hsm;object=no%20id")
	if dk.Wrapped.Material != "none" {
		t.Errorf("material %q", dk.Wrapped.Material)
	}
	wantOpen(t, p, dk)
}

func TestTokenTakenAway(t *testing.T) {
	p, m, _ := newFakeProvider(t)
	dk := generate(t, p, fakeKey)
	tok := m.remove(7)
	wantErr(t, p, fakeKey, keywrap.ErrUnavailable)
	_, err := p.Decrypt(context.Background(), dk.Wrapped, sample)
	checkErr(t, err, keywrap.ErrUnavailable)

	m.putBack(7, tok)
	now := time.Now().Add(2 * restartPause)
	p.now = func() time.Time { return now }
	wantOpen(t, p, dk)
	generate(t, p, fakeKey)

	// Back in another slot before anybody looked.
	m.putBack(9, m.remove(7))
	now = now.Add(2 * restartPause)
	wantOpen(t, p, dk)
}

// TestModuleDoesNotStart: an HSM's daemon that is down for a while.
func TestModuleDoesNotStart(t *testing.T) {
	p, m, _ := newFakeProvider(t)
	now := time.Now()
	p.now = func() time.Time { return now }
	dk := generate(t, p, fakeKey)
	tok := m.remove(7)
	m.change(func() { m.down = true })
	for range 3 {
		wantErr(t, p, fakeKey, keywrap.ErrUnavailable)
		now = now.Add(2 * restartPause)
	}
	m.change(func() { m.down = false })
	m.putBack(7, tok)
	wantOpen(t, p, dk)
}

// TestLogins: one login serves all sessions, and is repeated when it is lost.
func TestLogins(t *testing.T) {
	p, m, tok := newFakeProvider(t)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			dk, err := p.GenerateDataKey(context.Background(), fakeKey, sample)
			if err != nil {
				t.Error(err)
				return
			}
			dk.Plain.Wipe()
		})
	}
	wg.Wait()
	if m.logins != 1 {
		t.Errorf("%d logins, want 1", m.logins)
	}
	m.change(func() { tok.in = false })
	generate(t, p, fakeKey)
	if m.logins != 2 {
		t.Errorf("%d logins after a logout, want 2", m.logins)
	}
	if err := m.Finalize(); err != nil { // somebody else in the process
		t.Fatal(err)
	}
	generate(t, p, fakeKey)
	if m.logins != 3 {
		t.Errorf("%d logins after C_Finalize, want 3", m.logins)
	}
}

// TestSlowLogin: calls that come while the first one logs in wait for it, and
// for nothing that it needs.
func TestSlowLogin(t *testing.T) {
	p, m, _ := newFakeProvider(t)
	pin := p.pin
	p.pin = func() ([]byte, error) {
		time.Sleep(20 * time.Millisecond)
		return pin()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			dk, err := p.GenerateDataKey(ctx, fakeKey, sample)
			if err != nil {
				t.Error(err)
				return
			}
			dk.Plain.Wipe()
		})
	}
	wg.Wait()
	if m.logins != 1 {
		t.Errorf("%d logins, want 1", m.logins)
	}
}

// TestWrongPIN: a wrong PIN reaches the token once, so that it does not lock.
func TestWrongPIN(t *testing.T) {
	p, m, tok := newFakeProvider(t)
	pin := "wrong"
	p.pin = func() ([]byte, error) { return []byte(pin), nil }
	for range 10 {
		wantErr(t, p, fakeKey, keywrap.ErrCredentials)
	}
	if tok.tries != 1 || m.logins != 1 {
		t.Errorf("%d tries at the token, want 1", tok.tries)
	}
	pin = "1234"
	generate(t, p, fakeKey)

	p, _, tok = newFakeProvider(t)
	p.pin = nil
	wantErr(t, p, fakeKey, keywrap.ErrCredentials)
	p.pin = func() ([]byte, error) { return nil, errors.New("no such file") }
	wantErr(t, p, fakeKey, keywrap.ErrCredentials)
	p.pin = func() ([]byte, error) { return nil, nil }
	wantErr(t, p, fakeKey, keywrap.ErrCredentials)
	if tok.tries != 0 {
		t.Errorf("%d tries without a PIN", tok.tries)
	}
}

func TestFailuresOfTheToken(t *testing.T) {
	fail := func(name string, want *fault.Error, set func(*fakeToken)) {
		t.Run(name, func(t *testing.T) {
			p, m, tok := newFakeProvider(t)
			m.change(func() { set(tok) })
			wantErr(t, p, fakeKey, want)
		})
	}
	fail("zeros for random numbers", keywrap.ErrUnavailable, func(tok *fakeToken) { tok.zeroRand = true })
	fail("a constant IV", keywrap.ErrUnsupported, func(tok *fakeToken) { tok.zeroIV = true })
	fail("no mechanism", keywrap.ErrUnsupported, func(tok *fakeToken) {
		tok.without = []uint{ckmAESGCM, ckmAESKeyWrap, ckmAESKWP, ckmAESWrapPad}
	})
	fail("no sessions", keywrap.ErrThrottled, func(tok *fakeToken) { tok.max = 1 })
	fail("broken", keywrap.ErrUnavailable, func(tok *fakeToken) { tok.broken = true })
	fail("no AES key", keywrap.ErrUnsupported, func(tok *fakeToken) { tok.objects[1].AES = false })
	fail("no key", keywrap.ErrNotFound, func(tok *fakeToken) { clear(tok.objects) })
	fail("a PIN somebody changed", keywrap.ErrCredentials, func(tok *fakeToken) { tok.pin = "other" })

	// A token that breaks says the same as one that SoftHSM gives a bad blob.
	p, m, tok := newFakeProvider(t)
	dk := generate(t, p, fakeKey)
	m.change(func() { tok.broken = true })
	_, err := p.Decrypt(context.Background(), dk.Wrapped, sample)
	checkErr(t, err, keywrap.ErrUnavailable)
	m.change(func() { tok.broken = false })
	wantOpen(t, p, dk)
}

// TestHangingToken: a call ends with its context although the module hangs, and
// leaves no key behind.
func TestHangingToken(t *testing.T) {
	p, m, _ := newFakeProvider(t)
	live := keymem.Live()
	hang := make(chan struct{})
	m.change(func() { m.hang = hang })
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	_, err := p.GenerateDataKey(ctx, fakeKey, sample)
	checkErr(t, err, keywrap.ErrUnavailable)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	close(hang)
	if err := p.Close(); err != nil { // waits for the call
		t.Fatal(err)
	}
	if got := keymem.Live(); got != live-1 { // the Provider's own
		t.Errorf("%d keys live, want %d", got, live-1)
	}
	_, err = p.GenerateDataKey(context.Background(), fakeKey, sample)
	if !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestMovedBetweenForms(t *testing.T) {
	p, _, _ := newFakeProvider(t)
	dk := generate(t, p, fakeKey)
	p.withoutGCM = true
	p.lib.restart(1, time.Now())
	kw, err := p.Encrypt(context.Background(), fakeKey, sample, dk.Plain)
	if err != nil {
		t.Fatal(err)
	}
	if form(kw.Blob[0]) != formKW || form(dk.Wrapped.Blob[0]) != formGCM {
		t.Fatalf("forms %d and %d", kw.Blob[0], dk.Wrapped.Blob[0])
	}
	again, err := p.Encrypt(context.Background(), fakeKey, sample, dk.Plain)
	if err != nil || !bytes.Equal(again.Blob, kw.Blob) {
		t.Errorf("AES key wrap is not deterministic: %v", err)
	}
	p.withoutGCM = false // the token learns AES-GCM; what it wrapped before opens
	p.lib.restart(2, time.Now().Add(time.Hour))
	wantOpen(t, p, keywrap.DataKey{Plain: dk.Plain, Wrapped: kw})
	wantOpen(t, p, dk)
}

func TestCheckAndTrace(t *testing.T) {
	p, m, tok := newFakeProvider(t)
	dk := generate(t, p, fakeKey)
	var trace keywrap.Trace
	ctx := keywrap.WithTrace(context.Background(), &trace)
	checks := []keywrap.Check{
		{Op: keywrap.OpGenerate, Key: fakeKey, Context: sample},
		{Op: keywrap.OpEncrypt, Key: fakeKey, Context: sample},
		{Op: keywrap.OpDescribe, Key: fakeKey},
		{Op: keywrap.OpDecrypt, Key: fakeKey, Context: sample},
		{Op: keywrap.OpDecrypt, Wrapped: dk.Wrapped, Context: sample},
		{Op: keywrap.OpReEncrypt, Wrapped: dk.Wrapped, Context: sample, ToKey: fakeKey, ToContext: sample},
	}
	for _, c := range checks {
		if err := p.Check(ctx, c); err != nil {
			t.Errorf("%s: %v", c.Op, err)
		}
	}
	m.change(func() { o := tok.objects[1]; o.Encrypt, o.Decrypt, o.Wrap, o.Unwrap = false, false, false, false })
	for _, c := range checks {
		if err := p.Check(ctx, c); c.Op != keywrap.OpDescribe {
			checkErr(t, err, keywrap.ErrDisabled)
		}
	}
	ids := map[string]bool{}
	for i, a := range trace.Attempts() {
		if want := checks[i%len(checks)].Op; a.Op != want || a.RequestID == "" || !a.DryRun || ids[a.RequestID] {
			t.Errorf("attempt %d: %+v, want a dry %s with an id of its own", i, a, want)
		}
		if failed := i >= len(checks) && a.Op != keywrap.OpDescribe; (a.Code != "") != failed {
			t.Errorf("attempt %d: code %q", i, a.Code)
		}
		ids[a.RequestID] = true
	}
	if len(ids) != 2*len(checks) {
		t.Errorf("%d attempts, want %d", len(ids), 2*len(checks))
	}
}
