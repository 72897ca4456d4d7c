package rewrap

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/placement"
	"github.com/kmsfs/kmsfs/fs/record"
)

// Config says which store to look at.
type Config struct {
	Path string
	// Keys are the keys of each class that this machine has pinned; nil trusts
	// what the store says, which will do for looking at it.
	Keys map[string][]string
	// SameKey tells that two key URIs are one key, such as replicas of a
	// multi-Region key; nil: only equal URIs are.
	SameKey func(a, b string) bool
	Tap     backing.Tap // tests: in place of every operation on the store's disk; nil: none
}

// Store is a store as it lies on the disk. It is safe for concurrent use.
type Store struct {
	conf   Config
	root   *backing.Dir
	meta   *backing.Dir
	rec    *record.Store
	layout *record.Layout
	place  placement.Place
}

// Open opens the store. The caller has checked that there is one. Errors:
// ErrKeysChanged, those of the record's parser, and the disk's.
func Open(c Config) (*Store, error) {
	root, err := backing.OpenRootTapped(c.Path, c.Tap)
	if err != nil {
		return nil, err
	}
	s := &Store{conf: c, root: root}
	if err := s.setUp(); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Store) setUp() error {
	var err error
	if s.meta, err = s.root.OpenDir(record.MetaDir); err != nil {
		return err
	}
	b, err := s.meta.ReadFile(record.StoreFile, record.MaxStore)
	if err != nil {
		return err
	}
	if s.rec, err = record.ParseStore(b); err != nil {
		return err
	}
	if s.layout, err = s.rec.Layout(); err != nil {
		return err
	}
	s.place = placement.New(s.layout.Placement, s.layout.HeaderSize)
	if s.conf.Keys != nil && !sameKeys(s.conf.Keys, s.rec.Body.Keys) {
		return ErrKeysChanged
	}
	return nil
}

// Close lets go of the store.
func (s *Store) Close() {
	if s.meta != nil {
		_ = s.meta.Close()
	}
	_ = s.root.Close()
}

// ID returns the store's id.
func (s *Store) ID() envelope.ID { return s.layout.ID }

// Classes returns the names of the store's classes, sorted.
func (s *Store) Classes() []string { return s.layout.Policy.Names() }

// Active returns the keys of a class that files shall have as recipients.
func (s *Store) Active(class string) []string { return s.rec.Active(class) }

// Retired returns the keys of a class that only unwrap.
func (s *Store) Retired(class string) []string { return s.rec.Body.Retired[class] }

// Keys returns every key of every class once, sorted.
func (s *Store) Keys() []string {
	var out []string
	for _, keys := range s.rec.Body.Keys {
		out = append(out, keys...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// class returns what the key manager has to know of a class.
func (s *Store) class(name string) envelope.Class {
	return envelope.Class{Name: name, Keys: s.rec.Active(name), Allowed: s.rec.Body.Keys[name]}
}

// allowed returns the class's key that uri is, "" if it is none.
func (s *Store) allowed(class, uri string) string {
	keys := s.rec.Body.Keys[class]
	if slices.Contains(keys, uri) {
		return uri
	}
	if s.conf.SameKey != nil {
		for _, k := range keys {
			if s.conf.SameKey(k, uri) {
				return k
			}
		}
	}
	return ""
}

// sameKeys compares keys by class, in any order.
func sameKeys(a, b map[string][]string) bool {
	return maps.EqualFunc(a, b, func(x, y []string) bool {
		return slices.Equal(slices.Sorted(slices.Values(x)), slices.Sorted(slices.Values(y)))
	})
}

// OpenDir opens the directory that the file at a path of the store is in, and
// returns the file's entry. Only names of the plaintext tree lead anywhere.
//
// OpenDir is for the daemon, which writes the headers of a mounted store. The
// directory is the caller's to close.
func OpenDir(root *backing.Dir, at string) (dir *backing.Dir, entry string, err error) {
	names := strings.Split(at, "/")
	if at == "" || path.Clean("/"+at) != "/"+at || slices.ContainsFunc(names, isInternal) || strings.IndexByte(at, 0) >= 0 {
		return nil, "", fmt.Errorf("%q: %w", at, ErrPath)
	}
	if dir, err = root.OpenDir("."); err != nil {
		return nil, "", err
	}
	for _, name := range names[:len(names)-1] {
		sub, err := dir.OpenDir(name)
		_ = dir.Close()
		if err != nil {
			return nil, "", err
		}
		dir = sub
	}
	return dir, names[len(names)-1], nil
}

// isInternal reports whether an entry is the store's own.
func isInternal(entry string) bool {
	return strings.HasPrefix(entry, record.MetaDir) && !strings.HasPrefix(entry, record.LongEntry)
}

// Moved reports whether an error says that a file is not where it was, or not
// what it was: the next look at the store finds it, or not.
func Moved(err error) bool { return gone(err) || errors.Is(err, ErrChanged) }

// gone reports whether an error only says that a file is not there any more.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}
