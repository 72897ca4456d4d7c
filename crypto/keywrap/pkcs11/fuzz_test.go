package pkcs11

import (
	"bytes"
	"errors"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// FuzzParse: no input makes Parse panic, and the normalized form of what it
// takes is a fixed point that means the same.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"pkcs11:token=hsm;object=phi", "pkcs11:token=a;id=%00%ff?module-name=x&pin-source=file:/p", "pkcs11:slot-id=7;object=k",
		"pkcs11:", "pkcs11:token=a;object=k?pin-value=1", "pkcs11:token=%41%", "pkcs11:serial=1;manufacturer=m;model=o;object=%C3%BC",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := Parse(s)
		if err != nil {
			if !errors.Is(err, keywrap.ErrBadURI) {
				t.Fatalf("error without a kind: %v", err)
			}
			return
		}
		u = u.normalize(tokenInfo{Label: "label"})
		text := u.String()
		again, err := Parse(text)
		if err != nil {
			t.Fatalf("%q, of %q: %v", text, s, err)
		}
		if again.String() != text || !again.normalized(text) || again != u {
			t.Fatalf("%q became %q", text, again.String())
		}
	})
}

// FuzzWrapped: no blob makes the parser panic, and what it takes encodes to the
// same bytes.
func FuzzWrapped(f *testing.F) {
	f.Add([]byte{1, 1, 1})
	f.Add(append([]byte{1, 2, 0, 1}, make([]byte, ivLen+sealedLen)...))
	f.Add(append([]byte{2, 0}, make([]byte, minWrapped)...))
	f.Fuzz(func(t *testing.T, blob []byte) {
		w, err := parseWrapped(blob)
		if err != nil {
			if !errors.Is(err, keywrap.ErrCiphertext) {
				t.Fatal(err)
			}
			return
		}
		if got := w.encode(); !bytes.Equal(got, blob) {
			t.Fatalf("%x encodes to %x", blob, got)
		}
	})
}
