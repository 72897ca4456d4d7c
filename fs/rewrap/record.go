package rewrap

import (
	"bytes"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/placement"
	"github.com/kmsfs/kmsfs/fs/record"
)

// WriteRecord writes a store record that was just made or verified: its second
// copy, then the first, which is the one that counts. So one of them is whole at
// every moment, and who does a change again after a crash does it in both.
func WriteRecord(root, meta *backing.Dir, rec *record.Store) error {
	b, err := rec.Encode()
	if err != nil {
		return err
	}
	if err := WriteCopy(root, b); err != nil {
		return err
	}
	return meta.Replace(record.StoreFile, b, 0o600)
}

// WriteCopy writes the second copy of the store record.
func WriteCopy(root *backing.Dir, b []byte) error {
	return KeepTimes(root, func() error { return root.Replace(record.StoreCopy, b, 0o600) })
}

// KeepTimes changes something of the store's own in its root. The times of that
// are the plaintext root's, in which nothing changes.
func KeepTimes(root *backing.Dir, change func() error) error {
	return placement.Lifted(root, func() error {
		st, err := root.Stat("")
		if err != nil {
			return err
		}
		if err := change(); err != nil {
			return err
		}
		mtime := unix.Timespec{Sec: st.Mtime.Sec, Nsec: int64(st.Mtime.Nsec)}
		return root.SetTimes(".", unix.Timespec{Nsec: unix.UTIME_OMIT}, mtime)
	})
}

// copyKeys does to the second copy what was done to the record. Whoever has no
// key cannot tell which of two records is the right one: a copy that says
// anything else is left to those who can, and so is a block that is of no use
// here, while the record's may be.
func copyKeys(root *backing.Dir, rec *record.Store, b []byte, k record.StoreKeys) error {
	have, err := root.ReadFile(record.StoreCopy, record.MaxStore)
	if errors.Is(err, unix.ENOENT) {
		return WriteCopy(root, b)
	}
	if err != nil {
		return nil
	}
	second, err := record.ParseStore(have)
	if err != nil || !SameSigned(second, rec) {
		return nil
	}
	next, err := ReplaceKeys(second, k)
	if err != nil {
		return nil
	}
	if b, err = next.Encode(); err != nil {
		return err
	}
	return WriteCopy(root, b)
}

// SameSigned reports whether two records are the same but for the wrapped keys.
func SameSigned(a, b *record.Store) bool {
	x, xerr := a.Signed()
	y, yerr := b.Signed()
	return xerr == nil && yerr == nil && a.MAC == b.MAC && bytes.Equal(x, y)
}
