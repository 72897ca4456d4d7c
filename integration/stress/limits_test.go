package stress

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// TestTebibyte: a file of 1 TiB with data at both ends takes the space of the
// data, and whoever copies it finds both (S-17, S-19, S-36).
func TestTebibyte(t *testing.T) {
	t.Parallel()
	for _, placement := range placements {
		t.Run(placement, func(t *testing.T) {
			t.Parallel()
			tebibyte(t, newMount(t, "--placement", placement))
		})
	}
}

const tib = 1 << 40

func tebibyte(t *testing.T, m *rig.Mount) {
	begin, end := bytes.Repeat([]byte("at the beginning"), 5000), bytes.Repeat([]byte("at the end"), 10_000)
	f, err := os.Create(m.Path("f"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(begin, 0)
	if err == nil {
		_, err = f.WriteAt(end, tib-int64(len(end)))
	}
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	m.Unmount()
	m.Again()
	ends(t, m.Path("f"), begin, end)
	out := filepath.Join(memoryDir(t), "copy")
	m.Home.Sh(`cp --sparse=auto "$1"/f "$2"; cp --sparse=auto "$2" "$1"/back; cp "$1"/f "$1"/within`, m.Dir, out)
	for _, path := range []string{out, m.Path("back"), m.Path("within")} {
		ends(t, path, begin, end)
	}
	// Into the hole, over its edge, and away again.
	if err := os.Truncate(m.Path("f"), tib/2); err != nil {
		t.Fatal(err)
	}
	ends(t, m.Path("f"), begin, nil)
	clean(t, m)
}

// ends wants a sparse file with data only at its ends.
func ends(t *testing.T, path string, begin, end []byte) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if most := int64(4 << 20 / 512); st.Blocks > most {
		t.Errorf("%s takes %d blocks, want at most %d", path, st.Blocks, most)
	}
	size := int64(tib)
	if end == nil {
		size = tib / 2
	}
	if st.Size != size {
		t.Errorf("%s: %d bytes, want %d", path, st.Size, size)
	}
	first := make([]byte, len(begin)+100)
	if _, err := f.ReadAt(first, 0); err != nil || !bytes.Equal(first[:len(begin)], begin) || !allZero(first[len(begin):]) {
		t.Errorf("%s: the beginning differs: %v", path, err)
	}
	last := make([]byte, len(end)+100)
	if n, err := f.ReadAt(last, size-int64(len(last))); n != len(last) || !bytes.Equal(last[100:], end) || !allZero(last[:100]) {
		t.Errorf("%s: the end differs: %v", path, err)
	}
	fd := int(f.Fd())
	data, err := unix.Seek(fd, 0, unix.SEEK_DATA)
	if err != nil || data != 0 {
		t.Errorf("%s: the first data is at %d, %v", path, data, err)
	}
	hole, err := unix.Seek(fd, 0, unix.SEEK_HOLE)
	if err != nil || hole < int64(len(begin)) || hole > 1<<20 {
		t.Errorf("%s: the hole begins at %d, %v", path, hole, err)
	}
	next, err := unix.Seek(fd, hole, unix.SEEK_DATA)
	if err != nil || next < size-1<<20 || next > size-int64(len(end)) {
		t.Errorf("%s: the other end begins at %d, %v", path, next, err)
	}
}

// TestManyEntries: a directory of 200,000 files (fewer by default).
func TestManyEntries(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	count := sized(20_000, 200_000)
	dir := m.Path("d")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Mkdir(m.Path("away"), 0o755)); err != nil {
		t.Fatal(err)
	}
	name := func(i int) string { return filepath.Join(dir, fmt.Sprintf("entry number %d", i)) }
	for i := range count {
		if err := unix.Mknod(name(i), unix.S_IFREG|0o644, 0); err != nil {
			t.Fatal(err)
		}
	}
	list := func(when string, want int) {
		t.Helper()
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		unique := map[string]bool{}
		for _, e := range entries {
			unique[e.Name()] = true
		}
		if len(entries) != want || len(unique) != want {
			t.Errorf("%s: %d entries, %d of them different, want %d", when, len(entries), len(unique), want)
		}
	}
	list("at once", count)
	m.Unmount()
	m.Again()
	list("after a remount", count)
	for i := 0; i < count; i += 97 {
		var st unix.Stat_t
		if err := unix.Lstat(name(i), &st); err != nil {
			t.Fatal(err)
		}
		if err := unix.Lstat(name(count+i), &st); err != unix.ENOENT {
			t.Fatalf("a name that is not there: %v", err)
		}
	}
	moved := 0
	for i := 0; i < count; i += 50 { // out, in under another name, and over another
		away := m.Path("away", fmt.Sprint(i))
		if err := errors.Join(unix.Rename(name(i), away), unix.Rename(away, name(count+i)), unix.Rename(name(count+i), name(i+1))); err != nil {
			t.Fatal(err)
		}
		moved++
	}
	list("after renames", count-moved)
	if rss := m.RSS(); rss > 400<<20 {
		t.Errorf("the server takes %d MiB", rss>>20)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	clean(t, m)
}

// TestLongPaths works at the end of paths as long as the kernel takes them, of
// long names and of many levels (S-22, S-27).
func TestLongPaths(t *testing.T) {
	for _, names := range []string{"encrypted", "plain"} {
		for _, part := range []int{1, 50, 250} {
			t.Run(fmt.Sprintf("%s/%d", names, part), func(t *testing.T) {
				t.Parallel()
				m := newMount(t, "--names", names)
				path, err := deep(m.Dir, strings.Repeat("p", part))
				if err != nil {
					t.Fatal(err)
				}
				use := func(when string) {
					got, err := os.ReadFile(path)
					if err != nil || string(got) != "at the end of a long path" {
						t.Errorf("%s: %q, %v", when, got, err)
					}
				}
				if err := os.WriteFile(path, []byte("at the end of a long path"), 0o644); err != nil {
					t.Fatal(err)
				}
				use("at once")
				m.Unmount()
				m.Again()
				use("after a remount")
				if err := os.Symlink(path, m.Path("link")); err != nil {
					t.Fatal(err)
				}
				if target, err := os.Readlink(m.Path("link")); target != path {
					t.Errorf("a target of %d bytes, want %d: %v", len(target), len(path), err)
				}
				other := path[:len(path)-1] + "x"
				if err := errors.Join(os.Link(path, m.Path("short")), os.Rename(path, other), os.Rename(other, path), os.Remove(path)); err != nil {
					t.Error(err)
				}
				if err := os.RemoveAll(m.Path(strings.Repeat("p", part))); err != nil {
					t.Error(err)
				}
				clean(t, m)
			})
		}
	}
}

// deep makes directories of the same name in one another, as many as there is
// room for, and returns the longest path of a file in the last.
func deep(at, name string) (path string, err error) {
	const most = 4095
	fd, err := unix.Open(at, unix.O_PATH|unix.O_CLOEXEC, 0)
	for err == nil && len(at)+2*len(name)+2 <= most {
		if err = unix.Mkdirat(fd, name, 0o755); err != nil {
			break
		}
		var next int
		next, err = unix.Openat(fd, name, unix.O_PATH|unix.O_CLOEXEC, 0)
		_ = unix.Close(fd)
		fd, at = next, at+"/"+name
	}
	_ = unix.Close(fd)
	return at + "/" + strings.Repeat("f", min(255, most-len(at)-1)), err
}

// TestNamesOfAllBytes: names of 255 bytes in every encoding are names, and
// different ones are different.
func TestNamesOfAllBytes(t *testing.T) {
	for _, names := range []string{"encrypted", "plain"} {
		t.Run(names, func(t *testing.T) {
			t.Parallel()
			m := newMount(t, "--names", names)
			want := oddNames()
			for _, name := range want {
				m.Put(name, []byte("in "+name))
			}
			check := func(when string) {
				t.Helper()
				entries, err := os.ReadDir(m.Dir)
				if err != nil {
					t.Fatal(err)
				}
				var got []string
				for _, e := range entries {
					got = append(got, e.Name())
				}
				slices.Sort(got)
				if !slices.Equal(got, want) {
					t.Errorf("%s: %q, want %q", when, got, want)
				}
				for _, name := range want {
					if b, err := os.ReadFile(m.Path(name)); err != nil || string(b) != "in "+name {
						t.Errorf("%s: %q: %q, %v", when, name, b, err)
					}
				}
			}
			check("at once")
			m.Unmount()
			m.Again()
			check("after a remount")
			for i, name := range want { // each gets the name of the next, and its own back
				next := want[(i+1)%len(want)]
				if err := unix.Renameat2(unix.AT_FDCWD, m.Path(name), unix.AT_FDCWD, m.Path(next), unix.RENAME_EXCHANGE); err != nil {
					t.Error(err)
				}
				if b, err := os.ReadFile(m.Path(next)); err != nil || string(b) != "in "+name {
					t.Errorf("%q after the exchange: %q, %v", next, b, err)
				}
				if err := unix.Renameat2(unix.AT_FDCWD, m.Path(name), unix.AT_FDCWD, m.Path(next), unix.RENAME_EXCHANGE); err != nil {
					t.Error(err)
				}
			}
			for _, name := range want {
				if err := os.Remove(m.Path(name)); err != nil {
					t.Error(err)
				}
			}
			clean(t, m)
		})
	}
}

// oddNames are sorted.
func oddNames() []string {
	fill := func(s string) string { return strings.Repeat(s, 255/len(s)+1)[:255] }
	var every []byte // of the 254 that there are
	for b := 1; b < 256; b++ {
		if b != '/' {
			every = append(every, byte(b))
		}
	}
	backward := slices.Clone(every)
	slices.Reverse(backward)
	out := []string{
		string(every), string(backward), string(every[:253]) + "xy",
		fill("\xe9\xe8\xfc"),                     // latin-1
		strings.Repeat("\u00e9", 127) + "1",      // composed
		strings.Repeat("e\u0301", 85),            // decomposed
		strings.Repeat("\U0001f512", 63) + "abc", // four bytes each
		strings.Repeat("\u7d42", 85), fill("\n"), fill("\x01\x1b\x7f"), fill("\\"), fill(" "), fill("."), fill("\x80"), fill("\xff"),
		fill("\xed\xa0\x80"), fill("-"), fill("A"), fill("a"), // half a surrogate pair
		"\n", " ", "...", "\xff", "\x01", "-", "\u00e9", "e\u0301",
	}
	slices.Sort(out)
	return out
}
