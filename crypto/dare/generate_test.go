package dare_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/minio/sio"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
)

// generator makes vectors; every nonce in them is derived from the name.
type generator struct {
	t   *testing.T
	out []vector
}

// writeVectors writes testdata/vectors. It is what -update runs; its output is
// the same at every run.
func writeVectors(t *testing.T) {
	g := &generator{t: t}
	g.valid()
	g.misplaced()
	g.malformed()
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

// seal makes the slot of a valid vector.
func (g *generator) seal(name string, suite dare.Suite, chunk, n int, index int64, last bool) vector {
	v := vector{name: name, suite: suite, chunk: chunk, prk: testPRK(1), index: index, last: last}
	prk := keymem.Copy(v.prk)
	defer prk.Wipe()
	c, err := dare.New(prk, suite, chunk)
	if err != nil {
		g.t.Fatal(err)
	}
	defer c.Wipe()
	sum := sha256.Sum256([]byte(name))
	c.SetNonce([12]byte(sum[:12]))
	v.slot = seal(g.t, c, pattern(n), index, last)
	v.sum = fmt.Sprintf("%x", sha256.Sum256(pattern(n)))
	return v
}

func (g *generator) ok(comment string, v vector) {
	v.comment = comment
	g.out = append(g.out, v)
}

// bad adds v as one that must fail.
func (g *generator) bad(comment string, kind fault.Kind, v vector) {
	v.comment, v.expect = comment, kind
	v.sum = fmt.Sprintf("%x", sha256.Sum256(nil))
	g.out = append(g.out, v)
}

func (g *generator) valid() {
	for _, suite := range suites {
		g.ok("the shortest chunk there is", g.seal(fmt.Sprintf("ok-%v-1-byte", suite), suite, 4096, 1, 0, true))
		g.ok("a short last chunk", g.seal(fmt.Sprintf("ok-%v-short-last", suite), suite, 32768, 1000, 7, true))
		g.ok("a middle chunk", g.seal(fmt.Sprintf("ok-%v-middle", suite), suite, 4096, 4096, 3, false))
	}
	g.ok("a full last chunk", g.seal("ok-full-last", dare.AES256GCM, 4096, 4096, 3, true))
	g.ok("the largest chunk, length field 0xffff", g.seal("ok-64k", dare.AES256GCM, 65536, 65536, 1, false))
	g.ok("an index beyond 32 bits", g.seal("ok-large-index", dare.AES256GCM, 4096, 20, 1<<40, true))
}

func (g *generator) misplaced() {
	v := g.seal("moved", dare.AES256GCM, 4096, 100, 3, true)
	v.index = 9
	g.bad("chunk 3 at index 9", fault.Integrity, v)

	v = g.seal("moved-nonce-fixed-up", dare.AES256GCM, 4096, 100, 3, true)
	v.slot, v.index = moveNonce(v.slot, 3, 9), 9
	g.bad("chunk 3 at index 9, its nonce XORed as DARE sequence numbers would have it", fault.Integrity, v)

	v = g.seal("middle-as-last", dare.AES256GCM, 4096, 4096, 3, false)
	v.last = true
	g.bad("a file cut at a chunk boundary", fault.Integrity, v)

	v = g.seal("last-as-middle", dare.AES256GCM, 4096, 4096, 3, true)
	v.last = false
	g.bad("chunks added behind a full last chunk", fault.Integrity, v)

	v = g.seal("short-as-middle", dare.AES256GCM, 4096, 100, 3, true)
	v.last = false
	g.bad("a short chunk where only a full one may be", fault.Integrity, v)

	v = g.seal("other-file", dare.AES256GCM, 4096, 100, 3, true)
	v.prk = testPRK(2)
	g.bad("a chunk of another file", fault.Integrity, v)

	v = g.seal("negative-index", dare.AES256GCM, 4096, 100, 3, true)
	v.index = -1
	g.bad("no such chunk: the caller's mistake", fault.Invalid, v)
}

func (g *generator) malformed() {
	for _, c := range []struct {
		name, comment string
		change        func(slot []byte) []byte
	}{
		{"flip-version", "version byte", func(s []byte) []byte { s[0] = sio.Version10; return s }},
		{"flip-suite", "suite byte says the other suite", func(s []byte) []byte { s[1] ^= 1; return s }},
		{"flip-length", "length field one too large", func(s []byte) []byte { s[2]++; return s }},
		{"flip-final", "final flag cleared", func(s []byte) []byte { s[4] &= 0x7f; return s }},
		{"flip-nonce", "last bit of the nonce", func(s []byte) []byte { s[15] ^= 1; return s }},
		{"flip-ciphertext", "a bit of the ciphertext", func(s []byte) []byte { s[40] ^= 4; return s }},
		{"flip-tag", "last bit of the tag", func(s []byte) []byte { s[len(s)-1] ^= 1; return s }},
		{"trailing-byte", "a byte behind the package", func(s []byte) []byte { return append(s, 0) }},
		{"two-packages", "the package twice", func(s []byte) []byte { return append(s, s...) }},
		{"cut-byte", "the last byte is missing", func(s []byte) []byte { return s[:len(s)-1] }},
		{"cut-payload", "header and tag only", func(s []byte) []byte { return append(s[:16:16], s[len(s)-16:]...) }},
		{"cut-header", "less than a header", func(s []byte) []byte { return s[:15] }},
		{"empty", "no bytes at all", func([]byte) []byte { return nil }},
		{"zeros", "a zeroed slot", func(s []byte) []byte { return make([]byte, len(s)) }},
	} {
		v := g.seal(c.name, dare.AES256GCM, 4096, 100, 3, true)
		v.slot = c.change(v.slot)
		g.bad(c.comment, fault.Integrity, v)
	}
	g.foreign("version-1", "a DARE 1.0 stream under the chunk key", 100, sio.Version10, sio.AES_256_GCM)
	g.foreign("other-suite", "a DARE 2.0 stream of the other suite under the chunk key", 100, sio.Version20, sio.CHACHA20_POLY1305)
	g.foreign("oversize", "a DARE 2.0 stream under the chunk key, one byte longer than a chunk", 4097, sio.Version20, sio.AES_256_GCM)
}

// foreign adds a stream that sio opens and this format does not know.
func (g *generator) foreign(name, comment string, n int, version, suite byte) {
	v := g.seal(name, dare.AES256GCM, 4096, 100, 3, true)
	key, err := v.codec(g.t).ChunkKey(v.index, v.last)
	if err != nil {
		g.t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(name))
	var out bytes.Buffer
	_, err = sio.Encrypt(&out, bytes.NewReader(pattern(n)), sio.Config{
		MinVersion: version, MaxVersion: version, CipherSuites: []byte{suite}, Key: key, Nonce: (*[12]byte)(sum[:12]),
	})
	if err != nil {
		g.t.Fatal(err)
	}
	v.slot = out.Bytes()
	g.bad(comment, fault.Integrity, v)
}
