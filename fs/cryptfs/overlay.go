package cryptfs

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/journal"
)

// found is what the journal of a volume that is only read has: operations that
// were not done in place when their process died. Files show them as done.
type found struct {
	*journal.Found
	byID map[envelope.ID][]journal.Entry
}

// recoverFirst opens a store for writing and closes it again, where that can be
// done. Whoever wants to read it gets the errors that matter.
func recoverFirst(ctx context.Context, c Config) {
	c.ReadOnly, c.Recover = false, false
	if v, err := Open(ctx, c); err == nil {
		_ = v.Close() // what it could not finish is there to be finished
	}
}

// readJournal reads the journal of a store that nobody has mounted. Beside a
// mount that writes, the store is read as it is: the journal is about what that
// mount is going to do.
func (v *Volume) readJournal(ctx context.Context, storeKey *envelope.FileKey) error {
	if v.lock == nil {
		lock, err := v.meta.Lock(lockFile)
		if errors.Is(err, backing.ErrLocked) {
			return nil
		}
		if err == nil {
			defer func() { _ = lock.Close() }()
		} else if !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EACCES) {
			return err
		}
		if err := v.checkLease(ctx, storeKey); errors.Is(err, ErrElsewhere) {
			return nil
		} else if err != nil {
			return err
		}
	}
	key, err := subKey(storeKey, journalKeyInfo)
	if err != nil {
		return err
	}
	defer key.Wipe()
	return v.keepFound(key)
}

func (v *Volume) keepFound(key *keymem.Key) error {
	all, err := journal.Read(v.meta, key)
	if err != nil {
		return err
	}
	if v.conf.mend {
		if v.lastEpoch, err = journal.LastEpoch(v.meta, key); err != nil {
			return err
		}
	}
	if len(all.Epochs) == 0 {
		return nil
	}
	v.log.Warn("the store was not unmounted cleanly: files that were being written may not be readable until it is mounted for writing")
	v.found = &found{Found: all, byID: map[envelope.ID][]journal.Entry{}}
	for _, e := range all.Entries {
		v.found.byID[e.File] = append(v.found.byID[e.File], e)
	}
	return nil
}

// overlay returns the operations that a file of a volume which is only read has
// in the journal.
func (v *Volume) overlay(h *envelope.Header) []journal.Op {
	if v.found == nil {
		return nil
	}
	return redo(v.found.byID[h.File], h.Birth)
}

// redo returns the operations of a file's records that are to be done, in order.
func redo(entries []journal.Entry, birth uint64) (ops []journal.Op) {
	for _, e := range entries {
		switch {
		case e.Birth != birth:
		case e.Kind == journal.Grow && e.Fence:
			ops = nil
		case e.Kind == journal.Ops:
			ops = append(ops, e.Ops...)
		}
	}
	return ops
}
