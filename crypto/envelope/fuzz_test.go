package envelope_test

import (
	"bytes"
	"context"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// FuzzParse holds Parse to: no panic, errors of kind BadFormat only, bounds
// kept, and one encoding per header.
func FuzzParse(f *testing.F) {
	for _, v := range loadVectors(f) {
		f.Add(v.block)
	}
	f.Fuzz(func(t *testing.T, block []byte) {
		h, err := envelope.Parse(block)
		if err != nil {
			if fault.Of(err) != fault.BadFormat || h != nil {
				t.Errorf("got header %v, error %v", h, err)
			}
			return
		}
		if n := len(h.Recipients); n < 1 || n > envelope.MaxRecipients || h.BlockSize != len(block) {
			t.Errorf("got %d recipients, block size %d", n, h.BlockSize)
		}
		if h.Shared {
			k, err := envelope.Unseal(vectorBranch, h.Recipients[0].Class, h)
			if err != nil && fault.Of(err) != fault.Integrity {
				t.Errorf("Unseal: got error %v, want integrity", err)
			}
			k.Wipe()
		}
		again, err := h.Encode(len(block))
		if err != nil || !bytes.Equal(again, block) {
			t.Errorf("encodes to %x, %v, want %x", again, err, block)
		}
	})
}

// FuzzOpen edits good headers, of a shared and of an own data key, and opens
// them through a key service that ignores the encryption context. What opens is
// the file's own key: nothing but the recipients' unauthenticated texts changed.
func FuzzOpen(f *testing.F) {
	b := newBench(f, envelope.Options{})
	b.svc.careless = true
	var blocks [2][]byte
	var prks [2]*keymem.Key
	for i := range blocks {
		b.class.Shared = i == 1
		h, k, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(envelope.NewID()), 512)
		if err != nil {
			f.Fatal(err)
		}
		if blocks[i], err = h.Encode(512); err != nil {
			f.Fatal(err)
		}
		prks[i] = k.PRK()
		f.Add(i == 1, uint16(0), []byte{})
		f.Add(i == 1, uint16(7), []byte{3, 0, 0, 0, 2})
		f.Add(i == 1, uint16(84+13+2), []byte{1})
		f.Add(i == 1, uint16(280), bytes.Repeat([]byte{1}, 40))
	}
	f.Fuzz(func(t *testing.T, shared bool, at uint16, xor []byte) {
		i := 0
		if shared {
			i = 1
		}
		block := bytes.Clone(blocks[i])
		for j, x := range xor {
			if at := int(at) + j; at < len(block) {
				block[at] ^= x
			}
		}
		h, err := envelope.Parse(block)
		if err != nil {
			return
		}
		k, err := b.m.Open(context.Background(), b.class, keywrap.PurposeData, h)
		b.m.Forget(h)
		if err != nil {
			if k != nil || fault.Of(err) == fault.None {
				t.Errorf("got key %v, error %v of no kind", k, err)
			}
			return
		}
		defer k.Wipe()
		if !k.PRK().Equal(prks[i]) || !bytes.Equal(block[:80], blocks[i][:80]) {
			t.Errorf("an edited header opens: %x", block)
		}
	})
}
