package journal_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/journal"
)

// split cuts a segment into its header and its records, whether they count or
// not.
func split(b []byte) (head []byte, records [][]byte) {
	head, b = b[:journal.HeaderLen], b[journal.HeaderLen:]
	for len(b) >= journal.RecordHead {
		n := journal.RecordLen(b)
		if n == 0 || n > len(b) {
			break
		}
		records, b = append(records, b[:n]), b[n:]
	}
	return head, records
}

func join(parts ...[]byte) memory { return bytes.Join(parts, nil) }

// readTwo reads bytes as the two files.
func readTwo(t testing.TB, a, b []byte, key *keymem.Key) *journal.Found {
	t.Helper()
	found, err := journal.ReadFiles(asFile(a), asFile(b), key)
	check(t, err)
	return found
}

func asFile(b []byte) journal.File {
	if b == nil {
		return nil
	}
	return memory(b)
}

// written returns a segment of epoch 1 with n entries.
func written(t testing.TB, s *store, n int) []byte {
	t.Helper()
	l, _ := s.open(t, journal.Options{})
	for i := range n {
		add(t, l, entry(i))
	}
	check(t, l.Close(false))
	return s.file(t, 1)
}

// TestForged: who has no key, or that of another store, gets nothing replayed.
func TestForged(t *testing.T) { // F-57
	s, other := newStore(t), newStore(t)
	mine, theirs := written(t, s, 3), written(t, other, 3)
	wantFound(t, readTwo(t, nil, mine, s.key), []uint32{1}, entries(0, 3))
	wantFound(t, readTwo(t, nil, theirs, s.key), nil, nil)
	head, _ := split(mine)
	record, err := journal.AppendEntry(nil, entry(5))
	check(t, err)
	forged := journal.Sign(other.key, head, record)
	wantFound(t, readTwo(t, nil, forged, s.key), []uint32{1}, nil)
}

// TestSpliced: an authentic record counts only behind the one it was written
// behind.
func TestSpliced(t *testing.T) { // F-58
	s := newStore(t)
	again := newStore(t)
	again.key = s.key.Clone() // the same epoch number once more
	head, r := split(written(t, s, 5))
	_, twin := split(written(t, again, 5))
	l, _ := s.open(t, journal.Options{})
	check(t, l.Recovered())
	for i := range 5 { // epochs 2 and 3, the same entries at the same offsets
		add(t, l, entry(i))
	}
	check(t, l.Checkpoint(nothing, nothing))
	for i := range 5 {
		add(t, l, entry(i))
	}
	_, second := split(s.file(t, 0))
	_, third := split(s.file(t, 1)) // the first is Done(2)
	for _, c := range []struct {
		name string
		file memory
		want int
	}{
		{"as written", join(head, r[0], r[1], r[2], r[3], r[4]), 5},
		{"two exchanged", join(head, r[0], r[2], r[1], r[3], r[4]), 1},
		{"one left out", join(head, r[0], r[1], r[3], r[4]), 2},
		{"the first left out", join(head, r[1], r[2], r[3], r[4]), 0},
		{"one twice", join(head, r[0], r[1], r[1], r[2]), 2},
		{"of another epoch", join(head, r[0], second[1], r[2]), 1},
		{"of a later epoch in the same file", join(head, r[0], third[2], r[2]), 1},
		{"of the same epoch of another time", join(head, r[0], twin[1], r[2]), 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			wantFound(t, readTwo(t, nil, c.file, s.key), []uint32{1}, entries(0, c.want))
		})
	}
}

// TestEveryByte flips each bit of a segment, and cuts it at each byte: what is
// before the record counts, and nothing of it or behind it.
func TestEveryByte(t *testing.T) { // F-58
	s := newStore(t)
	b := written(t, s, 6)
	head, r := split(b)
	ends := []int{len(head)} // of each record
	for _, record := range r {
		ends = append(ends, ends[len(ends)-1]+len(record))
	}
	before := func(at int) (records int) {
		for records < len(r) && ends[records+1] <= at {
			records++
		}
		return records
	}
	expect := func(what string, at int, b []byte, headIsGood bool) {
		t.Helper()
		found, err := journal.ReadFiles(nil, memory(b), s.key)
		if err != nil {
			if headIsGood || !errors.Is(err, journal.ErrNewer) {
				t.Errorf("%s byte %d: %v", what, at, err)
			}
			return
		}
		want := &journal.Found{}
		if headIsGood {
			want.Epochs, want.Since, want.Entries = []uint32{1}, found.Since, entries(0, before(at))
		}
		if !reflect.DeepEqual(found, want) {
			t.Errorf("%s byte %d: %d epochs, %d entries, want %d, %d", what, at, len(found.Epochs), len(found.Entries), len(want.Epochs), len(want.Entries))
		}
	}
	for at := range b {
		flipped := bytes.Clone(b)
		flipped[at] ^= 1 << (at % 8)
		expect("flipped", at, flipped, at >= len(head))
		expect("cut at", at, b[:at], at >= len(head))
		zeroed := bytes.Clone(b)
		clear(zeroed[at:])
		changed := at // the first byte that was no zero
		for changed < len(b) && b[changed] == 0 {
			changed++
		}
		expect("zero from", changed, zeroed, changed >= len(head))
	}
}

