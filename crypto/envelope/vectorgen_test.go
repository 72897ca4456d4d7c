package envelope_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// vectorDEK is the data key of every vector.
var vectorDEK = func() []byte {
	b := make([]byte, keywrap.DataKeyLen)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}()

// vectorBranch is the branch key of every vector of a shared key.
var vectorBranch = bytes.Repeat([]byte{0xbb}, keywrap.DataKeyLen)

// recipient makes a recipient whose blob of n bytes is recognisable.
func recipient(class, key string, n int, material string) envelope.Recipient {
	return envelope.Recipient{Class: class, Wrapped: keywrap.Wrapped{Key: key, Blob: bytes.Repeat([]byte{0xb1}, n), Material: material}}
}

// generator collects vectors by file name.
type generator struct {
	t   testing.TB
	out map[string]*vector
}

func (g *generator) add(name, comment string, expect fault.Kind, h *envelope.Header, edit func(block []byte) []byte) {
	g.t.Helper()
	k, err := envelope.NewFileKey(vectorDEK, h.Store, h.File)
	if err != nil {
		g.t.Fatal(err)
	}
	defer k.Wipe()
	if h.Shared {
		sealed, err := envelope.Seal(vectorBranch, h.Recipients[0].Class, h, vectorDEK)
		if err != nil {
			g.t.Fatal(err)
		}
		defer sealed.Wipe()
	}
	k.Commit(h)
	block, err := h.Encode(h.BlockSize)
	if err != nil {
		g.t.Fatalf("%s: %v", name, err)
	}
	if edit != nil {
		block = edit(block)
	}
	v := &vector{name: name, comment: comment, expect: expect, block: block}
	if expect != fault.BadFormat {
		v.dek, v.prk = vectorDEK, bytes.Clone(k.PRK().Bytes())
	}
	if expect != fault.BadFormat && h.Shared {
		v.branch = vectorBranch
	}
	if g.out[name] != nil {
		g.t.Fatalf("two vectors %s", name)
	}
	g.out[name+".txt"] = v
}

func (g *generator) valid() {
	add := func(name, comment string, size int, edit func(h *envelope.Header)) {
		h := sampleHeader(size)
		edit(h)
		g.add(name, comment, fault.None, h, nil)
	}
	arn := "arn:aws:kms:%s:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	add("valid-smallest", "header of 512 bytes, one recipient", 512, func(*envelope.Header) {})
	add("valid-default", "default size, a KMS key and a recovery recipient", 1024, func(h *envelope.Header) {
		h.Recipients = []envelope.Recipient{
			recipient("phi", fmt.Sprintf(arn, "us-east-1"), 184, strings.Repeat("ab", 32)),
			recipient("phi", fmt.Sprintf(arn, "us-west-2"), 184, ""),
		}
	})
	add("valid-eight", "the most recipients, of several classes", 1024, func(h *envelope.Header) {
		h.Recipients = nil
		for i := range envelope.MaxRecipients {
			h.Recipients = append(h.Recipients, recipient(fmt.Sprintf("class%d", i), fmt.Sprintf("keyring:k%d", i), 61, "v1"))
		}
	})
	add("valid-sparse", "sparse file, 4 KiB chunks, suite 2", 512, func(h *envelope.Header) { h.Suite, h.ChunkSize, h.Sparse = 2, 4096, true })
	add("valid-no-contents", "a name key: no suite, no chunk size", 512, func(h *envelope.Header) { h.Suite, h.ChunkSize = 0, 0 })
	add("valid-no-contents-suite", "a name key that names a suite", 512, func(h *envelope.Header) { h.ChunkSize = 0 })
	add("valid-full", "recipients fill the block to the last byte", 512, func(h *envelope.Header) {
		h.Recipients = []envelope.Recipient{recipient("c", "keyring:k", 512-84-6-len("c")-len("keyring:k"), "")}
	})
	add("valid-longest-fields", "8,192 bytes, key URI and blob of the greatest length that fit", 8192, func(h *envelope.Header) {
		h.Recipients = []envelope.Recipient{recipient("c", "keyring:"+strings.Repeat("k", 1500), envelope.MaxBlob, strings.Repeat("m", 255))}
	})
	add("valid-longest-uri", "8,192 bytes, class and key URI at their bounds", 8192, func(h *envelope.Header) {
		h.Recipients = []envelope.Recipient{recipient(strings.Repeat("c", 255), "keyring:"+strings.Repeat("k", 2040), 64, "")}
	})
	add("valid-utf8", "class and key name outside ASCII", 512, func(h *envelope.Header) {
		h.Recipients = []envelope.Recipient{recipient("santé", "keyring:clé", 61, "v1")}
	})
}

// set returns an edit that writes b at off.
func set(off int, b ...byte) func([]byte) []byte {
	return func(block []byte) []byte { copy(block[off:], b); return block }
}

