package chunkfile_test

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"
)

// TestHoleInWhatIsDurable: a hole waits for the journal like bytes do, and is
// made by the last close.
func TestHoleInWhatIsDurable(t *testing.T) {
	for _, base := range bases {
		s := newStored(t, 4096, base)
		want := bytes.Repeat([]byte{7}, 4*4096)
		step := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		_, err := s.f.WriteAt(want, 0)
		step(err)
		for _, at := range []int64{4096, 8192} { // the header changes with the first
			step(s.close())
			step(s.open()) // all of it counts as durable
			step(s.f.Allocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, 4096))
			clear(want[at : at+4096])
		}
		if s.f.Pending() == 0 {
			t.Error("nothing is pending")
		}
		step(s.close())
		step(s.open())
		if got, err := contents(s.f); err != nil || !bytes.Equal(got, want) {
			t.Errorf("base %d: %v, byte %d differs", base, err, firstDiff(got, want))
		}
	}
}
