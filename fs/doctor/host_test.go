package doctor

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
)

// hostTree is a machine with the given files.
func hostTree(t *testing.T, files map[string]string) Host {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Host{Root: root, UID: 1000}
}

// wantFinding requires one finding of a level whose text and remedy have words.
func wantFinding(t *testing.T, got []Finding, level Level, words ...string) {
	t.Helper()
	if len(got) != 1 || got[0].Level != level {
		t.Errorf("got %+v, want one %s", got, level)
		return
	}
	if level != OK && level != Info && got[0].Remedy == "" {
		t.Errorf("%+v has no remedy", got[0])
	}
	for _, w := range words {
		if !strings.Contains(got[0].Text+" "+got[0].Remedy+" "+got[0].Subject, w) {
			t.Errorf("%+v does not have %q", got[0], w)
		}
	}
}

func TestDevice(t *testing.T) {
	wantFinding(t, hostTree(t, nil).device(), Error, "does not exist", "modprobe")
	wantFinding(t, hostTree(t, map[string]string{"dev/fuse": ""}).device(), Error, "is not a device")
	h := hostTree(t, map[string]string{"dev/x": ""})
	if err := os.Symlink("/dev/null", filepath.Join(h.Root, "dev/fuse")); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, h.device(), OK)
	if os.Geteuid() != 0 {
		return // the rest takes mknod
	}
	none := hostTree(t, map[string]string{"dev/x": ""})
	if err := unix.Mknod(filepath.Join(none.Root, "dev/fuse"), unix.S_IFCHR|0o666, int(unix.Mkdev(241, 77))); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, none.device(), Error, "no driver")
}

func TestHelper(t *testing.T) {
	h := hostTree(t, nil)
	wantFinding(t, h.helper(), Error, "install the package fuse3")
	h.UID = 0
	wantFinding(t, h.helper(), OK, "root mounts without it")
	h = hostTree(t, map[string]string{"usr/bin/fusermount3": ""})
	wantFinding(t, h.helper(), Error, "set-user-id")
	if err := os.Chmod(filepath.Join(h.Root, "usr/bin/fusermount3"), 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, h.helper(), OK)
}

func TestAllowOther(t *testing.T) {
	for text, want := range map[string]Level{"": Info, "#user_allow_other\n": Info, "mount_max = 9\n user_allow_other\n": OK} {
		wantFinding(t, hostTree(t, map[string]string{"etc/fuse.conf": text}).allowOther(), want)
	}
	wantFinding(t, hostTree(t, nil).allowOther(), Info, "user_allow_other")
	wantFinding(t, Host{}.allowOther(), OK, "root")
}

func TestSwap(t *testing.T) {
	const head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
	for text, want := range map[string]Level{
		head: OK, head + "/dev/zram0   partition 1 0 100\n": OK, head + "/dev/dm-1   partition 1 0 -2\n": Info, head + "/dev/zram0 partition 1 0 1\n/swap file 1 0 -2\n": Info,
	} {
		wantFinding(t, hostTree(t, map[string]string{"proc/swaps": text}).swap(), want)
	}
}

func TestKernel(t *testing.T) {
	for release, want := range map[string]Level{"4.19.0-5": Warning, "3.10.0": Warning, "4.20.1": OK, "5.15.0-generic": OK, "6.18.44": OK, "odd": Info} {
		wantFinding(t, kernelFinding(release), want)
	}
	wantFinding(t, kernelFinding("5.15.0"), OK, "birth time")
}

