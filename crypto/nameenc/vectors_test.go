package nameenc_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
)

var update = flag.Bool("update", false, "write testdata/vectors anew")

// vector is one file of testdata/vectors: stored bytes, what they are read as,
// and what comes of it.
type vector struct {
	file    string
	comment string
	kind    string        // name, target, xattr-name or xattr-value
	key     []byte        // the class's name key
	dir     nameenc.DirID // of a name; zero otherwise
	attr    string        // of a value: its attribute's name; hex in the file
	expect  fault.Kind    // None: it decrypts
	sum     string        // hex SHA-256 of the plaintext, which is empty on failure
	stored  []byte
}

var kinds = []string{"name", "target", "xattr-name", "xattr-value"}

// loadVectors reads every vector. It fails on none, and on anything in a head
// that it does not know.
func loadVectors(t testing.TB) []vector {
	t.Helper()
	files, err := filepath.Glob("testdata/vectors/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no vectors (%v)", err)
	}
	var out []vector
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		v, err := parseVector(text)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		v.file = strings.TrimSuffix(filepath.Base(file), ".txt")
		out = append(out, v)
	}
	return out
}

func parseVector(text []byte) (v vector, err error) {
	head, payload, ok := bytes.Cut(text, []byte("\n\n"))
	if !ok {
		return v, fmt.Errorf("no blank line")
	}
	seen := map[string]bool{}
	for line := range strings.Lines(string(head)) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		if seen[key] {
			return v, fmt.Errorf("%s: twice", key)
		}
		seen[key] = true
		if err := v.set(key, value); err != nil {
			return v, fmt.Errorf("%s: %w", key, err)
		}
	}
	for _, key := range []string{"comment", "kind", "name-key", "expect", "plaintext-sha256"} {
		if !seen[key] {
			return v, fmt.Errorf("%s: missing", key)
		}
	}
	if seen["directory"] != (v.kind == "name") || seen["attribute"] != (v.kind == "xattr-value") {
		return v, fmt.Errorf("head does not fit kind %s", v.kind)
	}
	v.stored, err = base64.StdEncoding.DecodeString(string(payload))
	return v, err
}

func (v *vector) set(key, value string) (err error) {
	ok := true
	var b []byte
	switch key {
	case "comment":
		v.comment = value
	case "kind":
		v.kind = value
		ok = strings.Contains(" "+strings.Join(kinds, " ")+" ", " "+value+" ")
	case "name-key":
		v.key, err = hex.DecodeString(value)
	case "directory":
		b, err = hex.DecodeString(value)
		ok = copy(v.dir[:], b) == len(v.dir) && len(b) == len(v.dir)
	case "attribute":
		b, err = hex.DecodeString(value)
		v.attr = string(b)
	case "expect":
		if value != "ok" {
			v.expect, ok = fault.ParseKind(value)
			ok = ok && v.expect != fault.None
		}
	case "plaintext-sha256":
		v.sum, ok = value, len(value) == 64
	default:
		ok = false
	}
	if err == nil && !ok {
		return fmt.Errorf("unknown: %q", value)
	}
	return err
}

func (v *vector) text() []byte {
	expect := "ok"
	if v.expect != fault.None {
		expect = v.expect.String()
	}
	b := fmt.Appendf(nil, "comment: %s\nkind: %s\nname-key: %x\n", v.comment, v.kind, v.key)
	switch v.kind {
	case "name":
		b = fmt.Appendf(b, "directory: %x\n", v.dir[:])
	case "xattr-value":
		b = fmt.Appendf(b, "attribute: %x\n", v.attr)
	}
	b = fmt.Appendf(b, "expect: %s\nplaintext-sha256: %s\n\n", expect, v.sum)
	enc := base64.StdEncoding.EncodeToString(v.stored)
	for len(enc) > 76 {
		b = append(b, enc[:76]...)
		b = append(b, '\n')
		enc = enc[76:]
	}
	return append(append(b, enc...), '\n')
}

func (v *vector) cipher(t testing.TB) *nameenc.Cipher {
	t.Helper()
	key := keymem.Copy(v.key)
	defer key.Wipe()
	c, err := nameenc.New(key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Wipe)
	return c
}

// decrypt reads v.stored as what v.kind says.
func (v *vector) decrypt(c *nameenc.Cipher) (plain string, err error) {
	switch v.kind {
	case "name":
		return c.DecryptName(v.dir, string(v.stored))
	case "target":
		return c.DecryptTarget(string(v.stored))
	case "xattr-name":
		return c.DecryptAttrName(string(v.stored))
	}
	b, err := c.DecryptAttrValue(v.attr, v.stored)
	return string(b), err
}

// encrypt is the inverse of decrypt, with the nonce that v.stored begins with.
func (v *vector) encrypt(c *nameenc.Cipher, plain string) (stored []byte, err error) {
	var s string
	switch v.kind {
	case "name":
		s, err = c.EncryptName(v.dir, plain)
	case "target":
		var raw []byte
		if raw, err = base64.RawURLEncoding.DecodeString(string(v.stored)); err == nil {
			c.SetNonce([16]byte(raw[:16]))
			s, err = c.EncryptTarget(plain)
		}
	case "xattr-name":
		s, err = c.EncryptAttrName(plain)
	default:
		c.SetNonce([16]byte(v.stored[:16]))
		return c.EncryptAttrValue(v.attr, []byte(plain))
	}
	return []byte(s), err
}

func TestVectors(t *testing.T) {
	if *update {
		writeVectors(t)
	}
	type class struct {
		kind   string
		expect fault.Kind
	}
	count := map[class]int{}
	for _, v := range loadVectors(t) {
		count[class{v.kind, v.expect}]++
		t.Run(v.file, func(t *testing.T) {
			c := v.cipher(t)
			plain, err := v.decrypt(c)
			if got := fault.Of(err); got != v.expect || (err == nil) != (v.expect == fault.None) {
				t.Fatalf("decrypt: %v (%v), want %v", err, got, v.expect)
			}
			if got := fmt.Sprintf("%x", sha256.Sum256([]byte(plain))); got != v.sum {
				t.Errorf("plaintext hash = %s, want %s", got, v.sum)
			}
			if err != nil {
				return
			}
			if again, err := v.encrypt(c, plain); err != nil || !bytes.Equal(again, v.stored) {
				t.Errorf("encrypting the plaintext again gives other bytes (%v)", err)
			}
		})
	}
	for _, kind := range kinds {
		for _, expect := range []fault.Kind{fault.None, fault.Integrity} {
			if count[class{kind, expect}] == 0 {
				t.Errorf("no vector of kind %s expects %v", kind, expect)
			}
		}
	}
}

// TestVectorLoaderRefuses plants the mistakes that the loader exists to see.
func TestVectorLoaderRefuses(t *testing.T) {
	good := loadVectors(t)[0]
	text := string(good.text())
	if _, err := parseVector([]byte(text)); err != nil {
		t.Fatalf("a good vector: %v", err)
	}
	for what, bad := range map[string]string{
		"unknown key":    "colour: red\n" + text,
		"missing key":    text[strings.Index(text, "\n")+1:],
		"key twice":      "comment: x\n" + text,
		"unknown kind":   strings.Replace(text, "kind: ", "kind: x", 1),
		"unknown expect": strings.Replace(text, "expect: ", "expect: not-", 1),
		"bad payload":    text + "*",
		"no payload":     strings.TrimSpace(text[:strings.Index(text, "\n\n")]),
	} {
		if _, err := parseVector([]byte(bad)); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}
