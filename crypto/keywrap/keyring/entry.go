package keyring

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/aead/aesgcm"
	"github.com/tink-crypto/tink-go/v2/insecurecleartextkeyset"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/tink"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

const (
	blobVersion   = 0x01
	tinkPrefix    = 0x01
	tinkPrefixLen = 5
	blobLen       = 1 + tinkPrefixLen + nonceLen + keywrap.DataKeyLen + tagLen
	uriPrefix     = "keyring:"
)

// entry is one key with its versions. It does not change once it is in a
// contents.
type entry struct {
	name       string
	state      keywrap.State
	created    time.Time
	rotated    time.Time
	deletionAt time.Time
	handle     *keyset.Handle
	aead       tink.AEAD
	ids        map[uint32]bool
	primary    uint32
}

func validName(name string) bool {
	if name == "" || len(name) > 63 {
		return false
	}
	for i, c := range []byte(name) {
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || !strings.ContainsRune("._-", rune(c))) {
			return false
		}
	}
	return true
}

// newEntry makes a key with one fresh version.
func newEntry(name string, now time.Time) (*entry, error) {
	e := &entry{name: name, state: keywrap.Enabled, created: now}
	return e, e.addVersion(keyset.NewManager())
}

// rotate returns a copy of e with a further version, which is primary.
func (e *entry) rotate(now time.Time) (*entry, error) {
	if len(e.ids) >= maxVersions {
		return nil, fmt.Errorf("%d versions of key %q: %w", len(e.ids), e.name, ErrFull)
	}
	out := *e
	out.rotated = now
	return &out, out.addVersion(keyset.NewManagerFromHandle(e.handle))
}

func (e *entry) addVersion(m *keyset.Manager) error {
	id, err := m.Add(aead.AES256GCMKeyTemplate())
	if err != nil {
		return err
	}
	if err := m.SetPrimary(id); err != nil {
		return err
	}
	h, err := m.Handle()
	if err != nil {
		return err
	}
	return e.setHandle(h)
}

// setHandle takes a keyset after checking that its keys are of the one kind
// that the format has: nothing in a file chooses an algorithm.
func (e *entry) setHandle(h *keyset.Handle) error {
	if h.Len() < 1 || h.Len() > maxVersions {
		return fmt.Errorf("%d versions: %w", h.Len(), ErrFormat)
	}
	e.ids, e.primary = make(map[uint32]bool, h.Len()), 0
	for i := range h.Len() {
		v, err := h.Entry(i)
		if err != nil {
			return fmt.Errorf("version %d: %w", i, ErrFormat)
		}
		k, ok := v.Key().(*aesgcm.Key)
		if !ok || v.KeyStatus() != keyset.Enabled || !isAES256GCM(k) || e.ids[v.KeyID()] {
			return fmt.Errorf("version %d is no enabled AES-256-GCM key of its own id: %w", i, ErrFormat)
		}
		e.ids[v.KeyID()] = true
		if v.IsPrimary() {
			e.primary = v.KeyID()
		}
	}
	if !e.ids[e.primary] {
		return fmt.Errorf("no primary version: %w", ErrFormat)
	}
	a, err := aead.New(h)
	if err != nil {
		return fmt.Errorf("keyset: %w", ErrFormat)
	}
	e.handle, e.aead = h, a
	return nil
}

func isAES256GCM(k *aesgcm.Key) bool {
	p, ok := k.Parameters().(*aesgcm.Parameters)
	return ok && p.KeySizeInBytes() == 32 && p.IVSizeInBytes() == nonceLen &&
		p.TagSizeInBytes() == tagLen && p.Variant() == aesgcm.VariantTink
}

func (e *entry) readKeyset(b []byte) error {
	h, err := insecurecleartextkeyset.Read(keyset.NewBinaryReader(bytes.NewReader(b)))
	if err != nil {
		return fmt.Errorf("keyset: %w", ErrFormat)
	}
	return e.setHandle(h)
}

// writeKeyset returns the keyset in clear. The caller wipes it.
func (e *entry) writeKeyset() ([]byte, error) {
	var buf bytes.Buffer
	if err := insecurecleartextkeyset.Write(e.handle, keyset.NewBinaryWriter(&buf)); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// gone reports whether the waiting period is over, so that the key counts as
// deleted although the file still has it.
func (e *entry) gone(now time.Time) bool {
	return e.state == keywrap.PendingDeletion && !now.Before(e.deletionAt)
}

// usable returns the failure that the key's state means for a caller.
func (e *entry) usable() error {
	switch e.state {
	case keywrap.Enabled:
		return nil
	case keywrap.PendingDeletion:
		return keywrap.ErrPending
	}
	return keywrap.ErrDisabled
}

func materialID(id uint32) string { return fmt.Sprintf("%08x", id) }

func associatedData(name string, ec keywrap.Context) []byte {
	pairs := ec.Map()
	list := []string{"kmsfs keyring data key v1", name}
	for _, k := range slices.Sorted(maps.Keys(pairs)) {
		list = append(list, k, pairs[k])
	}
	return joinStrings(list...)
}

// wrap seals plain under the primary version.
func (e *entry) wrap(ec keywrap.Context, plain *keymem.Key) (keywrap.Wrapped, error) {
	if plain.Len() != keywrap.DataKeyLen {
		return keywrap.Wrapped{}, keywrap.ErrKeyLength
	}
	ct, err := e.aead.Encrypt(plain.Bytes(), associatedData(e.name, ec))
	if err != nil {
		return keywrap.Wrapped{}, fmt.Errorf("%w: %w", keywrap.ErrUnavailable, err)
	}
	return keywrap.Wrapped{
		Key:      uriPrefix + e.name,
		Blob:     append([]byte{blobVersion}, ct...),
		Material: materialID(e.primary),
	}, nil
}

// unwrap is the inverse of wrap, under whichever version made blob.
func (e *entry) unwrap(ec keywrap.Context, blob []byte) (*keymem.Key, error) {
	if len(blob) != blobLen || blob[0] != blobVersion || blob[1] != tinkPrefix {
		return nil, keywrap.ErrCiphertext
	}
	if !e.ids[binary.BigEndian.Uint32(blob[2:])] {
		return nil, keywrap.ErrCiphertext
	}
	plain, err := e.aead.Decrypt(blob[1:], associatedData(e.name, ec))
	if err != nil || len(plain) != keywrap.DataKeyLen {
		clear(plain)
		return nil, keywrap.ErrCiphertext
	}
	return keymem.Take(plain), nil
}
