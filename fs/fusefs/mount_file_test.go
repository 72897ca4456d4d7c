package fusefs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const someUser = 4711

// openTo lets other users reach the mount: the test's directories are 0700.
func (m *mounted) openTo(t *testing.T) {
	t.Helper()
	must(t, os.Chmod(m.dir+"/..", 0o755))
	must(t, os.Chmod(m.dir, 0o777))
}

func stat(t *testing.T, path string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	return st
}

// S-37
func TestWriteBySomeUserClearsSetuid(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{AllowOther: true})
	m.openTo(t)
	file := m.path("file")
	must(t, os.WriteFile(file, []byte("x"), 0o600))
	reset := func() { must(t, unix.Chmod(file, 0o6777)) }

	reset()
	runHelper(t, 0, 0, "append", file)
	if got := stat(t, file).Mode & 0o7777; got != 0o6777 {
		t.Errorf("after root's write: mode %o, want 6777", got)
	}
	runHelper(t, someUser, 0, "append", file)
	if got := stat(t, file).Mode & 0o7777; got != 0o777 {
		t.Errorf("after a user's write: mode %o, want 777", got)
	}
	reset()
	must(t, os.Chown(file, 1, 1))
	if got := stat(t, file).Mode & 0o7777; got != 0o777 {
		t.Errorf("after chown: mode %o, want 777", got)
	}
	reset()
	must(t, os.Chown(file, -1, -1))
	if got := stat(t, file).Mode & 0o7777; got != 0o777 {
		t.Errorf("after chown(-1, -1): mode %o, want 777", got)
	}
}

// acl encodes a POSIX ACL as its extended attribute: version 2, then tag,
// permissions and id of each entry (linux/posix_acl_xattr.h).
func acl(entries ...[3]uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return b
}

// groupACL gives group 815 everything.
var groupACL = acl([3]uint32{0x01, 7, ^uint32(0)}, [3]uint32{0x04, 5, ^uint32(0)},
	[3]uint32{0x08, 7, 815}, [3]uint32{0x10, 7, ^uint32(0)}, [3]uint32{0x20, 0, ^uint32(0)})

// S-34 S-41
func TestACL(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{AllowOther: true})
	m.openTo(t)
	dir := m.path("d")
	must(t, os.Mkdir(dir, 0o777))
	runHelper(t, 0, 0o027, "create", dir+"/masked")
	if got := stat(t, dir+"/masked").Mode & 0o777; got != 0o640 {
		t.Errorf("without an ACL: mode %o, want 640", got)
	}
	must(t, unix.Setxattr(dir, aclDefault, groupACL, 0))
	// With a default ACL the umask means nothing.
	runHelper(t, 0, 0o027, "create", dir+"/inherits")
	if got := stat(t, dir+"/inherits").Mode & 0o777; got != 0o660 {
		t.Errorf("with a default ACL: mode %o, want 660 (the mask in place of the group)", got)
	}
	runHelper(t, 0, 0o077, "mkdir", dir+"/below")
	buf := make([]byte, 256)
	if n, err := unix.Getxattr(dir+"/below", aclDefault, buf); err != nil || !bytes.Equal(buf[:n], groupACL) {
		t.Errorf("the directory below has default ACL %x, %v", buf[:max(n, 0)], err)
	}

	// The ACL decides: a user without a group gets in by none of its entries.
	if err := helper(someUser, 0, "append", dir+"/inherits").Run(); err == nil {
		t.Error("a user whom the ACL does not name may write")
	}
}

// S-34
func TestSettingACLClearsSetgidOfForeignGroup(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{AllowOther: true})
	m.openTo(t)
	file := m.path("file")
	must(t, os.WriteFile(file, nil, 0o755))
	must(t, os.Chown(file, someUser, 815)) // the user is not in group 815
	must(t, unix.Chmod(file, 0o2755))
	runHelper(t, someUser, 0, "setacl", file)
	if got := stat(t, file).Mode; got&unix.S_ISGID != 0 {
		t.Errorf("mode %o still has setgid", got&0o7777)
	}
}

