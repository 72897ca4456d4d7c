package salvage

import (
	"context"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/record"
)

// The bounds of what a source may make this program remember of one store.
const (
	maxStores   = 64
	maxKeys     = 64 // URIs of a class
	maxNameKeys = 16 // wrapped name keys of a class
	maxSidecars = 8  // places of one file's header
)

// Names of the store's own files (docs/format.md, section 2).
const (
	internalPrefix = ".kmsfs"
	dirFile        = ".kmsfs.dir"
	longEntry      = record.LongEntry
	longName       = ".kmsfs.n."
	targetPrefix   = ".kmsfs.t."
	quarantineDir  = "quarantine"
	journalDir     = "journal"

	dirAttr    = "user.kmsfs.dir"
	ownAttr    = "user.kmsfs."
	sealedAttr = "user.kmsfs.x."
	userAttr   = "user."
)

// Source is a store, a directory of copies, or one file, looked over but never
// changed.
type Source struct {
	path     string
	root     *backing.Dir
	only     string // the one entry, if a file was given
	stores   map[envelope.ID]*store
	sidecars map[envelope.ID][]string // where header files lie
	bodies   map[envelope.ID]bool     // how files without a header of their own begin
	rewraps  []record.Rewrapped       // headers that were being written
	copies   []recordCopy             // second copies of store records
	files    uint64
	notes    []string
}

// recordCopy is a file that is called as the second copy of a store record is.
type recordCopy struct {
	b    []byte
	meta string // path of where the first is, or was
}

// StoreKeys are the keys that a store's files are said to be under. Nothing of
// it is authenticated.
type StoreKeys struct {
	ID       envelope.ID
	Recorded bool                // the store record was found
	Dir      string              // path of the directory that it was found in
	Keys     map[string][]string // class -> key URIs, by the record or else by the headers
}

// Open looks over a source: which files are headers, which stores they are of,
// and under which keys. No key is used. The caller closes it.
func Open(ctx context.Context, name string) (*Source, error) {
	abs, err := filepath.Abs(name)
	if err == nil {
		abs, err = filepath.EvalSymlinks(abs)
	}
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Stat(abs, &st); err != nil {
		return nil, err
	}
	s := &Source{path: abs, stores: map[envelope.ID]*store{}, sidecars: map[envelope.ID][]string{}, bodies: map[envelope.ID]bool{}}
	dir := abs
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		dir, s.only = filepath.Dir(abs), filepath.Base(abs)
	}
	if s.root, err = backing.OpenRoot(dir); err != nil {
		return nil, err
	}
	if err := s.look(ctx, s.root, "."); err != nil {
		s.Close()
		return nil, err
	}
	for _, c := range s.copies { // first copies come first
		s.addCopy(c)
	}
	return s, nil
}

// Close releases the source.
func (s *Source) Close() { _ = s.root.Close() }

// Files returns how many files there are to be looked at.
func (s *Source) Files() uint64 { return s.files }

