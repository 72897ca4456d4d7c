package backing_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// openRoot opens a new directory; path is for a look from outside.
func openRoot(t testing.TB) (d *backing.Dir, path string) {
	t.Helper()
	path = t.TempDir()
	d, err := backing.OpenRoot(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d, path
}

func create(t testing.TB, d *backing.Dir, name string) *backing.File {
	t.Helper()
	f, err := d.Open(name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// names lists a directory from outside.
func names(t testing.TB, path string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(path)
	check(t, err)
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// behindLinks makes symlinks to a file, a directory and nothing outside of d.
func behindLinks(t *testing.T) (d *backing.Dir, outside, secret string) {
	d, _ = openRoot(t)
	outside = t.TempDir()
	secret = filepath.Join(outside, "secret")
	check(t, os.WriteFile(secret, []byte("secret"), 0o600))
	check(t, os.Mkdir(filepath.Join(outside, "sub"), 0o700))
	check(t, d.Symlink(secret, "file"))
	check(t, d.Symlink(filepath.Join(outside, "sub"), "dir"))
	check(t, d.Symlink(filepath.Join(outside, "new"), "dangling"))
	return d, outside, secret
}

// closed closes what should not have been opened.
func closed(f interface{ Close() error }, err error) error {
	if err == nil {
		_ = f.Close()
	}
	return err
}

// TestSymlinksAreRefused puts a symlink where a file or directory is expected:
// nothing behind it is opened, read, written or changed.
func TestSymlinksAreRefused(t *testing.T) {
	d, outside, secret := behindLinks(t)
	before, err := os.Stat(secret)
	check(t, err)
	open := func(name string, flags int) error {
		f, err := d.Open(name, flags, 0o600)
		return closed(f, err)
	}
	dir := func(name string) error { sub, err := d.OpenDir(name); return closed(sub, err) }
	lock := func(name string) error { f, err := d.Lock(name); return closed(f, err) }
	read := func(name string) error { _, err := d.ReadFile(name, 100); return err }
	for _, c := range []struct {
		call string
		got  error
		want error
	}{
		{"OpenDir", dir("dir"), unix.ENOTDIR},
		{"Open for reading", open("file", unix.O_RDONLY), unix.ELOOP},
		{"Open for writing", open("file", unix.O_RDWR|unix.O_TRUNC), unix.ELOOP},
		{"Open O_CREAT", open("dangling", unix.O_RDWR|unix.O_CREAT), unix.ELOOP},
		{"ReadFile", read("file"), unix.ELOOP},
		{"WriteNew", d.WriteNew("dangling", []byte("x"), 0o600, false), unix.EEXIST},
		{"Lock", lock("file"), unix.ELOOP},
		{"Lock of nothing", lock("dangling"), unix.ELOOP},
		{"Chmod", d.Chmod("file", 0o777), unix.ELOOP},
		{"Chmod of nothing", d.Chmod("dangling", 0o777), unix.ELOOP},
		{"Attrs.Set", d.Attrs("file").Set("user.x", []byte("v"), 0), unix.EPERM},
		{"Rmdir", d.Rmdir("dir"), unix.ENOTDIR},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("%s: %v, want %v", c.call, c.got, c.want)
		}
	}
	after, err := os.Stat(secret)
	check(t, err)
	if b, err := os.ReadFile(secret); err != nil || string(b) != "secret" || after.Mode() != before.Mode() {
		t.Errorf("the file behind the symlink changed: %q, %v, %v", b, after, err)
	}
	if got := names(t, outside); len(got) != 2 {
		t.Errorf("behind the symlinks there is %v", got)
	}
}

// TestSymlinksThemselves: calls that are about a name are about the symlink.
func TestSymlinksThemselves(t *testing.T) {
	d, _, secret := behindLinks(t)
	before, err := os.Stat(secret)
	check(t, err)
	st, err := d.Stat("file")
	if err != nil || st.Type() != unix.S_IFLNK || st.Size != int64(len(secret)) {
		t.Errorf("Stat tells of another file: type %o, %d bytes, %v", st.Type(), st.Size, err)
	}
	check(t, d.SetTimes("file", unix.Timespec{Sec: 1}, unix.Timespec{Sec: 1}))
	check(t, d.Chown("file", os.Getuid(), os.Getgid()))
	check(t, d.Link("file", d, "file2"))
	if st, err := d.Stat("file2"); err != nil || st.Type() != unix.S_IFLNK {
		t.Errorf("Link followed the symlink: type %o, %v", st.Type(), err)
	}
	check(t, d.Replace("file", []byte("new"), 0o600))
	if b, err := d.ReadFile("file", 10); err != nil || string(b) != "new" {
		t.Errorf("after Replace: %q, %v", b, err)
	}
	after, err := os.Stat(secret)
	check(t, err)
	if b, err := os.ReadFile(secret); err != nil || string(b) != "secret" || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("the file behind the symlink changed: %q, %v, %v", b, after, err)
	}
}

func TestChmod(t *testing.T) {
	d, _ := openRoot(t)
	create(t, d, "f")
	check(t, d.Mkdir("d", 0o700))
	check(t, d.Mknod("fifo", unix.S_IFIFO|0o600, 0))
	for _, name := range []string{"f", "d", "fifo"} {
		for _, mode := range []uint32{0o640, 0, 0o1755} {
			check(t, d.Chmod(name, mode))
			if st, err := d.Stat(name); err != nil || st.Mode&0o7777 != mode {
				t.Errorf("%s: mode = %o, %v, want %o", name, st.Mode&0o7777, err, mode)
			}
		}
	}
	if err := d.Chmod("none", 0o600); !errors.Is(err, unix.ENOENT) {
		t.Errorf("no such file: %v", err)
	}
	sub, err := d.OpenDir("d")
	check(t, err)
	defer func() { _ = sub.Close() }()
	check(t, sub.ChmodSelf(0))
	if st, err := sub.Stat(""); err != nil || st.Mode&0o7777 != 0 {
		t.Errorf("ChmodSelf: mode = %o, %v", st.Mode&0o7777, err)
	}
}

// TestReplace: the old contents or the new, and nothing else left.
func TestReplace(t *testing.T) {
	d, path := openRoot(t)
	check(t, d.Replace("f", []byte("old"), 0o600))
	check(t, d.Replace("f", []byte("newer"), 0o640))
	if b, err := d.ReadFile("f", 5); err != nil || string(b) != "newer" {
		t.Errorf("contents = %q, %v", b, err)
	}
	if st, err := d.Stat("f"); err != nil || st.Mode&0o777 != 0o640 {
		t.Errorf("mode = %o, %v", st.Mode&0o777, err)
	}
	check(t, d.Mkdir("dir", 0o700))
	if err := d.Replace("dir", []byte("x"), 0o600); !errors.Is(err, unix.EISDIR) {
		t.Errorf("over a directory: %v", err)
	}
	if err := withFileLimit(t, 4096, func() error { return d.Replace("f", make([]byte, 8192), 0o600) }); !errors.Is(err, unix.EFBIG) {
		t.Errorf("a write that fails: %v", err)
	}
	if b, err := d.ReadFile("f", 5); err != nil || string(b) != "newer" {
		t.Errorf("contents after failures = %q, %v", b, err)
	}
	if got := names(t, path); len(got) != 2 {
		t.Errorf("left behind: %v", got)
	}
}

// TestReplaceKeepsReaders: who has the old file open goes on reading it.
func TestReplaceKeepsReaders(t *testing.T) {
	d, _ := openRoot(t)
	check(t, d.Replace("f", []byte("old"), 0o600))
	f, err := d.Open("f", unix.O_RDONLY, 0)
	check(t, err)
	defer func() { _ = f.Close() }()
	check(t, d.Replace("f", []byte("new"), 0o600))
	b := make([]byte, 10)
	if n, err := f.ReadAt(b, 0); string(b[:n]) != "old" || err != nil {
		t.Errorf("read %q, %v", b[:n], err)
	}
}

func TestWriteNew(t *testing.T) {
	d, path := openRoot(t)
	for _, sync := range []bool{false, true} {
		check(t, d.WriteNew("f", []byte("one"), 0o600, sync))
		if err := d.WriteNew("f", []byte("two"), 0o600, sync); !errors.Is(err, unix.EEXIST) {
			t.Errorf("over a file: %v", err)
		}
		if b, err := d.ReadFile("f", 100); err != nil || string(b) != "one" {
			t.Errorf("contents = %q, %v", b, err)
		}
		check(t, d.Unlink("f"))
		err := withFileLimit(t, 4096, func() error { return d.WriteNew("f", make([]byte, 8192), 0o600, sync) })
		if !errors.Is(err, unix.EFBIG) {
			t.Errorf("a write that fails: %v", err)
		}
		if got := names(t, path); len(got) != 0 {
			t.Errorf("left behind: %v", got)
		}
	}
	check(t, d.WriteNew("empty", nil, 0o600, true))
	if b, err := d.ReadFile("empty", 0); err != nil || len(b) != 0 {
		t.Errorf("empty file = %q, %v", b, err)
	}
}

func TestReadFile(t *testing.T) {
	d, _ := openRoot(t)
	want := bytes.Repeat([]byte("x"), 1000)
	check(t, d.WriteNew("f", want, 0o600, false))
	for _, limit := range []int{1000, 1001, 1 << 20} {
		if b, err := d.ReadFile("f", limit); err != nil || !bytes.Equal(b, want) {
			t.Errorf("limit %d: %d bytes, %v", limit, len(b), err)
		}
	}
	for _, limit := range []int{0, 1, 999} {
		if b, err := d.ReadFile("f", limit); !errors.Is(err, backing.ErrTooBig) || b != nil {
			t.Errorf("limit %d: %d bytes, %v", limit, len(b), err)
		}
	}
	check(t, d.Mkdir("dir", 0o700))
	if _, err := d.ReadFile("dir", 10); !errors.Is(err, unix.EISDIR) {
		t.Errorf("a directory: %v", err)
	}
	check(t, d.Mknod("fifo", unix.S_IFIFO|0o600, 0))
	if _, err := d.ReadFile("fifo", 10); err == nil { // and it does not wait for a writer
		t.Error("a fifo is read")
	}
	// Files of proc(5) say that they have no bytes, as one that grows does.
	proc, err := backing.OpenRoot("/proc")
	check(t, err)
	defer func() { _ = proc.Close() }()
	want, err = os.ReadFile("/proc/version")
	check(t, err)
	if b, err := proc.ReadFile("version", 1000); err != nil || !bytes.Equal(b, want) {
		t.Errorf("/proc/version = %q, %v, want %q", b, err, want)
	}
	if _, err := proc.ReadFile("version", len(want)-1); !errors.Is(err, backing.ErrTooBig) {
		t.Errorf("/proc/version with a limit: %v", err)
	}
}

func TestLock(t *testing.T) {
	d, _ := openRoot(t)
	f, err := d.Lock("lock")
	check(t, err)
	if g, err := d.Lock("lock"); !errors.Is(err, backing.ErrLocked) {
		t.Errorf("locked twice: %v, %v", g, err)
	}
	check(t, f.Close())
	g, err := d.Lock("lock")
	if err != nil {
		t.Fatalf("after close: %v", err)
	}
	check(t, g.Close())
	check(t, d.Mkdir("dir", 0o700))
	if _, err := d.Lock("dir"); !errors.Is(err, unix.EISDIR) {
		t.Errorf("a directory: %v", err)
	}
}

func TestTempNames(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		name := backing.TempName()
		if seen[name] || len(name) <= len(backing.TempPrefix) || name[:len(backing.TempPrefix)] != backing.TempPrefix {
			t.Fatalf("%q comes twice or is no temporary", name)
		}
		seen[name] = true
	}
}

// TestTempFile: it has no name until it gets one.
func TestTempFile(t *testing.T) {
	d, path := openRoot(t)
	f, err := d.TempFile(0o600)
	check(t, err)
	defer func() { _ = f.Close() }()
	check(t, f.WriteAt([]byte("x"), 0))
	if got := names(t, path); len(got) != 0 {
		t.Errorf("names = %v", got)
	}
	check(t, f.Link(d, "f"))
	if b, err := d.ReadFile("f", 10); err != nil || string(b) != "x" {
		t.Errorf("contents = %q, %v", b, err)
	}
	check(t, f.Link(d, "g"))
	if err := f.Link(d, "g"); !errors.Is(err, unix.EEXIST) {
		t.Errorf("over a file: %v", err)
	}
}

func TestRename(t *testing.T) {
	d, path := openRoot(t)
	check(t, d.Mkdir("sub", 0o700))
	sub, err := d.OpenDir("sub")
	check(t, err)
	defer func() { _ = sub.Close() }()
	check(t, d.WriteNew("a", []byte("a"), 0o600, false))
	check(t, d.WriteNew("b", []byte("b"), 0o600, false))
	if err := d.Rename("a", d, "b", unix.RENAME_NOREPLACE); !errors.Is(err, unix.EEXIST) {
		t.Errorf("NOREPLACE over a file: %v", err)
	}
	check(t, d.Rename("a", d, "b", unix.RENAME_EXCHANGE))
	if b, err := d.ReadFile("a", 10); err != nil || string(b) != "b" {
		t.Errorf("after EXCHANGE a = %q, %v", b, err)
	}
	check(t, d.Rename("a", sub, "c", 0))
	check(t, d.Link("b", sub, "b"))
	if got := names(t, filepath.Join(path, "sub")); len(got) != 2 || got[0] != "b" || got[1] != "c" {
		t.Errorf("names = %v", got)
	}
	if err := d.Rename("none", d, "x", 0); !errors.Is(err, unix.ENOENT) {
		t.Errorf("no such file: %v", err)
	}
	if err := d.Rename("sub", sub, "sub", 0); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a directory into itself: %v", err)
	}
}
