package pkcs11

import (
	"errors"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

func TestParse(t *testing.T) {
	for in, want := range map[string]string{
		"pkcs11:token=hsm;object=phi":                                      "pkcs11:token=hsm;object=phi",
		"pkcs11:object=phi;token=hsm":                                      "pkcs11:token=hsm;object=phi",
		"pkcs11:object=phi;type=secret-key;token=hsm":                      "pkcs11:token=hsm;object=phi",
		"pkcs11:token=The%20Software%20PKCS%2311%20token;object=my-key":    "pkcs11:token=The%20Software%20PKCS%2311%20token;object=my-key",
		"pkcs11:token=a;id=%00%ff":                                         "pkcs11:token=a;id=%00%FF",
		"pkcs11:token=a;id=ab":                                             "pkcs11:token=a;id=%61%62",
		"pkcs11:serial=0123;model=v2;manufacturer=m;object=k":              "pkcs11:manufacturer=m;model=v2;serial=0123;object=k",
		"pkcs11:token=%68sm;object=p,h+i":                                  "pkcs11:token=hsm;object=p%2Ch%2Bi",
		"pkcs11:token=a;object=k?module-path=/lib/x.so&pin-source=file:/p": "pkcs11:token=a;object=k",
		"pkcs11:slot-id=7;object=k":                                        "pkcs11:object=k",
		"pkcs11:token=Schl%C3%BCssel;object=k":                             "pkcs11:token=Schl%C3%BCssel;object=k",
	} {
		u, err := Parse(in)
		if err != nil {
			t.Errorf("%s: %v", in, err)
			continue
		}
		if got := u.String(); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
	u, err := Parse("pkcs11:slot-id=7;object=k?module-name=softhsm2&module-path=/lib/../lib/libsofthsm2.so&pin-source=/p")
	if err != nil || u.SlotID == nil || *u.SlotID != 7 || u.ModuleName != "softhsm2" || u.PINSource != "/p" {
		t.Errorf("%+v, %v", u, err)
	}
	if err := u.agrees("/lib/libsofthsm2.so", "/p"); err != nil {
		t.Error(err)
	}
	for _, other := range [][2]string{{"/lib/other.so", "/p"}, {"/lib/libsofthsm2.so", "/q"}, {"/lib/libsofthsm2.so", ""}} {
		if err := u.agrees(other[0], other[1]); !errors.Is(err, keywrap.ErrBadURI) {
			t.Errorf("agrees with %v: %v", other, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	const secret = "4711-the-pin"
	for _, in := range []string{
		"", "pkcs11", "pkcs11:", "PKCS11:token=a;object=k", "keyring:x",
		"pkcs11:token=a", "pkcs11:object=k", "pkcs11:token=a;id=", "pkcs11:token=;object=k",
		"pkcs11:token=a;object=k;object=k", "pkcs11:token=a;object=k;", "pkcs11:;token=a;object=k",
		"pkcs11:token=a;object=k;type=private", "pkcs11:token=a;object=k;x-vendor=1", "pkcs11:token=a;object=k;library-version=3",
		"pkcs11:token=a;object=k?", "pkcs11:token=a;object=k?x=y", "pkcs11:token=a;object=k?pin-value=" + secret,
		"pkcs11:token=a;object=k;pin-value=" + secret, "pkcs11:token=a;object=k?module-path=/a&pin-value=" + secret,
		"pkcs11:token=a;object=k%2", "pkcs11:token=a;object=k%zz", "pkcs11:token=a;object=k%+1", "pkcs11:token=a;object=k b",
		"pkcs11:token=a;object=k/b", "pkcs11:token=a;object=k#b", "pkcs11:token=a;object=%0A", "pkcs11:token=a;object=%FF",
		"pkcs11:token=" + strings.Repeat("a", 33) + ";object=k", "pkcs11:token=a;object=" + strings.Repeat("k", 256),
		"pkcs11:token=a;id=" + strings.Repeat("%00", 65), "pkcs11:token=a;object=k;" + strings.Repeat("x", 5000),
		"pkcs11:slot-id=-1;object=k", "pkcs11:slot-id=07;object=k", "pkcs11:slot-id=99999999999999999999;object=k",
		"pkcs11:token=a;object=k\x00",
	} {
		u, err := Parse(in)
		if !errors.Is(err, keywrap.ErrBadURI) {
			t.Errorf("%.80q: %+v, %v", in, u, err)
			continue
		}
		if strings.Contains(err.Error(), secret) {
			t.Errorf("the error tells the PIN: %v", err)
		}
	}
}

// TestPINInURIIsNotLogged: a URI with a PIN is refused without repeating it.
func TestPINInURIIsNotLogged(t *testing.T) {
	p, _, _ := newFakeProvider(t)
	_, err := p.Describe(t.Context(), fakeKey+"?pin-value=4711")
	if !errors.Is(err, keywrap.ErrBadURI) || strings.Contains(err.Error(), "4711") {
		t.Errorf("got %v", err)
	}
}

func TestModuleNames(t *testing.T) {
	for _, name := range []string{"softhsm2", "libsofthsm2", "libsofthsm2.so.1"} {
		u := URI{ModuleName: name}
		if err := u.agrees("/usr/lib/libsofthsm2.so.1", ""); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
