package keyring

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/aead/aesgcm"
	"github.com/tink-crypto/tink-go/v2/insecuresecretdataaccess"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/secretdata"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

const vectorPass = "vector passphrase"

func fatal(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fixedEntry is a key whose versions have the ids 1…versions and fixed bytes.
func fixedEntry(t testing.TB, name string, state keywrap.State, versions int) *entry {
	t.Helper()
	params, err := aesgcm.NewParameters(aesgcm.ParametersOpts{KeySizeInBytes: 32, IVSizeInBytes: 12, TagSizeInBytes: 16, Variant: aesgcm.VariantTink})
	fatal(t, err)
	m := keyset.NewManager()
	for id := uint32(1); id <= uint32(versions); id++ {
		k, err := aesgcm.NewKey(secretdata.NewBytesFromData(fixed(name+materialID(id), 32), insecuresecretdataaccess.Token{}), id, params)
		fatal(t, err)
		_, err = m.AddKey(k)
		fatal(t, err)
		fatal(t, m.SetPrimary(id))
	}
	h, err := m.Handle()
	fatal(t, err)
	e := &entry{name: name, state: state, created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	if versions > 1 {
		e.rotated = e.created.AddDate(0, 1, 0)
	}
	if state == keywrap.PendingDeletion {
		e.deletionAt = e.created.AddDate(0, 2, 0)
	}
	fatal(t, e.setHandle(h))
	return e
}

func fixedContents(t testing.TB) *contents {
	return &contents{keys: map[string]*entry{
		"general": fixedEntry(t, "general", keywrap.Enabled, 1),
		"old":     fixedEntry(t, "old", keywrap.PendingDeletion, 1),
		"paused":  fixedEntry(t, "paused", keywrap.Disabled, 1),
		"phi":     fixedEntry(t, "phi", keywrap.Enabled, 3),
	}}
}

// fixedWrapped wraps a data key under version id of a key of fixedEntry, by the
// description of the format and without tink or the code under test.
func fixedWrapped(t testing.TB, name string, id uint32) string {
	t.Helper()
	store, fileID := strings.Repeat("0123", 8), strings.Repeat("cdef", 8)
	block, err := aes.NewCipher(fixed(name+materialID(id), 32))
	fatal(t, err)
	gcm, err := cipher.NewGCM(block)
	fatal(t, err)
	var ad []byte
	for _, s := range []string{"kmsfs keyring data key v1", name, "kmsfs:class", "phi", "kmsfs:id", fileID, "kmsfs:purpose", "data", "kmsfs:store", store} {
		ad = binary.BigEndian.AppendUint32(ad, uint32(len(s)))
		ad = append(ad, s...)
	}
	dataKey, nonce := fixed("data key", 32), fixed("nonce", 12)
	blob := binary.BigEndian.AppendUint32([]byte{0x01, 0x01}, id)
	blob = append(blob, nonce...)
	blob = gcm.Seal(blob, nonce, dataKey, ad)
	return strings.Join([]string{"keyring:" + name, store, "phi", "data", fileID, hex.EncodeToString(blob), hex.EncodeToString(dataKey)}, " ")
}

func generateVectors(t testing.TB) map[string]vector {
	c := fixedContents(t)
	clearFile, err := encodeWithNonce(c, nil, nil)
	fatal(t, err)
	p := newProtection()
	p.Salt = fixed("salt", 16)
	key := p.derive([]byte(vectorPass))
	defer key.Wipe()
	sealed := *c
	sealed.protection = p
	sealedFile, err := encodeWithNonce(&sealed, key, fixed("nonce", nonceLen))
	fatal(t, err)
	empty, err := encodeWithNonce(&contents{keys: map[string]*entry{}}, nil, nil)
	fatal(t, err)

	out := map[string]vector{
		"valid-clear.txt":     {expect: "ok", note: "no passphrase; four keys", keys: summary(c), wrapped: fixedWrapped(t, "phi", 3), payload: clearFile},
		"valid-protected.txt": {expect: "ok", note: "the same keys under a passphrase", passphrase: vectorPass, keys: summary(c), wrapped: fixedWrapped(t, "phi", 1), payload: sealedFile},
		"valid-empty.txt":     {expect: "ok", note: "no keys", payload: empty},
	}
	brokenClear(t, out, clearFile, c)
	brokenProtected(t, out, sealedFile, p, key)
	return out
}

func brokenClear(t testing.TB, out map[string]vector, file []byte, c *contents) {
	bad := func(name, note string, payload []byte) {
		if bytes.Equal(payload, file) {
			t.Fatalf("%s: nothing changed", name)
		}
		out["bad-"+name+".txt"] = vector{expect: "bad-format", note: note, payload: payload}
	}
	edit := func(old, with string) []byte { return bytes.Replace(file, []byte(old), []byte(with), 1) }

	bad("nothing", "zero bytes", nil)
	bad("truncated", "half of a file", file[:len(file)/2])
	bad("trailing", "a second JSON value", append(bytes.Clone(file), '1'))
	bad("array", "JSON, but no object", []byte("[]\n"))
	bad("format", "another program's file", edit(formatName, "kmsfs-keychain"))
	bad("version", "a later version", edit(`"version": 1`, `"version": 2`))
	bad("member", "a member that version 1 does not have", edit(`"version": 1`, `"version": 1, "comment": ""`))
	bad("no-keys", "neither keys nor a sealed body", []byte(`{"format":"kmsfs-keyring","version":1}`))
	bad("null-keys", "keys is null", []byte(`{"format":"kmsfs-keyring","version":1,"keys":null}`))
	bad("name", "a key name with a slash", edit(`"general"`, `"gen/ral"`))
	bad("twice", "two keys of one name", edit(`"paused"`, `"old"`))
	bad("state", "an unknown state", edit(`"disabled"`, `"dormant"`))
	bad("dates", "pending deletion without a date", edit(`"deletion_at"`, `"rotated"`))
	bad("date-without-state", "a deletion date on an enabled key", edit(string(keywrap.PendingDeletion), "enabled"))
	bad("time", "a creation time that is none", edit("2026-01-02T03:04:05Z", "yesterday"))

	keysetOf := func(name string) []byte {
		ks, err := c.keys[name].writeKeyset()
		fatal(t, err)
		return ks
	}
	swap := func(name string, ks []byte) []byte {
		b64 := base64.StdEncoding.EncodeToString
		return edit(b64(keysetOf(name)), b64(ks))
	}
	bad("keyset-empty", "a keyset of no bytes", swap("general", nil))
	bad("keyset-garbage", "a keyset that is no protobuf", swap("general", []byte("garbage")))
	bad("keyset-cut", "a keyset with its end cut off", swap("general", keysetOf("general")[:40]))
	bad("keyset-aes128", "a version of another size", swap("general", aes128Keyset(t)))
	bad("keyset-no-primary", "the primary version is missing", swap("general", bytes.Replace(keysetOf("general"), []byte{0x08, 0x01}, []byte{0x08, 0x09}, 1)))
}

func aes128Keyset(t testing.TB) []byte {
	params, err := aesgcm.NewParameters(aesgcm.ParametersOpts{KeySizeInBytes: 16, IVSizeInBytes: 12, TagSizeInBytes: 16, Variant: aesgcm.VariantTink})
	fatal(t, err)
	k, err := aesgcm.NewKey(secretdata.NewBytesFromData(fixed("aes128", 16), insecuresecretdataaccess.Token{}), 1, params)
	fatal(t, err)
	m := keyset.NewManager()
	_, err = m.AddKey(k)
	fatal(t, err)
	fatal(t, m.SetPrimary(1))
	h, err := m.Handle()
	fatal(t, err)
	_, err = aead.New(h) // tink takes it; the format does not
	fatal(t, err)
	ks, err := (&entry{handle: h}).writeKeyset()
	fatal(t, err)
	return ks
}

func brokenProtected(t testing.TB, out map[string]vector, file []byte, p *protection, key *keymem.Key) {
	add := func(name, expect, note, pass string, payload []byte) {
		if pass == vectorPass && bytes.Equal(payload, file) {
			t.Fatalf("%s: nothing changed", name)
		}
		out["bad-"+name+".txt"] = vector{expect: expect, note: note, passphrase: pass, payload: payload}
	}
	edit := func(old, with string) []byte { return bytes.Replace(file, []byte(old), []byte(with), 1) }
	resealed := func(body string) []byte {
		sealed, err := p.sealWithNonce(key, fixed("nonce", nonceLen), []byte(body))
		fatal(t, err)
		data, err := document{Format: formatName, Version: formatVersion, Protection: p, Sealed: sealed}.marshal()
		fatal(t, err)
		return data
	}
	var doc document
	fatal(t, strictJSON(file, &doc))
	flipped := doc
	flipped.Sealed = bytes.Clone(doc.Sealed)
	flipped.Sealed[nonceLen+5] ^= 0x10
	flippedFile, err := flipped.marshal()
	fatal(t, err)
	both := doc
	both.Keys = []keyRecord{}
	bothFile, err := both.marshal()
	fatal(t, err)

	add("passphrase", "key-denied", "a wrong passphrase", "wrong", file)
	add("no-passphrase", "key-denied", "no passphrase given", "", file)
	add("sealed-flipped", "key-denied", "one bit of the sealed body changed", vectorPass, flippedFile)
	add("salt-changed", "key-denied", "another salt", vectorPass, edit(base64.StdEncoding.EncodeToString(p.Salt), base64.StdEncoding.EncodeToString(fixed("other", 16))))
	add("work-changed", "key-denied", "other work factors", vectorPass, edit(`"time": 1`, `"time": 2`))
	add("work-huge", "bad-format", "work factors beyond the bound", vectorPass, edit(`"time": 1`, `"time": 4000000000`))
	add("memory-huge", "bad-format", "memory beyond the bound", vectorPass, edit(`"memory_kib": 64`, `"memory_kib": 4294967295`))
	add("memory-small", "bad-format", "less memory than Argon2 allows", vectorPass, edit(`"memory_kib": 64`, `"memory_kib": 7`))
	add("threads-zero", "bad-format", "no threads", vectorPass, edit(`"threads": 1`, `"threads": 0`))
	add("salt-short", "bad-format", "a salt of 3 bytes", vectorPass, edit(base64.StdEncoding.EncodeToString(p.Salt), "AAAA"))
	add("kdf", "bad-format", "another key derivation", vectorPass, edit("argon2id", "scrypt"))
	add("cipher", "bad-format", "another cipher", vectorPass, edit("AES256-GCM", "none"))
	add("sealed-short", "bad-format", "a sealed body shorter than nonce and tag", vectorPass, edit(base64.StdEncoding.EncodeToString(doc.Sealed), "AAAA"))
	add("both", "bad-format", "sealed, with keys in clear as well", vectorPass, bothFile)
	add("body-null", "bad-format", "an authentic body without keys", vectorPass, resealed(`{}`))
	add("body-member", "bad-format", "an authentic body with an unknown member", vectorPass, resealed(`{"keys":[],"x":1}`))
}
