package rig

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

// SQLite commits numbered transactions to a database. Transaction n replaces
// row n%Rows with version n of it, whose contents follow from n, so that the
// number of the last one tells all that the database has to hold.
type SQLite struct {
	Dir  string // where the database is
	Mode string // journal mode
	Seed int
	Rows int

	Acked int // the last transaction whose commit was answered
	Tried int // the last that was begun

	session *Session
}

// body is what a row has in version n.
func (d *SQLite) body(n int) string {
	return strings.Repeat(fmt.Sprintf("%d.%d,", d.Seed, n), 1+n*7919%600)
}

func (d *SQLite) open() (*Session, error) {
	s, err := StartSession(LineBuffered("sqlite3", filepath.Join(d.Dir, "db")))
	if err != nil {
		return nil, err
	}
	// EXTRA: in mode "delete" a commit is durable only once the journal's name
	// durably is not there any more.
	_, err = s.Ask(".bail on\n.timeout 60000\nPRAGMA synchronous=EXTRA;\nPRAGMA wal_autocheckpoint=100;\nSELECT 'ready';", "ready")
	return s, err
}

// Create makes the database.
func (d *SQLite) Create() error {
	s, err := d.open()
	if err != nil {
		return err
	}
	if _, err := s.Ask(fmt.Sprintf(`PRAGMA journal_mode=%s; CREATE TABLE t (id INTEGER PRIMARY KEY, n INT, body TEXT); CREATE INDEX byN ON t (n);
		CREATE TABLE last (n INT); INSERT INTO last VALUES (0); SELECT 'made';`, d.Mode), "made"); err != nil {
		return err
	}
	return s.Close()
}

// Begin opens the database for transactions.
func (d *SQLite) Begin() (err error) {
	d.session, err = d.open()
	return err
}

// Commit commits the next transaction.
func (d *SQLite) Commit() error {
	n := d.Acked + 1
	d.Tried = n
	done := fmt.Sprintf("done %d", n)
	_, err := d.session.Ask(fmt.Sprintf("BEGIN IMMEDIATE; INSERT OR REPLACE INTO t VALUES (%d, %d, '%s'); UPDATE last SET n = %d; COMMIT; SELECT '%s';",
		n%d.Rows, n, d.body(n), n, done), done)
	if err != nil {
		return err
	}
	d.Acked = n
	return nil
}

// End closes the database, or kills the process that has it open.
func (d *SQLite) End(kill bool) (err error) {
	switch {
	case d.session == nil:
	case kill:
		d.session.Kill()
	default:
		err = d.session.Close()
	}
	d.session = nil
	return err
}

// Verify lets SQLite recover and compares the database with what it must hold:
// all transactions to some number that is at least Acked and at most Tried,
// which is Acked and Tried from then on.
func (d *SQLite) Verify() error {
	s, err := d.open()
	if err != nil {
		return err
	}
	got, err := s.Ask("PRAGMA integrity_check; SELECT n FROM last; SELECT id || '|' || n || '|' || body FROM t ORDER BY id; SELECT 'end';", "end")
	if err != nil {
		return err
	}
	if err := s.Close(); err != nil {
		return err
	}
	if len(got) < 2 || got[0] != "ok" {
		return fmt.Errorf("integrity_check: %.2000q", got)
	}
	last, err := strconv.Atoi(got[1])
	if err != nil {
		return err
	}
	if last < d.Acked || last > d.Tried {
		return fmt.Errorf("the last transaction is %d; %d was committed, %d tried", last, d.Acked, d.Tried)
	}
	var want []string
	for id := range d.Rows {
		if n := last - (last-id+d.Rows)%d.Rows; n > 0 {
			want = append(want, fmt.Sprintf("%d|%d|%s", id, n, d.body(n)))
		}
	}
	if rows := got[2:]; len(rows) != len(want) {
		return fmt.Errorf("%d rows, want %d", len(rows), len(want))
	}
	for i, row := range got[2:] {
		if row != want[i] {
			return fmt.Errorf("after transaction %d: row %.100q, want %.100q", last, row, want[i])
		}
	}
	d.Acked, d.Tried = last, last
	return nil
}
