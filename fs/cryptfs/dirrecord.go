package cryptfs

import (
	"crypto/rand"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/record"
)

const dirMACLabel = "directory"

// newDirRecord returns a record with a fresh directory id.
func newDirRecord(c *nameenc.Cipher, class string) (*record.Dir, error) {
	d := &record.Dir{Class: class}
	_, _ = rand.Read(d.ID[:])
	d.MAC = c.MAC(dirMACLabel, d.Body())
	return d, nil
}

// writeDirRecord writes both copies of a directory's record into it. The second
// is left out where the file system has no room for it.
func writeDirRecord(dir *backing.Dir, d *record.Dir) error {
	b := d.Encode()
	if err := dir.Replace(dirFile, b, 0o600); err != nil {
		return err
	}
	return setDirAttr(dir, b)
}

func setDirAttr(dir *backing.Dir, b []byte) error {
	err := dir.Attrs("").Set(dirAttr, b, 0)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EPERM) {
		return nil
	}
	return err
}

// readDirRecord reads a directory's record, from the second copy if the first
// is missing, damaged, or not to be read. It checks the form only.
func readDirRecord(dir *backing.Dir) (d *record.Dir, second bool, err error) {
	b, err := dir.ReadFile(dirFile, record.MaxDir)
	if err == nil {
		if d, err = record.ParseDir(b); err == nil {
			return d, false, nil
		}
	}
	if errors.Is(err, unix.EACCES) {
		return nil, false, err // see lifted
	}
	b, aerr := dir.Attrs("").Get(dirAttr)
	if aerr == nil {
		if d, perr := record.ParseDir(b); perr == nil {
			return d, true, nil
		}
	}
	for _, e := range []error{err, aerr} {
		if isDiskTrouble(e) {
			return nil, false, e
		}
	}
	return nil, false, fmt.Errorf("%w: %w", ErrDirRecord, err)
}

// checkDirRecord checks the record's MAC.
func checkDirRecord(c *nameenc.Cipher, d *record.Dir) error {
	if err := c.VerifyMAC(d.MAC, dirMACLabel, d.Body()); err != nil {
		return fmt.Errorf("%w: %w", ErrDirRecord, err)
	}
	return nil
}
