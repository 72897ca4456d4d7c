package nameenc_test

import (
	"encoding/base64"
	"errors"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/nameenc"
)

const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

func nameFails(t *testing.T, c *nameenc.Cipher, dir nameenc.DirID, enc, what string) {
	t.Helper()
	if got, err := c.DecryptName(dir, enc); !errors.Is(err, nameenc.ErrAuth) || got != "" {
		t.Errorf("%s: DecryptName = %q, %v, want %v", what, got, err, nameenc.ErrAuth)
	}
}

func encrypt(t *testing.T, c *nameenc.Cipher, name string) string {
	t.Helper()
	enc, err := c.EncryptName(dirA, name)
	if err != nil {
		t.Fatal(err)
	}
	return enc
}

func TestNameInAnotherPlace(t *testing.T) {
	c, other := newCipher(t, 1), newCipher(t, 2)
	enc := encrypt(t, c, "secret")
	nameFails(t, c, dirB, enc, "other directory")
	nameFails(t, c, nameenc.DirID{}, enc, "no directory")
	nameFails(t, other, dirA, enc, "other class")
	if b, err := c.EncryptName(dirB, "secret"); err != nil || b == enc {
		t.Errorf("one name looks the same in two directories (%v)", err)
	}
	if b, err := other.EncryptName(dirA, "secret"); err != nil || b == enc {
		t.Errorf("one name looks the same in two classes (%v)", err)
	}
}

// TestNameChanged replaces every character by every other one: all bit flips,
// and every other spelling of the last character.
func TestNameChanged(t *testing.T) {
	c := newCipher(t, 1)
	enc := encrypt(t, c, "secret")
	for i := range enc {
		for _, ch := range alphabet + "=+/.\n\r \x00" {
			if byte(ch) != enc[i] {
				nameFails(t, c, dirA, enc[:i]+string(ch)+enc[i+1:], "character changed")
			}
		}
	}
}

// F-37
func TestNameSpelledOtherwise(t *testing.T) {
	c := newCipher(t, 1)
	enc := encrypt(t, c, "secret")
	raw, err := base64.RawURLEncoding.DecodeString(enc)
	if err != nil {
		t.Fatal(err)
	}
	for what, bad := range map[string]string{
		"empty": "", "padded": base64.URLEncoding.EncodeToString(raw), "trailing newline": enc + "\n",
		"newline inside": enc[:10] + "\n" + enc[10:], "carriage return": "\r" + enc, "space": " " + enc,
		"cut": enc[:len(enc)-1], "longer": enc + "A", "twice": enc + enc, "one block": enc[:22],
		"huge": strings.Repeat("A", 1<<20), "zeros": strings.Repeat("A", len(enc)), "plain": "secret",
	} {
		nameFails(t, c, dirA, bad, what)
	}
	if std := base64.RawStdEncoding.EncodeToString(raw); std != enc {
		nameFails(t, c, dirA, std, "standard alphabet")
	}
}

// TestForgedByKeyHolder: what someone with the key, or a buggy writer, makes is
// still no directory entry.
//
// F-37
func TestForgedByKeyHolder(t *testing.T) {
	c := newCipher(t, 1)
	padded := func(s string) []byte { return append([]byte(s), make([]byte, 16-len(s)%16)...) }
	badPadding := map[string][]byte{
		"empty": {}, "only padding": make([]byte, 16), "not padded": []byte("x"), "padded to 17": append(padded("x"), 0),
		"a block of padding too much": append([]byte(strings.Repeat("x", 16)), make([]byte, 16)...),
		"two blocks of padding":       append(padded("x"), make([]byte, 16)...),
		"NUL inside":                  padded("a\x00b"), "NUL first": padded("\x00a"),
	}
	noName := map[string][]byte{
		"dot": padded("."), "dot dot": padded(".."), "slash": padded("../etc"), "256 bytes": []byte(strings.Repeat("x", 256)),
	}
	for what, raw := range noName {
		enc, err := c.SealName(dirA, raw)
		if err != nil {
			t.Fatal(err)
		}
		nameFails(t, c, dirA, enc, what)
	}
	for what, raw := range badPadding {
		enc, err := c.SealName(dirA, raw)
		if err != nil {
			t.Fatal(err)
		}
		nameFails(t, c, dirA, enc, what)
		if enc, err = c.SealAttrName(raw); err != nil {
			t.Fatal(err)
		}
		if got, err := c.DecryptAttrName(enc); !errors.Is(err, nameenc.ErrAuth) {
			t.Errorf("%s: DecryptAttrName = %q, %v, want %v", what, got, err, nameenc.ErrAuth)
		}
	}
	if enc, err := c.SealName(dirA, padded("fine")); err != nil {
		t.Fatal(err)
	} else if got, err := c.DecryptName(dirA, enc); err != nil || got != "fine" {
		t.Errorf("control: %q, %v", got, err)
	}
	for what, raw := range map[string]string{"empty": "", "NUL": "a\x00b"} {
		enc, err := c.SealTarget([16]byte{1}, []byte(raw))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := c.DecryptTarget(enc); !errors.Is(err, nameenc.ErrAuth) {
			t.Errorf("%s: DecryptTarget = %q, %v, want %v", what, got, err, nameenc.ErrAuth)
		}
	}
}