func (g *generator) badFixed() {
	add := func(name, comment string, edit func([]byte) []byte) {
		g.add(name, comment, fault.BadFormat, sampleHeader(512), edit)
	}
	add("bad-magic", "first byte of the magic", set(0, 'K'))
	add("bad-magic-end", "last byte of the magic", set(5, ' '))
	add("bad-version-0", "format version 0", set(6, 0, 0))
	add("bad-version-2", "format version 2", set(6, 0, 2))
	add("bad-suite-none", "chunk size without a suite", set(8, 0))
	add("bad-chunk-2k", "chunks of 2 KiB", set(9, 11))
	add("bad-chunk-128k", "chunks of 128 KiB", set(9, 17))
	add("bad-chunk-huge", "log2 of the chunk size is 255", set(9, 255))
	add("bad-flag", "unknown flag", set(10, 0, 2))
	add("bad-flag-high", "unknown flag in the high byte", set(10, 0x80, 0))
	add("bad-sparse-no-contents", "sparse without contents", func(b []byte) []byte { return set(8, 0, 0, 0, 1)(b) })
	add("bad-size-field", "says 1,024 bytes in a block of 512", set(12, 0, 0, 4, 0))
	add("bad-block-short", "one byte short", func(b []byte) []byte { return b[:511] })
	add("bad-block-long", "one byte more", func(b []byte) []byte { return append(b, 0) })
	add("bad-block-double", "padded to the next size", func(b []byte) []byte { return append(b, make([]byte, 512)...) })
	add("bad-empty", "no bytes", func([]byte) []byte { return nil })
	add("bad-all-zero", "zeros", func(b []byte) []byte { return make([]byte, len(b)) })
}

// rawRecipient encodes without any bound.
func rawRecipient(class, key, blob, material string) []byte {
	b := append([]byte{byte(len(class))}, class...)
	b = append(append(b, byte(len(key)>>8), byte(len(key))), key...)
	b = append(append(b, byte(len(blob)>>8), byte(len(blob))), blob...)
	return append(append(b, byte(len(material))), material...)
}

func (g *generator) badRecipients() {
	one := rawRecipient("c", "keyring:k", "blob", "v1")
	add := func(name, comment string, size, count, length int, recipients ...[]byte) {
		g.add(name, comment, fault.BadFormat, sampleHeader(size), func(block []byte) []byte {
			all := bytes.Join(recipients, nil)
			if length < 0 {
				length = len(all)
			}
			clear(block[80:])
			block[80], block[82], block[83] = byte(count), byte(length>>8), byte(length)
			copy(block[84:], all)
			return block
		})
	}
	add("bad-no-recipient", "no recipient", 512, 0, 0)
	add("bad-nine", "nine recipients", 512, 9, -1, bytes.Repeat(one, 9))
	add("bad-count-255", "count says 255", 512, 255, -1, one)
	add("bad-count-more", "count says one more than there are", 512, 2, -1, one)
	add("bad-count-less", "count says one less than there are", 512, 1, -1, one, one)
	add("bad-length-over-block", "length reaches beyond the block", 512, 1, 512-84+1, one)
	add("bad-length-max", "length 65,535", 512, 1, 65535, one)
	add("bad-length-short", "length ends within the recipient", 512, 1, len(one)-1, one)
	add("bad-length-zero", "one recipient in no bytes", 512, 1, 0)
	add("bad-length-long", "length goes on into the padding", 512, 1, len(one)+1, one)
	add("bad-class-overrun", "class longer than the rest", 512, 1, -1, []byte{200, 'c'})
	add("bad-key-overrun", "key URI longer than the rest", 512, 1, -1, []byte{1, 'c', 0xff, 0xff, 'k'})
	add("bad-blob-overrun", "blob longer than the rest", 512, 1, -1, []byte{1, 'c', 0, 1, 'k', 0, 9, 1})
	add("bad-material-overrun", "material longer than the rest", 512, 1, -1, []byte{1, 'c', 0, 1, 'k', 0, 1, 1, 5, 'v'})
	add("bad-material-missing", "ends before the material's length", 512, 1, -1, []byte{1, 'c', 0, 1, 'k', 0, 1, 1})
	add("bad-key-half-length", "ends within the key URI's length", 512, 1, -1, []byte{1, 'c', 0})
	add("bad-class-empty", "empty class", 512, 1, -1, rawRecipient("", "keyring:k", "blob", ""))
	add("bad-key-empty", "empty key URI", 512, 1, -1, rawRecipient("c", "", "blob", ""))
	add("bad-blob-empty", "empty blob", 512, 1, -1, rawRecipient("c", "keyring:k", "", ""))
	add("bad-key-long", "key URI of 2,049 bytes", 8192, 1, -1, rawRecipient("c", strings.Repeat("k", 2049), "blob", ""))
	add("bad-blob-long", "blob of 6,145 bytes", 8192, 1, -1, rawRecipient("c", "keyring:k", strings.Repeat("b", 6145), ""))
	add("bad-class-control", "escape sequence in the class", 512, 1, -1, rawRecipient("\x1b[2J", "keyring:k", "blob", ""))
	add("bad-key-utf8", "key URI is not UTF-8", 512, 1, -1, rawRecipient("c", "keyring:\xff", "blob", ""))
	add("bad-material-newline", "line feed in the material", 512, 1, -1, rawRecipient("c", "keyring:k", "blob", "v1\n"))
	g.add("bad-reserved", "reserved byte", fault.BadFormat, sampleHeader(512), set(81, 1))
	g.add("bad-padding-first", "first byte of the padding", fault.BadFormat, sampleHeader(512), set(84+6+7+15+3+2, 1))
	g.add("bad-padding-last", "last byte of the padding", fault.BadFormat, sampleHeader(512), set(511, 1))
}

