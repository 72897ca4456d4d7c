package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// newMount makes a store and mounts it.
func newMount(t testing.TB, flags ...string) *rig.Mount {
	t.Helper()
	rig.Need(t, "root", "fuse")
	h, store := rig.NewHome(t), filepath.Join(t.TempDir(), "S")
	h.Run(append(append([]string{"init"}, flags...), store)...)
	return h.Mount(store)
}

// TestGoTree unpacks the Go distribution on a mount, compares it, and builds a
// program with the tools and the sources that lie there.
func TestGoTree(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root", "fuse", "tar", "diff", "go")
	m := newMount(t)
	h := m.Home
	goroot := strings.TrimSpace(h.Sh(`GOTOOLCHAIN=local go env GOROOT`))
	h.Sh(`mkdir "$2"/go; cd "$1"; tar -cf - src pkg bin VERSION go.env | tar -xpf - -C "$2"/go`, goroot, m.Dir)
	compare := func(when string) {
		for _, dir := range []string{"src", "pkg", "bin"} {
			if r := h.TrySh(`diff -r --no-dereference "$1"/$3 "$2"/go/$3`, goroot, m.Dir, dir); r.Code != 0 {
				t.Fatalf("%s: %s: exit %d\n%.2000s%s", when, dir, r.Code, r.Stdout, r.Stderr)
			}
		}
	}
	compare("unpacked")
	m.Unmount()
	m.Again()
	compare("after a remount")
	out := h.Sh(`export GOROOT="$1"/go GOCACHE="$2"/cache GOTOOLCHAIN=local GOFLAGS= GOTMPDIR="$1" CGO_ENABLED=0
		cd "$1"/go/src; "$1"/go/bin/go build -o "$1"/gofmt cmd/gofmt
		printf 'package  x\n' | "$1"/gofmt; "$1"/gofmt -l "$1"/go/src/fmt; ls "$1"`, m.Dir, t.TempDir())
	if want := "package x\ngo\ngofmt\n"; out != want {
		t.Errorf("got %q, want %q", out, want)
	}
}

// TestGit clones to a mount, works there, and clones back.
func TestGit(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root", "fuse", "git")
	m := newMount(t)
	h := m.Home
	h.Env = append(h.Env, "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com")
	disk := t.TempDir()
	h.Sh(`cd "$1"; git init -q -b main src; cd src
		for i in $(seq 40); do for f in $(seq 10); do mkdir -p d$f; seq $i $((i*f)) >d$f/f$i; done; git add .; git commit -qm "c$i"; done
		ln -s d1/f1 link; printf 'x' >exec; chmod +x exec; git add .; git commit -qm links`, disk)
	h.Sh(`cd "$2"; git clone -q --no-hardlinks "$1"/src a; git -C a fsck --full --strict; git -C a status --porcelain --ignored`, disk, m.Dir)
	h.Sh(`cd "$1"/a; git checkout -q -b work; for i in $(seq 20); do echo $i >>d1/f$i; git mv d2/f$i d2/g$i; git commit -qam "w$i"; done
		git rebase -q --onto HEAD~10 HEAD~5; git gc -q --aggressive --prune=now; git fsck --full --strict; git worktree add -q ../wt main
		git clone -q . ../local; git -C ../local fsck --full --strict`, m.Dir)
	m.Unmount()
	m.Again()
	if out := h.Sh(`cd "$1"/a; git fsck --full --strict; git status --porcelain; git -C ../wt status --porcelain`, m.Dir); out != "" {
		t.Errorf("after a remount: %s", out)
	}
	h.Sh(`git clone -q --no-hardlinks "$2"/a "$1"/back; git -C "$1"/back fsck --full --strict
		test "$(git -C "$1"/back rev-parse HEAD)" = "$(git -C "$2"/a rev-parse work)"
		test "$(git -C "$1"/back rev-parse origin/main)" = "$(git -C "$1"/src rev-parse main)"`, disk, m.Dir)
}

