package backing_test

import (
	"errors"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// logTap writes down every call, and fails those of one kind.
type logTap struct {
	mu    sync.Mutex
	calls []string
	fail  string
}

func (l *logTap) Do(op *backing.Op, do func() error) error {
	l.mu.Lock()
	l.calls = append(l.calls, op.Call)
	fail := op.Call == l.fail
	l.mu.Unlock()
	if fail {
		return unix.EIO
	}
	return do()
}

// TestTap: nothing that changes or reads a store goes past the tap.
func TestTap(t *testing.T) {
	path := t.TempDir()
	l := &logTap{}
	root, err := backing.OpenRootTapped(path, l)
	check(t, err)
	defer func() { check(t, root.Close()) }()
	for _, c := range tapCalls {
		l.calls, l.fail = nil, ""
		if err := c.do(root); err != nil {
			t.Errorf("%s: %v", c.call, err)
		}
		if !slices.Contains(l.calls, c.call) {
			t.Errorf("the tap saw %v, want %s", l.calls, c.call)
		}
		l.fail = c.call
		if err := c.do(root); !errors.Is(err, unix.EIO) {
			t.Errorf("%s that fails: %v, want EIO", c.call, err)
		}
	}
}

func in(f func(d *backing.Dir) error) func(*backing.Dir) error {
	return func(root *backing.Dir) error {
		d, err := root.OpenDir("d") // a tap goes with what is opened below
		if err != nil {
			return err
		}
		return closed(d, f(d))
	}
}

func on(f func(f *backing.File) error) func(*backing.Dir) error {
	return in(func(d *backing.Dir) error {
		x, err := d.Open("f", unix.O_RDWR|unix.O_CREAT, 0o600)
		if err != nil {
			return err
		}
		return closed(x, f(x))
	})
}

var tapCalls = []struct {
	call string
	do   func(root *backing.Dir) error
}{
	{"mkdir", func(r *backing.Dir) error { return r.Mkdir("d", 0o700) }},
	{"open", func(r *backing.Dir) error { return on(func(*backing.File) error { return nil })(r) }},
	{"write", on(func(f *backing.File) error { return f.WriteAt([]byte("abc"), 0) })},
	{"read", on(func(f *backing.File) error { _, err := f.ReadAt(make([]byte, 1), 0); return err })},
	{"truncate", on(func(f *backing.File) error { return f.Truncate(8192) })},
	{"fallocate", on(func(f *backing.File) error { return f.Punch(0, 4096) })},
	{"fsync", on((*backing.File).Sync)},
	{"fsync", in((*backing.Dir).Sync)},
	{"fdatasync", on((*backing.File).Datasync)},
	{"syncfs", in((*backing.Dir).SyncFS)},
	{"stat", on(func(f *backing.File) error { _, err := f.Size(); return err })},
	{"stat", in(func(d *backing.Dir) error { _, err := d.Stat("f"); return err })},
	{"statfs", in(func(d *backing.Dir) error { _, err := d.Statfs(); return err })},
	{"readdir", in(func(d *backing.Dir) error { _, err := d.ReadDir(); return err })},
	{"symlink", in(func(d *backing.Dir) error { return d.Symlink("to", "s") })},
	{"readlink", in(func(d *backing.Dir) error { _, err := d.Readlink("s"); return err })},
	{"mknod", in(func(d *backing.Dir) error { return d.Mknod("n", unix.S_IFIFO|0o600, 0) })},
	{"link", in(func(d *backing.Dir) error { return d.Link("f", d, "g") })},
	{"rename", in(func(d *backing.Dir) error { return d.Rename("g", d, "h", 0) })},
	{"unlink", in(func(d *backing.Dir) error { return d.Unlink("h") })},
	{"chmod", in(func(d *backing.Dir) error { return d.Chmod("f", 0o644) })},
	{"chmod", in(func(d *backing.Dir) error { return d.ChmodSelf(0o755) })},
	{"chmod", on(func(f *backing.File) error { return f.Chmod(0o644) })},
	{"chown", in(func(d *backing.Dir) error { return d.Chown("f", -1, -1) })},
	{"chown", on(func(f *backing.File) error { return f.Chown(-1, -1) })},
	{"utimens", in(func(d *backing.Dir) error { return d.SetTimes("f", now, now) })},
	{"utimens", on(func(f *backing.File) error { return f.SetTimes(now, now) })},
	{"setxattr", on(func(f *backing.File) error { return f.Attrs().Set("user.a", []byte("b"), 0) })},
	{"getxattr", in(func(d *backing.Dir) error { _, err := d.Attrs("f").Get("user.a"); return err })},
	{"listxattr", on(func(f *backing.File) error { _, err := f.Attrs().List(); return err })},
	{"removexattr", in(func(d *backing.Dir) error { return d.Attrs("f").Remove("user.a") })},
	{"rmdir", func(r *backing.Dir) error {
		if err := r.Mkdir("e", 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		return r.Rmdir("e")
	}},
}

var now = unix.Timespec{Nsec: unix.UTIME_NOW}
