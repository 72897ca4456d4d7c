//go:build pkcs11 && cgo

package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	p11 "github.com/miekg/pkcs11"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keywraptest"
)

const userPIN = "98765432"

// softHSM finds the module, or skips; where nothing may be missing, it fails.
func softHSM(t *testing.T) string {
	t.Helper()
	for _, path := range []string{os.Getenv("SOFTHSM2_MODULE"), "/usr/lib/softhsm/libsofthsm2.so",
		"/usr/lib64/pkcs11/libsofthsm2.so", "/usr/local/lib/softhsm/libsofthsm2.so"} {
		if _, err := os.Stat(path); err == nil {
			if _, err := exec.LookPath("softhsm2-util"); err == nil {
				return path
			}
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("missing: SoftHSM2")
	}
	t.Skip("missing: SoftHSM2")
	return ""
}

// hsm is a SoftHSM token of this test alone.
type hsm struct {
	t      *testing.T
	module string
	dir    string // of the token's objects
	pin    string
	public bool // keys are no private objects: SoftHSM 2.6 then tells their dates
	*Provider
}

// newHSM makes the token "kmsfs test" and a Provider on it.
func newHSM(t *testing.T) *hsm {
	t.Helper()
	h := &hsm{t: t, module: softHSM(t), dir: filepath.Join(t.TempDir(), "tokens"), pin: userPIN}
	if err := os.Mkdir(h.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(t.TempDir(), "softhsm2.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", h.dir), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	h.initToken("kmsfs test")
	h.open()
	return h
}

func (h *hsm) initToken(label string) {
	h.t.Helper()
	h.exec("softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", "12345678", "--pin", userPIN)
}

func (h *hsm) exec(name string, args ...string) {
	h.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		h.t.Fatalf("%s: %v: %s", name, err, out)
	}
}

func (h *hsm) open() {
	h.t.Helper()
	p, err := New(Options{Module: h.module, PIN: func() ([]byte, error) { return []byte(h.pin), nil }})
	if err != nil {
		h.t.Fatal(err)
	}
	h.Provider = p
	h.t.Cleanup(func() { _ = p.Close() })
}

// admin runs f in a read-write session of an administrator.
func (h *hsm) admin(f func(ctx *p11.Ctx, s p11.SessionHandle)) {
	h.t.Helper()
	ctx := h.lib.cryptoki.(*module).ctx
	slots, err := ctx.GetSlotList(true)
	if err != nil {
		h.t.Fatal(err)
	}
	for _, slot := range slots {
		if info, err := ctx.GetTokenInfo(slot); err != nil || strings.TrimRight(info.Label, " \x00") != "kmsfs test" {
			continue
		}
		s, err := ctx.OpenSession(slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
		if err != nil {
			h.t.Fatal(err)
		}
		defer func() { _ = ctx.CloseSession(s) }()
		if err := ctx.Login(s, p11.CKU_USER, userPIN); err != nil && !is(failure(err), rvUserAlreadyLoggedIn) {
			h.t.Fatal(err)
		}
		f(ctx, s)
		return
	}
	h.t.Fatal("no token")
}

func (h *hsm) makeKey(label string, id byte) {
	h.t.Helper()
	h.admin(func(ctx *p11.Ctx, s p11.SessionHandle) {
		_, err := ctx.GenerateKey(s, []*p11.Mechanism{p11.NewMechanism(p11.CKM_AES_KEY_GEN, nil)}, []*p11.Attribute{
			p11.NewAttribute(p11.CKA_LABEL, label), p11.NewAttribute(p11.CKA_ID, []byte{id}),
			p11.NewAttribute(p11.CKA_VALUE_LEN, 32), p11.NewAttribute(p11.CKA_TOKEN, true),
			p11.NewAttribute(p11.CKA_PRIVATE, !h.public), p11.NewAttribute(p11.CKA_SENSITIVE, true),
			p11.NewAttribute(p11.CKA_EXTRACTABLE, false), p11.NewAttribute(p11.CKA_START_DATE, day),
			p11.NewAttribute(p11.CKA_ENCRYPT, true), p11.NewAttribute(p11.CKA_DECRYPT, true),
			p11.NewAttribute(p11.CKA_WRAP, true), p11.NewAttribute(p11.CKA_UNWRAP, true),
		})
		if err != nil {
			h.t.Fatal(err)
		}
	})
}

// allow sets what every version of a key may be used for.
func (h *hsm) allow(label string, yes bool) {
	h.t.Helper()
	h.each(label, func(ctx *p11.Ctx, s p11.SessionHandle, o p11.ObjectHandle) error {
		return ctx.SetAttributeValue(s, o, []*p11.Attribute{
			p11.NewAttribute(p11.CKA_ENCRYPT, yes), p11.NewAttribute(p11.CKA_DECRYPT, yes),
			p11.NewAttribute(p11.CKA_WRAP, yes), p11.NewAttribute(p11.CKA_UNWRAP, yes),
		})
	})
}

func (h *hsm) each(label string, f func(*p11.Ctx, p11.SessionHandle, p11.ObjectHandle) error) {
	h.t.Helper()
	h.admin(func(ctx *p11.Ctx, s p11.SessionHandle) {
		if err := ctx.FindObjectsInit(s, []*p11.Attribute{p11.NewAttribute(p11.CKA_LABEL, label)}); err != nil {
			h.t.Fatal(err)
		}
		list, _, err := ctx.FindObjects(s, 100)
		if err = errors.Join(err, ctx.FindObjectsFinal(s)); err != nil {
			h.t.Fatal(err)
		}
		if len(list) == 0 {
			h.t.Fatalf("no object %q", label)
		}
		for _, o := range list {
			if err := f(ctx, s, o); err != nil {
				h.t.Fatal(err)
			}
		}
	})
}

func (h *hsm) setup() keywraptest.Setup {
	n := 0
	label := func(key string) string {
		u, _ := Parse(key)
		return u.Object
	}
	return keywraptest.Setup{
		Provider: h.Provider,
		NewKey: func(testing.TB) string {
			n++
			h.makeKey(fmt.Sprintf("key-%d", n), 1)
			return fmt.Sprintf("pkcs11:token=kmsfs%%20test;object=key-%d", n)
		},
		NewAlias: func(_ testing.TB, key string) string {
			return "pkcs11:object=" + label(key) + ";token=kmsfs%20test?module-path=" + h.module
		},
		Disable:    func(_ testing.TB, key string) { h.allow(label(key), false) },
		Enable:     func(_ testing.TB, key string) { h.allow(label(key), true) },
		Rotate:     func(_ testing.TB, key string) { h.makeKey(label(key), 2) },
		Unknown:    "pkcs11:token=kmsfs%20test;object=unknown",
		NotCovered: notCovered,
	}
}

// undated is a Provider whose keys' creation time the token does not tell, in a
// suite that wants one.
type undated struct{ *Provider }

func (u undated) Describe(ctx context.Context, key string) (keywrap.Description, error) {
	d, err := u.Provider.Describe(ctx, key)
	if err == nil && d.Created.IsZero() {
		d.Created = day
	}
	return d, err
}

func TestContractSoftHSM(t *testing.T) {
	for _, public := range []bool{true, false} {
		for _, withoutGCM := range []bool{false, true} {
			t.Run(fmt.Sprintf("public %v, AES key wrap %v", public, withoutGCM), func(t *testing.T) {
				h := newHSM(t)
				h.public, h.withoutGCM = public, withoutGCM
				s := h.setup()
				if !public {
					s.Provider = undated{h.Provider}
				}
				keywraptest.Run(t, s)
			})
		}
	}
}

// TestModuleDirect holds the direct calls to the wrapper library's: the same
// functions of the same module.
func TestModuleDirect(t *testing.T) {
	h := newHSM(t)
	h.public = true
	h.makeKey("k", 1)
	h.admin(func(ctx *p11.Ctx, s p11.SessionHandle) {
		m := &module{ctx: ctx, direct: directOf(ctx)}
		if in, err := m.LoggedIn(session(s)); err != nil || !in {
			t.Fatalf("LoggedIn = %v, %v", in, err)
		}
		if err := m.Login(session(s), []byte(userPIN)); !is(err, rvUserAlreadyLoggedIn) {
			t.Errorf("second login: %v", err)
		}
		a, b := make([]byte, 32), make([]byte, 32)
		if err := errors.Join(m.Random(session(s), a), m.Random(session(s), b)); err != nil || zero(a) || bytes.Equal(a, b) {
			t.Errorf("random: %x, %x, %v", a, b, err)
		}
		secret := bytes.Repeat([]byte("secret! "), 8)
		o, err := m.direct.create(session(s), secret)
		if err != nil {
			t.Fatal(err)
		}
		out := make([]byte, 100)
		n, err := m.direct.value(session(s), o, out)
		if err != nil || !bytes.Equal(out[:n], secret) {
			t.Errorf("value: %q, %v", out[:n], err)
		}
		if _, err := m.direct.value(session(s), o, out[:10]); err == nil {
			t.Error("a value larger than the buffer fits")
		}
		if _, err := m.direct.value(session(s), 12345, out); !is(err, rvObjectHandleInvalid) {
			t.Errorf("value of no object: %v", err)
		}
		list, err := m.Find(session(s), "k", "\x01", 5)
		if err != nil || len(list) != 1 {
			t.Fatalf("Find = %v, %v", list, err)
		}
		if n, err := m.direct.value(session(s), list[0], out); err == nil {
			t.Errorf("the token gives %d bytes of a sensitive key", n)
		}
		attrs, err := m.Attributes(session(s), list[0])
		if err != nil || !attrs.AES || attrs.ID != "\x01" || attrs.Bytes != 32 || !attrs.Start.Equal(day) || !attrs.End.IsZero() || attrs.Extractable || !attrs.Encrypt {
			t.Errorf("attributes %+v, %v", attrs, err)
		}
	})
}

// TestSoftHSMKeyIsVisibleAtOnce: a version that another process makes wraps the
// next data key.
func TestSoftHSMKeyIsVisibleAtOnce(t *testing.T) {
	if _, err := exec.LookPath("pkcs11-tool"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("missing: pkcs11-tool")
		}
		t.Skip("missing: pkcs11-tool")
	}
	h := newHSM(t)
	const key = "pkcs11:token=kmsfs%20test;object=made"
	wantErr(t, h.Provider, key, keywrap.ErrNotFound)
	keygen := func(id string) {
		h.exec("pkcs11-tool", "--module", h.module, "--token-label", "kmsfs test", "--login", "--pin", userPIN,
			"--keygen", "--key-type", "AES:32", "--label", "made", "--id", id, "--sensitive")
	}
	keygen("0a")
	first := generate(t, h.Provider, key)
	keygen("0b")
	second := generate(t, h.Provider, key)
	if first.Wrapped.Material != "0a" || second.Wrapped.Material != "0b" {
		t.Errorf("materials %s, %s", first.Wrapped.Material, second.Wrapped.Material)
	}
	wantOpen(t, h.Provider, first)
	d, err := h.Describe(context.Background(), key)
	if err != nil || d.Material != "0b" || !strings.Contains(d.Description, "2 versions, AES-256, wraps with AES-GCM") {
		t.Errorf("%+v, %v", d, err)
	}
}

func TestSoftHSMTokenTakenAway(t *testing.T) {
	h := newHSM(t)
	h.makeKey("k", 1)
	const key = "pkcs11:token=kmsfs%20test;object=k"
	dk := generate(t, h.Provider, key)
	away := h.dir + ".away"
	if err := os.Rename(h.dir, away); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(h.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	wantErr(t, h.Provider, key, keywrap.ErrUnavailable)
	_, err := h.Decrypt(context.Background(), dk.Wrapped, sample)
	checkErr(t, err, keywrap.ErrUnavailable)
	if err := errors.Join(os.Remove(h.dir), os.Rename(away, h.dir)); err != nil {
		t.Fatal(err)
	}
	now := time.Now().Add(2 * restartPause)
	h.now = func() time.Time { return now }
	wantOpen(t, h.Provider, dk)
}

func TestSoftHSMWrongPIN(t *testing.T) {
	h := newHSM(t)
	const key = "pkcs11:token=kmsfs%20test;object=k"
	h.pin = "wrong"
	wantErr(t, h.Provider, key, keywrap.ErrCredentials)
	wantErr(t, h.Provider, key, keywrap.ErrCredentials)
	h.pin = userPIN
	h.makeKey("k", 1)
	generate(t, h.Provider, key)
	wantErr(t, h.Provider, "pkcs11:token=other;object=k", keywrap.ErrUnavailable)
	wantErr(t, h.Provider, "pkcs11:token=kmsfs%20test;object=k?module-path=/lib/evil.so", keywrap.ErrBadURI)
}

// TestSoftHSMTwoProviders: two in one process share the module; one's end does
// not disturb the other.
func TestSoftHSMTwoProviders(t *testing.T) {
	h := newHSM(t)
	h.makeKey("k", 1)
	const key = "pkcs11:token=kmsfs%20test;object=k"
	dk := generate(t, h.Provider, key)
	first := h.Provider
	h.open()
	wantOpen(t, h.Provider, dk)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	wantOpen(t, h.Provider, dk)
}

func TestNewRefuses(t *testing.T) {
	for path, want := range map[string]error{"": ErrNoModule, "/no/such/module.so": ErrModule, "/etc/hostname": ErrModule} {
		p, err := New(Options{Module: path})
		if !errors.Is(err, want) {
			t.Errorf("%q: %v, %v", path, p, err)
		}
	}
}
