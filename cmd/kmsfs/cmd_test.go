package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLsMode(t *testing.T) {
	for mode, want := range map[uint32]string{
		unix.S_IFREG | 0o644: "-rw-r--r--", unix.S_IFDIR | 0o1777: "drwxrwxrwt", unix.S_IFDIR | 0o3770: "drwxrws--T",
		unix.S_IFREG | 0o4755: "-rwsr-xr-x", unix.S_IFREG | 0o6644: "-rwSr-Sr--", unix.S_IFLNK | 0o777: "lrwxrwxrwx",
		unix.S_IFIFO: "p---------", unix.S_IFSOCK | 0o1: "s--------x", unix.S_IFCHR | 0o20: "c----w----", unix.S_IFBLK | 0o400: "br--------",
	} {
		if got := lsMode(mode); got != want {
			t.Errorf("lsMode(%#o) = %s, want %s", mode, got, want)
		}
	}
}

func TestShellQuote(t *testing.T) {
	for in, want := range map[string]string{"/srv/a-b_c.d": "/srv/a-b_c.d", "": "''", "a b": "'a b'", "a'b": `'a'\''b'`, "$x": "'$x'", "é": "'é'"} {
		if got := shellQuote(in); got != want {
			t.Errorf("shellQuote(%q) = %s, want %s", in, got, want)
		}
	}
}

func TestPlanTravels(t *testing.T) {
	plan := &mountPlan{
		Store: "/s", ID: idA, Keys: keysOf("keyring:a"), Mountpoint: "/m", Provider: providerConfig{Keyring: "/k", Region: "r"},
		ReadOnly: true, Options: []string{"noexec"}, LogLevel: "info",
	}
	for _, pass := range []string{"", "secret", strings.Repeat("x", maxPassphrase)} {
		var b bytes.Buffer
		if err := sendPlan(&b, plan, []byte(pass)); err != nil {
			t.Fatal(err)
		}
		got, gotPass, err := receivePlan(&b)
		if err != nil || !reflect.DeepEqual(got, plan) || string(gotPass) != pass {
			t.Errorf("got %+v, %q, %v", got, gotPass, err)
		}
	}
	for _, bad := range [][]byte{nil, {0, 0}, {0, 0, 0, 9, '{'}, {0, 0, 0, 2, '[', ']'}, binary.BigEndian.AppendUint32(nil, maxPlan+1)} {
		if _, _, err := receivePlan(bytes.NewReader(bad)); err == nil {
			t.Errorf("% x was accepted", bad)
		}
	}
}

func TestPassphraseIsGivenOnce(t *testing.T) {
	given := []byte("secret")
	source := (&mountPlan{}).passphraseSource(given)
	pass, err := source()
	if err != nil || string(pass) != "secret" {
		t.Errorf("got %q, %v", pass, err)
	}
	if !bytes.Equal(given, make([]byte, len(given))) {
		t.Error("the passphrase was kept")
	}
	if pass, err := source(); err == nil {
		t.Errorf("given again: %q", pass)
	}
	if (&mountPlan{}).passphraseSource(nil) != nil {
		t.Error("there is a source without a passphrase")
	}
}

func TestLogBeginsAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dir", "log")
	f, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(maxLog + 1); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	f, err = openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || st.Size() != 0 || st.Mode().Perm() != 0o600 {
		t.Errorf("size %d, mode %v, %v", st.Size(), st.Mode(), err)
	}
	if old, err := os.Stat(path + ".1"); err != nil || old.Size() != maxLog+1 {
		t.Errorf("the old log: %v", err)
	}
}

func TestReadLine(t *testing.T) {
	r := strings.NewReader("one\ntwo")
	for _, want := range []string{"one", "two", ""} {
		if got, err := readLine(r, 8); err != nil || string(got) != want {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
	}
	if _, err := readLine(strings.NewReader("123456789"), 8); err == nil {
		t.Error("a line beyond the bound was accepted")
	}
}

func TestDefaultPaths(t *testing.T) {
	t.Setenv("HOME", "/h")
	t.Setenv("XDG_CONFIG_HOME", "")
	g := &globalOptions{}
	check := func(wantKeyring, wantKnown string) {
		t.Helper()
		keyring, err := g.keyringPath()
		if err != nil || keyring != wantKeyring {
			t.Errorf("keyring %q, %v, want %q", keyring, err, wantKeyring)
		}
		known, err := g.knownStoresPath()
		if err != nil || known != wantKnown {
			t.Errorf("known stores %q, %v, want %q", known, err, wantKnown)
		}
	}
	check("/h/.config/kmsfs/keyring.json", "/h/.config/kmsfs/known-stores")
	t.Setenv("XDG_CONFIG_HOME", "relative")
	check("/h/.config/kmsfs/keyring.json", "/h/.config/kmsfs/known-stores")
	t.Setenv("XDG_CONFIG_HOME", "/x")
	check("/x/kmsfs/keyring.json", "/x/kmsfs/known-stores")
	g.keyring = "/k/ring.json"
	check("/k/ring.json", "/k/known-stores")
	g.knownStores = "/n"
	check("/k/ring.json", "/n")
	t.Setenv("HOME", "") // as mount(8) and systemd start programs
	if dir, err := homeDir(); err != nil || !filepath.IsAbs(dir) {
		t.Errorf("without HOME: %q, %v", dir, err)
	}
}