// S-31
func TestXattrSizes(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	file := m.path("file")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, unix.Setxattr(file, "user.a", []byte("value"), unix.XATTR_CREATE))
	must(t, unix.Setxattr(file, "user.empty", nil, 0))
	if err := unix.Setxattr(file, "user.a", nil, unix.XATTR_CREATE); err != unix.EEXIST {
		t.Errorf("XATTR_CREATE of an existing one: %v", err)
	}
	if err := unix.Setxattr(file, "user.b", nil, unix.XATTR_REPLACE); err != unix.ENODATA {
		t.Errorf("XATTR_REPLACE of a missing one: %v", err)
	}
	if _, err := unix.Getxattr(file, "user.a", make([]byte, 3)); err != unix.ERANGE {
		t.Errorf("short buffer: %v", err)
	}
	if n, err := unix.Getxattr(file, "user.empty", make([]byte, 3)); err != nil || n != 0 {
		t.Errorf("empty value: %d, %v", n, err)
	}
	if _, err := unix.Listxattr(file, make([]byte, 3)); err != unix.ERANGE {
		t.Errorf("list into a short buffer: %v", err)
	}
	must(t, unix.Removexattr(file, "user.a"))
	if err := unix.Removexattr(file, "user.a"); err != unix.ENODATA {
		t.Errorf("second removal: %v", err)
	}
}

// S-35
func TestTimesAndBirth(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	file := m.path("file")
	must(t, os.WriteFile(file, nil, 0o600))
	want := []unix.Timespec{{Sec: -100, Nsec: 1}, {Sec: 1 << 32, Nsec: 999_999_999}}
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, file, want, 0))
	if st := stat(t, file); st.Atim != want[0] || st.Mtim != want[1] {
		t.Errorf("got %v %v, want %v", st.Atim, st.Mtim, want)
	}
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, file, []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_OMIT}}, 0))
	if st := stat(t, file); st.Atim.Sec < 1e9 || st.Mtim != want[1] {
		t.Errorf("after atime now, mtime omitted: %v %v", st.Atim, st.Mtim)
	}
	var stx unix.Statx_t
	must(t, unix.Statx(unix.AT_FDCWD, file, 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &stx))
	if stx.Mask&unix.STATX_BTIME == 0 || stx.Btime.Sec < 1e9 {
		t.Errorf("birth time %v, mask %#x", stx.Btime, stx.Mask)
	}
}

// TestSpecialFiles: the mount of root has neither nodev nor nosuid.
//
// S-39
func TestSpecialFiles(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	const zero = 1<<8 | 5
	must(t, unix.Mknod(m.path("zero"), unix.S_IFCHR|0o600, zero))
	must(t, unix.Mknod(m.path("big"), unix.S_IFBLK|0o600, int(unix.Mkdev(259, 70000))))
	must(t, unix.Mknod(m.path("sock"), unix.S_IFSOCK|0o600, 0))
	must(t, unix.Mkfifo(m.path("fifo"), 0o600))
	for name, want := range map[string]struct {
		mode uint32
		rdev uint64
	}{
		"zero": {unix.S_IFCHR, zero}, "big": {unix.S_IFBLK, unix.Mkdev(259, 70000)},
		"sock": {unix.S_IFSOCK, 0}, "fifo": {unix.S_IFIFO, 0},
	} {
		if st := stat(t, m.path(name)); st.Mode&unix.S_IFMT != want.mode || st.Rdev != want.rdev {
			t.Errorf("%s: mode %o, rdev %#x, want %o, %#x", name, st.Mode, st.Rdev, want.mode, want.rdev)
		}
	}
	f, err := os.Open(m.path("zero"))
	must(t, err)
	defer f.Close()
	buf := []byte("xxxx")
	if _, err := io.ReadFull(f, buf); err != nil || !bytes.Equal(buf, make([]byte, 4)) {
		t.Errorf("read from the device: %q, %v", buf, err)
	}
}

// S-6
func TestTmpfileAndLink(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	fd, err := unix.Open(m.dir, unix.O_TMPFILE|unix.O_RDWR, 0o640)
	must(t, err)
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte("nameless"))
	must(t, err)
	if st := fstat(t, fd); st.Nlink != 0 || st.Size != 8 {
		t.Errorf("before the link: %d links, %d bytes", st.Nlink, st.Size)
	}
	must(t, unix.Linkat(fd, "", unix.AT_FDCWD, m.path("named"), unix.AT_EMPTY_PATH))
	if got, err := os.ReadFile(m.path("named")); err != nil || string(got) != "nameless" {
		t.Errorf("got %q, %v", got, err)
	}
	if a, b := fstat(t, fd), stat(t, m.path("named")); a.Ino != b.Ino || a.Nlink != 1 || b.Nlink != 1 {
		t.Errorf("inode %d with %d links, by name %d with %d", a.Ino, a.Nlink, b.Ino, b.Nlink)
	}
}

