package cryptfs

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/fs/classify"
)

func newProvider(t *testing.T, names ...string) keywrap.Provider {
	t.Helper()
	k := keyring.NewMemory()
	for _, n := range names {
		if err := k.CreateKey(n); err != nil {
			t.Fatal(err)
		}
	}
	return keywrap.Mux{Keyring: k}
}

func testStore(t *testing.T, p envelope.Placement, names classify.NameMode) (string, keywrap.Provider, *Info) {
	t.Helper()
	prov := newProvider(t, "general", "phi")
	pol := classify.Single("general", "keyring:general")
	c := pol.Classes["general"]
	c.Names, c.ChunkSize = names, 4096
	pol.Classes["general"] = c
	c.Keys = []string{"keyring:phi"}
	pol.Classes["phi"] = c
	pol.Directories = map[string]string{"/patients": "phi"}
	dir := t.TempDir() + "/s"
	info, err := Init(t.Context(), InitConfig{Store: dir, Policy: pol, Placement: p, HeaderSize: 1024, Suite: dare.AES256GCM, Provider: prov})
	if err != nil {
		t.Fatal(err)
	}
	return dir, prov, info
}

func openStore(t *testing.T, dir string, prov keywrap.Provider) *Volume {
	t.Helper()
	info, err := Inspect(dir)
	if err != nil {
		t.Fatal(err)
	}
	v, err := Open(t.Context(), Config{Store: dir, Provider: prov, Keys: info.Keys})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = v.Close() })
	return v
}

var everyPlace = []envelope.Placement{envelope.Prefix, envelope.Xattr, envelope.Sidecar}

func TestSmoke(t *testing.T) {
	for _, p := range everyPlace {
		for _, names := range []classify.NameMode{classify.NamesEncrypted, classify.NamesPlain} {
			t.Run(p.String()+"/"+string(names), func(t *testing.T) { smoke(t, p, names) })
		}
	}
}