// TestExchanged: files in each other's place, or one in both, are not taken for
// an empty journal, and their epoch numbers are not given again.
func TestExchanged(t *testing.T) { // F-64
	s := newStore(t)
	l, _ := s.open(t, journal.Options{})
	add(t, l, entry(0))
	check(t, l.Checkpoint(nothing, nothing))
	add(t, l, entry(1))
	check(t, l.Close(false))
	zero, one := s.file(t, 0), s.file(t, 1)
	for _, c := range []struct {
		name   string
		a, b   []byte
		epochs []uint32
	}{
		{"exchanged", one, zero, nil},
		{"only one, in the wrong place", nil, zero, nil},
		{"one in both", zero, zero, []uint32{2}},
	} {
		found := readTwo(t, c.a, c.b, s.key)
		if !reflect.DeepEqual(found.Epochs, c.epochs) || !errors.Is(found.Damage, journal.ErrMissing) {
			t.Errorf("%s: epochs %v, damage %v", c.name, found.Epochs, found.Damage)
		}
	}
	s.put(t, 0, one)
	s.put(t, 1, zero)
	l, _ = s.open(t, journal.Options{})
	if epoch, err := l.Epoch(); epoch != 3 || err != nil {
		t.Errorf("epoch = %d, %v, want 3", epoch, err)
	}
}

func (s *store) put(t testing.TB, i int, b []byte) {
	t.Helper()
	check(t, os.WriteFile(filepath.Join(s.path, "journal", string(rune('0'+i))), b, 0o600))
}

// TestLiveSegmentGone: a segment that the newer one says is live must be there.
func TestLiveSegmentGone(t *testing.T) { // F-64
	s := newStore(t)
	l, _ := s.open(t, journal.Options{})
	add(t, l, entry(0))
	stop := errors.New("stop")
	if err := l.Checkpoint(func() error { return stop }, nothing); !errors.Is(err, stop) {
		t.Fatalf("checkpoint: %v", err)
	}
	add(t, l, entry(1))
	check(t, l.Close(false))
	zero, one := s.file(t, 0), s.file(t, 1)
	wantFound(t, readTwo(t, zero, one, s.key), []uint32{1, 2}, entries(0, 2))
	torn := bytes.Clone(one)
	torn[13] ^= 1
	for name, b := range map[string][]byte{"removed": nil, "empty": {}, "damaged": torn} {
		found := readTwo(t, zero, b, s.key)
		if !reflect.DeepEqual(found.Epochs, []uint32{1, 2}) || !errors.Is(found.Damage, journal.ErrMissing) ||
			!reflect.DeepEqual(found.Entries, entries(1, 2)) || !found.Live(1<<32) {
			t.Errorf("%s: %+v", name, found)
		}
	}
	wantFound(t, readTwo(t, nil, one, s.key), []uint32{1}, entries(0, 1)) // as before the checkpoint
}

// TestRollback brings an older pair of files back. That is not seen, and cannot
// be without a memory outside the store; but it brings back only what files had
// under the births of that time, and the pair does not mix with a newer one.
func TestRollback(t *testing.T) { // F-60
	s := newStore(t)
	l, _ := s.open(t, journal.Options{})
	add(t, l, entry(0))
	old := [2][]byte{s.file(t, 0), s.file(t, 1)}
	for i := range 3 { // epochs 2, 3 and 4
		check(t, l.Checkpoint(nothing, nothing))
		add(t, l, entry(1+i))
	}
	check(t, l.Close(false))
	wantFound(t, s.read(t), []uint32{4}, entries(3, 4))
	zero, one := s.file(t, 0), s.file(t, 1)
	wantFound(t, readTwo(t, old[0], old[1], s.key), []uint32{1}, entries(0, 1))
	wantFound(t, readTwo(t, zero, old[1], s.key), []uint32{4}, entries(3, 4))
	wantFound(t, readTwo(t, old[0], one, s.key), []uint32{3}, entries(2, 3))
}

// TestContinued: a log whose end was torn is continued by equal records; those
// of the writer before that lie behind them do not count again.
func TestContinued(t *testing.T) { // F-61
	s := newStore(t)
	b := written(t, s, 6)
	head, r := split(b)
	at := len(head) + len(r[0]) + len(r[1])
	torn := bytes.Clone(b)
	torn[at+len(r[2])-1] ^= 1
	s.put(t, 1, torn)
	l, found := s.open(t, journal.Options{})
	wantFound(t, found, []uint32{1}, entries(0, 2))
	add(t, l, entry(2)) // what was lost, byte for byte
	wantFound(t, s.read(t), []uint32{1}, entries(0, 3))
	check(t, l.Close(false))

	// Had it gone to where it was before, with its old MAC, the rest counted.
	wantFound(t, readTwo(t, nil, b, s.key), []uint32{1}, entries(0, 6))
}

