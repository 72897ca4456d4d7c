package dare_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
)

var update = flag.Bool("update", false, "write testdata/vectors anew")

// vector is one file of testdata/vectors: a slot, where it is opened, and what
// comes of it.
type vector struct {
	name    string
	comment string
	suite   dare.Suite
	chunk   int
	prk     []byte
	index   int64
	last    bool
	expect  fault.Kind // None: it opens
	sum     string     // hex SHA-256 of the plaintext released, which is none on failure
	slot    []byte
}

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
		v.name = strings.TrimSuffix(filepath.Base(file), ".txt")
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
	if len(seen) != 8 {
		return v, fmt.Errorf("%d keys in the head, want 8", len(seen))
	}
	v.slot, err = base64.StdEncoding.DecodeString(string(payload))
	return v, err
}

func (v *vector) set(key, value string) (err error) {
	ok := true
	switch key {
	case "comment":
		v.comment = value
	case "suite":
		v.suite, err = dare.ParseSuite(value)
	case "chunk-size":
		v.chunk, err = strconv.Atoi(value)
	case "prk":
		v.prk, err = hex.DecodeString(value)
	case "index":
		v.index, err = strconv.ParseInt(value, 10, 64)
	case "last":
		v.last, err = strconv.ParseBool(value)
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
	b := fmt.Appendf(nil, "comment: %s\nsuite: %v\nchunk-size: %d\nprk: %x\nindex: %d\nlast: %v\nexpect: %s\nplaintext-sha256: %s\n\n",
		v.comment, v.suite, v.chunk, v.prk, v.index, v.last, expect, v.sum)
	enc := base64.StdEncoding.EncodeToString(v.slot)
	for len(enc) > 76 {
		b = append(b, enc[:76]...)
		b = append(b, '\n')
		enc = enc[76:]
	}
	return append(append(b, enc...), '\n')
}

func (v *vector) codec(t testing.TB) *dare.Codec {
	t.Helper()
	prk := keymem.Copy(v.prk)
	defer prk.Wipe()
	c, err := dare.New(prk, v.suite, v.chunk)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Wipe)
	return c
}

func TestVectors(t *testing.T) {
	if *update {
		writeVectors(t)
	}
	kinds := map[fault.Kind]int{}
	for _, v := range loadVectors(t) {
		kinds[v.expect]++
		t.Run(v.name, func(t *testing.T) {
			c := v.codec(t)
			plain, err := c.Open(nil, v.slot, v.index, v.last)
			if got := fault.Of(err); got != v.expect || (err == nil) != (v.expect == fault.None) {
				t.Fatalf("Open: %v (%v), want %v", err, got, v.expect)
			}
			if got := fmt.Sprintf("%x", sha256.Sum256(plain)); got != v.sum {
				t.Errorf("plaintext hash = %s, want %s", got, v.sum)
			}
			if err != nil {
				return
			}
			c.SetNonce([12]byte(v.slot[4:16]))
			if again := seal(t, c, plain, v.index, v.last); !bytes.Equal(again, v.slot) {
				t.Error("sealing the plaintext again gives other bytes")
			}
		})
	}
	for _, kind := range []fault.Kind{fault.None, fault.Integrity, fault.Invalid} {
		if kinds[kind] == 0 {
			t.Errorf("no vector expects %v", kind)
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
		"unknown key":    strings.Replace(text, "suite:", "sweet:", 1),
		"extra key":      "colour: red\n" + text,
		"missing key":    text[strings.Index(text, "\n")+1:],
		"key twice":      "comment: x\n" + text,
		"unknown expect": strings.Replace(text, "expect: ", "expect: not-", 1),
		"expect none":    strings.Replace(text, "expect: "+text[strings.Index(text, "expect: ")+8:strings.Index(text, "\nplaintext")], "expect: none", 1),
		"bad payload":    text + "*",
		"no payload":     strings.TrimSpace(text[:strings.Index(text, "\n\n")]),
	} {
		if _, err := parseVector([]byte(bad)); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}