func TestLimits(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 bytes", 1023: "1023 bytes", 65536: "64 KiB", 8 << 20: "8 MiB", 3 << 40: "3 TiB", unix.RLIM_INFINITY: "unlimited"} {
		if got := bytesText(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
	if got := (Host{UID: 0}).locked(); len(got) != 1 || got[0].Check != "memory.locked" {
		t.Errorf("locked: %+v", got)
	}
	// This process is not set up as a mount is.
	wantFinding(t, core(), Warning, "core dump")
	if got := synchronised(); len(got) != 1 || got[0].Level == Error {
		t.Errorf("synchronised: %+v", got)
	}
}

func TestFileSystems(t *testing.T) {
	for magic, want := range map[uint32]Level{
		unix.EXT4_SUPER_MAGIC: OK, unix.XFS_SUPER_MAGIC: OK, unix.TMPFS_MAGIC: Warning, unix.NFS_SUPER_MAGIC: Warning, unix.SMB2_SUPER_MAGIC: Warning,
		unix.OVERLAYFS_SUPER_MAGIC: Info, unix.MSDOS_SUPER_MAGIC: Error, 0x12345: Info,
	} {
		wantFinding(t, kind("/x", magic), want)
	}
	for _, tc := range []struct {
		st            unix.Statfs_t
		space, inodes Level
	}{
		{unix.Statfs_t{Frsize: 4096, Blocks: 1 << 30, Bavail: 1 << 29, Files: 1000, Ffree: 900}, OK, OK},
		{unix.Statfs_t{Frsize: 4096, Blocks: 1 << 40, Bavail: 1 << 30, Files: 0, Ffree: 0}, OK, OK},
		{unix.Statfs_t{Frsize: 4096, Blocks: 1 << 20, Bavail: 100, Files: 1000, Ffree: 9}, Warning, Warning},
		{unix.Statfs_t{Frsize: 4096, Blocks: 1 << 20, Bavail: 0, Files: 1000, Ffree: 0}, Error, Error},
	} {
		got := space("/x", &tc.st)
		if len(got) != 2 || got[0].Level != tc.space || got[1].Level != tc.inodes {
			t.Errorf("%+v: got %+v, want %s and %s", tc.st, got, tc.space, tc.inodes)
		}
	}
	if got := fileSystem(filepath.Join(t.TempDir(), "none"), envelope.Prefix); len(got) != 1 || got[0].Level != Error {
		t.Errorf("no directory: %+v", got)
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, ".KMSFS"), 0o755); err != nil { // as .kmsfs looks where case does not count
		t.Fatal(err)
	}
	for _, f := range fileSystem(dir, envelope.Prefix) {
		if f.Check == "store.case" {
			wantFinding(t, []Finding{f}, Error, "upper and lower case")
		}
	}
}

func TestStoreClock(t *testing.T) {
	made := time.Date(2026, 1, 31, 9, 0, 0, 0, time.UTC)
	s := Store{Created: made}
	wantFinding(t, s.clock(made.Add(-2*time.Minute)), Error, "2026-01-31 08:58:00", "timedatectl")
	wantFinding(t, s.clock(made.Add(-time.Second)), OK)
	wantFinding(t, s.clock(made.AddDate(1, 0, 0)), OK)
}

// TestRun: findings come in the order of the checks, and one that hangs is left
// behind.
func TestRun(t *testing.T) {
	said := func(name string) Check {
		return Check{name, func(context.Context) []Finding { return one(name, OK, "", "", "") }}
	}
	hangs := Check{"hangs", func(context.Context) []Finding { select {} }}
	slow := Check{"slow", func(ctx context.Context) []Finding {
		<-ctx.Done()
		return one("slow", Error, "", ctx.Err().Error(), "wait")
	}}
	got := Run(t.Context(), 50*time.Millisecond, said("a"), hangs, slow, said("b"))
	if len(got) != 4 || got[0].Check != "a" || got[1].Check != "hangs" || got[1].Level != Error || got[1].Remedy == "" || got[2].Check != "slow" || got[3].Check != "b" {
		t.Errorf("got %+v", got)
	}
	if !strings.Contains(got[2].Text, "deadline") {
		t.Errorf("a check that ends with its context: %+v", got[2])
	}
	if Count(got, Error) != 2 || Count(got, OK) != 2 || Count(got, Warning) != 0 {
		t.Errorf("counts of %+v", got)
	}
}
