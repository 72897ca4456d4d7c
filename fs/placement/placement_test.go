package placement_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/placement"
)

const size = envelope.MinHeader

func openDir(t *testing.T, path string) *backing.Dir {
	t.Helper()
	d, err := backing.OpenRoot(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func openFile(t *testing.T, d *backing.Dir, name string, flags int) *backing.File {
	t.Helper()
	f, err := placement.Open(d, name, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// TestContract holds every placement to what Place promises: F-18, F-19, F-20.
func TestContract(t *testing.T) {
	for _, p := range []envelope.Placement{envelope.Prefix, envelope.Xattr, envelope.Sidecar} {
		t.Run(p.String(), func(t *testing.T) { contract(t, p) })
	}
}

func contract(t *testing.T, p envelope.Placement) {
	path := t.TempDir()
	if err := os.Mkdir(filepath.Join(path, "second"), 0o700); err != nil {
		t.Fatal(err)
	}
	a, b := openDir(t, path), openDir(t, filepath.Join(path, "second"))
	place, id := placement.New(p, size), envelope.NewID()
	f, err := a.Open("file", unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()

	// A file with contents and no header is told as such.
	if err := f.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := place.Read(f, []*backing.Dir{a}); !errors.Is(err, placement.ErrHeader) || fault.Of(err) != fault.Integrity {
		t.Errorf("no header: %v, want %v", err, placement.ErrHeader)
	}
	if err := place.Rewrite(f, []*backing.Dir{a}, id, bytes.Repeat([]byte{0}, size)); p == envelope.Sidecar && !errors.Is(err, placement.ErrHeader) {
		t.Errorf("rewrite of what is not there: %v, want %v", err, placement.ErrHeader)
	}

	block := func(b byte) []byte { return bytes.Repeat([]byte{b}, size) }
	write := func(dirs []*backing.Dir, b byte) {
		t.Helper()
		prefix, err := place.Write(f, dirs, id, block(b))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := int64(len(prefix)), p.Base(size); got != want {
			t.Errorf("prefix of %d bytes, want %d", got, want)
		}
		if err := f.WriteAt(append(slices.Clone(prefix), "chunks"...), 0); err != nil {
			t.Fatal(err)
		}
		if err := place.Sync(dirs, id); err != nil {
			t.Errorf("Sync: %v", err)
		}
	}
	want := func(what string, dirs []*backing.Dir, b byte) {
		t.Helper()
		got, err := place.Read(f, dirs)
		if err != nil || !bytes.Equal(got, block(b)) {
			t.Errorf("%s: %.4x…, %v, want %.4x…", what, got, err, block(b))
		}
		body := make([]byte, 6)
		if _, err := f.ReadAt(body, p.Base(size)); err != nil || string(body) != "chunks" {
			t.Errorf("%s: chunks are %q, %v", what, body, err)
		}
	}
	write([]*backing.Dir{a}, 1)
	want("written", []*backing.Dir{a}, 1)

	// A second name in another directory: what is written reaches both.
	if err := a.Link("file", b, "other"); err != nil {
		t.Fatal(err)
	}
	write([]*backing.Dir{a, b}, 2)
	for _, dirs := range [][]*backing.Dir{{a}, {b}, {a, b}} {
		want("two names", dirs, 2)
	}
	old := unix.Timespec{Sec: 1e9, Nsec: 5}
	if err := f.SetTimes(old, old); err != nil {
		t.Fatal(err)
	}
	if err := place.Rewrite(f, []*backing.Dir{b}, id, block(3)); err != nil {
		t.Fatal(err)
	}
	if st, err := f.Stat(); err != nil || st.Mtime.Sec != 1e9 || st.Mtime.Nsec != 5 {
		t.Errorf("rewriting the header changed the file's mtime to %v, %v", st.Mtime, err)
	}
	for _, dirs := range [][]*backing.Dir{{a}, {b}} {
		want("rewritten", dirs, 3)
	}
	head := make([]byte, placement.IDLen)
	if _, err := f.ReadAt(head, 0); err != nil {
		t.Fatal(err)
	}
	if got := place.Sidecar(head); (got != "") != (p == envelope.Sidecar) || got != "" && got != envelope.SidecarName(id) {
		t.Errorf("Sidecar = %q", got)
	}
	if got := place.Sidecar(head[:3]); got != "" {
		t.Errorf("Sidecar of a file of 3 bytes = %q", got)
	}
	if got := place.Body(); got != (p == envelope.Prefix) {
		t.Errorf("Body = %v", got)
	}
}

// TestOpenLetsTheOwnerIn: the mode of a file is for the mount's users. It stays
// what it was. (Root needs no letting in.)
func TestOpenLetsTheOwnerIn(t *testing.T) {
	path := t.TempDir()
	d := openDir(t, path)
	if err := d.WriteNew("file", []byte("x"), 0o000, false); err != nil {
		t.Fatal(err)
	}
	f := openFile(t, d, "file", unix.O_RDWR)
	if st, err := f.Stat(); err != nil || st.Mode&0o7777 != 0 {
		t.Errorf("mode %o, %v, want 0", st.Mode&0o7777, err)
	}
	if _, err := placement.Open(d, "none", unix.O_RDONLY); !errors.Is(err, unix.ENOENT) {
		t.Errorf("no such file: %v", err)
	}
	calls := 0
	err := placement.Lifted(d, func() error { calls++; return unix.EACCES })
	if !errors.Is(err, unix.EACCES) || calls < 1 { // the directory lets its owner in as it is
		t.Errorf("Lifted: %v after %d calls", err, calls)
	}
}
