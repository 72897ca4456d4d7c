package integration

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// This file reads stores by docs/format.md with the standard library alone. It
// is the second implementation that shows whether the page is enough.

func hkdfExpand(prk []byte, info string, n int) []byte {
	b, err := hkdf.Expand(sha256.New, prk, info, n)
	if err != nil {
		panic(err)
	}
	return b
}

func hmacOf(key []byte, parts ...[]byte) []byte {
	h := hmac.New(sha256.New, key)
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

func u32(n int) []byte { return binary.BigEndian.AppendUint32(nil, uint32(n)) }
func u64(n int) []byte { return binary.BigEndian.AppendUint64(nil, uint64(n)) }

// readerKeyring opens wrapped keys with an unprotected keyring file (section 11).
type readerKeyring map[string]map[uint32][]byte // name -> key id -> AES key

func readKeyring(path string) (readerKeyring, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var doc struct {
		Format  string
		Version int
		Keys    []struct {
			Name   string
			Keyset []byte
		}
	}
	if err := json.Unmarshal(b, &doc); err != nil || doc.Format != "kmsfs-keyring" || doc.Version != 1 {
		return nil, fmt.Errorf("keyring: %q version %d: %w", doc.Format, doc.Version, err)
	}
	out := readerKeyring{}
	for _, k := range doc.Keys {
		out[k.Name] = map[uint32][]byte{}
		for _, key := range protoFields(k.Keyset)[2] { // tink Keyset.key
			f := protoFields(key)
			data := protoFields(f[1][0]) // Key.key_data
			id, _ := binary.Uvarint(f[3][0])
			out[k.Name][uint32(id)] = protoFields(data[2][0])[3][0] // AesGcmKey.key_value
		}
	}
	return out, nil
}

// protoFields splits a protobuf message: field number to values. A varint stays
// encoded.
func protoFields(b []byte) map[uint64][][]byte {
	out := map[uint64][][]byte{}
	for len(b) > 0 {
		tag, n := binary.Uvarint(b)
		b = b[n:]
		v, n := binary.Uvarint(b)
		if tag&7 == 0 {
			out[tag>>3] = append(out[tag>>3], b[:n])
			b = b[n:]
			continue
		}
		out[tag>>3] = append(out[tag>>3], b[n:n+int(v)])
		b = b[n+int(v):]
	}
	return out
}

func gcm(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	a, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return a
}

func (k readerKeyring) unwrap(uri string, blob []byte, context map[string]string) ([]byte, error) {
	name, ok := strings.CutPrefix(uri, "keyring:")
	if !ok || len(blob) != 66 || blob[0] != 1 || blob[1] != 1 {
		return nil, fmt.Errorf("wrapped key of %d bytes under %q", len(blob), uri)
	}
	list := []string{"kmsfs keyring data key v1", name}
	names := []string{}
	for n := range context {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		list = append(list, n, context[n])
	}
	var ad []byte
	for _, s := range list {
		ad = append(append(ad, u32(len(s))...), s...)
	}
	key := k[name][binary.BigEndian.Uint32(blob[2:])]
	if key == nil {
		return nil, fmt.Errorf("no version of %q opens the wrapped key", uri)
	}
	return gcm(key).Open(nil, blob[6:18], blob[18:], ad)
}

// readerHeader is a header block (section 4).
type readerHeader struct {
	suite, log2   byte
	flags         uint16
	store, id     []byte
	commitment    []byte
	class, uri    string // of the first recipient
	blob          []byte
	authenticated []byte
}

func readHeader(b []byte) (*readerHeader, error) {
	if len(b) < 512 || string(b[:7]) != "kmsfs\x00\x00" || b[7] != 1 && b[7] != 3 || int(binary.BigEndian.Uint32(b[12:])) != len(b) {
		return nil, fmt.Errorf("header of %d bytes", len(b))
	}
	h := &readerHeader{suite: b[8], log2: b[9], flags: binary.BigEndian.Uint16(b[10:]),
		store: b[16:32], id: b[32:48]}
	at := 48
	if b[7] == 3 { // with a birth
		at = 56
	}
	h.authenticated, h.commitment = b[:at], b[at:at+32]
	counts := b[at+32:]
	end := at + 36 + int(binary.BigEndian.Uint16(counts[2:]))
	if counts[0] < 1 || counts[0] > 8 || counts[1] != 0 || len(bytes.Trim(b[end:], "\x00")) > 0 {
		return nil, errors.New("header: recipients")
	}
	r := b[at+36 : end]
	field := func(lengthBytes int) []byte {
		n := int(r[0])
		if lengthBytes == 2 {
			n = int(binary.BigEndian.Uint16(r))
		}
		f := r[lengthBytes : lengthBytes+n]
		r = r[lengthBytes+n:]
		return f
	}
	h.class, h.uri, h.blob = string(field(1)), string(field(2)), field(2)
	return h, nil
}

// open returns the PRK of the key that the header carries.
func (h *readerHeader) open(k readerKeyring, purpose string) ([]byte, error) {
	dek, err := k.unwrap(h.uri, h.blob, map[string]string{
		"kmsfs:store": hex.EncodeToString(h.store), "kmsfs:class": h.class,
		"kmsfs:purpose": purpose, "kmsfs:id": hex.EncodeToString(h.id),
	})
	if err != nil {
		return nil, err
	}
	prk, err := hkdf.Extract(sha256.New, dek, append(bytes.Clone(h.store), h.id...))
	if err != nil {
		return nil, err
	}
	if !hmac.Equal(hmacOf(hkdfExpand(prk, "kmsfs v1 header", 32), h.authenticated), h.commitment) {
		return nil, errors.New("commitment")
	}
	return prk, nil
}

// openChunk opens a slot (section 3), AES-256-GCM only.
func openChunk(prk, slot []byte, index int, last bool) ([]byte, error) {
	if len(slot) < 33 || slot[0] != 0x20 || slot[1] != 0 || slot[4]&0x80 == 0 ||
		int(binary.LittleEndian.Uint16(slot[2:])) != len(slot)-33 {
		return nil, fmt.Errorf("slot %d of %d bytes", index, len(slot))
	}
	info := "kmsfs v1 chunk" + string(u64(index)) + "\x00"
	if last {
		info = info[:len(info)-1] + "\x01"
	}
	return gcm(hkdfExpand(prk, info, 32)).Open(nil, slot[4:16], slot[16:], slot[:4])
}

// cmac is RFC 4493.
func cmac(key, msg []byte) []byte {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	k := make([]byte, 16)
	block.Encrypt(k, k)
	k = dbl(k)
	if n := len(msg); n == 0 || n%16 != 0 {
		k = dbl(k)
		msg = append(append(bytes.Clone(msg), 0x80), make([]byte, (16-(n+1)%16)%16)...)
	}
	x := make([]byte, 16)
	for i := 0; i < len(msg); i += 16 {
		for j := range x {
			x[j] ^= msg[i+j]
			if i+16 == len(msg) {
				x[j] ^= k[j]
			}
		}
		block.Encrypt(x, x)
	}
	return x
}

// dbl is RFC 5297, section 2.3.
func dbl(b []byte) []byte {
	out := make([]byte, 16)
	for i := range 15 {
		out[i] = b[i]<<1 | b[i+1]>>7
	}
	out[15] = b[15]<<1 ^ b[0]>>7*0x87
	return out
}

// openSIV is AES-SIV (RFC 5297) with one associated-data string.
func openSIV(key, sealed, ad []byte) ([]byte, error) {
	block, err := aes.NewCipher(key[32:])
	if err != nil || len(sealed) < 16 {
		return nil, fmt.Errorf("sealed value of %d bytes", len(sealed))
	}
	q := bytes.Clone(sealed[:16])
	q[8] &= 0x7f
	q[12] &= 0x7f
	plain := make([]byte, len(sealed)-16)
	cipher.NewCTR(block, q).XORKeyStream(plain, sealed[16:])

	d := dbl(cmac(key[:32], make([]byte, 16)))
	for i, c := range cmac(key[:32], ad) {
		d[i] ^= c
	}
	t := bytes.Clone(plain)
	if len(plain) >= 16 {
		for i := range d {
			t[len(t)-16+i] ^= d[i]
		}
	} else {
		t = append(append(t, 0x80), make([]byte, 15-len(plain))...)
		for i, c := range dbl(d) {
			t[i] ^= c
		}
	}
	if !hmac.Equal(cmac(key[:32], t), sealed[:16]) {
		return nil, errors.New("AES-SIV")
	}
	return plain, nil
}

// readerStore is a store, opened by its page.
type readerStore struct {
	dir        string
	keys       readerKeyring
	body       readerBody
	recordKey  []byte
	journalKey []byte
	names      map[string][]byte // class -> PRK of its name key
}

type readerBody struct {
	ID, Placement, Suite string
	HeaderSize           int `json:"header_size"`
	Policy               struct {
		Classes map[string]struct {
			Names     string
			ChunkSize int `json:"chunk_size"`
		}
	}
	Names map[string]string
}

func openReader(dir, keyringFile string) (*readerStore, error) {
	s := &readerStore{dir: dir, names: map[string][]byte{}}
	var err error
	if s.keys, err = readKeyring(keyringFile); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, ".kmsfs", "store"))
	if err != nil {
		return nil, err
	}
	lines := strings.SplitAfter(string(b), "\n")
	if len(lines) != 5 || lines[0] != "kmsfs store 1\n" {
		return nil, fmt.Errorf("store record of %d lines", len(lines)-1)
	}
	var blocks struct{ Store, Names map[string][]byte }
	if err := errors.Join(json.Unmarshal([]byte(lines[1]), &s.body), json.Unmarshal([]byte(lines[3]), &blocks)); err != nil {
		return nil, err
	}
	for class := range s.body.Policy.Classes {
		if err := s.openClass(class, blocks.Store[class], blocks.Names[class], lines); err != nil {
			return nil, fmt.Errorf("class %s: %w", class, err)
		}
	}
	return s, nil
}

