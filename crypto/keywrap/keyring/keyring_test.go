package keyring_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keywraptest"
)

const passphrase = "correct horse battery staple"

func passFunc(s string) func() ([]byte, error) {
	return func() ([]byte, error) { return []byte(s), nil }
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newFile makes a keyring file and returns its path and a Keyring on it.
func newFile(t testing.TB, pass []byte) (string, *keyring.Keyring) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kmsfs", "keyring.json")
	k, err := keyring.Create(path, pass)
	must(t, err)
	t.Cleanup(func() { must(t, k.Close()) })
	return path, k
}

func open(t testing.TB, path string, pass func() ([]byte, error)) *keyring.Keyring {
	t.Helper()
	k, err := keyring.Open(path, pass)
	must(t, err)
	t.Cleanup(func() { must(t, k.Close()) })
	return k
}

// setup runs the contract suite on p while admin, which may be another Keyring
// on the same file, changes the keys.
func setup(p keywrap.Provider, admin *keyring.Keyring) keywraptest.Setup {
	n := 0
	do := func(f func(name string) error) func(testing.TB, string) {
		return func(t testing.TB, uri string) {
			t.Helper()
			must(t, f(strings.TrimPrefix(uri, "keyring:")))
		}
	}
	return keywraptest.Setup{
		Provider: p,
		NewKey: func(t testing.TB) string {
			n++
			name := fmt.Sprintf("key-%d", n)
			must(t, admin.CreateKey(name))
			return "keyring:" + name
		},
		Disable:          do(admin.Disable),
		Enable:           do(admin.Enable),
		ScheduleDeletion: do(func(name string) error { return admin.ScheduleDeletion(name, 7) }),
		CancelDeletion:   do(admin.CancelDeletion),
		Rotate:           do(admin.Rotate),
		Unknown:          "keyring:unknown",
		NotCovered:       map[string]string{keywraptest.CaseAlias: "the keyring has names, no aliases"},
	}
}

func TestContractInMemory(t *testing.T) {
	k := keyring.NewMemory()
	keywraptest.Run(t, setup(k, k))
}

func TestContractFile(t *testing.T) {
	_, k := newFile(t, nil)
	keywraptest.Run(t, setup(k, k))
}

// The provider of a mount sees what another process's "kmsfs keyring" does.
func TestContractChangedByAnother(t *testing.T) {
	path, admin := newFile(t, []byte(passphrase))
	keywraptest.Run(t, setup(open(t, path, passFunc(passphrase)), admin))
}

var sample = keywrap.Context{Store: strings.Repeat("0a", 16), Class: "phi", Purpose: keywrap.PurposeData, ID: strings.Repeat("0b", 16)}

func generate(t testing.TB, k *keyring.Keyring, key string) keywrap.DataKey {
	t.Helper()
	dk, err := k.GenerateDataKey(context.Background(), key, sample)
	must(t, err)
	t.Cleanup(dk.Plain.Wipe)
	return dk
}

func wantOpen(t testing.TB, k *keyring.Keyring, dk keywrap.DataKey) {
	t.Helper()
	got, err := k.Decrypt(context.Background(), dk.Wrapped, sample)
	must(t, err)
	defer got.Wipe()
	if !got.Equal(dk.Plain) {
		t.Error("another data key")
	}
}

func wantErr(t testing.TB, err, want error, kind fault.Kind) {
	t.Helper()
	if !errors.Is(err, want) || fault.Of(err) != kind {
		t.Errorf("error = %v (%v), want %v (%v)", err, fault.Of(err), want, kind)
	}
}

func TestFileSurvivesReopening(t *testing.T) {
	for _, pass := range []string{"", passphrase} {
		var raw []byte
		if pass != "" {
			raw = []byte(pass)
		}
		path, k := newFile(t, raw)
		must(t, k.CreateKey("general"))
		old := generate(t, k, "keyring:general")
		must(t, k.Rotate("general"))
		fresh := generate(t, k, "keyring:general")
		before, err := k.List()
		must(t, err)

		again := open(t, path, passFunc(pass))
		wantOpen(t, again, old)
		wantOpen(t, again, fresh)
		after, err := again.List()
		must(t, err)
		if fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("keys = %v, want %v", after, before)
		}
		if got, err := again.Protected(); err != nil || got != (pass != "") {
			t.Errorf("Protected = %v, %v", got, err)
		}
		fi, err := os.Stat(path)
		must(t, err)
		if got := fi.Mode().Perm(); got != 0o600 {
			t.Errorf("mode = %o, want 600", got)
		}
	}
}

// With a passphrase the file shows neither key material nor names.
func TestProtectedFileShowsNothing(t *testing.T) {
	path, k := newFile(t, []byte(passphrase))
	must(t, k.CreateKey("patients"))
	data, err := os.ReadFile(path)
	must(t, err)
	for _, bad := range []string{"patients", "keyset", "enabled", passphrase} {
		if bytes.Contains(data, []byte(bad)) {
			t.Errorf("the file shows %q", bad)
		}
	}
	path, k = newFile(t, nil)
	must(t, k.CreateKey("patients"))
	if data, err = os.ReadFile(path); err != nil || !bytes.Contains(data, []byte("patients")) {
		t.Errorf("the check above cannot fail: %v", err)
	}
}

