package record_test

import (
	"bytes"
	"encoding/base64"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/record"
)

var update = flag.Bool("update", false, "write testdata/vectors anew")

// vector is one file of testdata/vectors: the bytes of a record, and what comes
// of parsing them.
type vector struct {
	name    string
	comment string
	record  string // "directory", "store" or "rewrap"
	expect  fault.Kind
	parsed  string // what describe makes of it, "-" on failure
	bytes   []byte
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

// seeds returns the bytes of the vectors of one kind of record.
func seeds(t testing.TB, kind string) (out []vector) {
	for _, v := range loadVectors(t) {
		if v.record == kind {
			out = append(out, v)
		}
	}
	if len(out) == 0 {
		t.Fatalf("no vector is a %s record", kind)
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
	if len(seen) != 4 {
		return v, fmt.Errorf("%d keys in the head", len(seen))
	}
	v.bytes, err = base64.StdEncoding.DecodeString(string(payload))
	return v, err
}

func (v *vector) set(key, value string) (err error) {
	ok := true
	switch key {
	case "comment":
		v.comment = value
	case "record":
		v.record = value
		ok = value == "directory" || value == "store" || value == "rewrap"
	case "expect":
		if value != "ok" {
			v.expect, ok = fault.ParseKind(value)
			ok = ok && v.expect != fault.None
		}
	case "parsed":
		v.parsed = value
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
	b := fmt.Appendf(nil, "comment: %s\nrecord: %s\nexpect: %s\nparsed: %s\n\n", v.comment, v.record, expect, v.parsed)
	enc := base64.StdEncoding.EncodeToString(v.bytes)
	for len(enc) > 76 {
		b = append(b, enc[:76]...)
		b = append(b, '\n')
		enc = enc[76:]
	}
	return append(append(b, enc...), '\n')
}

// describe parses the record. It returns what is in it, in words, and the bytes
// that encoding it again gives.
func (v *vector) describe() (parsed string, again []byte, err error) {
	switch v.record {
	case "directory":
		return describeDir(v.bytes)
	case "store":
		return describeStore(v.bytes)
	default:
		return describeRewrap(v.bytes)
	}
}

func describeDir(b []byte) (string, []byte, error) {
	d, err := record.ParseDir(b)
	if err != nil {
		return "-", nil, err
	}
	return fmt.Sprintf("id %x class %s mac %x signed-bytes %d", d.ID, d.Class, d.MAC[:4], len(d.Body())), d.Encode(), nil
}

func describeStore(b []byte) (parsed string, encoded []byte, err error) {
	s, err := record.ParseStore(b)
	if err != nil {
		return "-", nil, err
	}
	l, err := s.Layout()
	if err != nil {
		return "-", nil, err
	}
	again, err := s.Encode()
	if err != nil {
		return "-", nil, err
	}
	signed, err := s.Signed()
	if len(s.Body.Retired) > 0 {
		defer func() { parsed += fmt.Sprintf(" retired %v active %v", s.Body.Retired, s.Active("general")) }()
	}
	return fmt.Sprintf("id %v placement %v header %d suite %v classes %v keys %v created %s mac %x signed-bytes %d",
		l.ID, l.Placement, l.HeaderSize, l.Suite, l.Policy.Names(), s.Body.Keys, s.Body.Created.Format("2006-01-02T15:04:05Z07:00"), s.MAC[:4], len(signed)), again, err
}

func describeRewrap(b []byte) (string, []byte, error) {
	files, err := record.ParseRewrap(b)
	if err != nil {
		return "-", nil, err
	}
	s := ""
	for _, f := range files {
		s += fmt.Sprintf("path %q block-bytes %d block %x ", f.Path, len(f.Block), bytes.TrimRight(f.Block, "\x00"))
	}
	return strings.TrimSuffix(s, " "), record.EncodeRewrap(files), nil
}

// F-22
func TestVectors(t *testing.T) {
	if *update {
		writeVectors(t)
	}
	type class struct {
		record string
		expect fault.Kind
	}
	seen := map[class]bool{}
	for _, v := range loadVectors(t) {
		seen[class{v.record, v.expect}] = true
		t.Run(v.name, func(t *testing.T) {
			parsed, again, err := v.describe()
			if got := fault.Of(err); got != v.expect || (err == nil) != (v.expect == fault.None) {
				t.Fatalf("got %v (%v), want %v", err, got, v.expect)
			}
			if parsed != v.parsed {
				t.Errorf("parsed = %s, want %s", parsed, v.parsed)
			}
			if err == nil && !bytes.Equal(again, v.bytes) {
				t.Errorf("encodes to %x, want %x", again, v.bytes)
			}
		})
	}
	for _, c := range []class{
		{"directory", fault.None}, {"directory", fault.BadFormat}, {"directory", fault.Unsupported},
		{"store", fault.None}, {"store", fault.BadFormat}, {"store", fault.Unsupported}, {"store", fault.Invalid},
		{"rewrap", fault.None}, {"rewrap", fault.BadFormat}, {"rewrap", fault.Unsupported},
	} {
		if !seen[c] {
			t.Errorf("no %s vector expects %v", c.record, c.expect)
		}
	}
}

// TestVectorLoaderRefuses plants the mistakes that the loader exists to see.
func TestVectorLoaderRefuses(t *testing.T) {
	v := vector{comment: "x", record: "rewrap", expect: fault.BadFormat, parsed: "-", bytes: []byte("abc")}
	text := string(v.text())
	if _, err := parseVector([]byte(text)); err != nil {
		t.Fatalf("a good vector: %v", err)
	}
	for what, bad := range map[string]string{
		"unknown key":    strings.Replace(text, "record:", "rekord:", 1),
		"extra key":      "colour: red\n" + text,
		"missing key":    text[strings.Index(text, "\n")+1:],
		"key twice":      "comment: x\n" + text,
		"unknown record": strings.Replace(text, "record: rewrap", "record: reading", 1),
		"unknown expect": strings.Replace(text, "expect: ", "expect: not-", 1),
		"expect none":    strings.Replace(text, "expect: bad-format", "expect: none", 1),
		"bad payload":    text + "*",
		"no payload":     strings.TrimSpace(text[:strings.Index(text, "\n\n")]),
	} {
		if _, err := parseVector([]byte(bad)); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}