// TestHugeLengths: lengths are bounded by the format and by what the file has,
// and cost no memory before the bytes are there.
func TestHugeLengths(t *testing.T) { // F-63
	s := newStore(t)
	b := written(t, s, 2)
	path := filepath.Join(s.path, "journal", "1")
	for _, kind := range []byte{0, 1, 2, 3, 4, 5, 6, 255} {
		for _, n := range []uint32{0, 1, journal.EntryHead, 1 << 20, journal.MaxEntry, journal.MaxEntry + 1, 1 << 31, 1<<32 - 1} {
			for _, size := range []int64{int64(len(b)) + journal.RecordHead, 1 << 40} {
				s.put(t, 1, binary.BigEndian.AppendUint32(append(bytes.Clone(b), kind, 0, 0, 0), n))
				check(t, os.Truncate(path, size))
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				found := s.read(t)
				runtime.ReadMemStats(&after)
				wantFound(t, found, []uint32{1}, entries(0, 2))
				if got := after.TotalAlloc - before.TotalAlloc; got > journal.MaxEntry+2<<20 || got > 2<<20 && size < 1<<40 {
					t.Errorf("kind %d, length %d, file of %d: %d bytes allocated", kind, n, size, got)
				}
			}
		}
	}
}

// TestAuthenticNonsense: what nobody with the key writes ends the log, too.
func TestAuthenticNonsense(t *testing.T) { // F-63
	key := keymem.Random(32)
	defer key.Wipe()
	good, err := journal.AppendEntry(nil, entry(1))
	check(t, err)
	// with sets a byte of the body of entry 0's record.
	with := func(at int, v byte) []byte {
		r, err := journal.AppendEntry(nil, entry(0))
		check(t, err)
		r[journal.RecordHead+at] = v
		return r
	}
	op := journal.EntryHead
	past := with(op+17+4+1, 0x7f)             // the punch's offset
	past[journal.RecordHead+op+17+4+9] = 0x7f // and size
	for name, r := range map[string][]byte{
		"unknown flag":                     with(52, 2),
		"17 operations":                    with(53, 17),
		"more operations than there are":   with(53, 5),
		"fewer operations than there are":  with(53, 3),
		"padding":                          with(54, 1),
		"more padding":                     with(55, 1),
		"nanoseconds":                      with(48, 0x40),
		"negative durable size":            with(32, 0x80),
		"unknown operation":                with(op, 9),
		"no operation":                     with(op, 0),
		"negative offset":                  with(op+1, 0x80),
		"data longer than the record":      with(op+13, 1),
		"data of negative length":          with(op+9, 0x80),
		"a punch of negative size":         with(op+17+4+9, 0x80),
		"a punch past the greatest offset": past,
		"a cut with a size":                with(op+17+4+17+16, 1),
		"a header at an offset":            with(op+17+4+17+17+8, 1),
		"done later than itself":           journal.AppendDone(nil, 2),
	} {
		b := journal.Sign(key, journal.Header(1, 1, key), bytes.Clone(good), r, bytes.Clone(good))
		if found := readTwo(t, nil, b, key); len(found.Entries) != 1 {
			t.Errorf("%s: %d entries, want 1", name, len(found.Entries))
		}
	}
	for _, h := range [][2]uint32{{0, 0}, {1, 0}, {1, 2}, {3, 1}} {
		b := journal.Sign(key, journal.Header(h[0], h[1], key), bytes.Clone(good))
		if found := readTwo(t, b, b, key); found.Epochs != nil || found.Entries != nil {
			t.Errorf("header of epoch %d, oldest %d: %+v", h[0], h[1], found)
		}
	}
}

// TestTornHeader: a header that was not wholly written leaves the epoch before
// it as it was.
func TestTornHeader(t *testing.T) { // F-59
	s := newStore(t)
	r := rand.New(rand.NewPCG(1, 2))
	l, _ := s.open(t, journal.Options{})
	add(t, l, entry(0))
	check(t, l.Checkpoint(nothing, nothing))
	add(t, l, entry(1))
	before := s.file(t, 1)
	stop := errors.New("stop")
	if err := l.Checkpoint(func() error { return stop }, nothing); !errors.Is(err, stop) {
		t.Fatalf("checkpoint: %v", err)
	}
	zero, after := s.file(t, 0), s.file(t, 1)
	for range 200 {
		torn := bytes.Clone(before)
		copy(torn, after[:r.IntN(88)]) // all but zeros follow
		wantFound(t, readTwo(t, zero, torn, s.key), []uint32{2}, entries(1, 2))
	}
}