func TestPassphrase(t *testing.T) {
	path, k := newFile(t, []byte(passphrase))
	must(t, k.CreateKey("general"))
	dk := generate(t, k, "keyring:general")

	_, err := keyring.Open(path, passFunc("wrong"))
	wantErr(t, err, keyring.ErrPassphrase, fault.KeyDenied)
	_, err = keyring.Open(path, nil)
	wantErr(t, err, keyring.ErrNeedPassphrase, fault.KeyDenied)
	_, err = keyring.Open(path, passFunc(""))
	wantErr(t, err, keyring.ErrNeedPassphrase, fault.KeyDenied)
	cause := errors.New("no terminal")
	_, err = keyring.Open(path, func() ([]byte, error) { return nil, cause })
	wantErr(t, err, cause, fault.KeyDenied)
	_, err = keyring.Create(filepath.Join(t.TempDir(), "k"), []byte{})
	wantErr(t, err, keyring.ErrEmptyPassphrase, fault.Invalid)
	wantErr(t, k.ChangePassphrase([]byte{}), keyring.ErrEmptyPassphrase, fault.Invalid)

	given := []byte(passphrase)
	wantOpen(t, open(t, path, func() ([]byte, error) { return given, nil }), dk)
	if !bytes.Equal(given, make([]byte, len(given))) {
		t.Error("the passphrase was not wiped")
	}
}

func TestChangePassphrase(t *testing.T) {
	path, k := newFile(t, []byte(passphrase))
	must(t, k.CreateKey("general"))
	dk := generate(t, k, "keyring:general")
	asked, answer := 0, passphrase
	other := open(t, path, func() ([]byte, error) { asked++; return []byte(answer), nil })

	must(t, k.ChangePassphrase([]byte("new")))
	wantOpen(t, k, dk)
	_, err := keyring.Open(path, passFunc(passphrase))
	wantErr(t, err, keyring.ErrPassphrase, fault.KeyDenied)
	wantOpen(t, open(t, path, passFunc("new")), dk)

	// The other process still has the old passphrase: it is asked once, not for
	// every operation, and recovers when the file changes again.
	for range 3 {
		_, err = other.Decrypt(context.Background(), dk.Wrapped, sample)
		wantErr(t, err, keyring.ErrPassphrase, fault.KeyDenied)
	}
	if asked != 2 {
		t.Errorf("asked for the passphrase %d times, want 2", asked)
	}
	answer = "new"
	must(t, k.CreateKey("more"))
	wantOpen(t, other, dk)
	if asked != 3 {
		t.Errorf("asked for the passphrase %d times, want 3", asked)
	}

	must(t, other.ChangePassphrase(nil))
	wantOpen(t, open(t, path, nil), dk)
	wantOpen(t, k, dk)
	must(t, k.ChangePassphrase([]byte("third")))
	wantOpen(t, open(t, path, passFunc("third")), dk)
}

func TestDeletion(t *testing.T) {
	path, k := newFile(t, nil)
	start := time.Now()
	at := start
	k.SetClock(func() time.Time { return at })
	must(t, k.CreateKey("a"))
	must(t, k.CreateKey("b"))
	dk := generate(t, k, "keyring:a")

	for _, days := range []int{-1, 0, 6, 31} {
		wantErr(t, k.ScheduleDeletion("a", days), keyring.ErrWindow, fault.Invalid)
	}
	wantErr(t, k.CancelDeletion("a"), keyring.ErrNotPending, fault.Invalid)
	must(t, k.ScheduleDeletion("a", 7))
	for op, err := range map[string]error{
		"schedule": k.ScheduleDeletion("a", 7), "enable": k.Enable("a"), "disable": k.Disable("a"), "rotate": k.Rotate("a"),
	} {
		if !errors.Is(err, keywrap.ErrPending) {
			t.Errorf("%s: %v, want %v", op, err, keywrap.ErrPending)
		}
	}
	wantErr(t, k.CreateKey("a"), keyring.ErrExists, fault.Conflict)
	info, err := k.Info("a")
	must(t, err)
	if d := info.DeletionAt.Sub(start.Truncate(time.Second)); d != 7*24*time.Hour {
		t.Errorf("deletion in %v, want 7 days", d)
	}

	at = info.DeletionAt.Add(-time.Second)
	_, err = k.Decrypt(context.Background(), dk.Wrapped, sample)
	wantErr(t, err, keywrap.ErrPending, fault.KeyRevoked)

	at = info.DeletionAt
	_, err = k.Decrypt(context.Background(), dk.Wrapped, sample)
	wantErr(t, err, keywrap.ErrNotFound, fault.KeyMissing)
	wantErr(t, k.CancelDeletion("a"), keywrap.ErrNotFound, fault.KeyMissing)
	if list, err := k.List(); err != nil || len(list) != 1 || list[0].Name != "b" {
		t.Errorf("List = %v, %v", list, err)
	}
	data, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Contains(data, []byte(`"name": "a"`)) {
		t.Error("a failed change wrote the file")
	}
	must(t, k.Disable("b"))
	data, err = os.ReadFile(path)
	must(t, err)
	if bytes.Contains(data, []byte(`"name": "a"`)) {
		t.Error("the material of a deleted key is still in the file")
	}

	// The name is free, and a new key of that name is another key.
	at = start
	must(t, k.CreateKey("a"))
	_, err = k.Decrypt(context.Background(), dk.Wrapped, sample)
	wantErr(t, err, keywrap.ErrCiphertext, fault.Integrity)
}

