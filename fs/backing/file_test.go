package backing_test

import (
	"bytes"
	"errors"
	"os/signal"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// withFileLimit runs f while the process cannot write files beyond n bytes:
// such a write is cut short, and the next fails with EFBIG.
func withFileLimit(t *testing.T, n uint64, f func() error) error {
	t.Helper()
	signal.Ignore(unix.SIGXFSZ)
	defer signal.Reset(unix.SIGXFSZ)
	var old unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_FSIZE, &old))
	check(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: n, Max: old.Max}))
	defer func() { check(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &old)) }()
	return f()
}

func TestReadWrite(t *testing.T) {
	d, _ := openRoot(t)
	f := create(t, d, "f")
	check(t, f.WriteAt([]byte("hello"), 3))
	check(t, f.WriteAt(nil, 100))
	for _, c := range []struct {
		off  int64
		n    int
		want string
	}{{0, 8, "\x00\x00\x00hello"}, {0, 20, "\x00\x00\x00hello"}, {3, 5, "hello"}, {6, 10, "lo"}, {8, 10, ""}, {1000, 10, ""}, {3, 0, ""}} {
		p := make([]byte, c.n)
		n, err := f.ReadAt(p, c.off)
		if string(p[:n]) != c.want || err != nil {
			t.Errorf("%d bytes at %d: %q, %v, want %q", c.n, c.off, p[:n], err, c.want)
		}
	}
	if size, err := f.Size(); size != 8 || err != nil {
		t.Errorf("size = %d, %v", size, err)
	}
	err := withFileLimit(t, 4096, func() error { return f.WriteAt(make([]byte, 8192), 0) })
	if !errors.Is(err, unix.EFBIG) {
		t.Errorf("a write that fails half-way: %v", err)
	}
	r, err := d.Open("f", unix.O_RDONLY, 0)
	check(t, err)
	defer func() { _ = r.Close() }()
	if err := r.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("write to a file that is open for reading: %v", err)
	}
	w, err := r.Reopen(unix.O_RDWR)
	check(t, err)
	defer func() { _ = w.Close() }()
	check(t, w.WriteAt([]byte("x"), 0))
}

// TestPunch: a hole reads as zeros and does not change the size, with holes or
// without.
func TestPunch(t *testing.T) {
	for name, punch := range map[string]func(*backing.File, int64, int64) error{
		"fallocate": (*backing.File).Punch, "zeros": (*backing.File).ZeroFill,
	} {
		d, _ := openRoot(t)
		f := create(t, d, "f")
		const size = 3<<20 + 100
		check(t, f.WriteAt(bytes.Repeat([]byte{7}, size), 0))
		for _, c := range []struct{ off, n int64 }{{100, 2 << 20}, {size - 10, 10}, {size - 5, 1 << 20}, {size + 4096, 4096}} {
			check(t, punch(f, c.off, c.n))
		}
		want := bytes.Repeat([]byte{7}, size)
		clear(want[100 : 100+2<<20])
		clear(want[size-10:])
		got := make([]byte, size+10)
		n, err := f.ReadAt(got, 0)
		if err != nil || !bytes.Equal(got[:n], want) {
			t.Errorf("%s: %d bytes, %v, contents as wanted: %v", name, n, err, bytes.Equal(got[:n], want))
		}
	}
}

func TestSeek(t *testing.T) {
	d, _ := openRoot(t)
	f := create(t, d, "f")
	const block, size = 64 << 10, 4 * 64 << 10
	check(t, f.Truncate(size))
	check(t, f.WriteAt([]byte{1}, block))
	data, ok, err := f.SeekData(0)
	if !ok || data > block || err != nil {
		t.Errorf("SeekData(0) = %d, %v, %v", data, ok, err)
	}
	if _, ok, err := f.SeekData(2 * block); ok || err != nil {
		t.Errorf("SeekData behind the last data: %v, %v", ok, err)
	}
	if _, ok, err := f.SeekData(size); ok || err != nil {
		t.Errorf("SeekData at the end: %v, %v", ok, err)
	}
	hole, err := f.SeekHole(block)
	if hole <= block || hole > 2*block || err != nil {
		t.Errorf("SeekHole = %d, %v", hole, err)
	}
	check(t, f.WriteAt(bytes.Repeat([]byte{1}, size), 0))
	if hole, err := f.SeekHole(0); hole != size || err != nil {
		t.Errorf("SeekHole of a file without holes = %d, %v", hole, err)
	}
}

// TestSeekFallback: where the file system knows no SEEK_DATA, all is data.
func TestSeekFallback(t *testing.T) {
	proc, err := backing.OpenRoot("/proc")
	check(t, err)
	defer func() { _ = proc.Close() }()
	f, err := proc.Open("version", unix.O_RDONLY, 0)
	check(t, err)
	defer func() { _ = f.Close() }()
	// Its size is 0, so there is no data at 0, and the end is there.
	if _, ok, err := f.SeekData(0); ok || err != nil {
		t.Errorf("SeekData(0) = %v, %v", ok, err)
	}
	if hole, err := f.SeekHole(0); hole != 0 || err != nil {
		t.Errorf("SeekHole(0) = %d, %v", hole, err)
	}
}

func TestTimes(t *testing.T) {
	d, _ := openRoot(t)
	f := create(t, d, "f")
	check(t, f.SetTimes(unix.Timespec{Sec: 11, Nsec: 12}, unix.Timespec{Sec: 1 << 33, Nsec: 14}))
	check(t, f.SetTimes(unix.Timespec{Nsec: unix.UTIME_OMIT}, unix.Timespec{Nsec: unix.UTIME_OMIT}))
	st, err := f.Stat()
	if err != nil || st.Atime.Sec != 11 || st.Atime.Nsec != 12 || st.Mtime.Sec != 1<<33 || st.Mtime.Nsec != 14 {
		t.Errorf("times = %v, %v, %v", st.Atime, st.Mtime, err)
	}
	check(t, d.SetTimes("f", unix.Timespec{Nsec: unix.UTIME_OMIT}, unix.Timespec{Sec: 5}))
	if st, err := d.Stat("f"); err != nil || st.Atime.Sec != 11 || st.Mtime.Sec != 5 {
		t.Errorf("times = %v, %v, %v", st.Atime, st.Mtime, err)
	}
}

// TestUnlinked: a file without a name takes every call but Link.
func TestUnlinked(t *testing.T) {
	d, _ := openRoot(t)
	f := create(t, d, "f")
	check(t, d.Unlink("f"))
	check(t, f.WriteAt([]byte("x"), 0))
	check(t, f.Chmod(0o640))
	check(t, f.SetTimes(unix.Timespec{Sec: 1}, unix.Timespec{Sec: 2}))
	check(t, f.Attrs().Set("user.x", []byte("v"), 0))
	check(t, f.Sync())
	check(t, f.Datasync())
	g, err := f.Reopen(unix.O_RDONLY)
	check(t, err)
	defer func() { _ = g.Close() }()
	st, err := g.Stat()
	if err != nil || st.Nlink != 0 || st.Size != 1 || st.Mode&0o777 != 0o640 || st.Mtime.Sec != 2 {
		t.Errorf("stat = %+v, %v", st, err)
	}
	if err := f.Link(d, "f"); !errors.Is(err, unix.ENOENT) {
		t.Errorf("link: %v", err)
	}
}
