package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/journal"
	"github.com/kmsfs/kmsfs/fs/record"
)

// Store is what a store's record says, unverified, as far as checks need it.
type Store struct {
	Path      string
	ID        envelope.ID
	Created   time.Time
	Placement envelope.Placement
	Default   string // class of the root
	Classes   []Class

	unclean bool     // its journal is not empty
	jobs    []string // commands that were begun and not finished
}

// Class is a class of a store with what its keys wrap in the record.
type Class struct {
	Name     string
	Keys     []string // the first makes data keys
	Retired  []string // only open what is there
	NameKey  []keywrap.Wrapped
	NameID   string // id in the encryption context of the name key
	StoreKey []keywrap.Wrapped
}

// all returns every key that may have wrapped a file of the class.
func (c *Class) all() []string { return append(slices.Clone(c.Keys), c.Retired...) }

// ReadStore reads the record of the store at path. Nothing of it is verified.
// With an error there is no Store; the findings say why.
func ReadStore(path string) (*Store, []Finding) {
	const check = "store.record"
	fail := func(err error) (*Store, []Finding) {
		switch {
		case errors.Is(err, record.ErrNoStore), errors.Is(err, unix.ENOTDIR):
			return nil, one(check, Error, path, "is not a kmsfs store", "give the directory that kmsfs init made, not the mountpoint")
		case errors.Is(err, record.ErrNewer):
			return nil, one(check, Error, path, err.Error(), "use a newer kmsfs")
		case errors.Is(err, fs.ErrNotExist):
			return nil, one(check, Error, path, "does not exist", "kmsfs init makes a store")
		case errors.Is(err, fs.ErrPermission):
			return nil, one(check, Error, path, "this user may not read the store's record: "+err.Error(), "run as the store's owner")
		}
		return nil, one(check, Error, path, err.Error(), "restore .kmsfs/store from a backup")
	}
	root, err := backing.OpenRoot(path)
	if err != nil {
		return fail(err)
	}
	defer func() { _ = root.Close() }()
	s, meta, err := readFirst(root)
	second := hasCopy(root)
	switch {
	case err != nil && second && !errors.Is(err, record.ErrNewer) && !errors.Is(err, fs.ErrPermission):
		return nil, one(check, Error, path, "the store record is missing or damaged, and its second copy is there: "+err.Error(), "kmsfs fsck --repair restores it")
	case err != nil:
		return fail(err)
	}
	defer func() { _ = meta.Close() }()
	s.Path = path
	s.unclean, _ = journal.Unclean(meta) // what cannot be read, the checks of files tell
	s.jobs = unfinishedIn(meta)
	text := fmt.Sprintf("store %s, placement %s, %d classes", s.ID, s.Placement, len(s.Classes))
	if !second {
		text += "; there is no second copy of its record yet: the next mount for writing makes one"
	}
	return s, one(check, OK, path, text, "")
}

// readFirst reads the first copy of the record, and opens the directory that it
// is in.
func readFirst(root *backing.Dir) (*Store, *backing.Dir, error) {
	meta, err := root.OpenDir(record.MetaDir)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		err = record.ErrNoStore
	}
	if err != nil {
		return nil, nil, err
	}
	b, err := meta.ReadFile(record.StoreFile, record.MaxStore)
	if errors.Is(err, unix.ENOENT) {
		err = record.ErrNoStore
	}
	var s *Store
	if err == nil {
		s, err = parseStore(b)
	}
	if err != nil {
		_ = meta.Close()
		return nil, nil, err
	}
	return s, meta, nil
}

// hasCopy reports whether there is a second copy of the record (docs/format.md,
// F-70), as far as its form goes.
func hasCopy(root *backing.Dir) bool {
	b, err := root.ReadFile(record.StoreCopy, record.MaxStore)
	if err != nil {
		return false
	}
	_, err = parseStore(b)
	return err == nil
}

