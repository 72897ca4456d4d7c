package cryptfs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/lease"
)

const leaseEvery = 50 * time.Millisecond

// sharedStore is a store on a disk of several machines, whose flock(2) does not
// reach from one to another.
type sharedStore struct {
	t    *testing.T
	dir  string
	prov keywrap.Provider
	conf Config
}

func newSharedStore(t *testing.T) *sharedStore {
	dir, prov, info := testStore(t, envelope.Prefix, classify.NamesEncrypted)
	return &sharedStore{t, dir, prov, Config{Store: dir, Provider: prov, Keys: info.Keys, LeaseInterval: leaseEvery}}
}

// on opens the store on another machine, or another boot of one.
func (s *sharedStore) on(host string, change ...func(*Config)) (*Volume, error) {
	c := s.conf
	c.machine = &lease.Identity{Machine: "machine of " + host, Boot: "boot of " + host, Host: host}
	for _, f := range change {
		f(&c)
	}
	lock := filepath.Join(s.dir, metaDir, lockFile)
	if err := os.Remove(lock); err != nil && !errors.Is(err, os.ErrNotExist) {
		s.t.Fatal(err)
	}
	v, err := Open(s.t.Context(), c)
	if err == nil {
		s.t.Cleanup(func() { _ = v.Close() })
	}
	return v, err
}

func (s *sharedStore) path(name string) string { return filepath.Join(s.dir, metaDir, name) }

// TestSecondMachineIsRefused: F-68
func TestSecondMachineIsRefused(t *testing.T) {
	s := newSharedStore(t)
	v, err := s.on("a")
	if err != nil {
		t.Fatal(err)
	}
	n, h, _, err := v.Create(t.Context(), v.Root(), "file", unix.O_RDWR, 0o644, Caller{})
	if err != nil {
		t.Fatal(err)
	}
	slow := func(c *Config) { c.LeaseInterval = 2 * time.Second } // this machine may have much else to do
	for name, how := range map[string]func(*Config){
		"a mount": slow,
		"fsck":    func(c *Config) { slow(c); c.ReadOnly, c.Alone = true, true },
	} {
		if _, err := s.on("b", how); !errors.Is(err, ErrElsewhere) {
			t.Errorf("%s on another machine: got %v, want ErrElsewhere", name, err)
		}
	}
	r, err := s.on("b", func(c *Config) { c.ReadOnly = true })
	if err != nil {
		t.Errorf("a read-only mount: %v", err)
	} else if err := r.Close(); err != nil {
		t.Error(err)
	}
	if _, err := h.WriteAt([]byte("data"), 0, false); err != nil {
		t.Errorf("write by the owner: %v", err)
	}
	h.Release()
	v.Forget(n, 1)
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.path(lease.FileName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close: got %v, want no lease", err)
	}
	if _, err := s.on("b", func(c *Config) { c.LeaseInterval = time.Hour }); err != nil {
		t.Errorf("after Close, on another machine: %v", err)
	}
}

