package journal_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/journal"
)

// model is what must be true of a journal after random calls and crashes.
type model struct {
	t    testing.TB
	s    *store
	d    *disk
	r    *rand.Rand
	l    *journal.Log
	next int // number of the next entry

	log []logged // what counts, in order; of done epochs too, from keep on
	// committed is how much of log must be there after a power cut.
	committed int
	// begins are where a replay may begin: behind what is surely done, and at
	// those later places behind which all before was said to be done.
	begins []int
	epoch  uint32 // the current one, as the last checkpoint saw it
	start  int    // where it begins
	lost   bool   // the log is aborted
	// recovering is whether Open found something and Recovered is not over.
	recovering bool
}

type logged struct {
	e   journal.Entry
	lsn journal.LSN // of the open Log, 0: of one before
}

func (m *model) entries(from, to int) (out []journal.Entry) {
	for _, x := range m.log[from:to] {
		out = append(out, x.e)
	}
	return out
}

// note takes up what is durable.
func (m *model) note() {
	for i, x := range m.log {
		if x.lsn <= m.l.Durable() {
			m.committed = max(m.committed, i+1)
		}
	}
}

func (m *model) append() {
	e := entry(m.next)
	if m.r.IntN(8) == 0 {
		e = journal.Entry{Kind: journal.Ops, Ops: []journal.Op{{Kind: journal.OpWrite, Data: make([]byte, m.r.IntN(9000))}}}
		for i := range e.Ops[0].Data {
			e.Ops[0].Data[i] = byte(m.next + i)
		}
	}
	lsn, err := m.l.Append(e)
	switch {
	case err == nil:
		m.next++
		m.log = append(m.log, logged{e, lsn})
	case !errors.Is(err, unix.ENOSPC) && !m.lost:
		m.t.Fatalf("append: %v", err)
	}
}

func (m *model) commit() {
	if len(m.log) == 0 {
		return
	}
	upTo := m.log[m.r.IntN(len(m.log))].lsn
	if err := m.l.Commit(upTo); err == nil && m.l.Durable() < upTo || err != nil && !m.lost {
		m.t.Fatalf("commit: %v, durable %d, want %d", err, m.l.Durable(), upTo)
	}
}

// checkpoint appends some entries anew in settle. What was there before the
// epoch is done after it.
func (m *model) checkpoint() {
	stop := errors.New("stop")
	err := m.l.Checkpoint(func() error {
		m.done() // a second call: the first finished
		if epoch, err := m.l.Epoch(); err == nil && epoch != m.epoch {
			m.epoch, m.start = epoch, len(m.log)
		}
		for range m.r.IntN(3) {
			m.append()
		}
		if m.r.IntN(4) == 0 {
			return stop
		}
		return nil
	}, nothing)
	m.done()
	switch {
	case errors.Is(err, journal.ErrRecovering) && m.recovering:
	case err == nil || errors.Is(err, stop) || errors.Is(err, unix.ENOSPC) || m.lost:
	default:
		m.t.Fatalf("checkpoint: %v", err)
	}
}

// done takes up that all before the current epoch is done.
func (m *model) done() {
	if m.epoch != 0 && m.l.Oldest() == m.epoch && m.begins[len(m.begins)-1] != m.start {
		m.begins = append(m.begins, m.start)
	}
}

// reopen is what comes after a crash: what is found must be a run of what was
// appended, from a place where it may begin.
func (m *model) reopen(kind string) {
	m.d.full = 0 // Open only writes over what is there
	l, found, err := journal.OpenWrapped(m.s.meta, m.s.key, journal.Options{Age: 1}, m.d.wrap)
	check(m.t, err)
	if found.Damage != nil {
		m.t.Fatalf("after a %s: %v", kind, found.Damage)
	}
	from, to, ok := m.place(found)
	if !ok {
		var begins []string
		for _, b := range m.begins {
			begins = append(begins, fmt.Sprint(len(m.log)-b))
		}
		m.t.Fatalf("after a %s: epochs %v, %d entries, want the last %v of them, without at most the last %d",
			kind, found.Epochs, len(found.Entries), begins, len(m.log)-m.committed)
	}
	if again, err := journal.Read(m.s.meta, m.s.key); err != nil || !reflect.DeepEqual(again, found) {
		m.t.Fatalf("Read: %v, %+v, want %+v", err, again, found)
	}
	m.l, m.lost, m.recovering = l, false, len(found.Epochs) > 0
	m.log = append([]logged{}, m.log[from:to]...)
	for i := range m.log {
		m.log[i].lsn = 0
	}
	m.begins, m.epoch, m.start = []int{0}, 0, 0
	m.committed = len(m.log) // Open made them durable
	for range m.r.IntN(4) {
		m.append()
	}
	m.recovered()
}

