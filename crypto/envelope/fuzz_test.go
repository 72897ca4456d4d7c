package envelope_test

import (
	"bytes"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
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