func (g *generator) integrity() {
	add := func(name, comment string, edit func([]byte) []byte) {
		g.add(name, comment, fault.Integrity, sampleHeader(512), edit)
	}
	add("integrity-suite", "other suite", set(8, 2))
	add("integrity-chunk", "other chunk size", set(9, 12))
	add("integrity-sparse", "dense file called sparse", set(10, 0, 1))
	add("integrity-contents", "suite and chunk size taken away", set(8, 0, 0))
	add("integrity-store", "other store id", set(16, 0xff))
	add("integrity-file", "other file id", set(47, 0))
	add("integrity-commitment-first", "first bit of the commitment", func(b []byte) []byte { b[48] ^= 0x80; return b })
	add("integrity-commitment-last", "last bit of the commitment", func(b []byte) []byte { b[79] ^= 1; return b })
	add("integrity-size", "block and its size field grown together", func(b []byte) []byte {
		return append(set(12, 0, 0, 4, 0)(b), make([]byte, 512)...)
	})
	add("integrity-dek", "other data key", nil)
	v := g.out["integrity-dek.txt"]
	v.dek = bytes.Repeat([]byte{0xee}, keywrap.DataKeyLen)
}

// sharedHeader is sampleHeader of a shared key. Its recipient ends, and the
// branch id begins, at sharedTrailer.
func sharedHeader(size int) *envelope.Header {
	h := sampleHeader(size)
	h.Shared = true
	for i := range h.Branch {
		h.Branch[i] = byte(0xa0 + i)
	}
	return h
}

const sharedTrailer = 84 + 6 + len("general") + len("keyring:general") + 3 + len("v1")

func (g *generator) shared() {
	valid := func(name, comment string, size int, edit func(h *envelope.Header)) {
		h := sharedHeader(size)
		edit(h)
		g.add(name, comment, fault.None, h, nil)
	}
	valid("valid-shared", "data key wrapped under a branch key", 512, func(*envelope.Header) {})
	valid("valid-shared-sparse", "the same, of a sparse file with two recipients", 1024, func(h *envelope.Header) {
		h.Sparse = true
		h.Recipients = []envelope.Recipient{recipient("phi", "keyring:a", 66, "00000001"), recipient("phi", "keyring:b", 66, "00000002")}
	})
	valid("valid-shared-full", "recipient and branch fill the block to the last byte", 512, func(h *envelope.Header) {
		h.Recipients = []envelope.Recipient{recipient("c", "keyring:k", 512-84-6-len("c")-len("keyring:k")-56, "")}
	})

	bad := func(name, comment string, edit func([]byte) []byte) {
		g.add(name, comment, fault.BadFormat, sharedHeader(512), edit)
	}
	bad("bad-shared-version-1", "flag of a shared key in version 1", set(6, 0, 1))
	bad("bad-shared-flag", "version 2 without the flag", set(10, 0, 0))
	bad("bad-shared-version-3", "format version 3", set(6, 0, 3))
	bad("bad-shared-downgrade", "version and flag of version 1, the branch still there", func(b []byte) []byte { return set(10, 0, 0)(set(6, 0, 1)(b)) })
	bad("bad-shared-no-contents", "shared key without contents", set(8, 0, 0))
	bad("bad-shared-no-branch", "branch id of zeros", set(sharedTrailer, make([]byte, 16)...))
	bad("bad-shared-padding", "first byte after the wrapped data key", set(sharedTrailer+56, 1))
	bad("bad-shared-flag-unknown", "unknown flag beside", set(10, 0, 6))
	g.add("bad-shared-cut", "no room for the whole branch", fault.BadFormat, sampleHeader(512), func(b []byte) []byte {
		r := rawRecipient("c", "keyring:k", strings.Repeat("b", 512-84-6-len("c")-len("keyring:k")-55), "")
		clear(b[80:])
		b[7], b[11], b[80], b[82], b[83] = 2, 2, 1, byte(len(r)>>8), byte(len(r))
		copy(b[84:], r)
		return append(b[:84+len(r)], bytes.Repeat([]byte{0xa0}, 55)...)
	})
	g.add("bad-upgrade", "version and flag of a shared key, and no branch", fault.BadFormat, sampleHeader(512), func(b []byte) []byte {
		return set(10, 0, 2)(set(6, 0, 2)(b))
	})
	g.sharedIntegrity()
}

