package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// S-22 S-27 S-30
func TestNameLimits(t *testing.T) {
	s := newSemantics(t)
	for _, dir := range []string{"", "open"} {
		for n, want := range map[int]unix.Errno{1: 0, 160: 0, 161: 0, 255: 0, 256: unix.ENAMETOOLONG} {
			name := strings.Repeat("n", n)
			wantErrno(t, fmt.Sprintf("name of %d bytes in %q", n, dir), os.WriteFile(s.Path(dir, name), nil, 0o644), want)
		}
	}
	for n, want := range map[int]unix.Errno{1: 0, 3039: 0, 3040: 0, 4095: 0, 4096: unix.ENAMETOOLONG} {
		target, path := strings.Repeat("t", n), s.Path(fmt.Sprint("link", n))
		wantErrno(t, fmt.Sprintf("target of %d bytes", n), os.Symlink(target, path), want)
		if want != 0 {
			continue
		}
		if got, err := os.Readlink(path); err != nil || got != target {
			t.Errorf("target of %d bytes: %d, %v", n, len(got), err)
		}
		if st, err := os.Lstat(path); err != nil || st.Size() != int64(n) {
			t.Errorf("lstat of a target of %d bytes: %v, %v", n, st, err)
		}
	}
	wantErrno(t, "target of 4,095 bytes, plain names", os.Symlink(strings.Repeat("t", 4095), s.Path("open", "link")), 0)
	_, err := os.Lstat(s.Path("open", ".kmsfs.dir"))
	wantErrno(t, "the store's own file", err, unix.ENOENT)
	wantErrno(t, "reserved name, plain names", os.WriteFile(s.Path("open", ".kmsfs.mine"), nil, 0o644), unix.EPERM)
	wantErrno(t, "the same name, encrypted names", os.WriteFile(s.Path(".kmsfs.mine"), nil, 0o644), 0)
	wantErrno(t, "not UTF-8", os.WriteFile(s.Path("\xff\x01\n"), nil, 0o644), 0)
}

// S-24 S-25
func TestRulesKeepDirectoriesInPlace(t *testing.T) {
	s := newSemantics(t)
	put(t, s.Path("file"), []byte("x"))
	if err := errors.Join(os.MkdirAll(s.Path("dir", "below"), 0o755), os.Remove(s.Path("open"))); err != nil {
		t.Fatal(err)
	}
	exchange := func(a, b string) error {
		return unix.Renameat2(unix.AT_FDCWD, s.Path(a), unix.AT_FDCWD, s.Path(b), unix.RENAME_EXCHANGE)
	}
	wantErrno(t, "file into another class", os.Rename(s.Path("file"), s.Path("phi", "file")), unix.EXDEV)
	wantErrno(t, "link into another class", os.Link(s.Path("file"), s.Path("phi", "file")), unix.EXDEV)
	wantErrno(t, "directory into another class", os.Rename(s.Path("dir"), s.Path("phi", "dir")), unix.EXDEV)
	wantErrno(t, "directory with a rule", os.Rename(s.Path("phi"), s.Path("elsewhere")), unix.EBUSY)
	wantErrno(t, "directory to a place with a rule", os.Rename(s.Path("dir"), s.Path("open")), unix.EBUSY)
	wantErrno(t, "exchange with a directory with a rule", exchange("dir", "phi"), unix.EBUSY)
	wantErrno(t, "directory without a rule", os.Rename(s.Path("dir", "below"), s.Path("moved")), 0)
	wantErrno(t, "rmdir of a directory with a rule", os.Remove(s.Path("phi")), 0)
	if out := s.h.Sh(`mkdir "$1" && mv "$2" "$1" && cat "$1"/file`, s.Path("phi"), s.Path("file")); out != "x" {
		t.Errorf("mv across classes: %q", out)
	}
}

