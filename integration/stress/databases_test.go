package stress

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// TestDatabases: PostgreSQL and SQLite on one mount, with git and tar beside
// them. The server is killed and started again; what was committed is there, the
// checks of the databases find nothing, and a dump is what it was.
func TestDatabases(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root", "fuse", "postgres", "pgbench", "sqlite3", "git", "tar", "stdbuf")
	m := newMount(t)
	for _, dir := range []string{"wal", "delete", "trees"} {
		if err := os.Mkdir(m.Path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	passable(t, m)
	pg := &rig.PostgresLoad{Server: rig.NewPostgres(t, m.Path("pg"), "-c", "shared_buffers=16MB", "-c", "max_connections=20"), Rows: 200}
	if err := errors.Join(pg.Server.Init(), pg.Server.Start(), pg.Create()); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var beside sync.WaitGroup
	for _, mode := range []string{"wal", "delete"} {
		beside.Go(func() { sqliteBeside(t, m, mode, stop) })
	}
	beside.Go(func() { treesBeside(t, m, stop) })
	for range sized(2, 20) {
		postgresRound(t, pg)
	}
	close(stop)
	beside.Wait()
	before := dump(t, pg)
	if err := errors.Join(pg.Check(), pg.Server.Stop()); err != nil {
		t.Fatal(err)
	}
	m.Unmount()
	m.Again("--allow-other")
	if err := errors.Join(pg.Server.Start(), pg.Verify()); err != nil {
		t.Fatal(err)
	}
	if after := dump(t, pg); after != before {
		t.Errorf("the dump of %d bytes has %d after a remount, or differs", len(before), len(after))
	}
	if err := pg.Server.Stop(); err != nil {
		t.Error(err)
	}
	clean(t, m)
}

// passable lets the server's user through to the mount.
func passable(t *testing.T, m *rig.Mount) {
	m.Unmount()
	for dir := filepath.Dir(m.Dir); dir != "/" && strings.HasPrefix(dir, os.TempDir()) && dir != os.TempDir(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.Again("--allow-other")
	if err := os.Chmod(m.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
}

// postgresRound commits beside pgbench, kills the server in the middle, and
// wants everything that was committed.
func postgresRound(t *testing.T, pg *rig.PostgresLoad) {
	bench := pg.Server.Command("pgbench", "-n", "-c", "2", "-T", "1000000")
	if err := errors.Join(pg.Begin(), bench.Start()); err != nil {
		t.Fatal(err)
	}
	for range sized(40, 1000) {
		if err := pg.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	pg.Server.Kill()
	_ = bench.Wait() // it lost its server
	pg.End()
	var err error
	for range 50 { // the other processes of the server are about to notice
		if err = pg.Server.Start(); err == nil {
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	if err = errors.Join(err, pg.Verify()); err != nil {
		t.Fatal(err)
	}
}

func dump(t *testing.T, pg *rig.PostgresLoad) string {
	t.Helper()
	out, err := pg.Server.Run("pg_dump", "--no-comments")
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(out) {
		if !strings.HasPrefix(line, `\restrict`) && !strings.HasPrefix(line, `\unrestrict`) { // a random key
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

// sqliteBeside commits, kills its process now and then, and checks.
func sqliteBeside(t *testing.T, m *rig.Mount, mode string, stop chan struct{}) {
	db := &rig.SQLite{Dir: m.Path(mode), Mode: mode, Seed: 1, Rows: 50}
	err := errors.Join(db.Create(), db.Begin())
	for n := 1; err == nil; n++ {
		select {
		case <-stop:
			if err := errors.Join(db.End(true), db.Verify()); err != nil {
				t.Errorf("sqlite, %s: %v", mode, err)
			}
			return
		default:
		}
		if err = db.Commit(); err == nil && n%40 == 0 {
			err = errors.Join(db.End(true), db.Verify(), db.Begin())
		}
	}
	t.Errorf("sqlite, %s: %v", mode, err)
}

// treesBeside unpacks a tree, has git keep it, and compares.
func treesBeside(t *testing.T, m *rig.Mount, stop chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		r := m.Home.TrySh(`export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@example.com GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@example.com
			rm -rf "$1"/trees/t; mkdir "$1"/trees/t; tar -C "$(go env GOROOT)"/src -cf - fmt os | tar -C "$1"/trees/t -xf -
			cd "$1"/trees/t; git init -q -b main; git add -A; git commit -qm all; git gc -q; git fsck --full --strict
			diff -r "$(go env GOROOT)"/src/os os`, m.Dir)
		if r.Code != 0 {
			t.Errorf("git and tar: exit %d\n%.2000s%.2000s", r.Code, r.Stdout, r.Stderr)
			return
		}
	}
}
