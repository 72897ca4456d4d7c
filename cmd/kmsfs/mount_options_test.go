package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestMountOptions(t *testing.T) {
	var o mountOptions
	var g globalOptions
	err := o.apply(&g, `rw,noexec,allow_other,keyring=/k\,1,known_stores=/ks,passphrase-file=/p,trust,,log-file=/l,`+
		`region=eu-west-1,x-systemd.automount,_netdev,user=root,nofail,ro,context=a:b`)
	if err != nil {
		t.Fatal(err)
	}
	if !o.readOnly || !o.allowOther || !o.trust || o.nonempty || o.foreground {
		t.Errorf("switches: %+v", o)
	}
	if g.keyring != "/k,1" || g.knownStores != "/ks" || g.passphraseFile != "/p" || o.logFile != "/l" || g.region != "eu-west-1" {
		t.Errorf("values: %+v %+v", o, g)
	}
	if want := []string{"noexec", "x-systemd.automount", "_netdev", "nofail", "context=a:b"}; !slices.Equal(o.passthrough, want) {
		t.Errorf("for the kernel: %q, want %q", o.passthrough, want)
	}
	for _, bad := range []string{"keyring", "keyring=", "ro=1", "trust=yes"} {
		if err := new(mountOptions).apply(&globalOptions{}, bad); !errors.Is(err, errUsage) {
			t.Errorf("%q: %v, want %v", bad, err, errUsage)
		}
	}
}

func TestHelperArgs(t *testing.T) {
	for _, tc := range []struct {
		args string
		fake bool
		ro   bool
	}{
		{"/s /m -o rw", false, false},
		{"/s /m -o ro,nosuid", false, true},
		{"-n -v /s /m -oro", false, true},
		{"-sfnv -o ro -o rw /s /m", true, false},
		{"/s /m -t fuse.kmsfs", false, false},
		{"/s /m", false, false},
	} {
		var o mountOptions
		fake, err := parseHelperArgs(strings.Fields(tc.args), &o, &globalOptions{})
		if err != nil || fake != tc.fake || o.readOnly != tc.ro || o.store != "/s" || o.mountpoint != "/m" {
			t.Errorf("%s: fake %v, %+v, %v", tc.args, fake, o, err)
		}
	}
	for _, bad := range []string{"", "/s", "/s /m /x", "/s /m -o", "/s /m -x", "/s /m --option", "/s /m -o keyring="} {
		if _, err := parseHelperArgs(strings.Fields(bad), &mountOptions{}, &globalOptions{}); !errors.Is(err, errUsage) {
			t.Errorf("%q: %v, want %v", bad, err, errUsage)
		}
	}
}

func TestParseMountinfo(t *testing.T) {
	mounts, err := parseMountinfo(strings.NewReader(
		"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" +
			"36 22 0:40 / /m\\040one rw,nosuid shared:1 master:2 - fuse.kmsfs /srv/st\\134ore rw,user_id=0\n" +
			"37 36 0:41 / /m\\040one ro - tmpfs tmpfs rw\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := mountEntry{Source: `/srv/st\ore`, Mountpoint: "/m one", Type: fsType, Options: "rw,nosuid,rw,user_id=0", Device: "0:40"}
	if len(mounts) != 3 || mounts[1] != want {
		t.Errorf("got %+v, want %+v", mounts, want)
	}
	if m := mountAt(mounts, "/m one"); m == nil || m.Type != "tmpfs" {
		t.Errorf("the top mount is %+v", m)
	}
	if m := mountAt(mounts, "/none"); m != nil {
		t.Errorf("a mount where none is: %+v", m)
	}
	for _, bad := range []string{"x", "36 22 0:40 / /m rw", "1 2 3 4 5 - a b c", "36 22 0:40 / /m rw - ext4"} {
		if _, err := parseMountinfo(strings.NewReader(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	if got := unescapeMount(`a\040b\1`); got != `a b\1` {
		t.Errorf("unescaped: %q", got)
	}
}

func TestCheckMountpoint(t *testing.T) {
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	store, empty, full, file := filepath.Join(base, "a/s"), filepath.Join(base, "m"), filepath.Join(base, "full"), filepath.Join(base, "file")
	for _, dir := range []string{store + "/sub", empty, full + "/x"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(base, "link")
	if err := os.Symlink(empty, link); err != nil {
		t.Fatal(err)
	}
	for path, words := range map[string]string{
		filepath.Join(base, "none"): "does not exist", file: "not a directory", store: "lies in the store", store + "/sub": "lies in the store",
		filepath.Join(base, "a"): "the store lies in", base: "the store lies in", "/": "mountpoint already", full: "not empty",
		"/proc": "mountpoint already",
	} {
		_, err := checkMountpoint(path, store, false)
		if err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v, want %q", path, err, words)
		}
	}
	for _, path := range []string{empty, link} {
		if got, err := checkMountpoint(path, store, false); err != nil || got != empty {
			t.Errorf("%s: %q, %v", path, got, err)
		}
	}
	if _, err := checkMountpoint(full, store, true); err != nil {
		t.Errorf("-o nonempty: %v", err)
	}
	if _, err := checkMountpoint(store, store, true); err == nil {
		t.Error("-o nonempty allows a mount on the store")
	}
}
