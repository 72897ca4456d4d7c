package keyring

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

var update = flag.Bool("update", false, "write testdata/vectors anew")

const vectorDir = "testdata/vectors"

// vector is one file of testdata/vectors: "key: value" lines, a blank line, and
// the keyring file as the payload.
type vector struct {
	note       string
	expect     string // "ok" or the name of a fault.Kind
	passphrase string
	keys       string // name=state/versions of each key, by name
	wrapped    string // "key-uri store class purpose id blob data-key", the last two hexadecimal
	payload    []byte
}

func (v vector) encode() []byte {
	var b bytes.Buffer
	for _, kv := range [][2]string{{"note", v.note}, {"expect", v.expect}, {"passphrase", v.passphrase}, {"keys", v.keys}, {"wrapped", v.wrapped}} {
		if kv[1] != "" {
			fmt.Fprintf(&b, "%s: %s\n", kv[0], kv[1])
		}
	}
	b.WriteByte('\n')
	b.Write(v.payload)
	return b.Bytes()
}

func parseVector(data []byte) (vector, error) {
	var v vector
	fields := map[string]*string{"note": &v.note, "expect": &v.expect, "passphrase": &v.passphrase, "keys": &v.keys, "wrapped": &v.wrapped}
	head, payload, ok := bytes.Cut(data, []byte("\n\n"))
	if !ok {
		return v, errors.New("no blank line")
	}
	v.payload = payload
	for line := range strings.SplitSeq(string(head), "\n") {
		key, value, _ := strings.Cut(line, ": ")
		f := fields[key]
		if f == nil {
			return v, fmt.Errorf("unknown or repeated key %q", key)
		}
		*f = value
		delete(fields, key)
	}
	if _, known := fault.ParseKind(v.expect); !known && v.expect != "ok" {
		return v, fmt.Errorf("unknown expect %q", v.expect)
	}
	return v, nil
}

// loadVectors fails the test if there is no vector or one that it does not
// understand.
func loadVectors(t testing.TB) map[string]vector {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(vectorDir, "*.txt"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no vectors in %s: %v", vectorDir, err)
	}
	out := map[string]vector{}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		v, err := parseVector(data)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		out[filepath.Base(name)] = v
	}
	return out
}

func (v vector) parse() (*contents, *keymem.Key, error) {
	var key *keymem.Key
	c, err := parse(bytes.Clone(v.payload), func(p *protection) (*keymem.Key, error) {
		if v.passphrase == "" {
			return nil, ErrNeedPassphrase
		}
		key = p.derive([]byte(v.passphrase))
		return key, nil
	})
	return c, key, err
}

// F-42 F-43
func TestVectors(t *testing.T) {
	if *update {
		writeVectors(t)
	}
	for name, v := range loadVectors(t) {
		t.Run(name, func(t *testing.T) {
			c, key, err := v.parse()
			defer key.Wipe()
			if v.expect != "ok" {
				if err == nil || fault.Of(err).String() != v.expect {
					t.Fatalf("error = %v (%v), want %s", err, fault.Of(err), v.expect)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := summary(c); got != v.keys {
				t.Errorf("keys = %q, want %q", got, v.keys)
			}
			v.checkReencoding(t, c, key)
			v.checkWrapped(t, c)
		})
	}
}

func summary(c *contents) string {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(c.keys)) {
		e := c.keys[name]
		list = append(list, fmt.Sprintf("%s=%s/%d", name, e.state, len(e.ids)))
	}
	return strings.Join(list, " ")
}

// checkReencoding wants the same bytes back. A sealed body gets its old nonce
// again for that.
func (v vector) checkReencoding(t *testing.T, c *contents, key *keymem.Key) {
	var doc document
	if err := strictJSON(v.payload, &doc); err != nil {
		t.Fatal(err)
	}
	var nonce []byte
	if c.protection != nil {
		nonce = doc.Sealed[:nonceLen]
	}
	got, err := encodeWithNonce(c, key, nonce)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, v.payload) {
		t.Errorf("encodes to\n%s\nwant\n%s", got, v.payload)
	}
}

func encodeWithNonce(c *contents, key *keymem.Key, nonce []byte) ([]byte, error) {
	data, err := c.encode(key)
	if err != nil || c.protection == nil {
		return data, err
	}
	var doc document
	if err := strictJSON(data, &doc); err != nil {
		return nil, err
	}
	plain, err := c.protection.open(key, doc.Sealed)
	if err != nil {
		return nil, err
	}
	if doc.Sealed, err = c.protection.sealWithNonce(key, bytes.Clone(nonce), plain); err != nil {
		return nil, err
	}
	return doc.marshal()
}

func (v vector) checkWrapped(t *testing.T, c *contents) {
	if v.wrapped == "" {
		return
	}
	f := strings.Fields(v.wrapped)
	if len(f) != 7 {
		t.Fatalf("wrapped has %d fields, want 7", len(f))
	}
	blob, err1 := hex.DecodeString(f[5])
	want, err2 := hex.DecodeString(f[6])
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	ec := keywrap.Context{Store: f[1], Class: f[2], Purpose: keywrap.Purpose(f[3]), ID: f[4]}
	got, err := c.keys[strings.TrimPrefix(f[0], uriPrefix)].unwrap(ec, blob)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Wipe()
	if !bytes.Equal(got.Bytes(), want) {
		t.Error("the wrapped key opens to another data key")
	}
}

func TestVectorLoaderRefuses(t *testing.T) {
	for name, data := range map[string]string{
		"unknown key":    "expect: ok\ncolour: red\n\n{}",
		"repeated key":   "expect: ok\nexpect: ok\n\n{}",
		"unknown expect": "expect: wonderful\n\n{}",
		"no expect":      "note: x\n\n{}",
		"no payload":     "expect: ok\n",
	} {
		if _, err := parseVector([]byte(data)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestVectorsAreGenerated keeps the generator and the vectors together.
func TestVectorsAreGenerated(t *testing.T) {
	want := generateVectors(t)
	got := loadVectors(t)
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if !bytes.Equal(got[name].encode(), want[name].encode()) {
			t.Errorf("%s differs from what the generator makes; run go test -run TestVectors -update", name)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d vectors, the generator makes %d", len(got), len(want))
	}
}

func writeVectors(t *testing.T) {
	if err := os.MkdirAll(vectorDir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, v := range generateVectors(t) {
		if err := os.WriteFile(filepath.Join(vectorDir, name), v.encode(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// fixed gives n bytes that depend on label alone: the vectors' secrets.
func fixed(label string, n int) []byte {
	sum := sha256.Sum256([]byte("kmsfs keyring vector: " + label))
	return sum[:n]
}
