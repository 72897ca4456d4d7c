package cryptfs

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/classify"
)

// TestOpenWhileOthersWrite opens and reads a file while others append to it,
// cut it and close it: nobody may take the change for damage, and what is read
// is what somebody wrote.
func TestOpenWhileOthersWrite(t *testing.T) {
	for _, p := range everyPlace {
		t.Run(p.String(), func(t *testing.T) { openWhileOthersWrite(t, p) })
	}
}

func openWhileOthersWrite(t *testing.T, p envelope.Placement) {
	dir, prov, _ := testStore(t, p, classify.NamesEncrypted)
	v := openStore(t, dir, prov)
	n, h, _, err := v.Create(t.Context(), v.Root(), "f", unix.O_RDWR, 0o644, Caller{})
	if err != nil {
		t.Fatal(err)
	}
	h.Release()
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 2))
			for range 150 {
				flags := unix.O_RDWR
				if rnd.IntN(4) == 0 {
					flags |= unix.O_TRUNC
				}
				h, err := v.Open(t.Context(), n, flags, false)
				if err != nil {
					t.Errorf("open for writing: %v", err)
					return
				}
				if _, err := h.WriteAt(bytes.Repeat([]byte{'x'}, 1+rnd.IntN(9000)), int64(rnd.IntN(5000)), false); err != nil {
					t.Errorf("write: %v", err)
				}
				h.Release()
			}
		})
		wg.Go(func() {
			buf := make([]byte, 20000)
			for range 300 {
				h, err := v.Open(t.Context(), n, unix.O_RDONLY, false)
				if err != nil {
					t.Errorf("open for reading: %v", err)
					return
				}
				k, err := h.ReadAt(buf, 0)
				if err != nil || len(bytes.Trim(buf[:k], "x\x00")) > 0 {
					t.Errorf("read: %d bytes, %v", k, err)
				}
				h.Release()
			}
		})
	}
	wg.Wait()
	if got := v.Status().Counters.OpenFiles; got != 0 {
		t.Errorf("%d files left open", got)
	}
}
