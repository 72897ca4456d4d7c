package soak

import (
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// sqlite commits numbered transactions.
type sqlite struct{ *rig.SQLite }

func newSQLite(dir, mode string, seed int) sqlite {
	return sqlite{&rig.SQLite{Dir: dir, Mode: mode, Seed: seed, Rows: 300}}
}

func (w sqlite) name() string         { return filepath.Base(w.Dir) }
func (w sqlite) every() time.Duration { return 120 * time.Millisecond }
func (w sqlite) setup() error         { return w.Create() }
func (w sqlite) begin() error         { return w.Begin() }
func (w sqlite) step() error          { return w.Commit() }
func (w sqlite) end(killed bool)      { _ = w.End(killed) } // what it wrote is compared
func (w sqlite) verify() error        { return w.Verify() }
func (w sqlite) last() error          { return nil }

// postgres commits numbered transactions beside pgbench, whose sums have to
// agree.
type postgres struct {
	*rig.PostgresLoad
	bench *exec.Cmd
}

func newPostgres(t *testing.T, data string) *postgres {
	server := rig.NewPostgres(t, data, "-c", "shared_buffers=16MB", "-c", "max_connections=20",
		"-c", "checkpoint_timeout=30s", "-c", "min_wal_size=2MB", "-c", "max_wal_size=16MB", "-c", "autovacuum_naptime=15s")
	return &postgres{PostgresLoad: &rig.PostgresLoad{Server: server, Rows: 500}}
}

func (w *postgres) name() string         { return "postgres" }
func (w *postgres) every() time.Duration { return 200 * time.Millisecond }

func (w *postgres) setup() error {
	if err := w.Server.Init(); err != nil {
		return err
	}
	if err := w.Server.Start(); err != nil {
		return err
	}
	return w.Create()
}

func (w *postgres) begin() error {
	if err := w.Begin(); err != nil {
		return err
	}
	w.bench = w.Server.Command("pgbench", "-n", "-c", "2", "-R", "10", "-T", "1000000")
	return w.bench.Start()
}

func (w *postgres) step() error { return w.Commit() }

func (w *postgres) end(killed bool) {
	if w.bench != nil {
		_ = w.bench.Process.Signal(syscall.SIGKILL)
		_ = w.bench.Wait()
		w.bench = nil
	}
	w.End()
	if killed {
		w.Server.Quit()
	} else {
		_ = w.Server.Stop() // what it wrote is compared
	}
}

func (w *postgres) verify() error {
	if err := w.Server.Start(); err != nil {
		return err
	}
	return w.Verify()
}

func (w *postgres) last() error { return w.Check() }