// unfinishedIn returns the jobs that left something to go on with in .kmsfs
// (docs/format.md, F-55 and section 14).
func unfinishedIn(meta *backing.Dir) (jobs []string) {
	if st, err := meta.Stat(record.RewrapFile); err == nil && st.Size > 0 {
		jobs = append(jobs, "rewrap")
	}
	for _, job := range []string{"rekey", "reclassify"} {
		stage, err := meta.OpenDir(job)
		if err != nil {
			continue
		}
		if _, err := stage.Stat("job"); err == nil {
			jobs = append(jobs, job)
		}
		_ = stage.Close()
	}
	return jobs
}

func parseStore(b []byte) (*Store, error) {
	rec, err := record.ParseStore(b)
	if err != nil {
		return nil, err
	}
	l, err := rec.Layout()
	if err != nil {
		return nil, err
	}
	s := &Store{ID: l.ID, Created: rec.Body.Created, Placement: l.Placement, Default: l.Policy.Default}
	for _, name := range l.Policy.Names() {
		c := Class{Name: name, Keys: rec.Active(name), Retired: rec.Body.Retired[name]}
		if h, err := envelope.Parse(rec.Keys.Names[name]); err == nil {
			c.NameKey, c.NameID = wrappedOf(h), h.File.String()
		}
		if h, err := envelope.Parse(rec.Keys.Store[name]); err == nil {
			c.StoreKey = wrappedOf(h)
		}
		s.Classes = append(s.Classes, c)
	}
	return s, nil
}

func wrappedOf(h *envelope.Header) []keywrap.Wrapped {
	var out []keywrap.Wrapped
	for _, r := range h.Recipients {
		out = append(out, r.Wrapped)
	}
	return out
}

// Keys returns every key of the store once, in order of the classes.
func (s *Store) Keys() []string {
	var out []string
	for _, c := range s.Classes {
		for _, key := range c.all() {
			if !slices.Contains(out, key) {
				out = append(out, key)
			}
		}
	}
	return out
}

// Checks returns the checks of the store that need no key. mounted says that it
// is mounted now.
func (s *Store) Checks(mounted bool) []Check {
	return []Check{
		{"store.filesystem", func(context.Context) []Finding { return fileSystem(s.Path, s.Placement) }},
		{"store.clock", func(context.Context) []Finding { return s.clock(time.Now()) }},
		{"store.writing", func(context.Context) []Finding { return s.unfinished(mounted) }},
		{"store.jobs", func(context.Context) []Finding { return s.unfinishedJobs(mounted) }},
	}
}

// clock compares the machine's clock with the store's past. A minute is within
// what machines differ by.
func (s *Store) clock(now time.Time) []Finding {
	const check = "clock.store"
	if now.Add(time.Minute).Before(s.Created) {
		return one(check, Error, "", fmt.Sprintf("this machine's clock says %s, before the store was made (%s)", now.UTC().Format(time.DateTime), s.Created.UTC().Format(time.DateTime)),
			"set the clock: timedatectl set-ntp true")
	}
	return one(check, OK, "", "the clock is later than the store", "")
}

func (s *Store) unfinished(mounted bool) []Finding {
	const check = "store.writing"
	switch {
	case !s.unclean:
		return one(check, OK, s.Path, "no file was left half written", "")
	case mounted:
		return one(check, OK, s.Path, "the mount has changed something", "")
	}
	return one(check, Info, s.Path, "it was not unmounted cleanly", "the next mount finishes the files that were being written, and logs each")
}

func (s *Store) unfinishedJobs(mounted bool) []Finding {
	const check = "store.jobs"
	if len(s.jobs) == 0 {
		return one(check, OK, s.Path, "no job was left unfinished", "")
	}
	names := strings.Join(s.jobs, " and ")
	if mounted { // the mount may be at it
		return one(check, Info, s.Path, names+" is under way, or was left unfinished", "")
	}
	return one(check, Warning, s.Path, names+" was begun and is not finished", "kmsfs "+s.jobs[0]+", called again as before, goes on where it was")
}
