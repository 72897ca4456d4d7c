package cryptfs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/classify"
)

// TestSharedSidecar works on a store that was copied without its hard links:
// several files need one sidecar, and none may take it from the others.
func TestSharedSidecar(t *testing.T) {
	for what, do := range map[string]func(t *testing.T, v *Volume, d *Node){
		"unlink": func(t *testing.T, v *Volume, d *Node) { check(t, v.Unlink(t.Context(), d, "a")) },
		"empty": func(t *testing.T, v *Volume, d *Node) {
			n, _, err := v.Lookup(t.Context(), d, "a")
			check(t, err)
			size := int64(0)
			_, err = v.Setattr(t.Context(), n, SetAttr{Size: &size})
			check(t, err)
			v.Forget(n, 1)
		},
		"replaced": func(t *testing.T, v *Volume, d *Node) { check(t, v.Rename(t.Context(), d, "other", d, "a", 0)) },
		"moved away": func(t *testing.T, v *Volume, d *Node) {
			check(t, v.Rename(t.Context(), d, "a", v.Root(), "a", 0))
			check(t, v.Unlink(t.Context(), v.Root(), "a"))
		},
		"moved to": func(t *testing.T, v *Volume, d *Node) {
			check(t, v.Unlink(t.Context(), d, "other")) // the directory has been searched
			check(t, v.Rename(t.Context(), v.Root(), "c", d, "c", 0))
			check(t, v.Unlink(t.Context(), d, "a"))
			check(t, v.Unlink(t.Context(), d, "c"))
		},
		"exchanged": func(t *testing.T, v *Volume, d *Node) {
			check(t, v.Rename(t.Context(), d, "a", v.Root(), "c", unix.RENAME_EXCHANGE))
			check(t, v.Unlink(t.Context(), d, "a"))
		},
	} {
		t.Run(what, func(t *testing.T) {
			dir, prov, _ := testStore(t, envelope.Sidecar, classify.NamesPlain)
			v := openStore(t, dir, prov)
			d, _, err := v.Mkdir(t.Context(), v.Root(), "d", 0o755, Caller{})
			check(t, err)
			make1(t, v, d, "a", "one file")
			make1(t, v, d, "other", "another")
			n, _, err := v.Lookup(t.Context(), d, "a")
			check(t, err)
			for name, to := range map[string]*Node{"b": d, "c": v.Root()} {
				_, err := v.Link(t.Context(), n, to, name)
				check(t, err)
			}
			check(t, v.Close())
			breakLinks(t, dir)
			v = openStore(t, dir, prov)
			d, _, err = v.Lookup(t.Context(), v.Root(), "d")
			check(t, err)
			do(t, v, d)
			if got := read1(t, v, d, "b"); got != "one file" {
				t.Errorf("got %q", got)
			}
			// The last one takes it along.
			check(t, v.Unlink(t.Context(), d, "b"))
			check(t, v.Close())
			report, err := Fsck(t.Context(), FsckConfig{Config: Config{Store: dir, Provider: prov, Keys: v.rec.Body.Keys}})
			check(t, err)
			if len(report.Problems) > 0 {
				t.Errorf("fsck: %+v", report.Problems)
			}
		})
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func make1(t *testing.T, v *Volume, d *Node, name, data string) {
	t.Helper()
	n, h, _, err := v.Create(t.Context(), d, name, unix.O_RDWR, 0o644, Caller{})
	check(t, err)
	_, err = h.WriteAt([]byte(data), 0, false)
	check(t, err)
	h.Release()
	v.Forget(n, 1)
}

func read1(t *testing.T, v *Volume, d *Node, name string) string {
	t.Helper()
	n, _, err := v.Lookup(t.Context(), d, name)
	check(t, err)
	defer v.Forget(n, 1)
	h, err := v.Open(t.Context(), n, unix.O_RDONLY, false)
	check(t, err)
	defer h.Release()
	b := make([]byte, 100)
	k, err := h.ReadAt(b, 0)
	check(t, err)
	return string(b[:k])
}

// breakLinks makes a file of its own of each name, as a copy by a tool that does
// not know hard links has it. Attributes stay.
func breakLinks(t *testing.T, dir string) {
	t.Helper()
	broken := 0
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || strings.Contains(path, "/.kmsfs/") {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		broken++
		if err := os.Remove(path); err != nil {
			return err
		}
		return os.WriteFile(path, data, 0o600)
	})
	check(t, err)
	if broken == 0 {
		t.Fatal("nothing was linked")
	}
}