func smoke(t *testing.T, p envelope.Placement, names classify.NameMode) {
	ctx := context.Background()
	dir, prov, _ := testStore(t, p, names)
	v := openStore(t, dir, prov)
	c := Caller{Umask: 0o22}
	d, _, err := v.Mkdir(ctx, v.Root(), "sub", 0o755, c)
	if err != nil {
		t.Fatal(err)
	}
	long := string(bytes.Repeat([]byte("n"), 255))
	data := make([]byte, 100_000)
	rand.NewChaCha8([32]byte{1}).Read(data)
	n, h, _, err := v.Create(ctx, d, long, unix.O_RDWR, 0o644, c)
	if err != nil {
		t.Fatal(err)
	}
	for off := 0; off < len(data); off += 777 {
		if _, err := h.WriteAt(data[off:min(off+777, len(data))], int64(off), false); err != nil {
			t.Fatal(err)
		}
	}
	a, err := v.Getattr(n)
	if err != nil || a.Size != int64(len(data)) {
		t.Fatal(a, err)
	}
	h.Release()
	if err := v.Rename(ctx, d, long, v.Root(), "moved", 0); err != nil {
		t.Fatal(err)
	}
	pat, _, err := v.Mkdir(ctx, v.Root(), "patients", 0o755, c)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Rename(ctx, v.Root(), "moved", pat, "moved", 0); !errors.Is(err, ErrCrossClass) {
		t.Fatalf("rename across classes: %v", err)
	}
	if _, _, err := v.Symlink(ctx, pat, "link", "../moved", c); err != nil {
		t.Fatal(err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	v = openStore(t, dir, prov)
	n, a, err = v.Lookup(ctx, v.Root(), "moved")
	if err != nil || a.Size != int64(len(data)) {
		t.Fatal(a, err)
	}
	h, err = v.Open(ctx, n, unix.O_RDONLY, false)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(data)+10)
	k, err := h.ReadAt(got, 0)
	if err != nil || !bytes.Equal(got[:k], data) {
		t.Fatal(k, err)
	}
	h.Release()
	dh, err := v.OpenDir(ctx, v.Root())
	if err != nil {
		t.Fatal(err)
	}
	if got := len(dh.Entries()); got != 5 {
		t.Errorf("%d entries: %v", got, dh.Entries())
	}
	dh.Close()
	if err := v.Setxattr(ctx, n, "user.a", []byte("b"), 0, c); err != nil {
		t.Fatal(err)
	}
	if val, err := v.Getxattr(ctx, n, "user.a"); err != nil || string(val) != "b" {
		t.Errorf("%q %v", val, err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestOrdinaryUser runs itself as somebody who is not root, whom modes keep out
// of their own files: the store's records must still be read and written.
func TestOrdinaryUser(t *testing.T) {
	if os.Geteuid() == 0 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestOrdinaryUser$", "-test.v")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		dir, err := os.MkdirTemp("/tmp", "kmsfs-user-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
		bin := dir + "/test" // the built test may lie where only root looks
		if b, err := os.ReadFile(os.Args[0]); err != nil || os.WriteFile(bin, b, 0o755) != nil {
			t.Fatal(err)
		}
		cmd.Path, cmd.Dir, cmd.Env = bin, dir, append(os.Environ(), "TMPDIR="+dir)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	for _, p := range everyPlace {
		t.Run(p.String(), func(t *testing.T) { ordinaryUser(t, p) })
	}
}

func ordinaryUser(t *testing.T, p envelope.Placement) {
	ctx := t.Context()
	dir, prov, _ := testStore(t, p, classify.NamesEncrypted)
	v := openStore(t, dir, prov)
	chmod := func(n *Node, mode uint32) {
		t.Helper()
		if _, err := v.Setattr(ctx, n, SetAttr{Mode: &mode}); err != nil {
			t.Fatal(err)
		}
	}
	for _, mode := range []uint32{0o700, 0o500, 0o300, 0o100, 0o400, 0} {
		sub, _, err := v.Mkdir(ctx, v.Root(), "sub", 0o700, Caller{})
		if err != nil {
			t.Fatal(err)
		}
		n, h, _, err := v.Create(ctx, sub, "f", unix.O_RDWR, mode, Caller{})
		if err != nil {
			t.Fatal(err)
		}
		h.Release()
		chmod(sub, mode|0o100) // without x the kernel lets nobody in
		v.dirs.remove(sub)
		if h, err = v.Open(ctx, n, unix.O_WRONLY, false); err != nil {
			t.Fatalf("mode %o: %v", mode, err)
		}
		if _, err := h.WriteAt([]byte("text"), 0, false); err != nil {
			t.Fatal(err)
		}
		if err := h.Fsync(false); err != nil {
			t.Fatalf("mode %o: fsync: %v", mode, err)
		}
		h.Release()
		chmod(sub, 0o700)
		if err := v.Unlink(ctx, sub, "f"); err != nil {
			t.Fatal(err)
		}
		chmod(sub, mode)
		v.dirs.remove(sub)
		if err := v.Rmdir(ctx, v.Root(), "sub"); err != nil {
			t.Fatalf("mode %o: rmdir: %v", mode, err)
		}
		v.Forget(n, 1)
		v.Forget(sub, 1)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("left in the store: %v %v", entries, err)
	}
}

// TestLongTargets checks symlinks whose encrypted target does not fit into a
// symlink: the file that holds it goes where the link goes.
func TestLongTargets(t *testing.T) {
	ctx := t.Context()
	dir, prov, _ := testStore(t, envelope.Prefix, classify.NamesEncrypted)
	v := openStore(t, dir, prov)
	sub, _, err := v.Mkdir(ctx, v.Root(), "sub", 0o755, Caller{})
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{3039, 3040, 4095} {
		target := strings.Repeat("t", size)
		n, a, err := v.Symlink(ctx, v.Root(), "link", target, Caller{})
		if err != nil || a.Size != int64(size) {
			t.Fatalf("%d bytes: size %d, %v", size, a.Size, err)
		}
		if err := v.Rename(ctx, v.Root(), "link", sub, "moved", 0); err != nil {
			t.Fatal(err)
		}
		if _, err := v.Link(ctx, n, v.Root(), "again"); err != nil {
			t.Fatal(err)
		}
		if err := v.Unlink(ctx, sub, "moved"); err != nil {
			t.Fatal(err)
		}
		n, a, err = v.Lookup(ctx, v.Root(), "again")
		if err != nil || a.Size != int64(size) {
			t.Fatalf("%d bytes: size %d, %v", size, a.Size, err)
		}
		if got, err := v.Readlink(n); err != nil || got != target {
			t.Errorf("Readlink = %d bytes, %v", len(got), err)
		}
		if err := v.Unlink(ctx, v.Root(), "again"); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.Rmdir(ctx, v.Root(), "sub"); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 3 {
		t.Errorf("left in the store: %v, %v", entries, err)
	}
}

// TestReplacedWhileLookedUp opens a node whose file was replaced after the
// lookup: it is the old file, not an error.
func TestReplacedWhileLookedUp(t *testing.T) {
	for _, p := range everyPlace {
		ctx := t.Context()
		dir, prov, _ := testStore(t, p, classify.NamesEncrypted)
		v := openStore(t, dir, prov)
		for _, name := range []string{"old", "new"} {
			n, h, _, err := v.Create(ctx, v.Root(), name, unix.O_RDWR, 0o644, Caller{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := h.WriteAt([]byte(name), 0, false); err != nil {
				t.Fatal(err)
			}
			h.Release()
			v.Forget(n, 1)
		}
		n, _, err := v.Lookup(ctx, v.Root(), "old")
		if err != nil {
			t.Fatal(err)
		}
		if err := v.Rename(ctx, v.Root(), "new", v.Root(), "old", 0); err != nil {
			t.Fatal(err)
		}
		h, err := v.Open(ctx, n, unix.O_RDONLY, false)
		if err != nil {
			t.Fatalf("%v: %v", p, err)
		}
		buf := make([]byte, 10)
		if k, err := h.ReadAt(buf, 0); err != nil || string(buf[:k]) != "old" {
			t.Errorf("%v: read %q, %v", p, buf[:k], err)
		}
		h.Release()
		v.Forget(n, 1)
		if got := v.ghosts.Load(); got != 0 {
			t.Errorf("%d ghosts left", got)
		}
	}
}

// TestRulesAreEncrypted looks for the rules' paths in the store record, and for
// the rules after a remount and a change.
func TestRulesAreEncrypted(t *testing.T) {
	dir, prov, info := testStore(t, envelope.Prefix, classify.NamesEncrypted)
	v := openStore(t, dir, prov)
	p, err := info.Policy.WithRule("/billing records", "phi")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.ApplyPolicy(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(dir + "/.kmsfs/store")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"patients", "billing"} {
		if bytes.Contains(b, []byte(path)) {
			t.Errorf("%q is in the store record", path)
		}
	}
	if got := openStore(t, dir, prov).Info().Policy.Directories; len(got) != 2 || got["/billing records"] != "phi" {
		t.Errorf("rules after a remount: %v", got)
	}
}
