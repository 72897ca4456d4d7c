package powercut

import (
	"fmt"
	"path/filepath"
	"testing"

	dbrig "github.com/kmsfs/kmsfs/integration/rig"
)

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
			acks, h, err := r.commits(db)
			if err != nil {
				t.Fatal(err)
			}
			p, n := newProver(r, first, 9), 12
			if full {
				n = 400
			}
			for range n {
				c := h.anywhere(p.rnd)
				acked := 0
				for _, at := range acks {
					if at <= c.at {
						acked++
					}
				}
				left := &dbrig.SQLite{Dir: db.Dir, Mode: mode, Seed: db.Seed, Rows: db.Rows, Acked: acked, Tried: min(acked+1, len(acks))}
				if err := r.verify(h.state(c), left); err != nil {
					t.Fatalf("CRASH_SEED=%d: %d of %d transactions were committed: %v", first, acked, len(acks), h.failure(c, err))
				}
			}
		})
	}
}

// transactions are how many are committed before the power is cut.
const transactions = 30

// commits makes a database, durable, and records a mount on which it gets
// transactions, and where in the record each was answered.
func (r *rig) commits(db *dbrig.SQLite) (acks []int, h *history, err error) {
	store, remove := r.folder()
	defer remove()
	if err := r.disk.build(store); err != nil {
		return nil, nil, err
	}
	if err := r.on(store, nil, func(*session) error { return db.Create() }); err != nil {
		return nil, nil, err
	}
	d, err := loadDisk(store)
	if err != nil {
		return nil, nil, err
	}
	rec := newRecorder(d)
	h = &history{base: d}
	err = r.on(store, rec, func(s *session) error {
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
			}
		}
		h.to = rec.at()
		return db.End(false)
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

// verify has the database recover on a mount of what a cut left.
func (r *rig) verify(d *disk, db *dbrig.SQLite) error {
	store, remove := r.folder()
	defer remove()
	if err := d.build(store); err != nil {
		return err
	}
	return r.on(store, nil, func(*session) error { return db.Verify() })
}
