package integration

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// handleOf returns what name_to_handle_at(2) says of a path, which may be a
// symbolic link.
func handleOf(t testing.TB, path string) unix.FileHandle {
	t.Helper()
	h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, path, 0)
	if err != nil {
		t.Fatalf("handle of %s: %v", path, err)
	}
	return h
}

// openHandle is open_by_handle_at(2) on the mount.
func (s *semantics) openHandle(h unix.FileHandle, flags int) (*os.File, error) {
	s.h.T.Helper()
	at, err := os.Open(s.Dir)
	if err != nil {
		s.h.T.Fatal(err)
	}
	defer at.Close()
	fd, err := unix.OpenByHandleAt(int(at.Fd()), h, flags|unix.O_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "by handle"), nil
}

// read returns the contents of a file that is opened by its handle.
func (s *semantics) read(h unix.FileHandle) (string, error) {
	s.h.T.Helper()
	f, err := s.openHandle(h, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	b := make([]byte, st.Size())
	_, err = f.ReadAt(b, 0)
	return string(b), err
}

// wantHandle requires that the handle leads to a file with the contents want,
// "" for none.
func (s *semantics) wantHandle(what string, h unix.FileHandle, want string) {
	s.h.T.Helper()
	got, err := s.read(h)
	if want == "" {
		wantErrno(s.h.T, what, err, unix.ESTALE)
	} else if err != nil || got != want {
		s.h.T.Errorf("%s: %q, %v, want %q", what, got, err, want)
	}
}

// forget makes the kernel forget every inode that nobody uses, and waits until
// the mount knows only its root. It does not come to that while directories are
// so new that their records are not on the disk.
func (s *semantics) forget() {
	s.h.T.Helper()
	var status cryptfs.Status
	for range 1000 {
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
			s.h.T.Fatal(err)
		}
		b := make([]byte, 1<<16)
		n, err := unix.Getxattr(s.Dir, "user.kmsfs.status", b)
		if err == nil {
			err = json.Unmarshal(b[:n], &status)
		}
		if err != nil {
			s.h.T.Fatal(err)
		}
		if status.Counters.KnownNodes == 1 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	s.h.T.Fatalf("the mount still knows %d nodes", status.Counters.KnownNodes)
}

// again unmounts and mounts.
func (s *semantics) again() {
	s.h.T.Helper()
	s.Unmount()
	s.Again()
}

// handleTree is a tree whose handles are looked at.
type handleTree struct {
	dir                   string
	file, linked, link, c unix.FileHandle
}

func (s *semantics) makeHandleTree(dir string) *handleTree {
	t := s.h.T
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, "b", "c"), 0o755); err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dir, "b", "file"), []byte("contents"))
	put(t, filepath.Join(dir, "linked"), []byte("two names"))
	if err := errors.Join(os.Link(filepath.Join(dir, "linked"), filepath.Join(dir, "b", "c", "second")),
		os.Symlink("target", filepath.Join(dir, "b", "link"))); err != nil {
		t.Fatal(err)
	}
	return &handleTree{dir, handleOf(t, filepath.Join(dir, "b", "file")), handleOf(t, filepath.Join(dir, "linked")),
		handleOf(t, filepath.Join(dir, "b", "link")), handleOf(t, filepath.Join(dir, "b", "c"))}
}

// wantTrees requires that all handles of some trees work. before is called before
// each kind of file.
func (s *semantics) wantTrees(when string, trees []*handleTree, before func()) {
	s.h.T.Helper()
	for _, want := range []func(tree *handleTree){
		func(tree *handleTree) { s.wantHandle("file "+when, tree.file, "contents") },
		func(tree *handleTree) { s.wantHandle("hard link "+when, tree.linked, "two names") },
		func(tree *handleTree) { s.wantDir(when, tree.c, filepath.Join(tree.dir, "b", "c")) },
		func(tree *handleTree) { s.wantLink(when, tree.link, "target") },
	} {
		before()
		for _, tree := range trees {
			want(tree)
		}
	}
}

// S-53
func TestHandles(t *testing.T) {
	s := newSemantics(t)
	trees := []*handleTree{}
	for _, dir := range []string{"a", "open/a", "phi/a"} {
		trees = append(trees, s.makeHandleTree(s.Path(dir)))
	}
	known := func() {}
	s.wantTrees("known", trees, known)
	s.again()
	s.wantTrees("after a mount", trees, known)
	s.wantTrees("forgotten", trees, s.forget)
	s.Kill()
	s.Again()
	s.wantTrees("after a crash", trees, known)

	// A file is followed to where it is moved, also when its directories are.
	for _, tree := range trees {
		if err := errors.Join(os.Rename(filepath.Join(tree.dir, "b", "file"), filepath.Join(tree.dir, "b", "c", "renamed")),
			os.Rename(filepath.Join(tree.dir, "b"), filepath.Join(tree.dir, "moved")), os.Remove(filepath.Join(tree.dir, "linked"))); err != nil {
			t.Fatal(err)
		}
	}
	for _, tree := range trees {
		s.forget()
		s.wantHandle("renamed", tree.file, "contents")
		s.wantHandle("one of two names removed", tree.linked, "two names")
		s.wantDir("renamed", tree.c, filepath.Join(tree.dir, "moved", "c"))
	}
	for _, tree := range trees {
		c := filepath.Join(tree.dir, "moved", "c")
		if err := errors.Join(os.Remove(filepath.Join(c, "renamed")), os.Remove(filepath.Join(c, "second"))); err != nil {
			t.Fatal(err)
		}
		s.wantHandle("removed", tree.file, "")
		s.wantHandle("both names removed", tree.linked, "")
		if err := os.Remove(c); err != nil {
			t.Fatal(err)
		}
		s.wantHandle("directory removed", tree.c, "")
	}
	s.again()
	for _, tree := range trees {
		s.wantHandle("removed, after a mount", tree.file, "")
		s.wantHandle("both names removed, after a mount", tree.linked, "")
	}
}

