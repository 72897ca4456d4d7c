package kmsserver

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"regexp"
	"sort"
)

// A ciphertext blob is
//
//	prefix   5 bytes   01 02 02 00 78, as the blobs of AWS begin (base64 "AQICAHg")
//	material 32 bytes  key-material id
//	key id   36 bytes  UUID or "mrk-" and 32 hexadecimal digits
//	padding  51 bytes  random
//	nonce    12 bytes
//	sealed   AES-256-GCM of the plaintext, 16 bytes longer
//
// which is 152 bytes more than the plaintext, as at AWS. Everything before the
// sealed part, and the encryption context, is associated data.
const (
	blobPrefix  = "\x01\x02\x02\x00\x78"
	materialLen = 32
	keyIDLen    = 36
	paddingLen  = 51
	nonceLen    = 12
	tagLen      = 16
	headLen     = len(blobPrefix) + materialLen + keyIDLen + paddingLen + nonceLen
	maxPlain    = 4096
	maxBlob     = 6144
)

var keyIDForm = regexp.MustCompile(`^([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|mrk-[0-9a-f]{32})$`)

// blobIDs reads who sealed a blob; ok is false for bytes that no server of
// this kind made.
func blobIDs(blob []byte) (keyID, materialID string, ok bool) {
	if len(blob) < headLen+tagLen+1 || len(blob) > maxBlob || string(blob[:len(blobPrefix)]) != blobPrefix {
		return "", "", false
	}
	rest := blob[len(blobPrefix):]
	materialID = hex.EncodeToString(rest[:materialLen])
	keyID = string(rest[materialLen : materialLen+keyIDLen])
	return keyID, materialID, keyIDForm.MatchString(keyID)
}

func (k *key) seal(plain []byte, context map[string]string) (blob []byte, materialID string) {
	m := k.set.current()
	id, err := hex.DecodeString(m.ID)
	if err != nil || len(id) != materialLen || len(k.ID) != keyIDLen {
		panic("kmsserver: key with an impossible id") // newKey and load make no such key
	}
	blob = make([]byte, headLen, headLen+len(plain)+tagLen)
	n := copy(blob, blobPrefix)
	n += copy(blob[n:], id)
	n += copy(blob[n:], k.ID)
	rand.Read(blob[n:])
	return m.aead().Seal(blob, blob[headLen-nonceLen:headLen], plain, associated(blob[:headLen], context)), m.ID
}

// open opens a blob of this key; ok is false for wrong bytes, a wrong context
// or key material that the key never had.
func (k *key) open(blob []byte, context map[string]string) (plain []byte, materialID string, ok bool) {
	_, materialID, ok = blobIDs(blob)
	if !ok {
		return nil, "", false
	}
	for i := range k.set.Versions {
		m := &k.set.Versions[i]
		if m.ID != materialID {
			continue
		}
		head, sealed := blob[:headLen], blob[headLen:]
		plain, err := m.aead().Open(nil, head[headLen-nonceLen:], sealed, associated(head, context))
		return plain, materialID, err == nil
	}
	return nil, "", false
}

func (m *material) aead() cipher.AEAD {
	block, err := aes.NewCipher(m.Bytes)
	if err != nil {
		panic(err) // load and add make 32 bytes
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return gcm
}

// associated is the head and a digest of the sorted, length-prefixed pairs.
func associated(head []byte, context map[string]string) []byte {
	names := make([]string, 0, len(context))
	for k := range context {
		names = append(names, k)
	}
	sort.Strings(names)
	var pairs []byte
	for _, k := range names {
		for _, s := range []string{k, context[k]} {
			pairs = binary.BigEndian.AppendUint32(pairs, uint32(len(s)))
			pairs = append(pairs, s...)
		}
	}
	sum := sha256.Sum256(pairs)
	return append(append([]byte(nil), head...), sum[:]...)
}
