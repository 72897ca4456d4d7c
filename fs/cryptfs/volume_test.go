package cryptfs

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
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
