package backing_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// TestReadDir lists more entries than one system call returns.
func TestReadDir(t *testing.T) {
	d, path := openRoot(t)
	if got, err := d.ReadDir(); len(got) != 0 || err != nil {
		t.Errorf("an empty directory: %v, %v", got, err)
	}
	want := map[string]uint32{}
	for i := range 2000 {
		name := fmt.Sprintf("%d-%s", i, strings.Repeat("n", i%250))
		check(t, d.Mknod(name, unix.S_IFREG|0o600, 0))
		want[name] = unix.S_IFREG
	}
	check(t, d.Mkdir("...", 0o700))
	check(t, d.Symlink("x", ".link"))
	check(t, d.Mknod("fifo", unix.S_IFIFO|0o600, 0))
	want["..."], want[".link"], want["fifo"] = unix.S_IFDIR, unix.S_IFLNK, unix.S_IFIFO

	var wg sync.WaitGroup
	for range 3 { // readers do not share a position
		wg.Go(func() {
			got, err := d.ReadDir()
			if err != nil || len(got) != len(want) {
				t.Errorf("%d entries, %v, want %d", len(got), err, len(want))
			}
			seen := map[string]bool{}
			for _, e := range got {
				st, err := d.Stat(e.Name)
				if seen[e.Name] || want[e.Name] != e.Type || err != nil || st.Ino != e.Ino || st.Type() != e.Type {
					t.Errorf("entry %+v, stat %+v, %v", e, st, err)
				}
				seen[e.Name] = true
			}
		})
	}
	wg.Wait()

	n := 0
	check(t, d.Each(func(backing.Entry) bool { n++; return n < 5 }))
	if n != 5 {
		t.Errorf("%d entries after the fifth was the last", n)
	}
	check(t, os.RemoveAll(path))
	if _, err := d.ReadDir(); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a directory that is gone: %v", err)
	}
}

