package journal_test

import (
	"errors"
	"reflect"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/journal"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// store is a store's own directory and its journal key.
type store struct {
	path string
	meta *backing.Dir
	key  *keymem.Key
}

func newStore(t testing.TB) *store {
	t.Helper()
	s := &store{path: t.TempDir(), key: keymem.Random(32)}
	meta, err := backing.OpenRoot(s.path)
	check(t, err)
	s.meta = meta
	t.Cleanup(func() { _ = meta.Close(); s.key.Wipe() })
	return s
}

func (s *store) open(t testing.TB, o journal.Options) (*journal.Log, *journal.Found) {
	t.Helper()
	l, found, err := journal.Open(s.meta, s.key, o)
	check(t, err)
	t.Cleanup(func() { _ = l.Close(false) })
	return l, found
}

func (s *store) read(t testing.TB) *journal.Found {
	t.Helper()
	found, err := journal.Read(s.meta, s.key)
	check(t, err)
	return found
}

func add(t testing.TB, l *journal.Log, e journal.Entry) journal.LSN {
	t.Helper()
	lsn, err := l.Append(e)
	check(t, err)
	return lsn
}

// entry makes an entry of some kind that is unlike those of other numbers.
func entry(n int) journal.Entry {
	e := journal.Entry{
		Kind: journal.Kind(1 + n%3), File: [16]byte{byte(n), byte(n >> 8), 0xaa},
		Birth: 1<<32 | uint64(n), Ino: uint64(n) * 7, Durable: int64(n) << 16, Fence: n%2 == 0,
		Mtime: unix.Timespec{Sec: int64(n) - 5, Nsec: unix.UTIME_OMIT},
	}
	if e.Kind == journal.Ops {
		e.Ops = []journal.Op{
			{Kind: journal.OpWrite, Off: int64(n), Data: []byte{byte(n), 1, 2, 3}},
			{Kind: journal.OpPunch, Off: 4096, Size: 1 << 40},
			{Kind: journal.OpTruncate, Off: int64(n) * 100},
			{Kind: journal.OpHeader, Data: []byte("header")},
		}
	}
	return e
}

func entries(from, to int) (out []journal.Entry) {
	for n := from; n < to; n++ {
		out = append(out, entry(n))
	}
	return out
}

func nothing() error { return nil }

// wantFound compares all but the time.
func wantFound(t testing.TB, got *journal.Found, epochs []uint32, want []journal.Entry) {
	t.Helper()
	if !reflect.DeepEqual(got.Epochs, epochs) {
		t.Errorf("epochs = %v, want %v", got.Epochs, epochs)
	}
	if len(got.Entries) != len(want) || len(want) > 0 && !reflect.DeepEqual(got.Entries, want) {
		t.Errorf("%d entries, want %d:\n%+v\n%+v", len(got.Entries), len(want), got.Entries, want)
	}
	if got.Damage != nil {
		t.Errorf("damage: %v", got.Damage)
	}
}

func TestLife(t *testing.T) {
	s := newStore(t)
	l, found := s.open(t, journal.Options{})
	wantFound(t, found, nil, nil)
	wantFound(t, s.read(t), nil, nil)
	for n := range 10 {
		if lsn := add(t, l, entry(n)); lsn != journal.LSN(n+1) {
			t.Errorf("LSN = %d, want %d", lsn, n+1)
		}
	}
	wantFound(t, s.read(t), []uint32{1}, entries(0, 10))
	check(t, l.Commit(7))
	if got := l.Durable(); got != 10 {
		t.Errorf("durable = %d, want 10", got)
	}
	settled := false
	check(t, l.Checkpoint(func() error {
		settled = true
		add(t, l, entry(10))
		wantFound(t, s.read(t), []uint32{1, 2}, entries(0, 11))
		return nil
	}, nothing))
	if !settled {
		t.Error("settle was not called")
	}
	add(t, l, entry(11))
	wantFound(t, s.read(t), []uint32{2}, entries(10, 12))
	check(t, l.Close(false))

	l, found = s.open(t, journal.Options{})
	wantFound(t, found, []uint32{2}, entries(10, 12))
	if !found.Live(2<<32|77) || found.Live(1<<32|77) || found.Live(0) {
		t.Error("Live is wrong")
	}
	add(t, l, entry(12))
	wantFound(t, s.read(t), []uint32{2}, entries(10, 13))
	check(t, l.Recovered())
	wantFound(t, s.read(t), nil, nil)
	if epoch, err := l.Epoch(); epoch != 3 || err != nil {
		t.Errorf("epoch = %d, %v, want 3", epoch, err)
	}
	add(t, l, entry(13))
	wantFound(t, s.read(t), []uint32{3}, entries(13, 14))
	check(t, l.Checkpoint(nothing, nothing))
	check(t, l.Close(true))
	wantFound(t, s.read(t), nil, nil)
	l, found = s.open(t, journal.Options{})
	wantFound(t, found, nil, nil)
	if epoch, err := l.Epoch(); epoch != 5 || err != nil {
		t.Errorf("epoch = %d, %v, want 5", epoch, err)
	}
}

// TestHeld: a log whose store is another's by now writes nothing more, and lets
// go of those that wait for it.
func TestHeld(t *testing.T) {
	s := newStore(t)
	lost := errors.New("lost")
	var gone atomic.Bool
	l, _ := s.open(t, journal.Options{Held: func() error {
		if gone.Load() {
			return lost
		}
		return nil
	}})
	e := journal.Entry{Kind: journal.Grow, Birth: 1}
	at, err := l.Append(e)
	if err != nil {
		t.Fatal(err)
	}
	gone.Store(true)
	covered := uint32(0)
	_, eerr := l.Epoch()
	_, aerr := l.Append(e)
	for what, err := range map[string]error{
		"Epoch": eerr, "Append": aerr, "Commit": l.Commit(at), "Err": l.Err(),
		"Direct":     l.Direct(&covered, func() journal.Entry { return e }, func() error { t.Error("written"); return nil }),
		"Checkpoint": l.Checkpoint(func() error { return nil }, func() error { t.Error("synced"); return nil }),
	} {
		if !errors.Is(err, lost) {
			t.Errorf("%s: got %v, want %v", what, err, lost)
		}
	}
	gone.Store(false)
	if err := l.Err(); !errors.Is(err, lost) {
		t.Errorf("later: got %v, want it to last", err)
	}
	if err := l.Close(true); !errors.Is(err, lost) {
		t.Errorf("Close: got %v, want %v", err, lost)
	}
	l, found := s.open(t, journal.Options{})
	if len(found.Entries) != 1 || len(found.Epochs) != 1 {
		t.Errorf("found: got %+v, want the first entry, live", found)
	}
	if err := l.Close(false); err != nil {
		t.Error(err)
	}
}