// openClass unwraps the store key as a member of one class would, checks the
// record with it, and unwraps the class's name key.
func (s *readerStore) openClass(class string, storeBlock, nameBlock []byte, lines []string) error {
	h, err := readHeader(storeBlock)
	if err != nil {
		return err
	}
	prk, err := h.open(s.keys, "store")
	if err != nil {
		return fmt.Errorf("store key: %w", err)
	}
	if id := hex.EncodeToString(h.id); h.class != class || id != s.body.ID || h.log2 != 0 {
		return fmt.Errorf("store key of class %s, id %s", h.class, id)
	}
	s.recordKey, s.journalKey = hkdfExpand(prk, "kmsfs v1 store record", 32), hkdfExpand(prk, "kmsfs v1 journal", 32)
	mac := hmacOf(s.recordKey, []byte(lines[0]+lines[1]))
	if lines[2] != "mac "+hex.EncodeToString(mac)+"\n" {
		return errors.New("store record: MAC")
	}
	file, err := os.ReadFile(filepath.Join(s.dir, ".kmsfs", "classes", class))
	if err != nil || !bytes.Equal(file, nameBlock) {
		return fmt.Errorf("class file differs from the record's copy: %w", err)
	}
	if h, err = readHeader(file); err != nil {
		return err
	}
	if hex.EncodeToString(h.commitment) != s.body.Names[class] {
		return errors.New("name key is not the record's")
	}
	s.names[class], err = h.open(s.keys, "names")
	return err
}