// TestOneKindAsAnother: names, targets, attribute names and values do not stand
// in for each other, though all are AES-SIV under one class.
func TestOneKindAsAnother(t *testing.T) {
	c := newCipher(t, 1)
	const text = "sixteen bytes..!"
	name := encrypt(t, c, text)
	target, err1 := c.EncryptTarget(text)
	attr, err2 := c.EncryptAttrName(text)
	value, err3 := c.EncryptAttrValue("x", []byte(text))
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	raw := func(s string) []byte {
		b, err := base64.RawURLEncoding.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	all := map[string]string{
		"name": name, "target": target, "xattr name": attr, "xattr value": base64.RawURLEncoding.EncodeToString(value),
		"target without nonce":  base64.RawURLEncoding.EncodeToString(raw(target)[16:]),
		"value without nonce":   base64.RawURLEncoding.EncodeToString(value[16:]),
		"directory id as nonce": base64.RawURLEncoding.EncodeToString(append(dirA[:], raw(name)...)),
	}
	for kind, enc := range all {
		if kind != "name" {
			nameFails(t, c, dirA, enc, kind+" as name")
		}
		if _, err := c.DecryptTarget(enc); kind != "target" && !errors.Is(err, nameenc.ErrAuth) {
			t.Errorf("%s as target: %v, want %v", kind, err, nameenc.ErrAuth)
		}
		if _, err := c.DecryptAttrName(enc); kind != "xattr name" && !errors.Is(err, nameenc.ErrAuth) {
			t.Errorf("%s as xattr name: %v, want %v", kind, err, nameenc.ErrAuth)
		}
		if _, err := c.DecryptAttrValue("x", raw(enc)); kind != "xattr value" && !errors.Is(err, nameenc.ErrAuth) {
			t.Errorf("%s as xattr value: %v, want %v", kind, err, nameenc.ErrAuth)
		}
	}
}

func TestTargetChanged(t *testing.T) {
	c, other := newCipher(t, 1), newCipher(t, 2)
	enc, err := c.EncryptTarget("../shared/key.pem")
	if err != nil {
		t.Fatal(err)
	}
	fails := func(bad, what string) {
		t.Helper()
		if got, err := c.DecryptTarget(bad); !errors.Is(err, nameenc.ErrAuth) || got != "" {
			t.Errorf("%s: DecryptTarget = %q, %v, want %v", what, got, err, nameenc.ErrAuth)
		}
	}
	for i := range enc {
		for _, ch := range alphabet + "=\n" {
			if byte(ch) != enc[i] {
				fails(enc[:i]+string(ch)+enc[i+1:], "character changed")
			}
		}
		fails(enc[:i], "cut")
	}
	fails(enc+"\n", "newline")
	fails(enc+"AAAA", "longer")
	fails(strings.Repeat("A", 4096), "too long")
	if _, err := other.DecryptTarget(enc); !errors.Is(err, nameenc.ErrAuth) {
		t.Errorf("other class: %v, want %v", err, nameenc.ErrAuth)
	}
}

func TestValueChanged(t *testing.T) {
	c, other := newCipher(t, 1), newCipher(t, 2)
	enc, err := c.EncryptAttrValue("owner", []byte("alice"))
	if err != nil {
		t.Fatal(err)
	}
	for bit := range len(enc) * 8 {
		enc[bit/8] ^= 1 << (bit % 8)
		if _, err := c.DecryptAttrValue("owner", enc); !errors.Is(err, nameenc.ErrAuth) {
			t.Errorf("bit %d flipped: %v, want %v", bit, err, nameenc.ErrAuth)
		}
		enc[bit/8] ^= 1 << (bit % 8)
	}
	for n := range enc {
		if _, err := c.DecryptAttrValue("owner", enc[:n]); !errors.Is(err, nameenc.ErrAuth) {
			t.Errorf("cut to %d: %v, want %v", n, err, nameenc.ErrAuth)
		}
	}
	for _, name := range []string{"", "own", "ownerx", "group", "owner\x00", strings.Repeat("n", 161)} {
		if _, err := c.DecryptAttrValue(name, enc); !errors.Is(err, nameenc.ErrAuth) {
			t.Errorf("as %q: %v, want %v", name, err, nameenc.ErrAuth)
		}
	}
	if _, err := c.DecryptAttrValue("owner", make([]byte, 64<<10+1)); !errors.Is(err, nameenc.ErrAuth) {
		t.Errorf("huge: %v, want %v", err, nameenc.ErrAuth)
	}
	if _, err := other.DecryptAttrValue("owner", enc); !errors.Is(err, nameenc.ErrAuth) {
		t.Errorf("other class: %v, want %v", err, nameenc.ErrAuth)
	}
	if got, err := c.DecryptAttrValue("owner", enc); err != nil || string(got) != "alice" {
		t.Errorf("control: %q, %v", got, err)
	}
}