// wantDir requires that a handle leads to the directory at path, with all that
// is above it.
func (s *semantics) wantDir(what string, h unix.FileHandle, path string) {
	t := s.h.T
	t.Helper()
	f, err := s.openHandle(h, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		t.Errorf("directory %s: %v", what, err)
		return
	}
	defer f.Close()
	if got, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err != nil || got != path {
		t.Errorf("directory %s: %q, %v, want %q", what, got, err, path)
	}
	if names, err := f.Readdirnames(-1); err != nil || len(names) == 0 {
		t.Errorf("entries of the directory %s: %v, %v", what, names, err)
	}
	var above, want unix.Stat_t
	if err := errors.Join(unix.Fstatat(int(f.Fd()), "..", &above, 0), unix.Stat(filepath.Dir(path), &want)); err != nil || above.Ino != want.Ino {
		t.Errorf("parent of the directory %s: inode %d, %v, want %d", what, above.Ino, err, want.Ino)
	}
}

func (s *semantics) wantLink(what string, h unix.FileHandle, want string) {
	s.h.T.Helper()
	f, err := s.openHandle(h, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		s.h.T.Errorf("symlink %s: %v", what, err)
		return
	}
	defer f.Close()
	got := make([]byte, 100)
	n, err := unix.Readlinkat(int(f.Fd()), "", got)
	if err != nil || string(got[:n]) != want {
		s.h.T.Errorf("symlink %s: %q, %v", what, got[:max(n, 0)], err)
	}
}

// TestHandlesOfReusedInodes: the store's file system gives inode numbers again,
// and a handle of the file before must not lead to the one after.
//
// S-53
func TestHandlesOfReusedInodes(t *testing.T) {
	s := newSemantics(t)
	put(t, s.Path("first"), []byte("x"))
	s.wantHandle("before all", handleOf(t, s.Path("first")), "x")
	inodes := map[uint64]unix.FileHandle{}
	reused := 0
	for i := range 300 {
		path := s.Path(fmt.Sprint("file", i))
		put(t, path, fmt.Append(nil, i))
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		if before, ok := inodes[st.Ino]; ok {
			reused++
			s.wantHandle("the file that had the inode before", before, "")
		}
		inodes[st.Ino] = handleOf(t, path)
		s.wantHandle("the file that has it", inodes[st.Ino], fmt.Sprint(i))
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range inodes {
		s.wantHandle("a removed file", h, "")
	}
	t.Logf("%d of 300 files had the inode number of one before", reused)
}

// TestForgedHandles: nobody gets by a handle what has no name on the mount: the
// store's own files, what lies beside the store, or a file whose inode number is
// all that is known of it.
//
// S-54
func TestForgedHandles(t *testing.T) {
	s := newSemantics(t)
	put(t, s.Path("phi", "file"), []byte("secret"))
	put(t, filepath.Join(filepath.Dir(s.store), "beside"), []byte("not in the store"))
	h := handleOf(t, s.Path("phi", "file"))
	s.again()
	s.wantHandle("the real handle", h, "secret")
	b := h.Bytes()
	id, generation := uint64(binary.NativeEndian.Uint32(b))<<32|uint64(binary.NativeEndian.Uint32(b[4:])), binary.NativeEndian.Uint32(b[8:])
	forge := func(what string, id uint64, generation uint32) {
		t.Helper()
		bytes := binary.NativeEndian.AppendUint32(nil, uint32(id>>32))
		bytes = binary.NativeEndian.AppendUint32(bytes, uint32(id))
		bytes = binary.NativeEndian.AppendUint32(bytes, generation)
		f, err := s.openHandle(unix.NewFileHandle(h.Type(), bytes), unix.O_PATH)
		if err == nil {
			var st unix.Stat_t
			_ = unix.Fstat(int(f.Fd()), &st)
			_ = f.Close()
			t.Errorf("%s: opens inode %d of mode %o", what, st.Ino, st.Mode)
			return
		}
		wantErrno(t, what, err, unix.ESTALE)
	}
	const inoMask = 1<<48 - 1
	if id&inoMask != inodeOf(t, s.Path("phi", "file")) {
		t.Fatalf("handle has node %#x, inode %d", id, inodeOf(t, s.Path("phi", "file")))
	}
	s.forget()
	forge("another generation", id, generation+1)
	forge("another tag", id^1<<48, generation)
	forge("no tag", id&inoMask, generation)
	forge("a passing number", id|1<<63, generation)
	for _, path := range []string{
		s.store, filepath.Join(s.store, ".kmsfs"), filepath.Join(s.store, ".kmsfs", "store"), filepath.Join(s.store, ".kmsfs.dir"),
		filepath.Dir(s.store), filepath.Join(filepath.Dir(s.store), "beside"),
	} {
		for tag := range uint64(64) {
			forge(path, inodeOf(t, path)|tag<<48, uint32(tag))
		}
		forge(path, inodeOf(t, path)|id&^inoMask, generation)
	}
	forge("the root with a generation", 1, 7)
	forge("nothing", 0, 0)

	// A class without its key gives nothing to a handle either.
	s.Unmount()
	s.h.Run("keyring", "disable", "phi")
	s.Again()
	if got, err := s.read(h); err == nil {
		t.Errorf("a file of a class without its key: %q", got)
	}
	s.h.Run("keyring", "enable", "phi")
	time.Sleep(1100 * time.Millisecond) // failures are remembered for a second
	s.wantHandle("with the key", h, "secret")
}

func inodeOf(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}
