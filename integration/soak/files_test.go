package soak

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// files changes files at random and keeps what they must hold. Under a mount
// that is killed a file may fall back to any state since its last fsync, byte
// by byte; names do not fall back, except for the operation under way.
type files struct {
	dir    string
	faults *faults
	rnd    *rand.Rand
	worlds []map[string]*file // what names there may be: one, or two while an operation is under way
}

// file is what a file may hold.
type file struct {
	states [][]byte // since the last fsync, that one included; the last is what a read gives
}

func (f *file) now() []byte { return f.states[len(f.states)-1] }

const (
	fileNames   = 20
	fileDirs    = 3
	fileMost    = 300_000
	fileUnsaved = 6 // changes, after which there is an fsync
)

func newFiles(dir string, f *faults, seed uint64) *files {
	return &files{dir: dir, faults: f, rnd: rand.New(rand.NewPCG(seed, 1)), worlds: []map[string]*file{{}}}
}

func (w *files) name() string         { return filepath.Base(w.dir) }
func (w *files) every() time.Duration { return 25 * time.Millisecond }
func (w *files) begin() error         { return nil }
func (w *files) last() error          { return nil }

func (w *files) setup() error {
	for d := range fileDirs {
		if err := os.Mkdir(filepath.Join(w.dir, fmt.Sprintf("d%d", d)), 0o755); err != nil {
			return err
		}
	}
	return nil
}

func (w *files) path(name string) string { return filepath.Join(w.dir, name) }

func (w *files) pick() string {
	i := w.rnd.IntN(fileNames)
	return fmt.Sprintf("d%d/f%d", w.rnd.IntN(fileDirs), i)
}

func (w *files) step() error {
	name := w.pick()
	var err error
	switch w.rnd.IntN(12) {
	case 0:
		err = w.rename(name, w.pick())
	case 1:
		err = w.remove(name)
	case 2, 3:
		err = w.read(name)
	default:
		err = w.change(name)
	}
	return err
}

// try does an operation that takes the names from one world to another.
func (w *files) try(next map[string]*file, do func() error) error {
	w.worlds = append(w.worlds, next)
	err := do()
	switch {
	case err == nil:
		w.worlds = w.worlds[1:]
	case isAway(err):
		w.worlds = w.worlds[:1]
	}
	return err
}

func (w *files) rename(from, to string) error {
	f := w.worlds[0][from]
	if f == nil || from == to {
		return nil
	}
	next := maps.Clone(w.worlds[0])
	delete(next, from)
	next[to] = f
	return w.try(next, func() error { return os.Rename(w.path(from), w.path(to)) })
}

func (w *files) remove(name string) error {
	if w.worlds[0][name] == nil {
		return nil
	}
	next := maps.Clone(w.worlds[0])
	delete(next, name)
	return w.try(next, func() error { return os.Remove(w.path(name)) })
}

func (w *files) read(name string) error {
	f := w.worlds[0][name]
	if f == nil {
		return nil
	}
	got, err := os.ReadFile(w.path(name))
	if err != nil {
		return w.faults.excuse(err)
	}
	if !bytes.Equal(got, f.now()) {
		return fmt.Errorf("%s: %d bytes that are not those of the model's %d", name, len(got), len(f.now()))
	}
	return nil
}

// change opens a file, which may be new, and changes it a few times.
func (w *files) change(name string) error {
	f := w.worlds[0][name]
	next := w.worlds[0]
	if f == nil {
		f = &file{states: [][]byte{nil}}
		next = maps.Clone(next)
		next[name] = f
	}
	var fd *os.File
	err := w.try(next, func() (err error) {
		fd, err = os.OpenFile(w.path(name), os.O_RDWR|os.O_CREATE, 0o644)
		return w.faults.excuse(err)
	})
	if err != nil {
		return err
	}
	for range 1 + w.rnd.IntN(3) {
		if err := w.changeOnce(fd, f); err != nil {
			_ = fd.Close()
			if err = w.faults.excuse(err); isAway(err) { // a new file's key
				f.states = f.states[:len(f.states)-1]
			}
			return err
		}
	}
	if len(f.states) > fileUnsaved || w.rnd.IntN(4) == 0 {
		if err := fd.Sync(); err != nil {
			_ = fd.Close()
			return err
		}
		f.states = f.states[len(f.states)-1:]
	}
	return fd.Close()
}