func (m *model) recovered() {
	if m.r.IntN(3) == 0 {
		return // the next crash comes before
	}
	if err := m.l.Recovered(); err != nil {
		if !m.lost {
			m.t.Fatalf("recovered: %v", err)
		}
		return
	}
	if m.recovering { // else it did nothing
		m.log, m.begins, m.committed, m.recovering = nil, []int{0}, 0, false
	}
}

// place finds what was found in the log.
func (m *model) place(found *journal.Found) (from, to int, ok bool) {
	for _, from := range m.begins {
		to := from + len(found.Entries)
		if to < m.committed || to > len(m.log) {
			continue
		}
		if len(found.Entries) == 0 || reflect.DeepEqual(found.Entries, m.entries(from, to)) {
			return from, to, true
		}
	}
	return 0, 0, false
}

func (m *model) step() {
	switch n := m.r.IntN(100); {
	case n < 60:
		m.append()
	case n < 75:
		m.commit()
	case n < 85:
		m.checkpoint()
	case n < 90: // a full disk, for a while
		m.d.full = 1 + m.r.IntN(3)
	case n < 92: // the process is killed
		m.note()
		m.exact()
		check(m.t, m.l.Close(false))
		m.reopen("kill")
	case n < 96:
		m.note()
		check(m.t, m.l.Close(false))
		m.d.cut(m.t, m.s, m.r)
		m.reopen("power cut")
	case n < 98: // the disk fails for a moment; only the kernel's memory has the rest
		m.d.failSync, m.lost = unix.EIO, true
		_ = m.l.Commit(m.log0())
		m.note()
		m.d.failSync = nil
		check(m.t, m.l.Close(false))
		m.reopen("failed sync")
	default:
		m.clean()
	}
}

func (m *model) log0() journal.LSN {
	if len(m.log) == 0 {
		return 0
	}
	return m.log[len(m.log)-1].lsn
}

// exact: without a power cut nothing at all is lost.
func (m *model) exact() {
	found := m.s.read(m.t)
	if len(found.Epochs) == 0 && len(m.log) == m.begins[len(m.begins)-1] {
		return
	}
	if from := m.begins[len(m.begins)-1]; len(found.Entries) != len(m.log)-from {
		m.t.Fatalf("epochs %v, %d entries, want %d", found.Epochs, len(found.Entries), len(m.log)-from)
	}
}

// clean ends the log cleanly, and then the power fails.
func (m *model) clean() {
	m.d.full = 0
	if err := m.l.Recovered(); err != nil {
		m.t.Fatalf("recovered: %v", err)
	}
	check(m.t, m.l.Close(true))
	m.d.cut(m.t, m.s, m.r)
	found := m.s.read(m.t)
	if len(found.Epochs) != 0 || len(found.Entries) != 0 || found.Damage != nil {
		m.t.Fatalf("after a clean end: %+v", found)
	}
	m.log, m.begins, m.committed = nil, []int{0}, 0
	m.reopen("clean end")
}

// TestModel makes random calls, kills, power cuts and disk failures: what is
// found is a run of what was appended, without a gap, with everything that was
// committed, and with nothing that was surely done.
func TestModel(t *testing.T) { // F-58 F-59 F-60 F-61 F-62
	steps := 12000
	if testing.Short() {
		steps = 2000
	}
	for seed := range uint64(4) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			m := &model{t: t, s: newStore(t), d: &disk{}, r: rand.New(rand.NewPCG(seed, 57)), begins: []int{0}}
			m.reopen("first use")
			defer func() { _ = m.l.Close(false) }()
			for range steps {
				m.step()
			}
		})
	}
}