// deadOwner leaves what one that was killed does.
func (s *sharedStore) deadOwner(host string) {
	s.t.Helper()
	v, err := s.on(host, func(c *Config) { c.LeaseInterval = time.Hour })
	if err != nil {
		s.t.Fatal(err)
	}
	b, err := os.ReadFile(s.path(lease.FileName))
	if err != nil {
		s.t.Fatal(err)
	}
	if err := v.Close(); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(s.path(lease.FileName), b, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

func TestDeadOwner(t *testing.T) {
	s := newSharedStore(t)
	hour := func(c *Config) { c.LeaseInterval = time.Hour }
	s.deadOwner("a")
	v, err := s.on("a", hour)
	if err != nil {
		t.Fatalf("on the same machine, at once: %v", err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	s.deadOwner("a")
	v, err = s.on("a", hour, func(c *Config) { c.machine.Boot = "a later one" })
	if err != nil {
		t.Fatalf("on the same machine after a boot, at once: %v", err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	s.deadOwner("a")
	ctx, cancel := context.WithTimeout(t.Context(), 10*leaseEvery)
	defer cancel()
	c := s.conf
	c.machine = &lease.Identity{Machine: "b", Boot: "b", Host: "b"}
	if _, err := Open(ctx, c); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("on another machine: got %v, want one that waits", err)
	}
}

// TestLostLease has another machine take a mounted store over. F-69
func TestLostLease(t *testing.T) {
	s := newSharedStore(t)
	v, err := s.on("a")
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	old := bytes.Repeat([]byte("old"), 4000)
	n, h, _, err := v.Create(ctx, v.Root(), "file", unix.O_RDWR, 0o644, Caller{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.WriteAt(old, 0, false); err != nil {
		t.Fatal(err)
	}
	if err := h.Fsync(false); err != nil {
		t.Fatal(err)
	}
	if _, err := h.WriteAt([]byte("mid"), 0, false); err != nil {
		t.Fatal(err)
	}
	if err := h.Flush(); err != nil { // in the journal, and not in its place
		t.Fatal(err)
	}
	if c := v.Status().Condition; c.State != StateSound {
		t.Errorf("before: got %+v, want %s", c, StateSound)
	}
	dir := t.TempDir()
	other, err := Open(ctx, Config{Store: s.copyTo(dir), Provider: s.prov, Keys: s.conf.Keys,
		machine: &lease.Identity{Machine: "b", Boot: "b", Host: "b"}, LeaseInterval: leaseEvery})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, metaDir, lease.FileName), s.path(lease.FileName)); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); v.lease.Err() == nil; time.Sleep(leaseEvery / 5) {
		if time.Now().After(end) {
			t.Fatal("a lost lease is not noticed")
		}
	}
	before := s.snapshot()
	for name, f := range map[string]func() error{
		"write and flush": func() error { _, err := h.WriteAt([]byte("new"), 0, false); return errors.Join(err, h.Flush()) },
		"truncate":        func() error { size := int64(5); _, err := v.Setattr(ctx, n, SetAttr{Size: &size}); return err },
		"create": func() error {
			_, _, _, err := v.Create(ctx, v.Root(), "next", unix.O_RDWR, 0o644, Caller{})
			return err
		},
		"mkdir":   func() error { _, _, err := v.Mkdir(ctx, v.Root(), "dir", 0o755, Caller{}); return err },
		"symlink": func() error { _, _, err := v.Symlink(ctx, v.Root(), "sym", "target", Caller{}); return err },
		"link":    func() error { _, err := v.Link(ctx, n, v.Root(), "again"); return err },
		"rename":  func() error { return v.Rename(ctx, v.Root(), "file", v.Root(), "moved", 0) },
		"unlink":  func() error { return v.Unlink(ctx, v.Root(), "file") },
		"setxattr": func() error {
			return v.Setxattr(ctx, n, "user.x", []byte("y"), 0, Caller{})
		},
		"settle":     v.Settle,
		"checkpoint": v.Checkpoint,
		"policy":     func() error { _, err := v.ApplyPolicy(ctx, v.Info().Policy); return err },
		"rekey":      func() error { _, err := v.Rekey(ctx, RekeyConfig{}); return err },
	} {
		if err := f(); !errors.Is(err, ErrHalted) || !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: got %v, want ErrHalted with EROFS", name, err)
		}
	}
	got := make([]byte, len(old))
	r, err := v.Open(ctx, n, unix.O_RDONLY, false)
	if err == nil {
		_, err = r.ReadAt(got[3:], 3) // what was written since is in memory
		r.Release()
	}
	if err != nil || !bytes.Equal(got[3:], old[3:]) {
		t.Errorf("reading goes on: %v", err)
	}
	c := v.Status().Condition
	if c.State != StateHalted || c.Halt == nil || c.Halt.Reason != HaltLease || c.Halt.Time.IsZero() {
		t.Errorf("condition: got %+v, want %s for %s", c, StateHalted, HaltLease)
	}
	if got := v.Health(ctx).Condition.State; got != StateHalted {
		t.Errorf("health: got %q, want %q", got, StateHalted)
	}
	h.Release()
	_ = v.Close() // what was in memory only is lost
	if after := s.snapshot(); after != before {
		t.Errorf("the store was changed after the lease was lost:\n%s\nwas\n%s", after, before)
	}
	_ = other.Close()
}

// copyTo makes dir a store with the same record, and nothing else in it.
func (s *sharedStore) copyTo(dir string) string {
	s.t.Helper()
	for _, name := range []string{dirFile, filepath.Join(metaDir, storeFile), filepath.Join(metaDir, classesDir)} {
		from, to := filepath.Join(s.dir, name), filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			s.t.Fatal(err)
		}
		if st, err := os.Stat(from); err == nil && st.IsDir() {
			if err := os.CopyFS(to, os.DirFS(from)); err != nil {
				s.t.Fatal(err)
			}
			continue
		}
		b, err := os.ReadFile(from)
		if err != nil {
			s.t.Fatal(err)
		}
		if err := os.WriteFile(to, b, 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	return dir
}

// snapshot is every name and content of the store, but for information for people.
func (s *sharedStore) snapshot() string {
	s.t.Helper()
	var out bytes.Buffer
	err := filepath.WalkDir(s.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.Name() == "keys-used" || d.Name() == lockFile {
			return err
		}
		out.WriteString(path[len(s.dir):] + "\n")
		if !d.Type().IsRegular() || d.Name() == lease.FileName { // whose owner renews it
			return nil
		}
		b, err := os.ReadFile(path)
		fmt.Fprintf(&out, "%x\n", sha256.Sum256(b))
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return out.String()
}
