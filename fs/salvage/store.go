package salvage

import (
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/journal"
	"github.com/kmsfs/kmsfs/fs/record"
)

// keyTime is how long an unwrapped key is kept, whatever the class says of a
// mount: a branch key opens many files.
const keyTime = 5 * time.Minute

// store is what is known of one store.
type store struct {
	id       envelope.ID
	keys     map[string][]string // class -> key URIs, by the headers
	nameKeys map[string][]*envelope.Header

	rec    *record.Store // nil without a record that can be read
	layout *record.Layout
	spare  *record.Store // the record's second copy, if both are there
	meta   string        // path of the directory that the record is in

	// While it is written:
	manager  *envelope.Manager
	allowed  map[string][]string
	verified bool // the record is authentic
	ciphers  map[string][]*nameenc.Cipher
	failures map[string]error                // why a class's name key could not be had
	entries  map[envelope.ID][]journal.Entry // of a live journal
}

func (t *store) class(name string) envelope.Class {
	return envelope.Class{Name: name, Keys: t.allowed[name], Allowed: t.allowed[name], Cache: keyTime}
}

// unlock gets what does not belong to one file: the store key with the journal,
// and the name keys.
func (t *store) unlock(ctx context.Context, s *Source, c Config, r *Report) error {
	t.manager = envelope.NewManager(c.Provider, t.id, envelope.Options{PoolSize: -1, SameKey: c.SameKey, Log: c.Log})
	t.allowed, t.ciphers, t.failures = c.Keys[t.id], map[string][]*nameenc.Cipher{}, map[string]error{}
	if t.rec == nil {
		r.note(fmt.Sprintf("store %s: there is no store record: whether its keys and files are those of the store is not known; a journal cannot be read", t.id))
	} else if err := t.verify(ctx, s, r); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		r.note(fmt.Sprintf("store %s: the store record is not used: %v", t.id, err))
	}
	for _, class := range slices.Sorted(maps.Keys(t.nameKeys)) {
		for _, h := range t.nameKeys[class] {
			k, err := t.manager.Open(ctx, t.class(class), keywrap.PurposeNames, h)
			if err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				r.note(fmt.Sprintf("store %s: name key of class %s: %v", t.id, class, err))
				t.failures[class] = err
				continue
			}
			cipher, err := nameenc.New(k.PRK())
			k.Wipe()
			if err != nil {
				return err
			}
			t.ciphers[class] = append(t.ciphers[class], cipher)
		}
	}
	return nil
}

func (t *store) close() {
	for _, list := range t.ciphers {
		for _, c := range list {
			c.Wipe()
		}
	}
	if t.manager != nil {
		t.manager.Close()
	}
}

// verify checks the store record, or its second copy.
func (t *store) verify(ctx context.Context, s *Source, r *Report) error {
	err := t.verifyOne(ctx, s, r)
	if err == nil || t.spare == nil || ctx.Err() != nil {
		return err
	}
	layout, lerr := t.spare.Layout()
	if lerr != nil {
		return err
	}
	rec, was := t.rec, t.layout
	t.rec, t.layout = t.spare, layout
	if serr := t.verifyOne(ctx, s, r); serr != nil {
		t.rec, t.layout = rec, was
		return err
	}
	r.note(fmt.Sprintf("store %s: the store record is read from its second copy: %v", t.id, err))
	return nil
}

// verifyOne checks a record and reads the journal that is under its key.
func (t *store) verifyOne(ctx context.Context, s *Source, r *Report) error {
	var first error
	for _, class := range slices.Sorted(maps.Keys(t.rec.Keys.Store)) {
		h, err := envelope.Parse(t.rec.Keys.Store[class])
		if err == nil && (h.Store != t.id || h.File != t.id) {
			err = ErrRecord
		}
		var key *envelope.FileKey
		if err == nil {
			key, err = t.manager.Open(ctx, t.class(class), keywrap.PurposeStore, h)
		}
		if err != nil {
			first = errors.Join(first, fmt.Errorf("class %s: %w", class, err))
			continue
		}
		defer key.Wipe()
		if err := t.checkMAC(key); err != nil {
			return err
		}
		t.verified = true
		if err := t.readJournal(s, key); err != nil {
			r.note(fmt.Sprintf("store %s: the journal is not used: %v", t.id, err))
		}
		return nil
	}
	return first
}

func (t *store) checkMAC(key *envelope.FileKey) error {
	signed, err := t.rec.Signed()
	if err != nil {
		return err
	}
	sub, err := hkdf.Expand(sha256.New, key.PRK().Bytes(), "kmsfs v1 store record", sha256.Size)
	if err != nil {
		return err
	}
	defer clear(sub)
	mac := hmac.New(sha256.New, sub)
	mac.Write(signed)
	if !hmac.Equal(mac.Sum(nil), t.rec.MAC[:]) {
		return ErrRecord
	}
	return nil
}

// readJournal reads what the last writer left, unless there is a writer now,
// whose journal is about what it is going to do.
func (t *store) readJournal(s *Source, storeKey *envelope.FileKey) error {
	meta, err := openPath(s.root, t.meta)
	if err != nil {
		return err
	}
	defer func() { _ = meta.Close() }()
	if _, err := meta.Stat(record.LockFile); err == nil { // it is not made here
		lock, err := meta.Lock(record.LockFile)
		if errors.Is(err, backing.ErrLocked) {
			return err
		}
		if err == nil {
			defer func() { _ = lock.Close() }()
		} else if !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EACCES) {
			return err
		}
	}
	b, err := hkdf.Expand(sha256.New, storeKey.PRK().Bytes(), "kmsfs v1 journal", sha256.Size)
	if err != nil {
		return err
	}
	key := keymem.Take(b)
	defer key.Wipe()
	found, err := journal.Read(meta, key)
	if err != nil {
		return err
	}
	t.entries = map[envelope.ID][]journal.Entry{}
	for _, e := range found.Entries {
		t.entries[e.File] = append(t.entries[e.File], e)
	}
	return found.Damage
}

// pending returns the operations of the journal that are still to be done on a
// file (docs/format.md, F-33), and the time of the newest; nil if there are none.
func (t *store) pending(h *envelope.Header) (ops []journal.Op, mtime *unix.Timespec) {
	for _, e := range t.entries[h.File] {
		switch {
		case e.Birth != h.Birth:
		case e.Kind == journal.Grow && e.Fence:
			ops, mtime = nil, nil
		case e.Kind == journal.Ops:
			ops, mtime = append(ops, e.Ops...), &e.Mtime
		}
	}
	return ops, mtime
}

// plain reports whether the store's record says that a class's names are not
// encrypted. known is false where no record says anything.
func (t *store) plain(class string) (plain, known bool) {
	if !t.verified {
		return false, false
	}
	c, ok := t.layout.Policy.Classes[class]
	return ok && c.Names == classify.NamesPlain, ok
}

// entriesOf returns what the journal has of a file.
func (t *store) entriesOf(h *envelope.Header) []journal.Entry {
	if t == nil {
		return nil
	}
	return t.entries[h.File]
}
