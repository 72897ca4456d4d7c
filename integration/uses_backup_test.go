package integration

import (
	"path/filepath"
	"testing"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// TestRsync copies a tree to a mount and back.
func TestRsync(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root", "fuse", "rsync", "setfacl", "setfattr")
	b := newBench(t)
	b.h.Sh(`rsync -aHAX --sparse "$1"/ "$2"/tree/`, b.src, b.m.Dir)
	b.check("on the mount", b.m.Path("tree"), nil)
	b.remount()
	b.check("after a remount", b.m.Path("tree"), nil)
	b.h.Sh(`rsync -aHAX --sparse "$1"/tree/ "$2"/`, b.m.Dir, b.out)
	b.check("copied back", b.out, nil)
	if out := b.h.Sh(`rsync -aHAXi --checksum "$1"/ "$2"/tree/`, b.src, b.m.Dir); out != "" {
		t.Errorf("a second run has something to do: %s", out)
	}
}

// bench is a tree to back up, and a mount.
type bench struct {
	t        *testing.T
	h        *rig.Home
	m        *rig.Mount
	src, out string // the tree; a directory for results, both on the disk
	want     tree
}

func newBench(t *testing.T) *bench {
	t.Helper()
	dir := t.TempDir()
	b := &bench{t: t, h: rig.NewHome(t), src: filepath.Join(dir, "src"), out: filepath.Join(dir, "out")}
	b.h.Run("init", filepath.Join(dir, "S"))
	b.m = b.h.Mount(filepath.Join(dir, "S"))
	hardTree(t, b.h, b.src)
	b.want = readTree(t, b.src)
	return b
}

func (b *bench) remount() {
	b.t.Helper()
	b.m.Unmount()
	b.m.Again()
}

// check compares a directory with the source, sparseness included unless
// forgive takes it away.
func (b *bench) check(what, dir string, forgive func(name string, got, want *entry)) {
	b.t.Helper()
	mustEqual(b.t, what, readTree(b.t, dir), b.want, forgive)
}