func (w *files) changeOnce(fd *os.File, f *file) error {
	next := bytes.Clone(f.now())
	size := len(next)
	var do func() error
	write := func(at int, p []byte) {
		if grow := at + len(p) - len(next); grow > 0 {
			next = append(next, make([]byte, grow)...)
		}
		copy(next[at:], p)
		do = func() error { _, err := fd.WriteAt(p, int64(at)); return err }
	}
	switch kind := w.rnd.IntN(10); {
	case kind < 4 && size > 0: // overwrite
		write(w.rnd.IntN(size), noise(w.rnd, 1+w.rnd.IntN(w.some())))
	case kind == 4: // past the end
		write(size+w.rnd.IntN(50_000), noise(w.rnd, 1+w.rnd.IntN(w.some())))
	case kind == 5:
		to := w.rnd.IntN(size + 40_000)
		next = append(next, make([]byte, 40_000)...)[:to]
		do = func() error { return fd.Truncate(int64(to)) }
	case kind == 6 && size > 0: // a hole
		at := w.rnd.IntN(size)
		n := 1 + w.rnd.IntN(size-at)
		clear(next[at : at+n])
		do = func() error {
			return unix.Fallocate(int(fd.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(at), int64(n))
		}
	default:
		write(size, noise(w.rnd, 1+w.rnd.IntN(w.some())))
	}
	if len(next) > fileMost {
		next = nil
		do = func() error { return fd.Truncate(0) }
	}
	f.states = append(f.states, next)
	return do()
}

// some is the bound of a write's size: mostly small.
func (w *files) some() int { return []int{100, 5000, 40_000, 100_000}[w.rnd.IntN(4)] }

// end: after an unmount in order there is but one state to be in.
func (w *files) end(killed bool) {
	if killed {
		return
	}
	for _, f := range w.worlds[0] {
		f.states = f.states[len(f.states)-1:]
	}
}

// verify takes what is there for the truth, if it may be so.
func (w *files) verify() error {
	got := map[string][]byte{}
	err := filepath.WalkDir(w.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		got[path[len(w.dir)+1:]] = b
		return err
	})
	if err != nil {
		return err
	}
	var wrong []error
	for _, world := range w.worlds {
		err := agrees(world, got)
		if err == nil {
			w.worlds = []map[string]*file{{}}
			for name, b := range got {
				w.worlds[0][name] = &file{states: [][]byte{b}}
			}
			return nil
		}
		wrong = append(wrong, err)
	}
	return errors.Join(wrong...)
}

func agrees(world map[string]*file, got map[string][]byte) error {
	if have, want := slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(world)); !slices.Equal(have, want) {
		return fmt.Errorf("names %q, want %q", have, want)
	}
	for name, b := range got {
		if err := world[name].allows(b); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// allows: the size is between those that the file had, and each byte is one
// that was there, or the zero of a file that was shorter.
func (f *file) allows(got []byte) error {
	least, most := len(f.now()), len(f.now())
	for _, s := range f.states {
		least, most = min(least, len(s)), max(most, len(s))
	}
	if len(got) < least || len(got) > most {
		return fmt.Errorf("%d bytes, want %d to %d", len(got), least, most)
	}
	for i, b := range got {
		if !slices.ContainsFunc(f.states, func(s []byte) bool { return i < len(s) && s[i] == b || i >= len(s) && b == 0 }) {
			return fmt.Errorf("byte %d of %d is of none of the %d states since the last fsync", i, len(got), len(f.states))
		}
	}
	return nil
}

// TestFilesSeesDamage plants what a mount must not do, on the bare file system,
// and requires that the model sees it.
func TestFilesSeesDamage(t *testing.T) {
	for name, damage := range map[string]func(w *files, path string) error{
		"a lost name":           func(_ *files, path string) error { return os.Remove(path) },
		"a name that came back": func(w *files, _ string) error { return os.WriteFile(w.path("d0/back"), nil, 0o600) },
		"a file cut short":      func(_ *files, path string) error { return os.Truncate(path, 1) },
		"a changed byte": func(_ *files, path string) error {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			b[len(b)/2] ^= 1
			return os.WriteFile(path, b, 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newFiles(t.TempDir(), nil, 3)
			if err := w.setup(); err != nil {
				t.Fatal(err)
			}
			for range 400 {
				if err := w.step(); err != nil {
					t.Fatal(err)
				}
			}
			w.end(false)
			if err := w.verify(); err != nil {
				t.Fatal(err)
			}
			big := ""
			for name, f := range w.worlds[0] {
				if len(f.now()) > 1000 {
					big = name
				}
			}
			if big == "" {
				t.Fatal("no file of some size")
			}
			if err := damage(w, w.path(big)); err != nil {
				t.Fatal(err)
			}
			if err := w.verify(); err == nil {
				t.Error("nothing was seen")
			}
		})
	}
}