// TestParseDirents: bytes that no kernel writes end the walk.
func TestParseDirents(t *testing.T) {
	record := func(name string, reclen int) []byte {
		b := make([]byte, 24+len(name))
		binary.NativeEndian.PutUint64(b, 42)
		binary.NativeEndian.PutUint16(b[16:], uint16(reclen))
		b[18] = unix.DT_REG
		copy(b[19:], name)
		return b
	}
	whole := record("abc", 27)
	for _, c := range []struct {
		name string
		b    []byte
		want []string
	}{
		{"nothing", nil, nil},
		{"one", whole, []string{"abc"}},
		{"two", slices.Concat(whole, record("d", 25)), []string{"abc", "d"}},
		{"dots", slices.Concat(record(".", 25), record("..", 26), whole), []string{"abc"}},
		{"length 0", slices.Concat(whole, record("d", 0)), []string{"abc"}},
		{"length of the head", record("abc", 19), nil},
		{"length beyond the buffer", slices.Concat(whole, record("d", 26)), []string{"abc"}},
		{"cut", slices.Concat(whole, whole[:18]), []string{"abc"}},
	} {
		var got []string
		backing.ParseDirents(c.b, func(e backing.Entry) bool {
			got = append(got, e.Name)
			if e.Ino != 42 || e.Type != unix.S_IFREG {
				t.Errorf("%s: entry %+v", c.name, e)
			}
			return true
		})
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// TestStat: every kind of object, and all fields against os.Stat's.
func TestStat(t *testing.T) {
	d, path := openRoot(t)
	f := create(t, d, "f")
	check(t, f.WriteAt(make([]byte, 10000), 0))
	check(t, d.Link("f", d, "g"))
	var want unix.Stat_t
	check(t, unix.Lstat(path+"/f", &want))
	byName, err := d.Stat("f")
	check(t, err)
	open, err := f.Stat()
	check(t, err)
	if byName != open {
		t.Errorf("stat by name %+v, of the open file %+v", byName, open)
	}
	if byName.Dev != want.Dev || byName.Ino != want.Ino || byName.Size != want.Size || byName.Blocks != want.Blocks || byName.Mode != want.Mode ||
		uint64(byName.Nlink) != want.Nlink || byName.Uid != want.Uid || byName.Gid != want.Gid || int64(byName.Blksize) != want.Blksize ||
		byName.Mtime.Sec != want.Mtim.Sec || int64(byName.Ctime.Nsec) != want.Ctim.Nsec {
		t.Errorf("stat = %+v, want %+v", byName, want)
	}
	self, err := d.Stat("")
	check(t, err)
	check(t, unix.Stat(path, &want))
	if self.Ino != want.Ino || self.Type() != unix.S_IFDIR {
		t.Errorf("the directory itself = %+v, want %+v", self, want)
	}
	if _, err := d.Stat("none"); !errors.Is(err, unix.ENOENT) {
		t.Errorf("no such file: %v", err)
	}
	if st, err := d.Statfs(); err != nil || st.Bsize == 0 {
		t.Errorf("statfs = %+v, %v", st, err)
	}
}

func TestReadlink(t *testing.T) {
	d, _ := openRoot(t)
	for i, target := range []string{"x", "/a/b/../c", strings.Repeat("y", 4095)} {
		name := fmt.Sprint(i)
		check(t, d.Symlink(target, name))
		if got, err := d.Readlink(name); got != target || err != nil {
			t.Errorf("%d bytes, %v, want %d", len(got), err, len(target))
		}
	}
	create(t, d, "f")
	if _, err := d.Readlink("f"); !errors.Is(err, unix.EINVAL) {
		t.Errorf("of a file: %v", err)
	}
}

// TestUnreadableDir: one that may be searched, not read, can be used for
// everything but listing and syncing it.
func TestUnreadableDir(t *testing.T) {
	d, _ := openRoot(t)
	check(t, d.Mkdir("d", 0o700))
	check(t, d.WriteNew("file", []byte("x"), 0o600, false))
	asUser(t, d, "d", "file")
	sub, err := d.OpenDir("d")
	check(t, err)
	check(t, sub.WriteNew("f", []byte("x"), 0o600, false))
	check(t, sub.Close())
	check(t, d.Chmod("d", 0o300))
	sub, err = d.OpenDir("d")
	check(t, err)
	defer func() { _ = sub.Close() }()
	if b, err := sub.ReadFile("f", 10); err != nil || string(b) != "x" {
		t.Errorf("contents = %q, %v", b, err)
	}
	check(t, sub.WriteNew("g", []byte("y"), 0o600, true))
	check(t, sub.Rename("g", sub, "h", 0))
	if _, err := sub.ReadDir(); !errors.Is(err, unix.EACCES) {
		t.Errorf("listing: %v", err)
	}
	if err := sub.Sync(); !errors.Is(err, unix.EACCES) {
		t.Errorf("sync: %v", err)
	}
	check(t, sub.ChmodSelf(0o700))
	check(t, sub.Sync())
	if got, err := sub.ReadDir(); len(got) != 2 || err != nil {
		t.Errorf("listing, readable again: %v, %v", got, err)
	}
	for _, name := range []string{"file", "none"} {
		if _, err := d.OpenDir(name); err == nil {
			t.Errorf("%s is opened as a directory", name)
		}
	}
}

// asUser gives the entries to a user without privileges and makes the test act
// as that user on the file system, if it runs as root.
func asUser(t *testing.T, d *backing.Dir, entries ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		return
	}
	const nobody = 65534
	for _, name := range entries {
		check(t, d.Chown(name, nobody, nobody))
	}
	runtime.LockOSThread()
	_, err := unix.SetfsuidRetUid(nobody)
	check(t, err)
	t.Cleanup(func() {
		if _, err := unix.SetfsuidRetUid(0); err != nil {
			t.Error(err)
		}
		runtime.UnlockOSThread()
	})
}

// TestXattrs: values and lists of every size around the buffers' sizes.
func TestXattrs(t *testing.T) {
	d, _ := openRoot(t)
	f := create(t, d, "f")
	check(t, d.Mkdir("d", 0o700))
	for name, a := range map[string]backing.Attrs{"by name": d.Attrs("f"), "open file": f.Attrs(), "a directory": d.Attrs("d"), "the directory": d.Attrs("")} {
		if got, err := a.List(); len(got) != 0 || err != nil {
			t.Errorf("%s: list without attributes = %v, %v", name, got, err)
		}
		if _, err := a.Get("user.none"); !errors.Is(err, unix.ENODATA) {
			t.Errorf("%s: no such attribute: %v", name, err)
		}
		for _, n := range []int{0, 1, 255, 256, 257, 3000} {
			want := bytes.Repeat([]byte{byte(n)}, n)
			check(t, a.Set("user.x", want, 0))
			if got, err := a.Get("user.x"); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: value of %d bytes: %d bytes, %v", name, n, len(got), err)
			}
		}
		if err := a.Set("user.x", nil, unix.XATTR_CREATE); !errors.Is(err, unix.EEXIST) {
			t.Errorf("%s: XATTR_CREATE: %v", name, err)
		}
		if err := a.Set("user.y", nil, unix.XATTR_REPLACE); !errors.Is(err, unix.ENODATA) {
			t.Errorf("%s: XATTR_REPLACE: %v", name, err)
		}
		check(t, a.Set("user.x", nil, 0))
		want := []string{"user.x"}
		for i := range 12 { // a list of more than 1,024 bytes
			key := fmt.Sprintf("user.%d.%s", i, strings.Repeat("k", 100))
			check(t, a.Set(key, []byte("v"), 0))
			want = append(want, key)
		}
		got, err := a.List()
		slices.Sort(got)
		slices.Sort(want)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: list = %v, %v, want %v", name, got, err, want)
		}
		for _, key := range got {
			check(t, a.Remove(key))
		}
		if err := a.Remove("user.x"); !errors.Is(err, unix.ENODATA) {
			t.Errorf("%s: remove twice: %v", name, err)
		}
	}
}

// TestLargeXattr: a value of the largest size that Linux has, where the file
// system has room for it.
func TestLargeXattr(t *testing.T) {
	d, _ := openRoot(t)
	a := create(t, d, "f").Attrs()
	size := 1 << 16
	for ; size > 0; size /= 2 {
		err := a.Set("user.x", bytes.Repeat([]byte{1}, size), 0)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.E2BIG) {
			t.Fatal(err)
		}
	}
	if got, err := a.Get("user.x"); err != nil || len(got) != size || size < 2048 {
		t.Errorf("%d bytes, %v, want %d", len(got), err, size)
	}
}
