package placement

import (
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// Place is where a store's headers live. One is chosen at init for the whole
// store; all three pass one contract test.
//
// dirs are the directories in which the file has a name, as far as known, or
// the one that an unnamed file was made in.
type Place interface {
	// Read returns the header block of a file that is not empty. The errors of a
	// file without one are ErrHeader.
	Read(disk *backing.File, dirs []*backing.Dir) ([]byte, error)
	// Write puts the block where it lives and returns the bytes that stand
	// before the first chunk, which the caller writes. A crash leaves the old
	// block or the new one.
	Write(disk *backing.File, dirs []*backing.Dir, id envelope.ID, block []byte) (prefix []byte, err error)
	// Rewrite puts the block in the place of the one that is there, and makes it
	// durable. A crash may leave a mixture of both where the block is no extended
	// attribute: whoever calls it has the block elsewhere, durably. disk is open
	// for writing where Body says so.
	Rewrite(disk *backing.File, dirs []*backing.Dir, id envelope.ID, block []byte) error
	// Body reports whether Rewrite writes to the store file itself.
	Body() bool
	// Sync makes what Write put elsewhere durable.
	Sync(dirs []*backing.Dir, id envelope.ID) error
	// Sidecar returns the name of the file that must be in every directory
	// where the store file has a name; "" where headers need none. b is the
	// beginning of the store file.
	Sidecar(b []byte) string
}

// IDLen is how much of the beginning of a store file Place.Sidecar looks at.
const IDLen = len(envelope.ID{})

// New returns the place of a store with this placement and header size in bytes.
func New(p envelope.Placement, size int) Place {
	switch p {
	case envelope.Xattr:
		return xattrPlace{}
	case envelope.Sidecar:
		return sidecarPlace{size}
	default:
		return prefixPlace{size}
	}
}

// Open opens a regular file of the store. Reading it leaves its access time
// alone, where the process may say so: headers are read at times when nobody
// reads the file. An owner who may not, by the
// mode, is let in for a moment: the mode is for the mount's users, and the
// kernel has applied it already.
func Open(dir *backing.Dir, entry string, flags int) (*backing.File, error) {
	f, err := dir.Open(entry, flags|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) { // somebody else's file
		f, err = dir.Open(entry, flags, 0)
	}
	if !errors.Is(err, unix.EACCES) {
		return f, err
	}
	lifting.Lock() // a mode that somebody else has lifted must not be taken for the file's own
	defer lifting.Unlock()
	st, serr := dir.Stat(entry)
	if serr != nil || int(st.Uid) != os.Geteuid() || st.Type() != unix.S_IFREG {
		return nil, err
	}
	if cerr := dir.Chmod(entry, st.Mode&0o7777|0o600); cerr != nil {
		return nil, err
	}
	f, err = dir.Open(entry, flags, 0)
	if cerr := dir.Chmod(entry, st.Mode&0o7777); cerr != nil && err == nil {
		_ = f.Close()
		return nil, cerr
	}
	return f, err
}

// lifting is held while Open changes a file's mode and back. Nothing else is
// locked with it held.
var lifting sync.Mutex

const (
	liftTries = 10
	liftPause = 2 * time.Millisecond
)

// Lifted calls f, and again with the directory's owner let in if its mode keeps
// out an owner who is not root. The mode is for the mount's users; the store's
// own files in the directory have to be read and written all the same. Whoever
// lifts the same directory at the same time may put its mode back while f runs:
// then f is called once more. So f may be called several times, and calls may
// nest.
func Lifted(d *backing.Dir, f func() error) error {
	err := f()
	for n := 0; errors.Is(err, unix.EACCES) && n < liftTries; n++ {
		st, serr := d.Stat("")
		if serr != nil || int(st.Uid) != os.Geteuid() {
			return err
		}
		if st.Mode&0o700 == 0o700 { // somebody has lifted it, or the directory is not the reason
			time.Sleep(liftPause)
			err = f()
			continue
		}
		if d.ChmodSelf(st.Mode&0o7777|0o700) != nil {
			return err
		}
		err = f()
		if cerr := d.ChmodSelf(st.Mode & 0o7777); err == nil {
			err = cerr
		}
	}
	return err
}
