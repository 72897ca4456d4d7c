package journal

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// dirName is the journal's directory in the store's own.
const dirName = "journal"

var fileNames = [2]string{"0", "1"}

// Found is what the last writer left to be done. The zero Found is nothing, as
// after a clean end.
type Found struct {
	// Epochs are those not done, oldest first: none, one or two.
	Epochs []uint32
	// Since is when the oldest of them began, by the writer's clock.
	Since time.Time
	// Entries are their records, in order.
	Entries []Entry
	// Damage is an ErrMissing if records are known to be gone that should be
	// among Entries; nil otherwise. The epochs they were of are in Epochs.
	Damage error
}

// Live tells whether birth was given in one of the epochs.
func (f *Found) Live(birth uint64) bool {
	return slices.Contains(f.Epochs, uint32(birth>>32))
}

// state is what both files hold.
type state struct {
	found  Found
	last   uint32   // the greatest epoch of any header, 0: none
	newest *segment // nil: none
	heads  [2]header
	ends   [2]int64 // behind the last record of each file
}

// secures tells whether file i holds records of Found.
func (st *state) secures(i int) bool {
	return st.ends[i] != 0 && slices.Contains(st.found.Epochs, st.heads[i].epoch)
}

// Read tells what the last writer left, for users that write nothing. It
// changes nothing and takes no lock; meta is the store's own directory.
func Read(meta *backing.Dir, key *keymem.Key) (*Found, error) {
	dir, err := meta.OpenDir(dirName)
	if errors.Is(err, unix.ENOENT) {
		return &Found{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	defer func() { _ = dir.Close() }() // read only: nothing to lose
	var before state
	for range 3 {
		st, err := readDir(dir, key)
		if err != nil {
			return nil, err
		}
		if st.found.Damage == nil || st.heads == before.heads {
			return &st.found, nil
		}
		before = *st // or did a writer begin an epoch between one file and the other?
	}
	return &before.found, nil
}

// LastEpoch returns the greatest epoch that the journal knows of, 0 if it knows
// none. It changes nothing and takes no lock.
func LastEpoch(meta *backing.Dir, key *keymem.Key) (uint32, error) {
	dir, err := meta.OpenDir(dirName)
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("journal: %w", err)
	}
	defer func() { _ = dir.Close() }() // read only: nothing to lose
	st, err := readDir(dir, key)
	if err != nil {
		return 0, err
	}
	return st.last, nil
}

func readDir(dir *backing.Dir, key *keymem.Key) (*state, error) {
	var files [2]file
	defer closeAll(&files)
	for i, name := range fileNames {
		f, err := dir.Open(name, unix.O_RDONLY, 0)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("journal: %w", err)
		}
		files[i] = f
	}
	return readState(&files, key)
}

func closeAll(files *[2]file) {
	for i, f := range files {
		if f != nil {
			_ = f.Close() // what counts was synced
			files[i] = nil
		}
	}
}

// readState reads both files; nil is one that does not exist.
func readState(files *[2]file, key *keymem.Key) (*state, error) {
	st := &state{}
	var segments [2]*segment
	for i, f := range files {
		if f == nil {
			continue
		}
		s, err := readSegment(f, key)
		if err != nil {
			return nil, fmt.Errorf("journal: segment %d: %w", i, err)
		}
		if s == nil {
			continue
		}
		st.heads[i], st.ends[i] = s.header, s.end
		st.last = max(st.last, s.epoch)
		if int(s.epoch%2) != i {
			st.found.Damage = fmt.Errorf("journal: segment %d is in the other's place: %w", i, ErrMissing)
			continue
		}
		segments[i] = s
	}
	a, b := segments[0], segments[1]
	if a == nil || b != nil && b.epoch > a.epoch {
		a, b = b, a
	}
	if a != nil {
		st.newest = a
		st.live(a, b)
	}
	return st, nil
}

// live fills in what of the newest segment and the other, which may be nil, is
// not done.
func (st *state) live(newest, older *segment) {
	f := &st.found
	if newest.done >= newest.epoch {
		return
	}
	f.Epochs, f.Since = []uint32{newest.epoch}, newest.begun
	if newest.oldest == newest.epoch || newest.done >= newest.oldest {
		f.Entries = newest.entries
		return
	}
	f.Epochs, f.Since = []uint32{newest.oldest, newest.epoch}, newest.since
	if older == nil || older.epoch != newest.oldest {
		f.Damage = fmt.Errorf("journal: epoch %d: %w", newest.oldest, ErrMissing)
		f.Entries = newest.entries
		return
	}
	if older.done >= older.epoch { // its end came after the newest could not begin
		f.Epochs, f.Since, f.Entries = f.Epochs[1:], newest.begun, newest.entries
		return
	}
	f.Entries = append(older.entries, newest.entries...)
}
