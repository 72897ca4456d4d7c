package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// goneStore is a mount whose store's disk, an ext4, is taken away. What was
// synced before is in kept.
type goneStore struct {
	t    *testing.T
	h    *rig.Home
	m    *rig.Mount
	disk string // where the file system is mounted
	kept map[string][]byte
}

func newGoneStore(t *testing.T) *goneStore {
	t.Helper()
	h := rig.NewHome(t)
	store := ext4Store(t, h, "48m", "--chunk-size", "4KiB")
	g := &goneStore{t: t, h: h, m: h.Mount(store), disk: filepath.Dir(store), kept: map[string][]byte{}}
	for i := range 5 {
		name := fmt.Sprintf("file%d", i)
		g.kept[name] = noise(10_000+i*5000, uint64(i))
		if err := writeSynced(g.m.Path(name), g.kept[name]); err != nil {
			t.Fatal(err)
		}
	}
	h.Sh(`sync "$1"`, g.m.Dir)
	return g
}

// reads: what can be read is right, and what is in the kernel's memory or on a
// disk that still reads can be.
func (g *goneStore) reads(when string) {
	g.t.Helper()
	for name, want := range g.kept {
		if got, errno := readAll(g.m.Path(name)); errno != 0 || !bytes.Equal(got, want) {
			g.t.Errorf("%s: %s: %d bytes, %s", when, name, len(got), errnoName(errno))
		}
	}
}

// refused: no change succeeds, each says why, and the mount says so.
func (g *goneStore) refused() {
	g.t.Helper()
	for what, do := range map[string]func() error{
		"create and sync": func() error { return writeSynced(g.m.Path("new"), []byte("new")) },
		"overwrite and sync": func() error {
			f, err := os.OpenFile(g.m.Path("file0"), os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer func() { _ = f.Close() }() // the error is fsync's
			if _, err := f.WriteAt([]byte("lost"), int64(len(g.kept["file0"]))); err != nil {
				return err
			}
			return f.Sync()
		},
		"mkdir":  func() error { return os.Mkdir(g.m.Path("dir"), 0o700) },
		"rename": func() error { return os.Rename(g.m.Path("file1"), g.m.Path("moved")) },
		"remove": func() error { return os.Remove(g.m.Path("file2")) },
	} {
		if errno := errnoOf(do()); errno != unix.EROFS && errno != unix.EIO {
			g.t.Errorf("%s: got %s, want EROFS or EIO", what, errnoName(errno))
		}
	}
	end := time.Now().Add(2 * time.Minute)
	for conditionOf(g.t, g.m).State != "halted" {
		if time.Now().After(end) {
			g.t.Fatalf("the mount does not say that it is halted: %+v", conditionOf(g.t, g.m))
		}
		time.Sleep(100 * time.Millisecond)
	}
	if h := conditionOf(g.t, g.m).Halt; h == nil || h.Reason != "disk" && h.Reason != "journal" {
		g.t.Errorf("halt: got %+v", h)
	}
	if r := g.h.Try("health", "--json", g.m.Dir); !strings.Contains(r.Stdout, `"halted"`) {
		g.t.Errorf("health: exit code %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// TestStoreMadeReadOnly: the kernel makes the store's file system read-only, as
// after an error of the disk. Changes are refused with a clear error, status and
// health say so, reading goes on, and after a repair everything is there.
func TestStoreMadeReadOnly(t *testing.T) {
	t.Parallel()
	g := newGoneStore(t)
	if r := g.h.TrySh(`mount -o remount,abort "$1"`, g.disk); r.Code != 0 {
		t.Fatalf("remount: %s", r.Stderr)
	}
	g.refused()
	g.reads("read-only")
	if r := g.h.Try("umount", g.m.Dir); rig.Mounted(g.m.Dir) {
		t.Fatalf("umount: exit code %d: %s", r.Code, r.Stderr)
	}
	g.m.Ended()
	g.h.Sh(`umount "$1"; e2fsck -p "$1"/../image >/dev/null || [ $? -le 2 ]; mount -o loop "$1"/../image "$1"`, g.disk)
	g.m.Again()
	g.reads("mounted anew")
	if err := writeSynced(g.m.Path("new"), []byte("new")); err != nil {
		t.Errorf("writing again: %v", err)
	}
	g.m.Unmount()
	if r := g.h.Try("fsck", "--repair", g.m.Store); r.Code != 0 {
		t.Errorf("fsck --repair: exit code %d: %s", r.Code, r.Stdout)
	}
	fsck(t, g.h, g.m.Store, 0)
}

// TestStoreUnmountedBeneath: somebody detaches the store's file system. The mount
// has it open and goes on; nothing of what it does then is lost.
func TestStoreUnmountedBeneath(t *testing.T) {
	t.Parallel()
	g := newGoneStore(t)
	if err := unix.Unmount(g.disk, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	g.reads("detached")
	g.kept["later"] = noise(20_000, 77)
	if err := writeSynced(g.m.Path("later"), g.kept["later"]); err != nil {
		t.Errorf("writing: %v", err)
	}
	if c := conditionOf(t, g.m); c.State != "sound" {
		t.Errorf("condition: got %+v, want sound", c)
	}
	g.m.Unmount()
	g.h.Sh(`for i in $(seq 600); do mount -o loop "$1"/../image "$1" 2>/dev/null && exit 0; sleep 0.1; done; exit 1`, g.disk)
	g.m.Again()
	g.reads("mounted anew")
	g.m.Unmount()
	fsck(t, g.h, g.m.Store, 0)
}
