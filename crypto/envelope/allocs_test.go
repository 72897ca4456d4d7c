//go:build !race

package envelope_test

import (
	"testing"

	"github.com/kmsfs/kmsfs/crypto/envelope"
)

// TestParseAllocations holds what the header of a file with two recipients
// allocates: itself, and the fields of each recipient.
func TestParseAllocations(t *testing.T) {
	_, h := kmsBench(t)
	block, err := h.Encode(h.BlockSize)
	if err != nil {
		t.Fatal(err)
	}
	const want = 9
	if got := testing.AllocsPerRun(1000, func() {
		if _, err := envelope.Parse(block); err != nil {
			t.Fatal(err)
		}
	}); got > want {
		t.Errorf("Parse allocates %v times, want at most %v", got, want)
	}
}
