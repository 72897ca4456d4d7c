package faultsweep

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	machine "github.com/kmsfs/kmsfs/integration/rig"
)

// balloon takes all space of a store's disk, or gives it back.
func balloon(store string) func(full bool) {
	at := filepath.Join(filepath.Dir(store), "balloon")
	return func(full bool) {
		if !full {
			_ = os.Remove(at) // it may never have been there
			return
		}
		f, err := os.Create(at)
		if err != nil {
			return // it is full
		}
		defer func() { _ = f.Close() }() // nothing in it counts
		var st unix.Statfs_t
		size := int64(0)
		for unix.Statfs(at, &st) == nil && st.Bavail > 0 && unix.Fallocate(int(f.Fd()), 0, size, int64(st.Bavail)*st.Bsize) == nil {
			size += int64(st.Bavail) * st.Bsize
		}
	}
}

// TestFullAtEveryCall fills the disk before a call of each path, for real, and
// makes room once a program was told.
func TestFullAtEveryCall(t *testing.T) {
	machine.Need(t, "root")
	eachPlacement(t, func(t *testing.T, r *rig) {
		disk := filepath.Join(r.dir, "disk")
		if err := os.Mkdir(disk, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "mode=0700,size=8m"); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := unix.Unmount(disk, 0); err != nil {
				t.Errorf("unmount of the test's disk: %v", err)
			}
		}()
		runs := 0
		for i, p := range paths {
			if only := os.Getenv("FAULT_PATH"); only != "" && only != p.name {
				continue
			}
			states := r.states(t, p)
			n := r.count(t, p, changes)
			for k := 1; k <= n; k++ {
				if !full && (k+i+int(r.placement))%24 != 0 {
					continue
				}
				runs++
				f := failure{filled, k, unix.ENOSPC}
				store := filepath.Join(disk, "store")
				copyTree(t, r.base, store)
				what := fmt.Sprintf("%s, %s", p.name, f)
				if err := watched(t, what, func() error { return r.run(store, p, f, states) }); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				_ = os.RemoveAll(store)
			}
		}
		t.Logf("%d paths, %d runs", len(paths), runs)
	})
}
