package cryptfs

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// stored is a name as the store has it.
type stored struct {
	entry string // the directory entry
	full  string // the ciphertext name, where it is too long to be the entry
}

// companion is the file that holds a long ciphertext name, "" if none does.
func (s stored) companion() string {
	if s.full == "" {
		return ""
	}
	return longName + strings.TrimPrefix(s.entry, longEntry)
}

// seal returns a plaintext name as it is stored in a loaded directory.
func (n *Node) seal(c *nameenc.Cipher, name string) (stored, error) {
	if err := nameenc.CheckName(name); err != nil {
		return stored{}, err
	}
	if n.dirClass().plain {
		if strings.HasPrefix(name, internalPrefix) {
			return stored{}, ErrReserved
		}
		return stored{entry: name}, nil
	}
	enc, err := c.EncryptName(n.dirID(), name)
	if err != nil {
		return stored{}, err
	}
	if nameenc.IsLong(enc) {
		return stored{entry: longEntry + nameenc.LongHash(enc), full: enc}, nil
	}
	return stored{entry: enc}, nil
}

// unseal returns the plaintext name of a store entry. ok is false for what is
// no file of the tree: the store's own files, and what somebody else put there.
// An error that is no damage is the disk's.
func (n *Node) unseal(c *nameenc.Cipher, dir *backing.Dir, entry string) (name string, ok bool, err error) {
	long := strings.HasPrefix(entry, longEntry)
	if strings.HasPrefix(entry, internalPrefix) && !long {
		return "", false, nil
	}
	if n.dirClass().plain {
		return entry, !long, nil
	}
	enc := entry
	if long {
		b, err := dir.ReadFile(longName+strings.TrimPrefix(entry, longEntry), maxLong)
		if isDiskTrouble(err) {
			return "", false, fmt.Errorf("entry %s: %w", entry, err)
		}
		if err != nil {
			return "", false, fmt.Errorf("entry %s: %w: %w", entry, ErrName, err)
		}
		enc = string(b)
		if longEntry+nameenc.LongHash(enc) != entry {
			return "", false, fmt.Errorf("entry %s: %w", entry, ErrName)
		}
	}
	name, err = c.DecryptName(n.dirID(), enc)
	if err != nil {
		return "", false, fmt.Errorf("entry %s: %w: %w", entry, ErrName, err)
	}
	return name, true, nil
}

// isDiskTrouble reports whether an error says nothing about what is stored: it
// could not be read.
func isDiskTrouble(err error) bool {
	for _, e := range []error{
		unix.ENOENT, unix.ENODATA, unix.EOPNOTSUPP, // nothing is there
		unix.ELOOP, unix.EISDIR, unix.ENOTDIR, unix.ENXIO, unix.ESPIPE, unix.EACCES, unix.EPERM, // something else is
	} {
		if errors.Is(err, e) {
			return false
		}
	}
	return err != nil && fault.Of(err) == fault.None
}

// maxLong bounds a ciphertext name, in bytes: 255 bytes padded to 256, the SIV
// tag, base64.
const maxLong = 400

// placeName puts a long name's companion into a directory before the entry. It
// may be there from an earlier use of the same name.
func placeName(dir *backing.Dir, s stored) error {
	if s.full == "" {
		return nil
	}
	err := dir.WriteNew(s.companion(), []byte(s.full), 0o600, true)
	if errors.Is(err, unix.EEXIST) {
		b, rerr := dir.ReadFile(s.companion(), maxLong)
		if rerr == nil && string(b) == s.full {
			return nil
		}
		return dir.Replace(s.companion(), []byte(s.full), 0o600)
	}
	return err
}

// dropName takes a companion away after the entry went. An entry that is there
// again keeps it.
func dropName(dir *backing.Dir, entry string) {
	if !strings.HasPrefix(entry, longEntry) {
		return
	}
	if _, err := dir.Stat(entry); errors.Is(err, unix.ENOENT) {
		_ = dir.Unlink(longName + strings.TrimPrefix(entry, longEntry)) // an orphan is fsck's
	}
}
