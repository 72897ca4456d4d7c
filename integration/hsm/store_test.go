//go:build pkcs11

package hsm

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestStore: a store under a key in the token is made, mounted and used; the
// key is rotated in the token, and files of both versions are read.
func TestStore(t *testing.T) {
	u := newUser(t)
	u.keygen("phi", "01")
	// As a user may write it; the store keeps the normalized URI.
	dir := u.store("pkcs11:object=phi;token=kmsfs%20test?module-path=" + u.module + "&pin-source=file:" + u.pinFile)
	m := u.Mount(dir)
	m.Put("old", []byte("of version 01"))
	wantFile(t, m.Path("old"), "of version 01")
	if err := os.MkdirAll(m.Path("a/b"), 0o755); err != nil {
		t.Fatal(err)
	}
	m.Put("a/b/c", []byte(strings.Repeat("long ", 50_000)))
	m.Unmount()

	u.keygen("phi", "02")
	m.Again()
	wantFile(t, m.Path("old"), "of version 01")
	m.Put("new", []byte("of version 02"))
	m.Unmount()
	m.Again("--read-only")
	wantFile(t, m.Path("old"), "of version 01")
	wantFile(t, m.Path("new"), "of version 02")
	wantFile(t, m.Path("a/b/c"), strings.Repeat("long ", 50_000))
	if got := u.key(m.Path("new")); got != tokenURI+"phi" {
		t.Errorf("the header's key is %q, want %q", got, tokenURI+"phi")
	}
	m.Unmount()
	u.Run("fsck", dir)

	// Whoever deletes a version deletes what it wrapped, and nothing else.
	// The store's own key was wrapped by the first one; with the policy's
	// second recipient it would survive.
	u.tool("--delete-object", "--type", "secrkey", "--label", "phi", "--id", "02")
	m.Again()
	wantFile(t, m.Path("old"), "of version 01")
	if _, err := os.ReadFile(m.Path("new")); !errors.Is(err, unix.EKEYREJECTED) {
		t.Errorf("a file whose version was deleted: %v, want EKEYREJECTED", err)
	}
	m.Unmount()
}

// key returns the key of a file on a mount.
func (u *user) key(path string) string {
	u.T.Helper()
	var info struct{ Keys []string }
	if err := json.Unmarshal([]byte(u.Run("info", "--json", path)), &info); err != nil || len(info.Keys) != 1 {
		u.T.Fatalf("info: %v, %v", info, err)
	}
	return info.Keys[0]
}

// TestTokenTakenAway: with the token gone, open files keep working, others fail
// as in an outage, and all is well without a remount when it is back.
func TestTokenTakenAway(t *testing.T) {
	u := newUser(t)
	u.keygen("phi", "01")
	dir := filepath.Join(t.TempDir(), "store")
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	write(t, policy, "version: 1\ndefault: phi\nclasses:\n  phi: { keys: [\""+tokenURI+"phi\"], cache: 0s }\n")
	u.Run("init", "--policy", policy, dir)
	m := u.Mount(dir)
	m.Put("open", []byte("open"))
	m.Put("closed", []byte("closed"))
	m.Unmount() // close(2) does not wait until the mount has forgotten the file and its key
	m.Again()
	f, err := os.OpenFile(m.Path("open"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	away := u.tokens + ".away"
	if err := os.Rename(u.tokens, away); err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadFile(m.Path("closed")); !errors.Is(err, unix.ETIMEDOUT) {
		t.Errorf("without the token: %v, want ETIMEDOUT", err)
	}
	if err := os.WriteFile(m.Path("new"), []byte("x"), 0o600); err == nil {
		t.Log("the new file's key was there already")
	} else if !errors.Is(err, unix.ETIMEDOUT) {
		t.Errorf("a new file without the token: %v, want ETIMEDOUT", err)
	}
	if _, err := f.WriteAt([]byte("OP"), 0); err != nil {
		t.Errorf("writing an open file: %v", err)
	}
	if err := os.Rename(away, u.tokens); err != nil {
		t.Fatal(err)
	}
	back := false
	for end := time.Now().Add(30 * time.Second); !back && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		_, err := os.ReadFile(m.Path("closed"))
		back = err == nil
	}
	if !back {
		t.Error("the token is back, and the mount does not notice")
	}
	wantFile(t, m.Path("closed"), "closed")
	wantFile(t, m.Path("open"), "OPen")
	_ = f.Close()
	m.Unmount()
	if log := u.log(); strings.Contains(log, pin) || strings.Contains(log, "closed") || !strings.Contains(log, "the module does not start") {
		t.Errorf("the log holds the PIN or a plaintext name, or does not say what was wrong:\n%s", log)
	}
}

// log returns what mounts of this user logged.
func (u *user) log() string {
	u.T.Helper()
	return u.Sh(`find "$HOME/.state" -name '*.log' -exec cat {} +`)
}

// TestConfiguration: what is wrong with module, PIN or URI is said in one line
// with a hint, and never with the PIN.
func TestConfiguration(t *testing.T) {
	u := newUser(t)
	u.keygen("phi", "01")
	const wrongPIN = "0815-wrong-pin"
	wrong := filepath.Join(t.TempDir(), "wrong")
	write(t, wrong, wrongPIN+"\n")
	open := filepath.Join(t.TempDir(), "open")
	write(t, open, pin+"\n")
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, want string
		args       []string
	}{
		{"wrong PIN", "CKR_PIN_INCORRECT", []string{"--pkcs11-pin-file", wrong, "--key", tokenURI + "phi"}},
		{"PIN file open to others", "open to others", []string{"--pkcs11-pin-file", open, "--key", tokenURI + "phi"}},
		{"no PIN file", "no such file", []string{"--pkcs11-pin-file", "/no/such/pin", "--key", tokenURI + "phi"}},
		{"no module", "/no/such/module.so", []string{"--pkcs11-module", "/no/such/module.so", "--key", tokenURI + "phi"}},
		{"no token", "no such token", []string{"--key", "pkcs11:token=other;object=phi"}},
		{"no key", "key not found", []string{"--key", tokenURI + "other"}},
		{"PIN in the URI", "PIN in a key URI", []string{"--key", tokenURI + "phi?pin-value=" + wrongPIN}},
		{"another module in the URI", "module-path", []string{"--key", tokenURI + "phi?module-path=/lib/evil.so"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "store")
			r := u.Try(append(append([]string{"init"}, tc.args...), dir)...)
			if r.Code == 0 || !strings.Contains(r.Stderr, tc.want) || !strings.Contains(r.Stderr, "kmsfs: hint: ") {
				t.Errorf("exit %d, want %q and a hint:\n%s", r.Code, tc.want, r.Stderr)
			}
			if strings.Contains(r.Stdout+r.Stderr, wrongPIN) || strings.Contains(r.Stdout+r.Stderr, pin) {
				t.Errorf("the PIN is printed:\n%s%s", r.Stdout, r.Stderr)
			}
			if _, err := os.Stat(dir); err == nil {
				t.Error("something was made")
			}
		})
	}
	u.Env = append(u.Env, "KMSFS_PKCS11_PIN_FILE=", "KMSFS_PKCS11_PIN="+pin)
	m := u.Mount(u.store(tokenURI + "phi"))
	m.Put("f", []byte("with the PIN of the environment"))
	wantFile(t, m.Path("f"), "with the PIN of the environment")
	m.Unmount()
}
