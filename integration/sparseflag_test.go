package integration

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// TestLargeFilesAreNotSparse: the kernel sends a large file in parts of 1 MiB,
// several at a time. They are written in their order, or the file would have a
// hole for a moment, and say for ever that it may have some, which lets whoever
// can write the store blank its chunks (F-9, F-10). On a loaded machine a part may
// be so late that it is not waited for.
func TestLargeFilesAreNotSparse(t *testing.T) {
	rig.Need(t, "root", "fuse")
	h := rig.NewHome(t)
	store := filepath.Join(t.TempDir(), "S")
	h.Run("init", store)
	m := h.Mount(store)
	const files = 40
	for i := range files {
		m.Put(fmt.Sprint(i), noise(1_100_000+50_000*i, uint64(i)))
	}
	m.Unmount()
	sparse, seen := 0, 0
	err := filepath.WalkDir(store, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if fi, err := d.Info(); err != nil || fi.Size() < 1_100_000 {
			return err
		}
		b := make([]byte, headerSize)
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.ReadAt(b, 0); err != nil {
			return err
		}
		header, err := envelope.Parse(b)
		if err != nil {
			return nil // the journal
		}
		if seen++; header.Sparse {
			sparse++
		}
		return nil
	})
	if err != nil || seen != files {
		t.Fatalf("%d files of %d in the store: %v", seen, files, err)
	}
	if sparse > files/5 {
		t.Errorf("%d of %d files that were written from their beginning to their end say that they are sparse", sparse, files)
	}
}
