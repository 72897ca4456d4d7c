package powercut

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	dbrig "github.com/kmsfs/kmsfs/integration/rig"
)

// database commits numbered transactions. Commit returns when the next one's
// commit was answered.
type database interface {
	Create() error // and close
	Begin() error
	Commit() error
	Finish() error // Begin's counterpart
	Kill()         // ends what still runs after a failure
}

// recovery lets a database recover, and wants the first acked of its transactions
// in it, perhaps those up to tried, and no others.
type recovery func(acked, tried int) error

type sqlite struct{ *dbrig.SQLite }

func (d sqlite) Finish() error { return d.End(false) }
func (d sqlite) Kill()         { _ = d.End(true) }

// TestSQLite commits transactions to a database on a mount, cuts the power, and
// lets SQLite recover what is left on another: every transaction whose commit was
// answered is there, and integrity_check finds nothing. S-57
func TestSQLite(t *testing.T) {
	dbrig.Need(t, "root", "fuse", "sqlite3", "stdbuf")
	first, _ := seed(t)
	for i, mode := range []string{"wal", "delete"} {
		t.Run(mode, func(t *testing.T) {
			r := newRig(t, layout{placement: placements[(int(first%3)+i)%3]}, nil)
			db := &dbrig.SQLite{Dir: filepath.Join(r.dir, "mnt"), Mode: mode, Seed: 1, Rows: 20}
			r.cutDatabase(sqlite{db}, first, states(12, 400), nil, func(acked, tried int) error {
				left := &dbrig.SQLite{Dir: db.Dir, Mode: mode, Seed: db.Seed, Rows: db.Rows, Acked: acked, Tried: tried}
				return left.Verify()
			})
		})
	}
}

type postgres struct{ *dbrig.PostgresLoad }

func (d postgres) Create() error {
	return inTurn(
		func() error { return os.Chmod(filepath.Dir(d.Server.Data), 0o755) }, // the server does not run as root
		d.Server.Init, d.Server.Start, d.PostgresLoad.Create, d.Server.Stop)
}

func (d postgres) Begin() error { return inTurn(d.Server.Start, d.PostgresLoad.Begin) }

func (d postgres) Finish() error {
	d.End()
	return d.Server.Stop()
}

func (d postgres) Kill() {
	d.End()
	d.Server.Quit()
}

// TestPostgreSQL is the same with a server, which recovers by itself; pg_amcheck
// finds nothing. S-57
func TestPostgreSQL(t *testing.T) {
	dbrig.Need(t, "root", "fuse", "postgres", "stdbuf")
	first, _ := seed(t)
	r := newRig(t, layout{placement: placements[(first+2)%3]}, nil)
	r.others = true
	if err := os.Chmod(r.dir, 0o711); err != nil {
		t.Fatal(err)
	}
	server := dbrig.NewPostgres(t, filepath.Join(r.dir, "mnt", "pg"), "-c", "shared_buffers=2MB", "-c", "max_connections=10", "-c", "autovacuum=off")
	db := postgres{&dbrig.PostgresLoad{Server: server, Rows: 20}}
	checkpoint := func() error { // its writes in place, and the end of its older log
		_, err := server.Query("CHECKPOINT")
		return err
	}
	r.cutDatabase(db, first, states(6, 200), checkpoint, func(acked, tried int) error {
		left := &dbrig.PostgresLoad{Server: server, Rows: db.Rows, Acked: acked, Tried: tried}
		return inTurn(func() error { return dropEmptyPid(server.Data) }, server.Start, left.Verify, left.Check, server.Stop)
	})
}

// dropEmptyPid removes the server's pid file if a cut left it empty, before the
// server had synced it: it refuses to start then, on any file system, and says so.
func dropEmptyPid(data string) error {
	path := filepath.Join(data, "postmaster.pid")
	if fi, err := os.Stat(path); err != nil || fi.Size() > 0 {
		return nil
	}
	return os.Remove(path)
}

// inTurn does one thing after the other, until one fails.
func inTurn(all ...func() error) error {
	for _, do := range all {
		if err := do(); err != nil {
			return err
		}
	}
	return nil
}

// states is how many states of a database are tried, here and with CRASH_FULL.
func states(few, many int) int {
	if full {
		return many
	}
	return few
}

// transactions are how many are committed before the power is cut.
const transactions = 30

// cutDatabase records transactions, and has the database recover from n of the
// states that a cut leaves. In the middle, the mount and then the database write
// back what their own logs hold.
func (r *rig) cutDatabase(db database, first uint64, n int, middle func() error, recover recovery) {
	r.t.Helper()
	acks, h, err := r.commits(db, middle)
	if err != nil {
		r.t.Fatal(err)
	}
	p := newProver(r, first, 9)
	for range n {
		c := h.anywhere(p.rnd)
		acked := 0
		for _, at := range acks {
			if at <= c.at {
				acked++
			}
		}
		err := r.recovers(h.state(c), func() error {
			defer db.Kill()
			return recover(acked, min(acked+1, len(acks)))
		})
		if err != nil {
			r.t.Fatalf("CRASH_SEED=%d: %d of %d transactions were committed: %v", first, acked, len(acks), h.failure(c, err))
		}
	}
	r.t.Logf("%d states after any of %d events", n, h.to-h.from)
}

// commits makes a database, durable, and records a mount on which it gets
// transactions, and where in the record each was answered.
func (r *rig) commits(db database, middle func() error) (acks []int, h *history, err error) {
	store, remove := r.folder()
	defer remove()
	if err := r.disk.build(store); err != nil {
		return nil, nil, err
	}
	if err := r.on(store, nil, func(*session) error { defer db.Kill(); return db.Create() }); err != nil {
		return nil, nil, err
	}
	d, err := loadDisk(store)
	if err != nil {
		return nil, nil, err
	}
	rec := newRecorder(d)
	h = &history{base: d}
	err = r.on(store, rec, func(s *session) error {
		defer db.Kill()
		if err := db.Begin(); err != nil {
			return err
		}
		h.from = rec.at()
		for n := range transactions {
			if err := db.Commit(); err != nil {
				return err
			}
			acks = append(acks, rec.at())
			if n == transactions/2 { // another epoch of the journal
				if err := s.volume.Checkpoint(); err != nil {
					return err
				}
				if middle != nil {
					if err := middle(); err != nil {
						return err
					}
				}
			}
		}
		h.to = rec.at()
		return db.Finish()
	})
	h.events = rec.events
	return acks, h, err
}

// on mounts a store while f runs.
func (r *rig) on(store string, tap *recorder, f func(*session) error) error {
	s, err := r.mount(store, tap)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	err = f(s)
	s.unmount()
	return err
}

// recovers has a database recover on a mount of what a cut left.
func (r *rig) recovers(d *disk, recover func() error) error {
	store, remove := r.folder()
	defer remove()
	if err := d.build(store); err != nil {
		return err
	}
	return r.on(store, nil, func(*session) error { return recover() })
}