func fstat(t *testing.T, fd int) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Fstat(fd, &st))
	return st
}

// TestHardLinkAliases: what happens under one name shows under the other at
// once, in spite of the long attribute times.
//
// S-26 S-21
func TestHardLinkAliases(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	a, b := m.path("a"), m.path("b")
	must(t, os.WriteFile(a, []byte("one"), 0o600))
	must(t, os.Link(a, b))
	check := func(when string, nlink uint64, size int64) {
		t.Helper()
		for _, name := range []string{a, b} {
			if _, err := os.Lstat(name); err != nil {
				continue
			}
			if st := stat(t, name); st.Nlink != nlink || st.Size != size {
				t.Errorf("%s, %s: %d links, %d bytes, want %d, %d", when, name, st.Nlink, st.Size, nlink, size)
			}
		}
	}
	check("linked", 2, 3)
	must(t, os.WriteFile(b, []byte("three"), 0o600))
	check("written", 2, 5)
	must(t, os.Truncate(a, 1))
	check("truncated", 2, 1)
	must(t, os.Remove(a))
	check("unlinked", 1, 1)
}

// S-17
func TestOverwriteThroughCachedPages(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	file := m.path("file")
	long, short := bytes.Repeat([]byte("long"), 50_000), []byte("short")
	for range 3 {
		for _, want := range [][]byte{long, short} {
			must(t, os.WriteFile(file, want, 0o600)) // O_TRUNC, one request
			if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("read %d bytes, %v, want %d", len(got), err, len(want))
			}
		}
	}
	must(t, os.WriteFile(file, long, 0o600))
	must(t, os.Truncate(file, 10))
	must(t, os.Truncate(file, 20))
	want := append(append([]byte{}, long[:10]...), make([]byte, 10)...)
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after shrinking and growing: %q, %v, want %q", got, err, want)
	}
}

// TestSeekSeesWhatWasJustWritten: what is in the page cache only is data when cp
// asks where the data is, and nothing is behind its end.
//
// S-19
func TestSeekSeesWhatWasJustWritten(t *testing.T) {
	for _, l := range layouts {
		t.Run(l.String(), func(t *testing.T) {
			m := mountStore(t, newStore(t, l), Options{})
			must(t, os.Mkdir(m.path("dir"), 0o700))
			f, err := os.Create(m.path("dir/" + strings.Repeat("name", 60)))
			must(t, err)
			defer f.Close()
			const end = 3 << 20
			_, err = f.WriteAt([]byte("data"), end-4)
			must(t, err)
			must(t, os.Rename(m.path("dir"), m.path("moved")))
			seek := func(off int64, whence int, want int64, wantErr error) {
				t.Helper()
				got, err := unix.Seek(int(f.Fd()), off, whence)
				if err != wantErr || err == nil && got != want {
					t.Errorf("lseek(%d, %d): %d, %v, want %d, %v", off, whence, got, err, want, wantErr)
				}
			}
			seek(end-4, unix.SEEK_DATA, end-4, nil)
			seek(end-4, unix.SEEK_HOLE, end, nil)
			seek(end, unix.SEEK_DATA, 0, unix.ENXIO)
			seek(end, unix.SEEK_HOLE, 0, unix.ENXIO)
			must(t, os.Remove(m.path("moved/"+strings.Repeat("name", 60))))
			seek(7, unix.SEEK_DATA, 7, nil)
		})
	}
}

