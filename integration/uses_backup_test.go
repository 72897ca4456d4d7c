package integration

import (
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// TestRsync copies a tree to a mount and back.
func TestRsync(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root", "fuse", "rsync", "setfacl", "setfattr")
	b := newBench(t)
	b.h.Sh(`rsync -aHAX --sparse "$1"/ "$2"/tree/`, b.src, b.m.Dir)
	b.check("on the mount", b.m.Path("tree"))
	b.remount()
	b.check("after a remount", b.m.Path("tree"))
	b.h.Sh(`rsync -aHAX --sparse "$1"/tree/ "$2"/`, b.m.Dir, b.out)
	b.check("copied back", b.out)
	mustBeSparse(t, b.m.Path("tree", "links", "sparse"))
	mustBeSparse(t, b.out+"/links/sparse")
	if out := b.h.Sh(`rsync -aHAXi --checksum "$1"/ "$2"/tree/`, b.src, b.m.Dir); out != "" {
		t.Errorf("a second run has something to do: %s", out)
	}
}

// TestTar writes an archive on the mount, unpacks it there, and archives the
// mount.
func TestTar(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root", "fuse", "tar", "setfacl", "setfattr")
	b := newBench(t)
	const flags = `--xattrs --xattrs-include=* --acls --sparse --numeric-owner --warning=no-file-ignored`
	b.h.Sh(`tar -c `+flags+` --format=posix -f "$2"/x.tar -C "$1" .`, b.src, b.m.Dir)
	b.remount()
	b.h.Sh(`mkdir "$1"/tree; tar -xp `+flags+` -f "$1"/x.tar -C "$1"/tree`, b.m.Dir)
	b.checkWithout("unpacked on the mount", b.m.Path("tree"), "links/sock")
	mustBeSparse(t, b.m.Path("tree", "links", "sparse"))
	b.remount()
	b.h.Sh(`mkdir "$2"; tar -c `+flags+` --format=posix -C "$1"/tree . | tar -xp `+flags+` -C "$2"`, b.m.Dir, b.out)
	b.checkWithout("unpacked from the mount", b.out, "links/sock")
	mustBeSparse(t, b.out+"/links/sparse")
}

// TestRestic keeps a repository on a mount, and backs a mount up.
func TestRestic(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root", "fuse", "restic", "setfacl", "setfattr")
	b := newBench(t)
	b.h.Env = append(b.h.Env, "RESTIC_PASSWORD=x", "RESTIC_CACHE_DIR="+t.TempDir())
	b.h.Sh(`cd "$1"/..; restic -r "$2"/repo init; restic -r "$2"/repo backup src`, b.src, b.m.Dir)
	b.remount()
	b.h.Sh(`restic -r "$1"/repo check --read-data; restic -r "$1"/repo restore latest --target "$1"/1`, b.m.Dir)
	b.checkRestic("restored on the mount", b.m.Path("1/src"))
	b.remount()
	b.h.Sh(`cd "$1"/1; restic -r "$2"/repo init; restic -r "$2"/repo backup src; restic -r "$2"/repo check --read-data
		restic -r "$2"/repo restore latest --target "$2"/2`, b.m.Dir, b.out)
	b.checkRestic("a mount's backup", b.out+"/2/src")
	again := b.h.Sh(`cd "$1"/1; restic -r "$2"/repo backup src --json | tail -n 1 | grep -o '"files_changed":[0-9]*,'`, b.m.Dir, b.out)
	if again != "\"files_changed\":0,\n" {
		t.Errorf("a second backup of an unchanged mount: %s", again)
	}
}

// checkRestic forgives what restic loses wherever it runs: sockets, holes
// (before its 0.15), and what is not UTF-8 in a symlink's target.
func (b *bench) checkRestic(what, dir string) {
	b.t.Helper()
	b.want["links/bytes"] = readTree(b.t, dir)["links/bytes"]
	sparse := b.want["links/sparse"]
	sparse.holes = readTree(b.t, dir+"/links")["sparse"].holes
	b.want["links/sparse"] = sparse
	b.checkWithout(what, dir, "links/sock")
}

// TestBorg is TestRestic with borg.
func TestBorg(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root", "fuse", "borg", "setfacl", "setfattr")
	b := newBench(t)
	b.h.Env = append(b.h.Env, "BORG_PASSPHRASE=x", "BORG_BASE_DIR="+t.TempDir())
	const create = `borg create --numeric-ids --chunker-params fixed,65536 `
	b.h.Sh(`cd "$1"/..; borg init -e repokey "$2"/repo; `+create+`"$2"/repo::a src`, b.src, b.m.Dir)
	b.remount()
	b.h.Sh(`borg check --verify-data "$1"/repo; mkdir "$1"/1; cd "$1"/1; borg extract --numeric-ids --sparse "$1"/repo::a`, b.m.Dir)
	b.checkBorg("extracted on the mount", b.m.Path("1/src"))
	b.remount()
	b.h.Sh(`mkdir "$2"; cd "$1"/1; borg init -e repokey "$2"/repo; `+create+`"$2"/repo::a src
		borg check --verify-data "$2"/repo; mkdir "$2"/2; cd "$2"/2; borg extract --numeric-ids --sparse "$2"/repo::a`, b.m.Dir, b.out)
	b.checkBorg("a mount's backup", b.out+"/2/src")
	again := b.h.Sh(`cd "$1"/1; borg create --numeric-ids --list --filter AM "$2"/repo::b src 2>&1`, b.m.Dir, b.out)
	// Borg reads the files with the newest ctime again, wherever they lie.
	if strings.Count(again, "\n") > 3 {
		t.Errorf("a second backup of an unchanged mount reads: %s", again)
	}
}

// borgNewest is the newest time that borg stores, in s.
const borgNewest = 2147310847

// checkBorg forgives that borg keeps no sockets and no time after 2038.
func (b *bench) checkBorg(what, dir string) {
	b.t.Helper()
	for name, e := range b.want {
		e.mtime = min(e.mtime, borgNewest*1e9)
		b.want[name] = e
	}
	b.checkWithout(what, dir, "links/sock")
	mustBeSparse(b.t, dir+"/links/sparse")
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

func (b *bench) check(what, dir string) {
	b.t.Helper()
	mustEqual(b.t, what, readTree(b.t, dir), b.want)
}

// checkWithout expects the names that a tool is known to leave out to be
// missing, and all else to be there.
func (b *bench) checkWithout(what, dir string, names ...string) {
	b.t.Helper()
	want := maps.Clone(b.want)
	for _, name := range names {
		if _, ok := want[name]; !ok {
			b.t.Fatalf("the source has no %q", name)
		}
		delete(want, name)
	}
	mustEqual(b.t, what, readTree(b.t, dir), want)
}
