package journal_test

import (
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/fs/journal"
)

// TestClockSetBack: recovery looks for files that were changed since the oldest
// live epoch began. So an epoch ends early if the clock is set back during it, and
// while both are live the earlier time counts. F-62
func TestClockSetBack(t *testing.T) {
	s, now := newStore(t), time.Unix(2_000_000_000, 0)
	l, _ := s.open(t, journal.Options{Now: func() time.Time { return now }})
	add(t, l, journal.Entry{Kind: journal.Grow, File: [16]byte{1}})
	if l.Want() {
		t.Fatal("a checkpoint is due at once")
	}
	now = now.Add(-time.Hour)
	if !l.Want() {
		t.Fatal("no checkpoint is due after the clock was set back")
	}
	failed := l.Checkpoint(func() error { return journal.ErrEntry }, func() error { return nil })
	if failed == nil {
		t.Fatal("the checkpoint did not fail")
	}
	if found := s.read(t); len(found.Epochs) != 2 || found.Since.After(now) {
		t.Errorf("epochs %v since %v, the clock said %v", found.Epochs, found.Since, now)
	}
	check(t, l.Checkpoint(func() error { return nil }, func() error { return nil }))
	if l.Want() {
		t.Error("a checkpoint is due after one")
	}
}