// S-18 S-19 S-20
func TestHolesAndCopies(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	must(t, os.WriteFile(m.path("from"), data, 0o600))
	from, err := os.OpenFile(m.path("from"), os.O_RDWR, 0)
	must(t, err)
	defer from.Close()
	fd := int(from.Fd())
	const hole, length = 256 << 10, 512 << 10
	must(t, unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, hole, length))
	clear(data[hole : hole+length])
	if got, err := os.ReadFile(m.path("from")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("after punching: %d bytes, %v", len(got), err)
	}
	if off, err := unix.Seek(fd, 0, unix.SEEK_HOLE); err != nil || off != int64(len(data)) {
		t.Errorf("SEEK_HOLE in a file that is open for writing: %d, %v, want its end", off, err)
	}
	if _, err := unix.Seek(fd, int64(len(data))+5, unix.SEEK_DATA); err != unix.ENXIO {
		t.Errorf("SEEK_DATA past the end: %v, want ENXIO", err)
	}
	if err := unix.Fallocate(fd, unix.FALLOC_FL_COLLAPSE_RANGE, 0, 4096); err != unix.EOPNOTSUPP {
		t.Errorf("FALLOC_FL_COLLAPSE_RANGE: %v, want EOPNOTSUPP", err)
	}

	to, err := os.Create(m.path("to"))
	must(t, err)
	defer to.Close()
	var in, out int64
	for out < int64(len(data)) {
		if n, err := unix.CopyFileRange(fd, &in, int(to.Fd()), &out, len(data), 0); err != nil || n == 0 {
			t.Fatalf("copy_file_range after %d bytes: %d, %v", out, n, err)
		}
	}
	if got, err := os.ReadFile(m.path("to")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("copy: %d bytes, %v", len(got), err)
	}
	must(t, from.Close())
	must(t, to.Close())
	m.remount(t) // the writer is gone for certain
	reader, err := os.Open(m.path("from"))
	must(t, err)
	defer reader.Close()
	if off, err := unix.Seek(int(reader.Fd()), 0, unix.SEEK_HOLE); err != nil || off < hole || off >= hole+length {
		t.Errorf("SEEK_HOLE when nobody writes: %d, %v", off, err)
	}
}

// S-4
func TestAppendersTakeTurns(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	open := func() *os.File {
		f, err := os.OpenFile(m.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		must(t, err)
		t.Cleanup(func() { f.Close() })
		return f
	}
	a, b := open(), open()
	for range 100 {
		for _, f := range []*os.File{a, b} {
			if _, err := f.WriteString("0123456789"); err != nil {
				t.Fatal(err)
			}
		}
	}
	if st := stat(t, m.path("log")); st.Size != 2000 {
		t.Errorf("%d bytes, want 2000", st.Size)
	}
}

// S-40
func TestLocks(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	a, err := os.Create(m.path("file"))
	must(t, err)
	defer a.Close()
	b, err := os.OpenFile(m.path("file"), os.O_RDWR, 0)
	must(t, err)
	defer b.Close()
	must(t, unix.Flock(int(a.Fd()), unix.LOCK_EX))
	if err := unix.Flock(int(b.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK {
		t.Errorf("second flock: %v", err)
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK, Len: 10}
	must(t, unix.FcntlFlock(a.Fd(), unix.F_OFD_SETLK, &lock))
	if err := unix.FcntlFlock(b.Fd(), unix.F_OFD_SETLK, &lock); err != unix.EAGAIN {
		t.Errorf("second fcntl lock: %v", err)
	}
}

// S-7
func TestUnlinkedOpenFile(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	f, err := os.Create(m.path("file"))
	must(t, err)
	defer f.Close()
	must(t, os.Remove(m.path("file")))
	want := bytes.Repeat([]byte("gone"), 100_000)
	_, err = f.WriteAt(want, 0)
	must(t, errors.Join(err, f.Sync(), f.Chmod(0o604), f.Truncate(int64(len(want))-1)))
	got := make([]byte, len(want)-1)
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want[:len(got)]) {
		t.Errorf("read: %v", err)
	}
	if st := fstat(t, int(f.Fd())); st.Nlink != 0 || st.Mode&0o777 != 0o604 || st.Size != int64(len(got)) {
		t.Errorf("%d links, mode %o, %d bytes", st.Nlink, st.Mode, st.Size)
	}
}

// S-14
func TestSharedMapping(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	must(t, os.WriteFile(m.path("file"), bytes.Repeat([]byte("page"), 30_000), 0o600))
	runHelper(t, 0, 0, "mmap", m.path("file"))
	m.remount(t)
	got, err := os.ReadFile(m.path("file"))
	if err != nil || !bytes.HasSuffix(got, []byte("by map")) || !bytes.Contains(got, []byte("by write")) {
		t.Errorf("%d bytes, end %q, %v", len(got), got[max(0, len(got)-8):], err)
	}
}
