package cryptfs

import (
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/classify"
)

// TestKilledAfterCheckpoint: a file that is being appended to ends in a chunk
// that is not sealed as the last. A checkpoint does not forget that.
func TestKilledAfterCheckpoint(t *testing.T) {
	for _, p := range everyPlace {
		t.Run(p.String(), func(t *testing.T) {
			dir, prov, _ := testStore(t, p, classify.NamesPlain)
			v := openStore(t, dir, prov)
			_, h, _, err := v.Create(t.Context(), v.Root(), "f", unix.O_RDWR, 0o644, Caller{})
			if err != nil {
				t.Fatal(err)
			}
			defer h.Release()
			if _, err := h.WriteAt(make([]byte, 3*4096+10), 0, false); err != nil {
				t.Fatal(err)
			}
			if err := v.Checkpoint(); err != nil {
				t.Fatal(err)
			}
			if err := v.Checkpoint(); err != nil {
				t.Fatal(err)
			}
			killed := t.TempDir() + "/s"
			if out, err := exec.Command("cp", "-a", dir, killed).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			_ = os.Remove(killed + "/.kmsfs/lease")
			after := openStore(t, killed, prov)
			n, _, err := after.Lookup(t.Context(), after.Root(), "f")
			if err != nil {
				t.Fatal(err)
			}
			again, err := after.Open(t.Context(), n, unix.O_RDONLY, false)
			if err != nil {
				t.Fatal(err)
			}
			again.Release()
		})
	}
}
