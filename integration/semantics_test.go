package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// The tests of this file show what docs/semantics.md says of real mounts and
// the tests of fs/fusefs do not show yet.

// semantics is a mount with the class general; phi in /phi, whose key is asked
// for at every open; and open in /open, with plain names.
type semantics struct {
	*rig.Mount
	h     *rig.Home
	store string
}

const semanticsPolicy = `
version: 1
default: general
classes:
  general: { keys: ["keyring:general"], chunk_size: 4KiB }
  phi: { keys: ["keyring:phi"], cache: 0s }
  open: { keys: ["keyring:general"], names: plain }
directories: { /phi: phi, /open: open }
`

func newSemantics(t *testing.T, flags ...string) *semantics {
	t.Helper()
	rig.Need(t, "root", "fuse")
	return newSemanticsIn(t, filepath.Join(t.TempDir(), "store"), flags...)
}

func newSemanticsIn(t *testing.T, store string, flags ...string) *semantics {
	t.Helper()
	s := &semantics{h: rig.NewHome(t), store: store}
	policy := filepath.Join(s.h.Dir, "policy.yaml")
	put(t, policy, []byte(semanticsPolicy))
	s.h.Run("init", "--policy", policy, s.store)
	s.Mount = s.h.Mount(s.store, flags...)
	for _, dir := range []string{"phi", "open"} {
		if err := os.Mkdir(s.Path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// entries returns the store's entries of the root that are of a type.
func (s *semantics) entries(dir bool) (out []string) {
	s.h.T.Helper()
	list, err := os.ReadDir(s.store)
	if err != nil {
		s.h.T.Fatal(err)
	}
	for _, e := range list {
		if !strings.HasPrefix(e.Name(), ".kmsfs") && e.IsDir() == dir {
			out = append(out, filepath.Join(s.store, e.Name()))
		}
	}
	return out
}

// wantErrno requires that err is the errno want, 0 for success.
func wantErrno(t testing.TB, what string, err error, want unix.Errno) {
	t.Helper()
	if want == 0 && err == nil || want != 0 && errors.Is(err, want) {
		return
	}
	t.Errorf("%s: got %v, want %s", what, err, unix.ErrnoName(want))
}

// eventually tries for a second until f gives want: the kernel releases a file
// a moment after close(2) has returned.
func eventually(t *testing.T, what string, f func() error, want unix.Errno) {
	t.Helper()
	var err error
	for range 100 {
		if err = f(); errors.Is(err, want) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%s: got %v, want %s", what, err, unix.ErrnoName(want))
}

// S-2 S-3 S-8 S-9
func TestKeyDisabledUnderAMount(t *testing.T) {
	s := newSemantics(t)
	file, other := s.Path("phi", "file"), s.Path("phi", "other")
	put(t, file, []byte("old contents"))
	put(t, other, []byte("x"))
	open, err := os.OpenFile(s.Path("phi", "open"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	s.h.Run("keyring", "disable", "phi")
	eventually(t, "open", func() error { _, err := os.ReadFile(file); return err }, unix.ENOKEY)
	// Keys that were made ahead of need may serve a file or two; then the next
	// ones are refused, and what is left of them goes.
	eventually(t, "create", func() error {
		err := os.WriteFile(s.Path("phi", "new"), nil, 0o644)
		if err == nil {
			err = os.Remove(s.Path("phi", "new"))
		}
		return err
	}, unix.ENOKEY)
	_, err = os.Lstat(s.Path("phi", "new"))
	wantErrno(t, "what the failed create left", err, unix.ENOENT)
	wantErrno(t, "open with O_TRUNC", os.WriteFile(file, []byte("new"), 0o644), unix.ENOKEY)
	wantErrno(t, "truncate to nothing", os.Truncate(other, 0), 0)

	_, werr := open.WriteAt([]byte("while the key is away"), 0)
	got := make([]byte, 5)
	_, rerr := open.ReadAt(got, 0)
	wantErrno(t, "write, read and fsync of an open file", errors.Join(werr, rerr, open.Sync()), 0)

	_, serr := os.Stat(file)
	_, lerr := os.ReadDir(s.Path("phi"))
	wantErrno(t, "what needs no data key", errors.Join(serr, lerr, os.Chmod(file, 0o600), os.Symlink("x", s.Path("phi", "link")),
		os.Mkdir(s.Path("phi", "dir"), 0o755), os.Rename(other, s.Path("phi", "dir", "moved")),
		os.Remove(s.Path("phi", "dir", "moved")), unix.Setxattr(file, "user.a", []byte("b"), 0)), 0)
	s.h.Run("keyring", "enable", "phi")
	time.Sleep(1100 * time.Millisecond) // failures are remembered for a second
	if got, err := os.ReadFile(file); err != nil || string(got) != "old contents" {
		t.Errorf("after all that: %q, %v", got, err)
	}
}

// S-5
func TestDirectIO(t *testing.T) {
	s := newSemantics(t)
	fd, err := unix.Open(s.Path("file"), unix.O_CREAT|unix.O_RDWR|unix.O_DIRECT, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	want := noise(10_001, 1)
	if n, err := unix.Pwrite(fd, want, 3); n != len(want) || err != nil {
		t.Fatalf("write: %d, %v", n, err)
	}
	got := make([]byte, len(want))
	if n, err := unix.Pread(fd, got, 3); n != len(want) || err != nil || !bytes.Equal(got, want) {
		t.Errorf("read: %d, %v", n, err)
	}
}

// S-10
func TestOneDamagedChunk(t *testing.T) {
	s := newSemantics(t)
	data := noise(100*4096, 1)
	put(t, s.Path("file"), data)
	s.Unmount()
	editFile(t, s.entries(false)[0], func(b []byte) []byte { b[1024+50*4128+100] ^= 1; return b })
	s.Again()
	f, err := os.Open(s.Path("file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil { // no reading ahead
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	_, err = f.ReadAt(got, 50*4096)
	wantErrno(t, "the damaged chunk", err, unix.EIO)
	for _, i := range []int{0, 49, 51, 99} {
		if _, err := f.ReadAt(got, int64(i)*4096); err != nil || !bytes.Equal(got, data[i*4096:(i+1)*4096]) {
			t.Errorf("chunk %d: %v", i, err)
		}
	}
}

// S-11 S-12
func TestFullDisk(t *testing.T) {
	rig.Need(t, "root", "fuse")
	disk := t.TempDir()
	if err := unix.Mount("none", disk, "tmpfs", 0, "size=24m"); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(disk, unix.MNT_DETACH) }()
	s := newSemanticsIn(t, filepath.Join(disk, "store"))
	put(t, s.Path("before"), noise(100_000, 1))
	f, err := os.Create(s.Path("big"))
	if err != nil {
		t.Fatal(err)
	}
	block, done := noise(1<<20, 2), int64(0)
	for err == nil && done < 100<<20 {
		var n int
		n, err = f.Write(block)
		done += int64(n)
	}
	wantErrno(t, "write to a full disk", err, unix.ENOSPC)
	if st, err := f.Stat(); err != nil || st.Size() != done {
		t.Errorf("size %v, %v, want the %d bytes that were written", st.Size(), err, done)
	}
	if err := f.Close(); err != nil {
		t.Errorf("close, after write has told: %v", err)
	}
	if got, err := os.ReadFile(s.Path("before")); err != nil || !bytes.Equal(got, noise(100_000, 1)) {
		t.Errorf("another file: %d bytes, %v", len(got), err)
	}
	s.Unmount()
	s.Again()
	b, err := os.ReadFile(s.Path("big"))
	if err != nil || int64(len(b)) != done {
		t.Errorf("after a mount: %d bytes, %v, want %d", len(b), err, done)
	}
	wantErrno(t, "remove on a full disk", os.Remove(s.Path("big")), 0)
	put(t, s.Path("after"), noise(100_000, 3))
	s.Unmount()
}

// S-35: a write that goes past the kernel's cache moves the file's time, too.
func TestTimesOfWritesThatGoThrough(t *testing.T) {
	rig.Need(t, "root", "fuse")
	disk := t.TempDir()
	if err := unix.Mount("none", disk, "tmpfs", 0, "size=24m"); err != nil { // nearly full, to a store
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(disk, unix.MNT_DETACH) }()
	s := newSemanticsIn(t, filepath.Join(disk, "store"))
	put(t, s.Path("file"), noise(100_000, 1))
	old := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	if err := os.Chtimes(s.Path("file"), old, old); err != nil {
		t.Fatal(err)
	}
	s.Unmount()
	s.Again()
	f, err := os.OpenFile(s.Path("file"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt([]byte("changed"), 50_000)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	s.Unmount()
	s.Again()
	if st, err := os.Stat(s.Path("file")); err != nil || time.Since(st.ModTime()) > time.Hour {
		t.Errorf("mtime %v, %v, want that of the write", st.ModTime(), err)
	}
	s.Unmount()
}

// S-13 S-15
func TestKilledServer(t *testing.T) {
	s := newSemantics(t)
	synced, closed := noise(10_000, 1), noise(9_000, 2)
	f, err := os.Create(s.Path("synced"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = f.Write(synced)
	if err := errors.Join(err, f.Sync()); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write([]byte("not synced")); err != nil {
		t.Fatal(err)
	}
	put(t, s.Path("closed"), closed)
	s.Kill()
	s.Again()
	if got, err := os.ReadFile(s.Path("synced")); err != nil || !bytes.HasPrefix(got, synced) {
		t.Errorf("synced: %d bytes, %v, want at least %d", len(got), err, len(synced))
	}
	if got, err := os.ReadFile(s.Path("closed")); err != nil || !bytes.Equal(got, closed) {
		t.Errorf("closed: %d bytes, %v, want %d", len(got), err, len(closed))
	}
}

// S-13
func TestWrittenBytesReachTheStoreByThemselves(t *testing.T) {
	t.Parallel()
	s := newSemantics(t)
	f, err := os.Create(s.Path("file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write([]byte("left alone")); err != nil {
		t.Fatal(err)
	}
	body := func() int64 {
		st, err := os.Stat(s.entries(false)[0])
		if err != nil {
			t.Fatal(err)
		}
		return st.Size()
	}
	for range 1800 { // the kernel's half a minute, and its turn every five seconds
		if body() == 1024+32+10 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("store file of %d bytes one and a half minutes after the write", body())
}

// S-17 S-18
func TestFallocate(t *testing.T) {
	s := newSemantics(t)
	const keep, punch, zero = unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE
	for i, tt := range []struct {
		mode      uint32
		off, size int64
		want      unix.Errno
		end       int64 // size afterwards
		from, to  int64 // zeros
	}{
		{0, 0, 50_000, 0, 50_000, 20_000, 50_000},
		{keep, 0, 50_000, 0, 20_000, 0, 0},
		{keep | punch, 5_000, 9_000, 0, 20_000, 5_000, 14_000},
		{zero, 15_000, 20_000, 0, 35_000, 15_000, 35_000},
		{zero | keep, 15_000, 20_000, 0, 20_000, 15_000, 20_000},
		{unix.FALLOC_FL_COLLAPSE_RANGE, 0, 4096, unix.EOPNOTSUPP, 20_000, 0, 0},
		{unix.FALLOC_FL_INSERT_RANGE, 0, 4096, unix.EOPNOTSUPP, 20_000, 0, 0},
		{unix.FALLOC_FL_UNSHARE_RANGE, 0, 4096, unix.EOPNOTSUPP, 20_000, 0, 0},
	} {
		path := s.Path(fmt.Sprint("file", i))
		want := noise(20_000, 1)
		put(t, path, want)
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		wantErrno(t, fmt.Sprintf("fallocate mode %#x", tt.mode), unix.Fallocate(int(f.Fd()), tt.mode, tt.off, tt.size), tt.want)
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		want = append(want, make([]byte, tt.end-int64(len(want)))...)
		clear(want[tt.from:tt.to])
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("mode %#x: %d bytes, %v, want %d", tt.mode, len(got), err, len(want))
		}
	}
}

// S-20
func TestIoctls(t *testing.T) {
	s := newSemantics(t)
	put(t, s.Path("a"), []byte("a"))
	put(t, s.Path("b"), nil)
	a, err := os.Open(s.Path("a"))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := os.OpenFile(s.Path("b"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	_, err = unix.IoctlGetInt(int(a.Fd()), unix.FS_IOC_GETFLAGS)
	wantErrno(t, "FS_IOC_GETFLAGS", err, unix.ENOTTY)
	wantErrno(t, "FICLONE", unix.IoctlFileClone(int(b.Fd()), int(a.Fd())), unix.EOPNOTSUPP)
}

// S-41
func TestOtherUsers(t *testing.T) {
	rig.Need(t, "setpriv")
	s := newSemantics(t, "--allow-other")
	if err := errors.Join(os.Chmod(s.Dir, 0o755), os.Mkdir(s.Path("shared"), 0o777), os.Chmod(s.Path("shared"), 0o777)); err != nil {
		t.Fatal(err)
	}
	put(t, s.Path("mine"), []byte("x"))
	if err := os.Chmod(s.Path("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	for dir := s.Dir; dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		if st, err := os.Stat(dir); err == nil && st.Mode().Perm()&0o001 == 0 {
			if err := os.Chmod(dir, 0o711); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.h.Sh(`setpriv --reuid 4711 --regid 4712 --clear-groups sh -c 'umask 027; cd "$0" && echo hello > shared/theirs && mkdir shared/dir && ln -s x shared/link' "$1"`, s.Dir)
	for _, name := range []string{"theirs", "dir", "link"} {
		var st unix.Stat_t
		if err := unix.Lstat(s.Path("shared", name), &st); err != nil || st.Uid != 4711 || st.Gid != 4712 {
			t.Errorf("%s belongs to %d:%d, %v", name, st.Uid, st.Gid, err)
		}
	}
	if st, err := os.Stat(s.Path("shared", "theirs")); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v, want 0640", st.Mode(), err)
	}
	if r := s.h.TrySh(`setpriv --reuid 4711 --regid 4712 --clear-groups cat "$1"`, s.Path("mine")); r.Code == 0 {
		t.Error("another user reads a file of mode 0600")
	}
}

// S-45
func TestOneMountOwnsTheStore(t *testing.T) {
	s := newSemantics(t)
	put(t, s.Path("file"), []byte("x"))
	second := filepath.Join(t.TempDir(), "second")
	if err := os.Mkdir(second, 0o755); err != nil {
		t.Fatal(err)
	}
	if r := s.h.Try("mount", s.store, second); r.Code != 6 {
		t.Errorf("second mount: exit %d, %s", r.Code, r.Stderr)
	}
	m := s.h.Mount(s.store, "--read-only")
	if got, err := os.ReadFile(m.Path("file")); err != nil || string(got) != "x" {
		t.Errorf("read-only beside it: %q, %v", got, err)
	}
	wantErrno(t, "write there", os.WriteFile(m.Path("new"), nil, 0o644), unix.EROFS)
}

// S-46
func TestDeadMount(t *testing.T) {
	s := newSemantics(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := unix.Kill(s.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "stat", func() error { _, err := os.Stat(s.Path("file")); return err }, unix.ENOTCONN)
	if out, err := exec.CommandContext(ctx, "umount", s.Dir).CombinedOutput(); err != nil {
		t.Errorf("umount: %v: %s", err, out)
	}
	s.Again()
	wantErrno(t, "write", os.WriteFile(s.Path("file"), []byte("x"), 0o644), 0)
}