// readerDir is a directory of the store.
type readerDir struct {
	s     *readerStore
	path  string
	id    []byte
	class string
}

func (s *readerStore) openDir(path string) (*readerDir, error) {
	path = filepath.Join(s.dir, path)
	b, err := os.ReadFile(filepath.Join(path, ".kmsfs.dir"))
	if err != nil || len(b) < 60 || string(b[:10]) != "kmsfsdir\x00\x01" || len(b) != 27+int(b[26])+32 {
		return nil, fmt.Errorf("directory record of %d bytes: %w", len(b), err)
	}
	body := b[:len(b)-32]
	d := &readerDir{s, path, body[10:26], string(body[27:])}
	key := hkdfExpand(s.names[d.class], "kmsfs v1 record", 32)
	if !hmac.Equal(hmacOf(key, u64(9), []byte("directory"), u64(len(body)), body), b[len(body):]) {
		return nil, errors.New("directory record: MAC")
	}
	return d, nil
}

func (d *readerDir) siv(label string, sealed, ad []byte) (string, error) {
	b, err := openSIV(hkdfExpand(d.s.names[d.class], label, 64), sealed, ad)
	return string(b), err
}

var base64Name = base64.RawURLEncoding.Strict()

// list returns the plaintext names with their entries.
func (d *readerDir) list() (map[string]string, error) {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, e := range entries {
		enc := e.Name()
		hash, long := strings.CutPrefix(enc, ".kmsfs.l.")
		if strings.HasPrefix(enc, ".kmsfs") && !long {
			continue
		}
		if d.s.body.Policy.Classes[d.class].Names == "plain" {
			out[enc] = enc
			continue
		}
		if long {
			b, err := os.ReadFile(filepath.Join(d.path, ".kmsfs.n."+hash))
			sum := sha256.Sum256(b)
			if err != nil || base64Name.EncodeToString(sum[:]) != hash {
				return nil, fmt.Errorf("long name %s: %w", hash, err)
			}
			enc = string(b)
		}
		sealed, err := base64Name.DecodeString(enc)
		if err != nil {
			return nil, err
		}
		name, err := d.siv("kmsfs v1 name", sealed, d.id)
		if err != nil {
			return nil, err
		}
		out[strings.TrimRight(name, "\x00")] = e.Name()
	}
	return out, nil
}