func TestNamesAndStates(t *testing.T) {
	k := keyring.NewMemory()
	for _, name := range []string{"a", "0", "general", "a.b_c-d", strings.Repeat("x", 63)} {
		must(t, k.CreateKey(name))
	}
	for _, name := range []string{"", "A", "-a", ".a", "_a", "a/b", "a b", "a\x00", "ä", strings.Repeat("x", 64)} {
		wantErr(t, k.CreateKey(name), keyring.ErrName, fault.Invalid)
		wantErr(t, k.Rotate(name), keyring.ErrName, fault.Invalid)
	}
	wantErr(t, k.CreateKey("a"), keyring.ErrExists, fault.Conflict)
	wantErr(t, k.Enable("missing"), keywrap.ErrNotFound, fault.KeyMissing)
	_, err := k.Info("missing")
	wantErr(t, err, keywrap.ErrNotFound, fault.KeyMissing)
	must(t, k.Disable("a"))
	must(t, k.Disable("a"))
	wantErr(t, k.Rotate("a"), keywrap.ErrDisabled, fault.KeyMissing)
	if info, err := k.Info("a"); err != nil || info.State != keywrap.Disabled || info.Versions != 1 || info.URI != "keyring:a" {
		t.Errorf("Info = %+v, %v", info, err)
	}
}

func TestRotationHasALimit(t *testing.T) {
	k := keyring.NewMemory()
	must(t, k.CreateKey("a"))
	dk := generate(t, k, "keyring:a")
	var err error
	n := 1
	for ; err == nil && n < 10_000; n++ {
		err = k.Rotate("a")
	}
	wantErr(t, err, keyring.ErrFull, fault.TooLong)
	wantOpen(t, k, dk)
	generate(t, k, "keyring:a")
}

func TestClosed(t *testing.T) {
	live := keymem.Live()
	path, k := newFile(t, []byte(passphrase))
	must(t, k.CreateKey("a"))
	other, err := keyring.Open(path, passFunc(passphrase))
	must(t, err)
	must(t, other.Close())
	must(t, other.Close())
	_, err = other.GenerateDataKey(context.Background(), "keyring:a", sample)
	wantErr(t, err, keyring.ErrClosed, fault.Invalid)
	wantErr(t, other.Rotate("a"), keyring.ErrClosed, fault.Invalid)
	_, err = keyring.Open(path, passFunc("wrong"))
	wantErr(t, err, keyring.ErrPassphrase, fault.KeyDenied)
	must(t, k.Close())
	if got := keymem.Live(); got != live {
		t.Errorf("%d keys live, want %d", got, live)
	}
}

// Several Keyrings in several processes change one file: no change is lost.
func TestNoLostUpdates(t *testing.T) {
	if path := os.Getenv("KEYRING_TEST_FILE"); path != "" {
		createMany(t, path, os.Getenv("KEYRING_TEST_PREFIX"))
		return
	}
	path, k := newFile(t, nil)
	exe, err := os.Executable()
	must(t, err)
	var wg sync.WaitGroup
	for p := range 3 {
		wg.Go(func() {
			cmd := exec.Command(exe, "-test.run=^TestNoLostUpdates$", "-test.count=1")
			cmd.Env = append(os.Environ(), "KEYRING_TEST_FILE="+path, fmt.Sprintf("KEYRING_TEST_PREFIX=process%d", p))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("process %d: %v\n%s", p, err, out)
			}
		})
		wg.Go(func() { createMany(t, path, fmt.Sprintf("goroutine%d", p)) })
	}
	wg.Wait()
	list, err := k.List()
	must(t, err)
	if got, want := len(list), 6*perWriter; got != want {
		t.Errorf("%d keys, want %d", got, want)
	}
}

const perWriter = 8

func createMany(t *testing.T, path, prefix string) {
	k, err := keyring.Open(path, nil)
	if err != nil {
		t.Error(err)
		return
	}
	defer func() { _ = k.Close() }()
	for i := range perWriter {
		if err := k.CreateKey(fmt.Sprintf("%s-%d", prefix, i)); err != nil {
			t.Error(err)
		}
	}
}

func TestUnprotectedWarning(t *testing.T) {
	for _, word := range []string{"no passphrase", "root", "backup"} {
		if !strings.Contains(keyring.UnprotectedWarning, word) {
			t.Errorf("the warning does not speak of %q", word)
		}
	}
}
