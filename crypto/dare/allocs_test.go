//go:build !race

package dare_test

import (
	"testing"

	"github.com/kmsfs/kmsfs/crypto/dare"
)

// TestAllocations holds what one chunk allocates, whatever its size: its key's
// schedule and state, never room for its contents.
func TestAllocations(t *testing.T) {
	const index = 3
	for _, tt := range []struct {
		suite      dare.Suite
		seal, open float64
	}{{suites[0], 6, 4}, {suites[1], 5, 3}} {
		for _, size := range []int{4 << 10, 64 << 10} {
			c, plain := newCodec(t, 1, tt.suite, size), pattern(size)
			slot := seal(t, c, plain, index, false)
			sealed, opened := make([]byte, 0, size+dare.Overhead), make([]byte, 0, size)
			if got := testing.AllocsPerRun(1000, func() {
				if _, err := c.Seal(sealed, plain, index, false); err != nil {
					t.Fatal(err)
				}
			}); got > tt.seal {
				t.Errorf("%v, %d bytes: Seal allocates %v times, want at most %v", tt.suite, size, got, tt.seal)
			}
			if got := testing.AllocsPerRun(1000, func() {
				if _, err := c.Open(opened, slot, index, false); err != nil {
					t.Fatal(err)
				}
			}); got > tt.open {
				t.Errorf("%v, %d bytes: Open allocates %v times, want at most %v", tt.suite, size, got, tt.open)
			}
		}
	}
}
