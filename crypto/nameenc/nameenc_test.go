package nameenc_test

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/tink-crypto/tink-go/v2/daead/subtle"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
)

// testKey is the name key of test class number id.
func testKey(id byte) []byte {
	sum := sha256.Sum256([]byte{'n', 'a', 'm', 'e', id})
	return sum[:]
}

func newCipher(t testing.TB, id byte) *nameenc.Cipher {
	t.Helper()
	key := keymem.Take(testKey(id))
	defer key.Wipe()
	c, err := nameenc.New(key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Wipe)
	return c
}

var (
	dirA = nameenc.DirID{1, 2, 3}
	dirB = nameenc.DirID{1, 2, 4}
)

// names are valid, and awkward.
var names = []string{
	"a", "report.pdf", "...", ".hidden", " ", "\n", "-rf", "\xff\xfe", ".kmsfs.dir", "käse", "e\u0301",
	strings.Repeat("x", 15), strings.Repeat("x", 16), strings.Repeat("x", 17),
	strings.Repeat("é", 127), strings.Repeat("n", 254), strings.Repeat("n", 255),
}

func TestNameRoundTrip(t *testing.T) {
	c := newCipher(t, 1)
	seen := map[string]string{}
	for _, name := range names {
		enc, err := c.EncryptName(dirA, name)
		if err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		if again, _ := c.EncryptName(dirA, name); again != enc {
			t.Errorf("%q: not deterministic", name)
		}
		if other, ok := seen[enc]; ok {
			t.Errorf("%q and %q share a ciphertext", name, other)
		}
		seen[enc] = name
		if strings.Trim(enc, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			t.Errorf("%q: %q is not base64url", name, enc)
		}
		if got, want := len(enc), base64.RawURLEncoding.EncodedLen((len(name)+15)/16*16+16); got != want {
			t.Errorf("%q: %d characters, want %d", name, got, want)
		}
		if got, err := c.DecryptName(dirA, enc); err != nil || got != name {
			t.Errorf("DecryptName = %q, %v, want %q", got, err, name)
		}
	}
}

