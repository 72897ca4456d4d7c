package nameenc_test

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
)

// generator makes vectors; every nonce in them is derived from the file name.
type generator struct {
	t   *testing.T
	out []vector
}

// writeVectors writes testdata/vectors. It is what -update runs; its output is
// the same at every run.
func writeVectors(t *testing.T) {
	g := &generator{t: t}
	g.names()
	g.targets()
	g.attributes()
	dir := "testdata/vectors"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, v := range g.out {
		if err := os.WriteFile(filepath.Join(dir, v.file+".txt"), v.text(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// make encrypts plain as a valid vector; attr is the attribute of a value.
func (g *generator) make(file, kind, attr, plain string) vector {
	v := vector{file: file, kind: kind, key: testKey(1), attr: attr}
	if kind == "name" {
		v.dir = dirA
	}
	c := v.cipher(g.t)
	sum := sha256.Sum256([]byte(file))
	c.SetNonce([16]byte(sum[:16]))
	var s string
	var err error
	switch kind {
	case "name":
		s, err = c.EncryptName(v.dir, plain)
	case "target":
		s, err = c.EncryptTarget(plain)
	case "xattr-name":
		s, err = c.EncryptAttrName(plain)
	default:
		v.stored, err = c.EncryptAttrValue(attr, []byte(plain))
	}
	if err != nil {
		g.t.Fatal(err)
	}
	if kind != "xattr-value" {
		v.stored = []byte(s)
	}
	v.sum = fmt.Sprintf("%x", sha256.Sum256([]byte(plain)))
	return v
}

func (g *generator) ok(comment string, v vector) {
	v.comment = comment
	g.out = append(g.out, v)
}

// bad adds v, changed, as one that must fail.
func (g *generator) bad(comment string, v vector, change func(v *vector)) {
	change(&v)
	v.comment, v.expect = comment, fault.Integrity
	v.sum = fmt.Sprintf("%x", sha256.Sum256(nil))
	g.out = append(g.out, v)
}

func (g *generator) names() {
	name := func(file, plain string) vector { return g.make(file, "name", "", plain) }
	g.ok("one block", name("name-ok-short", "report.pdf"))
	g.ok("exactly one block: no padding", name("name-ok-16", strings.Repeat("x", 16)))
	g.ok("one byte more than a block", name("name-ok-17", strings.Repeat("x", 17)))
	g.ok("not UTF-8", name("name-ok-bytes", "\xff\xfe\n"))
	g.ok("the longest name that is stored as such", name("name-ok-160", strings.Repeat("n", 160)))
	g.ok("a long name", name("name-ok-161", strings.Repeat("n", 161)))
	g.ok("the longest name", name("name-ok-255", strings.Repeat("n", 255)))

	g.bad("a name of another directory", name("name-other-directory", "report.pdf"), func(v *vector) { v.dir = dirB })
	g.bad("a name of another class", name("name-other-class", "report.pdf"), func(v *vector) { v.key = testKey(2) })
	g.bad("a changed character", name("name-changed", "report.pdf"), func(v *vector) { v.stored[20] ^= 1 })
	g.bad("another spelling of the last character: unused bits set", name("name-spare-bits", "report.pdf"), func(v *vector) { v.stored[len(v.stored)-1]++ })
	g.bad("base64 with padding", name("name-base64-padding", "report.pdf"), func(v *vector) { v.stored = append(v.stored, '=') })
	g.bad("a line break at the end", name("name-newline", "report.pdf"), func(v *vector) { v.stored = append(v.stored, '\n') })
	g.bad("cut by a character", name("name-cut", "report.pdf"), func(v *vector) { v.stored = v.stored[:len(v.stored)-1] })
	g.bad("nothing", name("name-empty", "report.pdf"), func(v *vector) { v.stored = nil })
	g.bad("a plaintext name", name("name-plain", "report.pdf"), func(v *vector) { v.stored = []byte("report.pdf") })
	g.bad("an attribute's name", name("name-is-xattr", "report.pdf"), func(v *vector) {
		v.stored = g.make("x", "xattr-name", "", "report.pdf").stored
	})
	for file, raw := range map[string]string{
		"name-forged-unpadded": "report.pdf", "name-forged-long-padding": "report.pdf" + strings.Repeat("\x00", 22), "name-forged-empty": "",
		"name-forged-nul": "a\x00b" + strings.Repeat("\x00", 13), "name-forged-dotdot": ".." + strings.Repeat("\x00", 14),
		"name-forged-slash": "a/b" + strings.Repeat("\x00", 13), "name-forged-256": strings.Repeat("n", 256),
	} {
		g.bad("sealed with the right key, but no name that a directory has", name(file, "x"), func(v *vector) { v.stored = g.forge(v, raw) })
	}
}

// forge seals raw as v's name, without the checks and the padding.
func (g *generator) forge(v *vector, raw string) []byte {
	enc, err := v.cipher(g.t).SealName(v.dir, []byte(raw))
	if err != nil {
		g.t.Fatal(err)
	}
	return []byte(enc)
}

func (g *generator) targets() {
	target := func(file, plain string) vector { return g.make(file, "target", "", plain) }
	g.ok("a relative target", target("target-ok", "../shared/report.pdf"))
	g.ok("one byte", target("target-ok-1", "/"))
	g.ok("the longest target", target("target-ok-longest", strings.Repeat("t", nameenc.MaxTarget)))
	g.bad("a target of another class", target("target-other-class", "../x"), func(v *vector) { v.key = testKey(2) })
	g.bad("a changed nonce", target("target-nonce-changed", "../x"), func(v *vector) { v.stored[3] ^= 1 })
	g.bad("a changed character", target("target-changed", "../x"), func(v *vector) { v.stored[30] ^= 1 })
	g.bad("nonce and tag only", target("target-empty", "../x"), func(v *vector) { v.stored = v.stored[:43] })
	g.bad("a name", target("target-is-name", "../x"), func(v *vector) { v.stored = g.make("x", "name", "", "report.pdf").stored })
	g.bad("a plaintext target", target("target-plain", "../x"), func(v *vector) { v.stored = []byte("../x") })
}

func (g *generator) attributes() {
	name := func(file, plain string) vector { return g.make(file, "xattr-name", "", plain) }
	g.ok("an attribute", name("xattr-name-ok", "mime_type"))
	g.ok("the longest attribute name", name("xattr-name-ok-longest", strings.Repeat("n", nameenc.MaxAttrName)))
	g.bad("an attribute of another class", name("xattr-name-other-class", "mime_type"), func(v *vector) { v.key = testKey(2) })
	g.bad("a changed character", name("xattr-name-changed", "mime_type"), func(v *vector) { v.stored[20] ^= 1 })
	g.bad("a file's name", name("xattr-name-is-name", "mime_type"), func(v *vector) { v.stored = g.make("x", "name", "", "mime_type").stored })

	value := func(file, plain string) vector { return g.make(file, "xattr-value", "mime_type", plain) }
	g.ok("a value", value("xattr-value-ok", "text/plain"))
	g.ok("an empty value", value("xattr-value-ok-empty", ""))
	g.ok("a value of several blocks", value("xattr-value-ok-long", strings.Repeat("v", 1000)))
	g.bad("a value of another attribute", value("xattr-value-other-attribute", "text/plain"), func(v *vector) { v.attr = "origin" })
	g.bad("a value of another class", value("xattr-value-other-class", "text/plain"), func(v *vector) { v.key = testKey(2) })
	g.bad("a changed nonce", value("xattr-value-nonce-changed", "text/plain"), func(v *vector) { v.stored[0] ^= 1 })
	g.bad("a changed bit", value("xattr-value-changed", "text/plain"), func(v *vector) { v.stored[40] ^= 1 })
	g.bad("cut", value("xattr-value-cut", "text/plain"), func(v *vector) { v.stored = v.stored[:31] })
	g.bad("a plaintext value", value("xattr-value-plain", "text/plain"), func(v *vector) { v.stored = []byte("text/plain") })
}