func (g *generator) sharedIntegrity() {
	add := func(name, comment string, edit func([]byte) []byte) {
		g.add("integrity-shared-"+name, comment, fault.Integrity, sharedHeader(512), edit)
	}
	flip := func(off int, bit byte) func([]byte) []byte {
		return func(b []byte) []byte { b[off] ^= bit; return b }
	}
	add("branch", "other branch id", flip(sharedTrailer, 0x80))
	add("sealed-first", "first bit of the wrapped data key", flip(sharedTrailer+16, 0x80))
	add("sealed-last", "last bit of the wrapped data key", flip(sharedTrailer+55, 1))
	add("class", "recipient's class", set(85, 'G'))
	add("file", "other file id", flip(47, 1))
	add("store", "other store id", flip(16, 1))
	add("sparse", "dense file called sparse", set(10, 0, 3))
	add("suite", "other suite", set(8, 2))
	add("downgrade", "made a header of version 1 whose data key is the branch key", func(b []byte) []byte {
		clear(b[sharedTrailer:])
		return set(10, 0, 0)(set(6, 0, 1)(b))
	})
	v := g.out["integrity-shared-downgrade.txt"]
	v.dek, v.branch = vectorBranch, nil
	add("key", "other branch key", nil)
	g.out["integrity-shared-key.txt"].branch = vectorDEK
}

// bornHeader gives a header the third birth of the journal's seventh epoch.
func bornHeader(h *envelope.Header) *envelope.Header {
	h.Birth = 7<<32 | 3
	return h
}

// F-66, F-67
func (g *generator) born() {
	valid := func(name, comment string, h *envelope.Header) { g.add("valid-born"+name, comment, fault.None, h, nil) }
	valid("", "header with a birth", bornHeader(sampleHeader(512)))
	valid("-shared", "the same, data key wrapped under a branch key", bornHeader(sharedHeader(512)))
	full := bornHeader(sampleHeader(512))
	full.Sparse = true
	full.Recipients = []envelope.Recipient{recipient("c", "keyring:k", 512-92-6-len("c")-len("keyring:k"), "")}
	valid("-full", "the same of a sparse file, its recipient fills the block to the last byte", full)

	bad := func(name, comment string, edit func([]byte) []byte) {
		g.add("bad-born-"+name, comment, fault.BadFormat, bornHeader(sampleHeader(512)), edit)
	}
	bad("zero", "birth of zeros", set(48, make([]byte, 8)...))
	bad("version-1", "version 1, the birth still there", set(6, 0, 1))
	bad("version-4", "format version 4", set(6, 0, 4))
	bad("no-contents", "birth without contents", set(8, 0, 0))
	bad("flag-unknown", "unknown flag", set(10, 0, 4))
	bad("reserved", "reserved byte", set(89, 1))
	bad("padding-last", "last byte of the padding", set(511, 1))

	integrity := func(name, comment string, edit func([]byte) []byte) {
		g.add("integrity-born-"+name, comment, fault.Integrity, bornHeader(sampleHeader(512)), edit)
	}
	integrity("epoch", "birth of another epoch", set(51, 8))
	integrity("serial", "another birth of the epoch", set(55, 4))
	integrity("file", "other file id", set(47, 0))
	integrity("commitment-last", "last bit of the commitment", func(b []byte) []byte { b[87] ^= 1; return b })
	integrity("taken", "birth taken away, version 1", func(b []byte) []byte {
		return set(6, 0, 1)(takeBirth(b))
	})
	g.add("integrity-born-shared-taken", "birth taken away from a shared header, version 2", fault.Integrity, bornHeader(sharedHeader(512)), func(b []byte) []byte {
		return set(6, 0, 2)(takeBirth(b))
	})
}

// takeBirth cuts the birth out of a block.
func takeBirth(b []byte) []byte {
	return append(append(b[:48:48], b[56:]...), make([]byte, 8)...)
}

func makeVectors(t testing.TB) map[string]*vector {
	g := &generator{t: t, out: map[string]*vector{}}
	g.valid()
	g.badFixed()
	g.badRecipients()
	g.integrity()
	g.shared()
	g.born()
	return g.out
}
