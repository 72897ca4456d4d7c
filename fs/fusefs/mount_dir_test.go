package fusefs

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// readNames reads the directory fd from where it stands.
func readNames(t *testing.T, fd int) []string {
	t.Helper()
	var names []string
	buf := make([]byte, 4096)
	for {
		n, err := unix.ReadDirent(fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			slices.Sort(names)
			return names
		}
		for rest := buf[:n]; len(rest) > 0; {
			var e fuse.DirEntry
			rest = rest[e.Parse(rest):]
			names = append(names, e.Name)
		}
	}
}

func openDir(t *testing.T, path string) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// S-28
func TestReadDirRewindAndDots(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	dir := m.path("d")
	must(t, os.Mkdir(dir, 0o755))
	want := []string{".", ".."}
	for i := range 500 {
		name := fmt.Sprintf("%s-%03d", strings.Repeat("n", i%200), i)
		must(t, os.WriteFile(dir+"/"+name, nil, 0o600))
		want = append(want, name)
	}
	slices.Sort(want)
	fd := openDir(t, dir)
	if got := readNames(t, fd); !slices.Equal(got, want) {
		t.Errorf("got %d names, want %d", len(got), len(want))
	}
	if got := readNames(t, fd); len(got) != 0 {
		t.Errorf("after the end: %q", got)
	}
	must(t, os.WriteFile(dir+"/zzz", nil, 0o600))
	if _, err := unix.Seek(fd, 0, unix.SEEK_SET); err != nil {
		t.Fatal(err)
	}
	if got := readNames(t, fd); !slices.Equal(got, append(want, "zzz")) {
		t.Errorf("after rewind: %d names, want %d", len(got), len(want)+1)
	}
}

// TestReadDirWhileEntriesVanish: whoever lists and deletes at the same time
// (rm -r) sees every name once and no error.
//
// S-28
func TestReadDirWhileEntriesVanish(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	const files = 2000
	for i := range files {
		must(t, os.WriteFile(m.path(fmt.Sprintf("file-%04d", i)), nil, 0o600))
	}
	fd := openDir(t, m.dir)
	buf := make([]byte, 2048)
	seen := map[string]int{}
	for {
		n, err := unix.ReadDirent(fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
		for rest := buf[:n]; len(rest) > 0; {
			var e fuse.DirEntry
			rest = rest[e.Parse(rest):]
			if seen[e.Name]++; seen[e.Name] > 1 {
				t.Errorf("%s comes twice", e.Name)
			}
			if e.Name[0] != '.' {
				must(t, os.Remove(m.path(e.Name)))
			}
		}
	}
	if len(seen) != files+2 {
		t.Errorf("%d names, want %d", len(seen), files+2)
	}
	if left, err := os.ReadDir(m.dir); err != nil || len(left) != 0 {
		t.Errorf("left: %d, %v", len(left), err)
	}
}

// TestReadDirPlus: a listing with attributes hands out references, and all of
// them come back (mountStore's end fails otherwise).
func TestReadDirPlus(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	for i := range 300 {
		must(t, os.WriteFile(m.path(fmt.Sprint(i)), make([]byte, i), 0o600))
	}
	m.remount(t)
	for range 2 {
		list, err := os.ReadDir(m.dir)
		if err != nil || len(list) != 300 {
			t.Fatalf("%d entries, %v", len(list), err)
		}
		for _, e := range list {
			st, err := e.Info()
			if err != nil || fmt.Sprint(st.Size()) != e.Name() {
				t.Errorf("%s: %v, %v", e.Name(), st, err)
			}
		}
	}
}

// S-23
func TestRenameFlags(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	must(t, os.WriteFile(m.path("a"), []byte("a"), 0o600))
	must(t, os.WriteFile(m.path("b"), []byte("b"), 0o600))
	rename := func(flags uint) error {
		return unix.Renameat2(unix.AT_FDCWD, m.path("a"), unix.AT_FDCWD, m.path("b"), flags)
	}
	if err := rename(unix.RENAME_NOREPLACE); err != unix.EEXIST {
		t.Errorf("RENAME_NOREPLACE: got %v, want EEXIST", err)
	}
	if err := rename(unix.RENAME_WHITEOUT); err != unix.EINVAL {
		t.Errorf("RENAME_WHITEOUT: got %v, want EINVAL", err)
	}
	must(t, rename(unix.RENAME_EXCHANGE))
	for name, want := range map[string]string{"a": "b", "b": "a"} {
		if got, err := os.ReadFile(m.path(name)); err != nil || string(got) != want {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
		}
	}
	must(t, rename(0))
	if _, err := os.Stat(m.path("a")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a after the rename: %v", err)
	}
}

// TestAbsentNames: the kernel remembers that a name does not exist, and
// forgets it when the name appears by any call.
//
// S-21
func TestAbsentNames(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	must(t, os.WriteFile(m.path("file"), nil, 0o600))
	for name, appear := range map[string]func(path string) error{
		"created": func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"dir":     func(p string) error { return os.Mkdir(p, 0o700) },
		"link":    func(p string) error { return os.Link(m.path("file"), p) },
		"symlink": func(p string) error { return os.Symlink("file", p) },
		"fifo":    func(p string) error { return unix.Mkfifo(p, 0o600) },
	} {
		requireAppears(t, m.path(name), appear)
	}
	requireAppears(t, m.path("renamed"), func(p string) error { return os.Rename(m.path("file"), p) })
}

func requireAppears(t *testing.T, path string, appear func(string) error) {
	t.Helper()
	for range 2 {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s before: %v", path, err)
		}
	}
	must(t, appear(path))
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("%s after: %v", path, err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