// S-29
func TestForeignFileInADirectory(t *testing.T) {
	s := newSemantics(t)
	if err := os.Mkdir(s.Path("dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	s.Unmount()
	for _, dir := range s.entries(true) {
		put(t, filepath.Join(dir, "plain.txt"), []byte("by hand"))
	}
	s.Again()
	if list, err := os.ReadDir(s.Path("dir")); err != nil || len(list) != 0 {
		t.Errorf("listing: %v, %v", list, err)
	}
	wantErrno(t, "rmdir", os.Remove(s.Path("dir")), unix.ENOTEMPTY)
	_, err := os.ReadFile(s.Path("open", "plain.txt"))
	wantErrno(t, "read, where names are plain", err, unix.EIO)
}

// S-32
func TestAttributeLimits(t *testing.T) {
	s := newSemantics(t)
	file := s.Path("file")
	put(t, file, nil)
	for n, want := range map[int]unix.Errno{1: 0, 160: 0, 161: unix.ERANGE} {
		wantErrno(t, fmt.Sprintf("name of %d bytes", n), unix.Setxattr(file, "user."+strings.Repeat("n", n), []byte("v"), 0), want)
	}
	for n, want := range map[int]unix.Errno{0: 0, 1000: 0, 65_505: unix.E2BIG} {
		wantErrno(t, fmt.Sprintf("value of %d bytes", n), unix.Setxattr(file, "user.v", make([]byte, n), 0), want)
	}
	wantErrno(t, "security attribute", unix.Setxattr(file, "security.test", []byte("v"), 0), 0)
}

// S-33
func TestVirtualAttributes(t *testing.T) {
	s := newSemantics(t)
	file := s.Path("phi", "file")
	put(t, file, []byte("x"))
	get := func(path, name string) string {
		buf := make([]byte, 4096)
		n, err := unix.Getxattr(path, name, buf)
		if err != nil {
			return err.Error()
		}
		return string(buf[:n])
	}
	for name, want := range map[string]string{"user.kmsfs.class": "phi", "user.kmsfs.key": "keyring:phi"} {
		if got := get(file, name); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	if got := get(file, "user.kmsfs.id"); len(got) != 32 {
		t.Errorf("user.kmsfs.id = %q", got)
	}
	wantErrno(t, "set user.kmsfs.key", unix.Setxattr(file, "user.kmsfs.key", []byte("x"), 0), unix.EPERM)
	wantErrno(t, "set user.kmsfs.class on a file", unix.Setxattr(file, "user.kmsfs.class", []byte("general"), 0), unix.ENOTDIR)
	wantErrno(t, "classify a directory with a file in it", unix.Setxattr(s.Path("phi"), "user.kmsfs.class", []byte("general"), 0), unix.EPERM)
	if err := os.Mkdir(s.Path("new"), 0o755); err != nil {
		t.Fatal(err)
	}
	wantErrno(t, "no such class", unix.Setxattr(s.Path("new"), "user.kmsfs.class", []byte("none"), 0), unix.EINVAL)
	wantErrno(t, "classify", unix.Setxattr(s.Path("new"), "user.kmsfs.class", []byte("phi"), 0), 0)
	put(t, s.Path("new", "file"), []byte("x"))
	if got := get(s.Path("new", "file"), "user.kmsfs.class"); got != "phi" {
		t.Errorf("class of a file in it: %q", got)
	}
}

// S-35 S-36 S-38
func TestStat(t *testing.T) {
	s := newSemantics(t)
	f, err := os.Create(s.Path("file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	past := time.Now().Add(-time.Hour)
	if err := os.Chtimes(s.Path("file"), past, past); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(noise(100_000, 1)); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(s.Path("file"))
	if err != nil || time.Since(before.ModTime()) > time.Minute || before.Size() != 100_000 {
		t.Fatalf("right after the write: %v, %v", before, err)
	}
	wantErrno(t, "close", f.Close(), 0)
	s.Unmount()
	var disk, mount unix.Statfs_t
	var inode unix.Stat_t
	if err := unix.Lstat(s.entries(false)[0], &inode); err != nil {
		t.Fatal(err)
	}
	s.Again()
	after, err := os.Stat(s.Path("file"))
	if err != nil || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("mtime moved from %v to %v, %v", before.ModTime(), after.ModTime(), err)
	}
	var st unix.Stat_t
	err = errors.Join(unix.Stat(s.Path("file"), &st), unix.Statfs(s.store, &disk), unix.Statfs(s.Dir, &mount))
	if err != nil || st.Ino != inode.Ino || st.Blocks != inode.Blocks || st.Size != 100_000 || inode.Size == 100_000 {
		t.Errorf("%v: inode %d, %d blocks, %d bytes; in the store %d, %d, %d", err, st.Ino, st.Blocks, st.Size, inode.Ino, inode.Blocks, inode.Size)
	}
	if disk.Blocks != mount.Blocks || disk.Files != mount.Files || mount.Namelen != 255 {
		t.Errorf("statfs: %+v, of the store %+v", mount, disk)
	}
}
