package rewrap

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/lease"
	"github.com/kmsfs/kmsfs/fs/placement"
	"github.com/kmsfs/kmsfs/fs/record"
)

func purposeOf(name string) keywrap.Purpose {
	switch name {
	case "names":
		return keywrap.PurposeNames
	case "store":
		return keywrap.PurposeStore
	}
	return keywrap.PurposeData
}

// Locked writes the headers of a store that nobody has mounted. It holds the
// store's lock until Close.
type Locked struct {
	s     *Store
	lock  *backing.File
	lease *lease.Lease
	batch *Batch
	log   *slog.Logger
}

// lockPatience is how long an owner of the store may take to let go: one that
// ends just now.
const lockPatience = time.Second

// Lock takes the store's lock and lease and finishes a batch that a crash left.
// The lease is not signed: there is no key for that. Until ctx ends Lock waits to
// see whether an owner on another machine is alive. Errors: ErrLocked;
// lease.ErrHeld; ErrUnfinished if the journal is not empty: the next mount may
// write headers again as they were.
func (s *Store) Lock(ctx context.Context, log *slog.Logger) (*Locked, error) {
	lock, err := s.meta.Lock(record.LockFile)
	for end := time.Now().Add(lockPatience); errors.Is(err, backing.ErrLocked) && time.Now().Before(end); {
		time.Sleep(lockPatience / 20)
		lock, err = s.meta.Lock(record.LockFile)
	}
	if errors.Is(err, backing.ErrLocked) {
		return nil, ErrLocked
	}
	if err != nil {
		return nil, err
	}
	w := &Locked{s: s, lock: lock, batch: NewBatch(s.root, s.meta, s.place), log: log}
	id := s.ID()
	if w.lease, err = lease.Acquire(ctx, lease.Config{Dir: s.meta, Store: id[:], Log: log}); err != nil {
		_ = lock.Close()
		return nil, err
	}
	if err = w.batch.Recover(log); err == nil {
		var unfinished bool
		if unfinished, err = s.unfinished(); err == nil && unfinished {
			err = ErrUnfinished
		}
	}
	if err != nil {
		w.Close()
		return nil, err
	}
	return w, nil
}

// Close gives lease and lock back.
func (w *Locked) Close() {
	if err := w.lease.Release(); err != nil && w.log != nil {
		w.log.Warn("the store's lease is left behind", "err", err)
	}
	_ = w.lock.Close()
}

// Write implements Writer.
func (w *Locked) Write(ctx context.Context, files []record.Rewrapped) ([]error, error) {
	if err := errors.Join(ctx.Err(), w.lease.Held()); err != nil {
		return nil, err
	}
	each := make([]error, len(files))
	err := w.batch.Do(files, func() {
		var wg sync.WaitGroup
		slots := make(chan struct{}, 8)
		for i := range files {
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				each[i] = w.one(files[i])
			})
		}
		wg.Wait()
	})
	return each, err
}

func (w *Locked) one(f record.Rewrapped) error {
	dir, entry, err := OpenDir(w.s.root, f.Path)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	flags := unix.O_RDONLY
	if w.s.place.Body() {
		flags = unix.O_RDWR
	}
	disk, err := placement.Open(dir, entry, flags)
	if err != nil {
		return err
	}
	defer func() { _ = disk.Close() }()
	dirs := []*backing.Dir{dir}
	have, err := w.s.place.Read(disk, dirs)
	if err != nil {
		return err
	}
	block, err := Replace(have, f.Block)
	if err != nil {
		return err
	}
	h, err := envelope.Parse(block)
	if err != nil {
		return err
	}
	return placement.Lifted(dir, func() error { return w.s.place.Rewrite(disk, dirs, h.File, block) })
}

// Keys implements Writer: the record's copies, then the class files. A crash
// between the two leaves copies under older keys, which the next run sees.
func (w *Locked) Keys(_ context.Context, k record.StoreKeys) error {
	if err := w.lease.Held(); err != nil {
		return err
	}
	rec, err := ReplaceKeys(w.s.rec, k)
	if err != nil {
		return err
	}
	if err := WriteKeys(w.s.root, w.s.meta, rec, k); err != nil {
		return err
	}
	w.s.rec = rec
	return nil
}

// ReplaceKeys returns the record with other wrapped name keys and store keys,
// each of which is a block of the same key as before (else ErrChanged).
func ReplaceKeys(rec *record.Store, k record.StoreKeys) (*record.Store, error) {
	out := *rec
	out.Keys = record.StoreKeys{Store: maps.Clone(rec.Keys.Store), Names: maps.Clone(rec.Keys.Names)}
	for _, of := range []struct{ next, have map[string][]byte }{{k.Store, out.Keys.Store}, {k.Names, out.Keys.Names}} {
		for class, block := range of.next {
			next, err := Replace(of.have[class], block)
			if err != nil {
				return nil, fmt.Errorf("wrapped key of class %s: %w", class, err)
			}
			of.have[class] = next
		}
	}
	return &out, nil
}

// WriteKeys writes the record, its second copy before it, and the class files of
// the name keys in k.
func WriteKeys(root, meta *backing.Dir, rec *record.Store, k record.StoreKeys) error {
	b, err := rec.Encode()
	if err != nil {
		return err
	}
	if err := copyKeys(root, rec, b, k); err != nil {
		return err
	}
	if err := meta.Replace(record.StoreFile, b, 0o600); err != nil {
		return err
	}
	dir, err := meta.OpenDir(record.ClassesDir)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	for _, class := range slices.Sorted(maps.Keys(k.Names)) {
		if err := dir.Replace(class, rec.Keys.Names[class], 0o600); err != nil {
			return err
		}
	}
	return nil
}
