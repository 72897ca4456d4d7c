package rig

import (
	"fmt"
	"strconv"
	"strings"
)

// PostgresLoad commits numbered transactions, as SQLite does, to a server that
// runs, beside pgbench's tables, whose sums have to agree.
type PostgresLoad struct {
	Server *Postgres
	Rows   int

	Acked int // the last transaction whose commit was answered
	Tried int // the last that was begun

	session *Session
}

// Create makes the tables: some 20 MB with pgbench's.
func (d *PostgresLoad) Create() error {
	if _, err := d.Server.Run("pgbench", "-i", "-q", "-s", "1"); err != nil {
		return err
	}
	_, err := d.Server.Query(`CREATE EXTENSION amcheck; CREATE TABLE t (id INT PRIMARY KEY, n INT, body TEXT); CREATE INDEX ON t (n);
		CREATE TABLE last (n INT); INSERT INTO last VALUES (0);`)
	return err
}

// Begin connects for transactions.
func (d *PostgresLoad) Begin() (err error) {
	d.session, err = d.Server.Psql()
	return err
}

// Commit commits the next transaction.
func (d *PostgresLoad) Commit() error {
	n := d.Acked + 1
	d.Tried = n
	done := fmt.Sprintf("done %d", n)
	_, err := d.session.Ask(fmt.Sprintf(`BEGIN; INSERT INTO t VALUES (%d, %d, repeat('%d,', %d)) ON CONFLICT (id) DO UPDATE SET n = excluded.n, body = excluded.body;
		UPDATE last SET n = %d; COMMIT;
\echo %s`, n%d.Rows, n, n, 1+n*7919%1500, n, done), done)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, d.Server.Log())
	}
	d.Acked = n
	return nil
}

// End kills the client.
func (d *PostgresLoad) End() {
	if d.session != nil {
		d.session.Kill()
		d.session = nil
	}
}

// Verify compares the tables with what they must hold: all transactions to some
// number that is at least Acked and at most Tried, which is Acked and Tried from
// then on.
func (d *PostgresLoad) Verify() error {
	out, err := d.Server.Query(fmt.Sprintf(`SELECT n FROM last;
		SELECT count(*) FROM t, last WHERE t.body <> repeat(t.n || ',', 1 + t.n * 7919 %% 1500) OR t.id <> t.n %% %[1]d OR t.n > last.n OR t.n <= last.n - %[1]d;
		SELECT count(*) - least(%[1]d, (SELECT n FROM last)) FROM t;
		SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(bbalance) FROM pgbench_branches)
			AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(bbalance) FROM pgbench_branches)
			AND (SELECT coalesce(sum(delta), 0) FROM pgbench_history) = (SELECT sum(bbalance) FROM pgbench_branches);`, d.Rows))
	if err != nil {
		return fmt.Errorf("%w\n%s", err, d.Server.Log())
	}
	got := strings.Fields(out)
	if len(got) != 4 {
		return fmt.Errorf("answers %q", got)
	}
	last, err := strconv.Atoi(got[0])
	if err != nil {
		return err
	}
	if last < d.Acked || last > d.Tried {
		return fmt.Errorf("the last transaction is %d; %d was committed, %d tried", last, d.Acked, d.Tried)
	}
	if got[1] != "0" || got[2] != "0" || got[3] != "t" {
		return fmt.Errorf("after transaction %d: %s wrong rows, %s too many, sums of pgbench agree: %s", last, got[1], got[2], got[3])
	}
	d.Acked, d.Tried = last, last
	return nil
}

// Check has pg_amcheck look at every table and index.
func (d *PostgresLoad) Check() error {
	_, err := d.Server.Run("pg_amcheck", "--all", "--install-missing", "--heapallindexed", "--parent-check")
	return err
}