// Stores returns what the source says of keys, by store id.
func (s *Source) Stores() []StoreKeys {
	var out []StoreKeys
	for id, st := range s.stores {
		k := StoreKeys{ID: id, Keys: map[string][]string{}}
		if st.rec != nil {
			k.Recorded, k.Keys, k.Dir = true, st.rec.Body.Keys, filepath.Join(s.path, path.Dir(st.meta))
		} else {
			for class, uris := range st.keys {
				k.Keys[class] = slices.Sorted(slices.Values(uris))
			}
		}
		if len(k.Keys) > 0 {
			out = append(out, k)
		}
	}
	slices.SortFunc(out, func(a, b StoreKeys) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	return out
}

func (s *Source) look(ctx context.Context, d *backing.Dir, at string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	entries, err := d.ReadDir()
	if err != nil {
		return nil // listed when its turn comes
	}
	for _, e := range entries {
		if s.only != "" && e.Name != s.only && !strings.HasPrefix(e.Name, envelope.SidecarPrefix) {
			continue
		}
		where := path.Join(at, e.Name)
		st, err := d.Stat(e.Name)
		if err != nil {
			continue
		}
		switch st.Type() {
		case unix.S_IFREG:
			if e.Name == record.StoreCopy && len(s.copies) < maxStores {
				if b, err := d.ReadFile(e.Name, record.MaxStore); err == nil {
					s.copies = append(s.copies, recordCopy{b, path.Join(at, record.MetaDir)})
				}
			}
			s.lookAt(d, e.Name, where, st.Size)
		case unix.S_IFDIR:
			if err := s.lookInto(ctx, d, e.Name, where); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Source) lookInto(ctx context.Context, d *backing.Dir, entry, where string) error {
	sub, err := d.OpenDir(entry)
	if err != nil {
		return nil // listed when its turn comes
	}
	defer func() { _ = sub.Close() }()
	if entry == record.MetaDir {
		s.lookMeta(sub, where)
	}
	return s.look(ctx, sub, where)
}

// lookMeta reads what a store keeps for itself, as far as it is there.
func (s *Source) lookMeta(meta *backing.Dir, where string) {
	b, err := meta.ReadFile(record.StoreFile, record.MaxStore)
	if err == nil {
		err = s.addRecord(b, where)
	}
	if err != nil {
		s.notes = append(s.notes, fmt.Sprintf("%s: no usable store record: %v", path.Join(where, record.StoreFile), err))
	}
	if b, err := meta.ReadFile(record.RewrapFile, record.MaxRewrap); err == nil && len(b) > 0 {
		if batch, err := record.ParseRewrap(b); err == nil {
			s.rewraps = append(s.rewraps, batch...)
		}
	}
}

func (s *Source) addRecord(b []byte, where string) error {
	rec, err := record.ParseStore(b)
	if err != nil {
		return err
	}
	layout, err := rec.Layout()
	if err != nil {
		return err
	}
	st := s.store(layout.ID)
	if st == nil || st.rec != nil {
		return fmt.Errorf("a second record of store %s, or too many stores: %w", layout.ID, ErrRecord)
	}
	st.rec, st.layout, st.meta = rec, layout, where
	s.addNameKeys(rec, layout)
	return nil
}

func (s *Source) addNameKeys(rec *record.Store, l *record.Layout) {
	for _, block := range rec.Keys.Names {
		if h, err := envelope.Parse(block); err == nil && h.Store == l.ID {
			s.addHeader(h)
		}
	}
}

// addCopy takes a second copy of a record for the first if that was not found, and
// keeps it for the case that the first is not authentic.
func (s *Source) addCopy(c recordCopy) {
	rec, err := record.ParseStore(c.b)
	if err != nil {
		return
	}
	layout, err := rec.Layout()
	if err != nil {
		return
	}
	st := s.store(layout.ID)
	switch {
	case st == nil:
	case st.rec == nil:
		s.notes = append(s.notes, fmt.Sprintf("store %s: the store record is read from its second copy", layout.ID))
		st.rec, st.layout, st.meta = rec, layout, c.meta
		s.addNameKeys(rec, layout)
	case st.spare == nil:
		st.spare = rec
		s.addNameKeys(rec, layout)
	}
}

// lookAt notes the header of a file, or what the file is if it is nothing but a
// header: a name key, or the header of another file.
func (s *Source) lookAt(d *backing.Dir, entry, where string, size int64) {
	if !strings.HasPrefix(entry, internalPrefix) || strings.HasPrefix(entry, longEntry) {
		s.files++
	}
	if size == 0 {
		return
	}
	f, err := openQuiet(d, entry)
	if err != nil {
		return
	}
	defer func() { _ = f.Close() }()
	h := prefixHeader(f)
	if h == nil {
		if block, err := f.Attrs().Get(envelope.XattrName); err == nil {
			if h, err = envelope.Parse(block); err != nil {
				return
			}
		}
	}
	if h == nil {
		var id envelope.ID
		if n, err := f.ReadAt(id[:], 0); err == nil && n == len(id) {
			s.bodies[id] = true
		}
		return
	}
	s.addHeader(h)
	if int64(h.BlockSize) == size && h.ChunkSize != 0 && len(s.sidecars[h.File]) < maxSidecars {
		s.sidecars[h.File] = append(s.sidecars[h.File], where)
	}
}

// addHeader notes whose keys a header names, and a name key.
func (s *Source) addHeader(h *envelope.Header) {
	st := s.store(h.Store)
	if st == nil {
		return
	}
	for _, r := range h.Recipients {
		if uris := st.keys[r.Class]; len(uris) < maxKeys && !slices.Contains(uris, r.Wrapped.Key) {
			st.keys[r.Class] = append(uris, r.Wrapped.Key)
		}
		if h.ChunkSize == 0 && h.File != h.Store && len(st.nameKeys[r.Class]) < maxNameKeys &&
			!slices.ContainsFunc(st.nameKeys[r.Class], func(o *envelope.Header) bool { return o.Commitment == h.Commitment }) {
			st.nameKeys[r.Class] = append(st.nameKeys[r.Class], h)
		}
	}
}

// store returns what is known of a store, nil if there are too many.
func (s *Source) store(id envelope.ID) *store {
	st := s.stores[id]
	if st == nil && len(s.stores) < maxStores {
		st = &store{id: id, keys: map[string][]string{}, nameKeys: map[string][]*envelope.Header{}}
		s.stores[id] = st
	}
	return st
}

// openQuiet opens a file for reading without leaving an access time behind,
// where the process may say so.
func openQuiet(d *backing.Dir, entry string) (*backing.File, error) {
	f, err := d.Open(entry, unix.O_RDONLY|unix.O_NOATIME, 0)
	if err == unix.EPERM {
		f, err = d.Open(entry, unix.O_RDONLY, 0)
	}
	return f, err
}

// openPath opens the directory at a path below root, an element at a time.
func openPath(root *backing.Dir, at string) (*backing.Dir, error) {
	d, err := root.OpenDir(".")
	if err != nil || at == "." {
		return d, err
	}
	for name := range strings.SplitSeq(at, "/") {
		next, err := d.OpenDir(name)
		_ = d.Close()
		if err != nil {
			return nil, err
		}
		d = next
	}
	return d, nil
}
