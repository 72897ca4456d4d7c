package record_test

import (
	"bytes"
	"crypto/sha256"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/record"
)

// generator makes vectors; its output is the same at every run.
type generator struct {
	t   *testing.T
	out []vector
}

// writeVectors writes testdata/vectors. It is what -update runs.
func writeVectors(t *testing.T) {
	g := &generator{t: t}
	g.directories()
	g.stores()
	g.rewraps()
	dir := "testdata/vectors"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, v := range g.out {
		if err := os.WriteFile(filepath.Join(dir, v.name+".txt"), v.text(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func (g *generator) ok(name, comment string, v vector) {
	g.t.Helper()
	v.name, v.comment = v.record+"-ok-"+name, comment
	var err error
	if v.parsed, _, err = v.describe(); err != nil {
		g.t.Fatalf("%s: %v", v.name, err)
	}
	g.out = append(g.out, v)
}

func (g *generator) bad(name, comment string, kind fault.Kind, v vector) {
	v.name, v.comment, v.expect, v.parsed = v.record+"-"+name, comment, kind, "-"
	g.out = append(g.out, v)
}

// damage adds what b becomes by each of the changes.
func (g *generator) damage(of vector, changes []change) {
	for _, c := range changes {
		v := of
		v.bytes = c.do(bytes.Clone(of.bytes))
		g.bad(c.name, c.comment, c.kind, v)
	}
}

type change struct {
	name, comment string
	kind          fault.Kind
	do            func([]byte) []byte
}

func pattern(first byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

func testDir(class string) *record.Dir {
	return &record.Dir{ID: [16]byte(pattern(0x10, 16)), Class: class, MAC: [32]byte(pattern(0x80, 32))}
}

func (g *generator) directories() {
	dir := func(class string) vector { return vector{record: "directory", bytes: testDir(class).Encode()} }
	g.ok("plain", "a directory of class phi", dir("phi"))
	g.ok("short-class", "the shortest class name", dir("a"))
	g.ok("long-class", "the longest class name", dir(strings.Repeat("c", 32)))
	g.damage(dir("phi"), []change{
		{"empty", "no bytes", fault.BadFormat, func([]byte) []byte { return nil }},
		{"magic-only", "cut after the magic", fault.BadFormat, func(b []byte) []byte { return b[:8] }},
		{"magic", "another magic", fault.BadFormat, func(b []byte) []byte { b[0] = 'K'; return b }},
		{"version-0", "a version that never was", fault.BadFormat, func(b []byte) []byte { b[9] = 0; return b }},
		{"version-2", "a newer version", fault.Unsupported, func(b []byte) []byte { b[9] = 2; return b }},
		{"version-2-long", "a newer version, longer than this one's records", fault.Unsupported, func(b []byte) []byte { b[9] = 2; return append(b, make([]byte, 100)...) }},
		{"cut", "the last byte is missing", fault.BadFormat, func(b []byte) []byte { return b[:len(b)-1] }},
		{"trailing", "a byte behind the record", fault.BadFormat, func(b []byte) []byte { return append(b, 0) }},
		{"class-length", "length of the class one too large", fault.BadFormat, func(b []byte) []byte { b[26]++; return b }},
		{"class-length-255", "length of the class beyond the record", fault.BadFormat, func(b []byte) []byte { b[26] = 255; return b }},
		{"no-class", "a class of no bytes", fault.BadFormat, func(b []byte) []byte { b[26] = 0; return append(b[:27:27], b[30:]...) }},
		{"class-33", "a class of 33 bytes", fault.BadFormat, func(b []byte) []byte {
			b[26] = 33
			return append(append(b[:27:27], bytes.Repeat([]byte("c"), 33)...), b[30:]...)
		}},
	})
}

// policy is the smallest policy in its canonical form.
const policy = `{"version":1,"default":"general","classes":{"general":{"keys":["keyring:general"],"cache":"5m","names":"encrypted","chunk_size":32768}},"directories":{}}`

func testStore() *record.Store {
	return &record.Store{
		Body: record.StoreBody{
			ID: "000102030405060708090a0b0c0d0e0f", Created: time.Date(2025, 3, 4, 5, 6, 7, 0, time.UTC),
			Placement: "header", HeaderSize: 1024, Suite: "aes-256-gcm", Policy: []byte(policy),
			Keys:  map[string][]string{"general": {"keyring:general"}},
			Names: map[string]string{"general": strings.Repeat("ab", 32)},
		},
		MAC: [32]byte(pattern(0x40, 32)),
		Keys: record.StoreKeys{
			Store: map[string][]byte{"general": pattern(1, 20)},
			Names: map[string][]byte{"general": pattern(2, 20)},
		},
	}
}

// store encodes testStore after change.
func (g *generator) store(change func(*record.Store)) vector {
	g.t.Helper()
	s := testStore()
	change(s)
	b, err := s.Encode()
	if err != nil {
		g.t.Fatal(err)
	}
	return vector{record: "store", bytes: b}
}

func (g *generator) stores() {
	plain := g.store(func(*record.Store) {})
	g.ok("plain", "one class, keyring", plain)
	g.ok("sidecar", "another placement, suite and header size", g.store(func(s *record.Store) {
		s.Body.Placement, s.Body.Suite, s.Body.HeaderSize = "sidecar", "chacha20-poly1305", 8192
	}))
	g.ok("two-classes", "map members are sorted, and characters that HTML knows are escaped", g.store(func(s *record.Store) {
		s.Body.Policy = []byte(strings.Replace(policy, `"classes":{`, `"classes":{"a":{"keys":["alias/a"],"cache":"0s","names":"plain","chunk_size":4096},`, 1))
		s.Body.Keys["a"] = []string{"arn:aws:kms:eu-west-1:111122223333:key/k1", "arn:<&>"}
		s.Body.Names["a"] = strings.Repeat("cd", 32)
		s.Keys.Store["a"], s.Keys.Names["a"] = []byte{}, nil
	}))
	retired := g.store(func(s *record.Store) {
		s.Body.Policy = []byte(strings.Replace(policy, `"keys":["keyring:general"]`, `"keys":["keyring:general"],"retired":["keyring:old","alias/older"]`, 1))
		s.Body.Keys["general"] = []string{"keyring:general", "keyring:old", "keyring:older"}
		s.Body.Retired = map[string][]string{"general": {"keyring:old", "keyring:older"}}
	})
	g.ok("retired", "two keys that only unwrap", retired)
	g.storeRetired(g.text(retired))
	g.text(plain)("no-store", "another kind of file", fault.Invalid, "kmsfs store 1", "#!/bin/sh")
	g.damage(plain, []change{
		{"empty", "no bytes", fault.Invalid, func([]byte) []byte { return nil }},
		{"first-line-only", "cut after the first line", fault.BadFormat, func(b []byte) []byte { return b[:14] }},
		{"cut", "no line feed at the end", fault.BadFormat, func(b []byte) []byte { return b[:len(b)-1] }},
		{"trailing", "a fifth line", fault.BadFormat, func(b []byte) []byte { return append(b, '\n') }},
	})
	g.storeLines(g.text(plain))
	g.storeValues(g.text(plain))
}

func (g *generator) storeLines(text func(name, comment string, kind fault.Kind, old, new string)) {
	text("version-2", "a newer version, whose lines are unknown", fault.Unsupported, "kmsfs store 1\n{", "kmsfs store 2\n?")
	text("version-0", "a version that never was", fault.BadFormat, "store 1", "store 0")
	text("version-01", "the version spelled otherwise", fault.BadFormat, "store 1", "store 01")
	text("version-plus", "the version with a sign", fault.BadFormat, "store 1", "store +1")
	text("version-word", "the version no number", fault.BadFormat, "store 1", "store one")
	text("space", "white space in the JSON", fault.BadFormat, `"header_size":1024`, `"header_size": 1024`)
	text("unknown-member", "a member that nobody knows", fault.BadFormat, `{"id"`, `{"x":1,"id"`)
	text("member-twice", "a member twice", fault.BadFormat, `"suite"`, `"suite":"aes-256-gcm","suite"`)
	text("member-case", "a member in capitals", fault.BadFormat, `"suite"`, `"Suite"`)
	text("member-order", "members in another order", fault.BadFormat, `"header_size":1024,"suite":"aes-256-gcm"`, `"suite":"aes-256-gcm","header_size":1024`)
	text("member-missing", "no policy", fault.BadFormat, `"policy":`+policy+`,`, ``)
	text("crlf", "a carriage return", fault.BadFormat, "\n{", "\r\n{")
	text("after-json", "more behind the JSON", fault.BadFormat, "}\nmac", "}{}\nmac")
	text("brace-after-json", "a brace behind the JSON", fault.BadFormat, "}\nmac", "}}\nmac")
	text("no-mac", "the MAC line is another", fault.BadFormat, "\nmac ", "\nsig ")
	text("mac-short", "the MAC is too short", fault.BadFormat, "\nmac 40", "\nmac ")
	text("mac-capitals", "the MAC in capitals", fault.BadFormat, "4a4b", "4A4B")
	text("mac-hex", "the MAC is not hexadecimal", fault.BadFormat, "4a4b", "4x4b")
	text("keys-base64", "a wrapped key is not base64", fault.BadFormat, `"store":{"general":"AQ`, `"store":{"general":"A!`)
}

func (g *generator) storeValues(text func(name, comment string, kind fault.Kind, old, new string)) {
	text("time-zone", "the time is not in UTC", fault.BadFormat, "05:06:07Z", "05:06:07+01:00")
	text("time", "no such time", fault.BadFormat, "2025-03-04", "2025-03-99")
	text("id", "the id in capitals", fault.BadFormat, "0a0b0c", "0A0B0C")
	text("id-zero", "the id that names nothing", fault.BadFormat, "000102030405060708090a0b0c0d0e0f", strings.Repeat("0", 32))
	text("placement", "no such placement", fault.BadFormat, `"placement":"header"`, `"placement":"footer"`)
	text("header-size", "a header size that is no power of two", fault.BadFormat, `1024`, `1025`)
	text("header-size-small", "a header size that is too small", fault.BadFormat, `1024`, `256`)
	text("header-size-negative", "a negative header size", fault.BadFormat, `1024`, `-1024`)
	text("suite", "no such suite", fault.BadFormat, `"suite":"aes-256-gcm"`, `"suite":"rot13"`)
	text("policy", "a policy that is none", fault.BadFormat, policy, `{"version":1}`)
	text("policy-null", "no policy at all", fault.BadFormat, policy, `null`)
	text("class-without-key", "a class of the policy has no key", fault.BadFormat, `"keys":{"general":["keyring:general"]},"names"`, `"keys":{},"names"`)
	text("class-with-no-keys", "a class of the policy has an empty list of keys", fault.BadFormat, `"keys":{"general":["keyring:general"]},"names"`, `"keys":{"general":[]},"names"`)
	text("invalid-utf8", "a string that is not UTF-8", fault.BadFormat, `"keys":{"general":["keyring:general"]},"names"`, "\"keys\":{\"general\":[\"keyring:\xff\"]},\"names\"")
	text("nul", "a NUL byte in a string", fault.BadFormat, `"suite":"aes`, "\"suite\":\"\x00es")
}

func (g *generator) storeRetired(text func(name, comment string, kind fault.Kind, old, new string)) {
	const is = `"retired":{"general":["keyring:old","keyring:older"]}`
	text("retired-all", "no key is left that wraps", fault.BadFormat, is, `"retired":{"general":["keyring:general","keyring:old","keyring:older"]}`)
	text("retired-first", "the first key is retired and others are not", fault.BadFormat, is, `"retired":{"general":["keyring:general"]}`)
	text("retired-stranger", "a retired key that is none of the class's", fault.BadFormat, is, `"retired":{"general":["keyring:other"]}`)
	text("retired-none", "an empty list of retired keys", fault.BadFormat, is, `"retired":{"general":[]}`)
	text("retired-empty", "no class with retired keys", fault.BadFormat, is, `"retired":{}`)
	text("retired-class", "retired keys of a class that is not there", fault.BadFormat, is, `"retired":{"phi":["keyring:older"]}`)
}

// text returns a function that adds v with a text in it replaced.
func (g *generator) text(v vector) func(name, comment string, kind fault.Kind, old, new string) {
	return func(name, comment string, kind fault.Kind, old, new string) {
		g.damage(v, []change{{name, comment, kind, func(b []byte) []byte {
			if !bytes.Contains(b, []byte(old)) {
				g.t.Fatalf("%s: no %q", name, old)
			}
			return bytes.Replace(b, []byte(old), []byte(new), 1)
		}}})
	}
}

// sealed ends a batch with the hash that belongs there.
func sealed(b []byte) []byte {
	sum := sha256.Sum256(b)
	return append(bytes.Clone(b), sum[:]...)
}

func (g *generator) rewraps() {
	block := func(n int) []byte { return append(pattern(5, 40), make([]byte, n-40)...) }
	v := func(b []byte) vector { return vector{record: "rewrap", bytes: b} }
	one := record.Rewrapped{Path: "dir/entry", Block: block(512)}
	g.ok("plain", "one file", v(record.EncodeRewrap([]record.Rewrapped{one})))
	g.ok("two", "two files, another header size, a path that is not UTF-8", v(record.EncodeRewrap([]record.Rewrapped{{Path: "\xff", Block: block(8192)}, {Path: "x", Block: make([]byte, 8192)}})))
	full := make([]record.Rewrapped, record.MaxRewrapFiles)
	for i := range full {
		full[i] = one
	}
	g.ok("full", "as many files as there may be", v(record.EncodeRewrap(full)))
	plain := v(record.EncodeRewrap([]record.Rewrapped{one}))
	const path, length = 16, 16 + 2 + 9 // where the file's fields are
	body := func(f func(b []byte) []byte) func([]byte) []byte {
		return func(b []byte) []byte { return sealed(f(b[:len(b)-32])) }
	}
	set := func(at int, to byte) func([]byte) []byte {
		return body(func(b []byte) []byte { b[at] = to; return b })
	}
	g.damage(plain, []change{
		{"empty", "no bytes", fault.BadFormat, func([]byte) []byte { return nil }},
		{"torn", "as a crash leaves it", fault.BadFormat, func(b []byte) []byte { return b[:len(b)-1] }},
		{"flipped", "a bit that the hash covers", fault.BadFormat, func(b []byte) []byte { b[30] ^= 1; return b }},
		{"magic", "another magic", fault.BadFormat, set(0, 'K')},
		{"version-2", "a newer version", fault.Unsupported, set(11, 2)},
		{"none", "no files", fault.BadFormat, set(15, 0)},
		{"count-large", "more files than bytes for them", fault.BadFormat, set(15, 2)},
		{"sixty-five", "a file too many", fault.BadFormat, func([]byte) []byte { return record.EncodeRewrap(append(full, one)) }},
		{"path-long", "a path beyond the end", fault.BadFormat, set(path, 0xff)},
		{"path-empty", "no path", fault.BadFormat, body(func(b []byte) []byte { b[path+1] = 0; return append(b[:path+2:path+2], b[path+2+9:]...) })},
		{"size", "a header size that is none", fault.BadFormat, set(length+1, 1)},
		{"block-long", "a block beyond the end", fault.BadFormat, set(length+3, 41)},
		{"block-padding", "padding that is not left out", fault.BadFormat, body(func(b []byte) []byte { b[length+3]++; return append(b, 0) })},
		{"trailing", "a byte behind the last file", fault.BadFormat, body(func(b []byte) []byte { return append(b, 7) })},
	})
}