// TestNameIsRFC5297 holds the construction to its parts as documented.
//
// F-36
func TestNameIsRFC5297(t *testing.T) {
	key, err := hkdf.Expand(sha256.New, testKey(1), "kmsfs v1 name", 64)
	if err != nil {
		t.Fatal(err)
	}
	siv, err := subtle.NewAESSIV(key)
	if err != nil {
		t.Fatal(err)
	}
	ct, err := siv.EncryptDeterministically([]byte("hello\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), dirA[:])
	if err != nil {
		t.Fatal(err)
	}
	got, err := newCipher(t, 1).EncryptName(dirA, "hello")
	if want := base64.RawURLEncoding.EncodeToString(ct); got != want || err != nil {
		t.Errorf("EncryptName = %q, %v, want %q", got, err, want)
	}
}

// F-36
func TestCheckName(t *testing.T) {
	for _, name := range names {
		if err := nameenc.CheckName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	c := newCipher(t, 1)
	for name, want := range map[string]error{
		"": nameenc.ErrName, ".": nameenc.ErrName, "..": nameenc.ErrName, "a/b": nameenc.ErrName, "/": nameenc.ErrName,
		"a\x00": nameenc.ErrName, "\x00": nameenc.ErrName, strings.Repeat("n", 256): nameenc.ErrTooLong,
	} {
		if err := nameenc.CheckName(name); !errors.Is(err, want) {
			t.Errorf("CheckName(%q): %v, want %v", name, err, want)
		}
		if _, err := c.EncryptName(dirA, name); !errors.Is(err, want) {
			t.Errorf("EncryptName(%q): %v, want %v", name, err, want)
		}
	}
	if fault.Of(nameenc.ErrName) != fault.Invalid || fault.Of(nameenc.ErrTooLong) != fault.TooLong || fault.Of(nameenc.ErrAuth) != fault.Integrity {
		t.Error("kinds are wrong")
	}
}

// F-38
func TestLongNames(t *testing.T) {
	c := newCipher(t, 1)
	for n := 1; n <= nameenc.MaxName; n++ {
		enc, err := c.EncryptName(dirA, strings.Repeat("n", n))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := nameenc.IsLong(enc), n > 160; got != want { // 160 + 16 bytes are 235 characters, 192 are 256
			t.Errorf("a name of %d bytes: IsLong = %v, want %v", n, got, want)
		}
	}
	if nameenc.IsLong(strings.Repeat("x", 254)) || !nameenc.IsLong(strings.Repeat("x", 255)) {
		t.Error("IsLong is off by one")
	}
	// SHA-256("abc"), FIPS 180-4.
	if got, want := nameenc.LongHash("abc"), "ungWv48Bz-pBQUDeXa4iI7ADYaOWF3qctBD_YfIAFa0"; got != want {
		t.Errorf("LongHash = %q, want %q", got, want)
	}
}

// F-39
func TestTargets(t *testing.T) {
	c := newCipher(t, 1)
	for _, target := range []string{"a", "..", "/", "../x/y", "\xff", strings.Repeat("t", 16), strings.Repeat("t", 3039), strings.Repeat("t", 3040), strings.Repeat("t", nameenc.MaxTarget)} {
		enc, err := c.EncryptTarget(target)
		if err != nil {
			t.Fatalf("%d bytes: %v", len(target), err)
		}
		if len(enc) > nameenc.MaxStoredTarget || nameenc.IsLongTarget(enc) != (len(target) > 3039) {
			t.Errorf("%d characters for %d bytes", len(enc), len(target))
		}
		if again, _ := c.EncryptTarget(target); again == enc {
			t.Error("two encryptions are equal")
		}
		if got, err := c.DecryptTarget(enc); err != nil || got != target {
			t.Errorf("DecryptTarget = %q, %v, want %q", got, err, target)
		}
		if got, ok := nameenc.TargetLen(len(enc)); got != len(target) || !ok {
			t.Errorf("TargetLen = %d, %v, want %d", got, ok, len(target))
		}
	}
	if _, err := c.EncryptTarget(strings.Repeat("t", nameenc.MaxTarget+1)); !errors.Is(err, nameenc.ErrTooLong) {
		t.Errorf("long target: %v, want %v", err, nameenc.ErrTooLong)
	}
	for _, bad := range []string{"", "a\x00b"} {
		if _, err := c.EncryptTarget(bad); !errors.Is(err, nameenc.ErrName) {
			t.Errorf("EncryptTarget(%q): %v, want %v", bad, err, nameenc.ErrName)
		}
	}
	for _, n := range []int{-1, 0, 1, 42, 43, 45, 5504, 1 << 30} { // 45 is 1 mod 4: no base64
		if got, ok := nameenc.TargetLen(n); ok {
			t.Errorf("TargetLen(%d) = %d", n, got)
		}
	}
}

// F-40
func TestAttributes(t *testing.T) {
	c := newCipher(t, 1)
	for _, name := range []string{"x", "mime_type", "a/b", strings.Repeat("n", nameenc.MaxAttrName)} {
		enc, err := c.EncryptAttrName(name)
		if err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		if len(nameenc.AttrPrefix)+len(enc) > 255 {
			t.Errorf("%d characters", len(enc))
		}
		if again, _ := c.EncryptAttrName(name); again != enc {
			t.Error("attribute name is not deterministic")
		}
		if got, err := c.DecryptAttrName(enc); err != nil || got != name {
			t.Errorf("DecryptAttrName = %q, %v, want %q", got, err, name)
		}
		for _, value := range [][]byte{{}, {0}, []byte("text"), make([]byte, 16), make([]byte, nameenc.MaxAttrValue)} {
			enc, err := c.EncryptAttrValue(name, value)
			if err != nil {
				t.Fatal(err)
			}
			if again, _ := c.EncryptAttrValue(name, value); bytes.Equal(again, enc) {
				t.Error("two encryptions are equal")
			}
			if got, err := c.DecryptAttrValue(name, enc); err != nil || !bytes.Equal(got, value) {
				t.Errorf("value of %d bytes: %v", len(value), err)
			}
			if got, ok := nameenc.AttrValueLen(len(enc)); got != len(value) || !ok {
				t.Errorf("AttrValueLen = %d, %v, want %d", got, ok, len(value))
			}
		}
	}
	for name, want := range map[string]error{
		"": nameenc.ErrName, "a\x00": nameenc.ErrName, strings.Repeat("n", nameenc.MaxAttrName+1): nameenc.ErrTooLong,
	} {
		if _, err := c.EncryptAttrName(name); !errors.Is(err, want) {
			t.Errorf("EncryptAttrName(%q): %v, want %v", name, err, want)
		}
		if _, err := c.EncryptAttrValue(name, nil); !errors.Is(err, want) {
			t.Errorf("EncryptAttrValue(%q): %v, want %v", name, err, want)
		}
	}
	if _, err := c.EncryptAttrValue("x", make([]byte, nameenc.MaxAttrValue+1)); !errors.Is(err, nameenc.ErrTooLong) {
		t.Errorf("long value: %v, want %v", err, nameenc.ErrTooLong)
	}
	if _, ok := nameenc.AttrValueLen(31); ok {
		t.Error("AttrValueLen accepts 31")
	}
}

func TestMAC(t *testing.T) {
	c, other := newCipher(t, 1), newCipher(t, 2)
	lists := [][][]byte{
		nil, {nil}, {nil, nil}, {[]byte("ab")}, {[]byte("a"), []byte("b")}, {[]byte("ab"), nil}, {nil, []byte("ab")},
		{[]byte("\x00\x00\x00\x00\x00\x00\x00\x00")}, {[]byte("label")},
	}
	seen := map[[32]byte]bool{}
	for _, label := range []string{"", "label", "labelab"} {
		for _, rec := range lists {
			mac := c.MAC(label, rec...)
			if seen[mac] {
				t.Errorf("MAC(%q, %q) is another list's", label, rec)
			}
			seen[mac] = true
			if err := c.VerifyMAC(mac, label, rec...); err != nil {
				t.Errorf("VerifyMAC(%q, %q): %v", label, rec, err)
			}
			if err := other.VerifyMAC(mac, label, rec...); !errors.Is(err, nameenc.ErrAuth) {
				t.Errorf("another class verifies: %v", err)
			}
			mac[31] ^= 1
			if err := c.VerifyMAC(mac, label, rec...); !errors.Is(err, nameenc.ErrAuth) {
				t.Errorf("a changed MAC verifies: %v", err)
			}
		}
	}
	if err := c.VerifyMAC([32]byte{}, "label"); !errors.Is(err, nameenc.ErrAuth) {
		t.Errorf("the zero MAC verifies: %v", err)
	}
}

// TestMACFraming holds the framing to its description.
func TestMACFraming(t *testing.T) {
	key, err := hkdf.Expand(sha256.New, testKey(1), "kmsfs v1 record", 32)
	if err != nil {
		t.Fatal(err)
	}
	h := hmac.New(sha256.New, key)
	h.Write([]byte("\x00\x00\x00\x00\x00\x00\x00\x03dir\x00\x00\x00\x00\x00\x00\x00\x02id\x00\x00\x00\x00\x00\x00\x00\x00"))
	got := newCipher(t, 1).MAC("dir", []byte("id"), nil)
	if want := h.Sum(nil); !bytes.Equal(got[:], want) {
		t.Errorf("MAC = %x, want %x", got, want)
	}
}

func TestKeyIsCheckedAndWiped(t *testing.T) {
	short := keymem.Random(31)
	defer short.Wipe()
	for _, key := range []*keymem.Key{nil, short, {}} {
		if _, err := nameenc.New(key); !errors.Is(err, nameenc.ErrKey) {
			t.Errorf("New: %v, want %v", err, nameenc.ErrKey)
		}
	}
	key := keymem.Random(32)
	defer key.Wipe()
	before := keymem.Live()
	c, err := nameenc.New(key)
	if err != nil {
		t.Fatal(err)
	}
	mac := c.MAC("x")
	c.Wipe()
	c.Wipe()
	if got := keymem.Live(); got != before {
		t.Errorf("Live = %d, want %d", got, before)
	}
	_, err1 := c.EncryptName(dirA, "x")
	_, err2 := c.DecryptName(dirA, strings.Repeat("A", 43))
	_, err3 := c.EncryptTarget("x")
	_, err4 := c.EncryptAttrValue("x", nil)
	for _, err := range []error{err1, err2, err3, err4, c.VerifyMAC(mac, "x")} {
		if !errors.Is(err, nameenc.ErrKey) {
			t.Errorf("after Wipe: %v, want %v", err, nameenc.ErrKey)
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("MAC answers after Wipe")
		}
	}()
	c.MAC("x")
}

// TestWipeDuringUse: whatever a call answers while the cipher is wiped is
// right; no name is made under the memory of a key that took its place.
func TestWipeDuringUse(t *testing.T) {
	want, err := newCipher(t, 1).EncryptName(dirA, "x")
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		c := newCipher(t, 1)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for {
					got, err := c.EncryptName(dirA, "x")
					if err != nil {
						return
					}
					if got != want {
						t.Errorf("EncryptName = %q, want %q", got, want)
						return
					}
				}
			})
		}
		c.Wipe()
		other := keymem.Random(64)
		wg.Wait()
		other.Wipe()
	}
}

func BenchmarkEncryptName(b *testing.B) {
	c := newCipher(b, 1)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.EncryptName(dirA, "quarterly-report-2024.pdf"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecryptName(b *testing.B) {
	c := newCipher(b, 1)
	enc, err := c.EncryptName(dirA, "quarterly-report-2024.pdf")
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.DecryptName(dirA, enc); err != nil {
			b.Fatal(err)
		}
	}
}
