package soak

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// trees unpacks an archive with tar, compares the tree, and removes an older
// one.
type trees struct {
	dir     string
	archive string
	want    map[string]treeEntry
	faults  *faults
	n       int
	under   string // the tree that is being made or removed
}

type treeEntry struct {
	mode fs.FileMode
	data []byte // contents, or a symlink's target
}

const treeFiles = 150

func newTrees(t *testing.T, dir string, f *faults, seed uint64) *trees {
	w := &trees{dir: dir, archive: filepath.Join(t.TempDir(), "tree.tar"), want: map[string]treeEntry{}, faults: f}
	if err := w.pack(rand.New(rand.NewPCG(seed, 1))); err != nil {
		t.Fatal(err)
	}
	return w
}

// pack makes the archive: directories, files of all sizes, symlinks.
func (w *trees) pack(rnd *rand.Rand) error {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	put := func(name string, e treeEntry) error {
		w.want[name] = e
		h := &tar.Header{Name: name, Mode: int64(e.mode.Perm()), ModTime: time.Unix(1e9, 0)}
		switch e.mode.Type() {
		case fs.ModeDir:
			h.Typeflag, h.Name = tar.TypeDir, name+"/"
		case fs.ModeSymlink:
			h.Typeflag, h.Linkname = tar.TypeSymlink, string(e.data)
		default:
			h.Typeflag, h.Size = tar.TypeReg, int64(len(e.data))
		}
		if err := tw.WriteHeader(h); err != nil || h.Typeflag != tar.TypeReg {
			return err
		}
		_, err := tw.Write(e.data)
		return err
	}
	for d := range treeFiles / 15 {
		dir := fmt.Sprintf("directory %d", d)
		if err := put(dir, treeEntry{mode: fs.ModeDir | 0o755}); err != nil {
			return err
		}
		for f := range 15 {
			size := []int{0, 1, 300, 5000, 32_767, 32_768, 40_000, 150_000}[rnd.IntN(8)]
			name := fmt.Sprintf("%s/file %d%s", dir, f, strings.Repeat("x", rnd.IntN(2)*200))
			if err := put(name, treeEntry{0o644, noise(rnd, size)}); err != nil {
				return err
			}
		}
		if err := put(dir+"/link", treeEntry{fs.ModeSymlink | 0o777, []byte("file 1")}); err != nil {
			return err
		}
	}
	if err := tw.Close(); err != nil {
		return err
	}
	return os.WriteFile(w.archive, b.Bytes(), 0o600)
}

func noise(rnd *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := 0; i < n; i += 8 {
		v := rnd.Uint64()
		for j := i; j < min(n, i+8); j++ {
			b[j], v = byte(v), v>>8
		}
	}
	return b
}

func (w *trees) name() string         { return "tar" }
func (w *trees) every() time.Duration { return 8 * time.Second }
func (w *trees) setup() error         { return nil }
func (w *trees) begin() error         { return nil }
func (w *trees) end(bool)             {}
func (w *trees) last() error          { return nil }

func (w *trees) path(n int) string { return filepath.Join(w.dir, fmt.Sprintf("t%d", n)) }

func (w *trees) step() error {
	w.under = w.path(w.n)
	if err := os.Mkdir(w.under, 0o755); err != nil {
		return err
	}
	out, err := exec.Command("tar", "xf", w.archive, "-C", w.under).CombinedOutput()
	if err == nil {
		err = w.compare(w.under, false)
	} else if err = fmt.Errorf("tar: %w: %.2000s", err, out); bytes.Contains(out, []byte("Connection timed out")) {
		err = errors.Join(unix.ETIMEDOUT, err)
	}
	if err = w.faults.excuse(err); isAway(err) {
		return errors.Join(err, os.RemoveAll(w.under))
	}
	if err != nil {
		return err
	}
	w.n++
	w.under = w.path(w.n - 3)
	if err := os.RemoveAll(w.under); err != nil {
		return err
	}
	w.under = ""
	return nil
}

// compare walks a tree. A part of one has only things that it may have, and
// files that begin as they should.
func (w *trees) compare(dir string, part bool) error {
	seen := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		want, ok := w.want[path[len(dir)+1:]]
		if !ok || d.Type() != want.mode.Type() {
			return fmt.Errorf("%s: %v, want %v", path, d.Type(), want.mode)
		}
		seen++
		var got []byte
		switch d.Type() {
		case fs.ModeDir:
			return nil
		case fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil || target != string(want.data) {
				return fmt.Errorf("%s: %q (%v), want %q", path, target, err, want.data)
			}
			return nil
		}
		if got, err = os.ReadFile(path); err != nil {
			return err
		}
		if bytes.Equal(got, want.data) || part && bytes.HasPrefix(want.data, got) {
			return nil
		}
		return fmt.Errorf("%s: %d bytes, not those of the archive's %d", path, len(got), len(want.data))
	})
	if err == nil && !part && seen != len(w.want) {
		err = fmt.Errorf("%s: %d entries, want %d", dir, seen, len(w.want))
	}
	return err
}

// verify: nothing of a tree was synced, so a killed mount may have kept less of
// a file than was written; everything is there under its name.
func (w *trees) verify() error {
	names, err := os.ReadDir(w.dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		dir := filepath.Join(w.dir, n.Name())
		if err := w.compare(dir, true); err != nil {
			return err
		}
	}
	for n := max(0, w.n-2); n < w.n; n++ {
		if _, err := os.Stat(w.path(n)); err != nil {
			return err
		}
	}
	if w.under != "" {
		if err := os.RemoveAll(w.under); err != nil {
			return err
		}
		w.under = ""
	}
	// A step that was broken off after its tree was complete removed nothing.
	return os.RemoveAll(w.path(w.n - 3))
}
