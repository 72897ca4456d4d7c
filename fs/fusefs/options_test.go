package fusefs

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/fault"
)

func TestParseOptions(t *testing.T) {
	m, err := parseOptions([]string{"nosuid,nodev", "noexec", "defaults,_netdev,x-systemd.automount,allow_other",
		"context=system_u:object_r:x_t:s0", "exec,rw,ro", ""})
	if err != nil {
		t.Fatal(err)
	}
	if want := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_RDONLY); m.flags != want {
		t.Errorf("flags %#x, want %#x", m.flags, want)
	}
	if want := []string{"nosuid", "nodev", "noexec", "exec", "rw", "ro"}; !slices.Equal(m.names, want) {
		t.Errorf("names %q, want %q", m.names, want)
	}
	if want := []string{"context=system_u:object_r:x_t:s0"}; !slices.Equal(m.data, want) {
		t.Errorf("data %q, want %q", m.data, want)
	}
	if !m.allowOther {
		t.Error("allow_other is not seen")
	}
	if _, err := parseOptions([]string{"ro,big_writes"}); !errors.Is(err, ErrOption) {
		t.Errorf("unknown option: %v", err)
	}
}

func TestReadOnlyWinsOverExtra(t *testing.T) {
	m, err := parseOptions([]string{"rw"})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.add("ro"); err != nil || m.flags&unix.MS_RDONLY == 0 {
		t.Errorf("flags %#x, %v", m.flags, err)
	}
}

func TestCheckMountpoint(t *testing.T) {
	dir := t.TempDir()
	store, inside, beside, file := filepath.Join(dir, "s"), filepath.Join(dir, "s", "d"), filepath.Join(dir, "s2"), filepath.Join(dir, "f")
	for _, d := range []string{inside, beside} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(inside, link); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{store, inside, link, file} {
		if got, err := checkMountpoint(bad, store); !errors.Is(err, ErrMountpoint) {
			t.Errorf("checkMountpoint(%s) = %q, %v", bad, got, err)
		}
	}
	if _, err := checkMountpoint(filepath.Join(dir, "none"), store); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing mountpoint: %v", err)
	}
	if got, err := checkMountpoint(beside, store); err != nil || got == "" {
		t.Errorf("checkMountpoint(%s) = %q, %v", beside, got, err)
	}
}

func TestErrorsHaveKinds(t *testing.T) {
	for _, err := range []error{ErrNoFuse, ErrMountpoint, ErrOption, ErrRefused, ErrBusy} {
		if fault.Of(err) == fault.None {
			t.Errorf("%v has no kind", err)
		}
	}
	if err := noDevice(unix.EACCES); !errors.Is(err, ErrNoFuse) {
		t.Error(err)
	}
	if err := refused(unix.EPERM, mountArgs{}); !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
	if err := refused(unix.EINVAL, mountArgs{}); errors.Is(err, ErrRefused) || !errors.Is(err, unix.EINVAL) {
		t.Error(err)
	}
}

func TestKillPriv(t *testing.T) {
	for _, test := range []struct {
		valid uint32
		dir   bool
		want  bool
	}{
		{fuse.FATTR_SIZE, false, false},
		{fuse.FATTR_SIZE | fuse.FATTR_KILL_SUIDGID, false, true},
		{fuse.FATTR_UID, false, true},
		{fuse.FATTR_GID | fuse.FATTR_CTIME, false, true},
		{fuse.FATTR_CTIME | fuse.FATTR_FH, false, true}, // chown(-1, -1)
		{fuse.FATTR_MTIME, false, false},
		{fuse.FATTR_MODE, false, false},
		{fuse.FATTR_MODE | fuse.FATTR_UID, false, false},
		{fuse.FATTR_UID, true, false},
	} {
		in := &fuse.SetAttrIn{}
		in.Valid = test.valid
		if got := setAttr(in, test.dir).KillPriv; got != test.want {
			t.Errorf("valid %#x, directory %v: KillPriv %v, want %v", test.valid, test.dir, got, test.want)
		}
	}
}