// TestSQLite has several processes write one database in each journal mode.
func TestSQLite(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root", "fuse", "sqlite3")
	m := newMount(t)
	h := m.Home
	const writers, rows = 4, 50
	for _, mode := range []string{"wal", "delete", "truncate", "persist"} {
		db := m.Path(mode + ".db")
		if out := h.Sh(`sqlite3 "$1" "PRAGMA journal_mode=$2; CREATE TABLE t (w INT, i INT, b BLOB, PRIMARY KEY (w, i));"`, db, mode); out != mode+"\n" {
			t.Fatalf("journal mode: got %q, want %q", out, mode)
		}
		var wg sync.WaitGroup
		for w := range writers {
			var sql strings.Builder
			fmt.Fprintf(&sql, ".timeout 60000\n.bail on\nPRAGMA synchronous=NORMAL;\n")
			for i := range rows {
				fmt.Fprintf(&sql, "INSERT INTO t VALUES (%d, %d, randomblob(%d));\n", w, i, 10+i*i)
			}
			fmt.Fprintf(&sql, "BEGIN; DELETE FROM t WHERE w=%d; ROLLBACK; UPDATE t SET b=randomblob(3000) WHERE w=%d AND i%%5=0;\n", w, w)
			wg.Go(func() {
				if r := h.Exec([]byte(sql.String()), "sqlite3", db); r.Code != 0 {
					t.Errorf("%s: writer: exit %d %s", mode, r.Code, r.Stderr)
				}
			})
		}
		wg.Wait()
	}
	check := func(when string) {
		for _, mode := range []string{"wal", "delete", "truncate", "persist"} {
			want := fmt.Sprintf("ok\n%d|%d\n", writers*rows, writers)
			got := h.Sh(`sqlite3 "$1" "PRAGMA integrity_check; SELECT count(*), count(DISTINCT w) FROM t;"`, m.Path(mode+".db"))
			if got != want {
				t.Errorf("%s, %s: got %q, want %q", mode, when, got, want)
			}
		}
	}
	check("at once")
	m.Unmount()
	m.Again()
	check("after a remount")
}

// TestMmap writes through a shared mapping and reads with read(2), and the
// other way round.
func TestMmap(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	page := os.Getpagesize()
	want := noise(50*page+100, 1)
	m.Put("f", want)
	f, err := os.OpenFile(m.Path("f"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	shared := mapFile(t, f, len(want), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	private := mapFile(t, f, len(want), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	same := func(what string, got []byte) {
		t.Helper()
		if !bytes.Equal(got, want) {
			t.Errorf("%s differs", what)
		}
	}
	same("the mapping", shared)
	copy(private[3*page:], "of this process alone")
	same("the file after a write to a private mapping", readFile(t, m.Path("f")))
	for _, at := range []int{0, 8*page - 5, 20 * page, len(want) - 30} { // the second spans pages and chunks
		copy(shared[at:], fmt.Sprintf("written at %-10d", at))
		copy(want[at:], fmt.Sprintf("written at %-10d", at))
	}
	if err := unix.Msync(shared, unix.MS_SYNC); err != nil {
		t.Fatal(err)
	}
	same("the file after msync", readFile(t, m.Path("f")))
	if _, err := f.WriteAt([]byte("by write(2)"), int64(12*page)); err != nil {
		t.Fatal(err)
	}
	copy(want[12*page:], "by write(2)")
	same("the mapping after write(2)", shared)
	// Without msync: unmapping and closing must do.
	copy(shared[30*page:], "not synced")
	copy(want[30*page:], "not synced")
	unmap(t, shared)
	unmap(t, private)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	same("the file after close", readFile(t, m.Path("f")))
	m.Unmount()
	m.Again()
	same("the file after a remount", readFile(t, m.Path("f")))
}

// TestMmapOutlivesName maps a file, closes and removes it, and goes on: what
// databases and linkers do. A file that is grown under a mapping is mapped
// further than before.
func TestMmapOutlivesName(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	page := os.Getpagesize()
	f, err := os.Create(m.Path("f"))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(int64(20 * page)); err != nil {
		t.Fatal(err)
	}
	mem := mapFile(t, f, 40*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	defer unmap(t, mem)
	copy(mem[19*page:], "in the last page")
	if err := f.Truncate(int64(40 * page)); err != nil {
		t.Fatal(err)
	}
	copy(mem[39*page:], "in the new last page")
	if err := unix.Msync(mem, unix.MS_SYNC); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 20)
	if _, err := f.ReadAt(got, int64(39*page)); err != nil || string(got) != "in the new last page" {
		t.Errorf("got %q, %v", got, err)
	}
	if err := os.Remove(m.Path("f")); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	copy(mem[5*page:], "after the name is gone")
	if err := unix.Msync(mem, unix.MS_SYNC); err != nil {
		t.Error(err)
	}
	if !bytes.HasPrefix(mem[19*page:], []byte("in the last page")) || !bytes.HasPrefix(mem[5*page:], []byte("after the name")) {
		t.Error("the mapping lost what was written")
	}
	runtime.KeepAlive(mem)
}

func mapFile(t testing.TB, f *os.File, n, prot, flags int) []byte {
	t.Helper()
	mem, err := unix.Mmap(int(f.Fd()), 0, n, prot, flags)
	if err != nil {
		t.Fatal(err)
	}
	return mem
}

func unmap(t testing.TB, mem []byte) {
	t.Helper()
	if err := unix.Munmap(mem); err != nil {
		t.Fatal(err)
	}
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
