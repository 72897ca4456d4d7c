package cryptfs

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// place is where a store's headers live. One is chosen at init for the whole
// store; all three pass one contract test.
//
// dirs are the directories in which the file has a name, as far as known, or
// the one that an unnamed file was made in.
type place interface {
	// read returns the header block of a file that is not empty.
	read(disk *backing.File, dirs []*backing.Dir) ([]byte, error)
	// write puts the block where it lives and returns the bytes that stand
	// before the first chunk, which the caller writes. A crash leaves the old
	// block or the new one.
	write(disk *backing.File, dirs []*backing.Dir, id envelope.ID, block []byte) (prefix []byte, err error)
	// sync makes what write put elsewhere durable.
	sync(dirs []*backing.Dir, id envelope.ID) error
	// sidecar returns the name of the file that must be in every directory
	// where the store file has a name; "" where headers need none. b is the
	// beginning of the store file.
	sidecar(b []byte) string
}

func newPlace(p envelope.Placement, size int) place {
	switch p {
	case envelope.Xattr:
		return xattrPlace{}
	case envelope.Sidecar:
		return sidecarPlace{size}
	default:
		return prefixPlace{size}
	}
}

// prefixPlace: the header is the first bytes of the store file.
type prefixPlace struct{ size int }

func (p prefixPlace) read(disk *backing.File, _ []*backing.Dir) ([]byte, error) {
	block := make([]byte, p.size)
	n, err := disk.ReadAt(block, 0)
	if err != nil {
		return nil, err
	}
	if n < p.size {
		return nil, fmt.Errorf("%d bytes: %w", n, ErrHeader)
	}
	return block, nil
}

func (p prefixPlace) write(_ *backing.File, _ []*backing.Dir, _ envelope.ID, block []byte) ([]byte, error) {
	return block, nil
}

func (prefixPlace) sync([]*backing.Dir, envelope.ID) error { return nil }
func (prefixPlace) sidecar([]byte) string                  { return "" }

// xattrPlace: the header is an extended attribute of the store file.
type xattrPlace struct{}

func (xattrPlace) read(disk *backing.File, _ []*backing.Dir) ([]byte, error) {
	block, err := disk.Attrs().Get(headerAttr)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, fmt.Errorf("no %s attribute: %w", headerAttr, ErrHeader)
	}
	return block, err
}

func (xattrPlace) write(disk *backing.File, _ []*backing.Dir, _ envelope.ID, block []byte) ([]byte, error) {
	err := disk.Attrs().Set(headerAttr, block, 0)
	if !errors.Is(err, unix.EACCES) {
		return nil, err
	}
	// The mode keeps out even an owner who has the file open: see openEntry.
	st, serr := disk.Stat()
	if serr != nil || disk.Chmod(st.Mode&0o7777|0o600) != nil {
		return nil, err
	}
	err = disk.Attrs().Set(headerAttr, block, 0)
	if cerr := disk.Chmod(st.Mode & 0o7777); err == nil {
		err = cerr
	}
	return nil, err
}

func (xattrPlace) sync([]*backing.Dir, envelope.ID) error { return nil }
func (xattrPlace) sidecar([]byte) string                  { return "" }

// sidecarPlace: the header is a file of its own, named by the file id, in every
// directory where the store file has a name. The store file begins with the id.
type sidecarPlace struct{ size int }

const idLen = len(envelope.ID{})

func (p sidecarPlace) read(disk *backing.File, dirs []*backing.Dir) ([]byte, error) {
	b := make([]byte, idLen)
	n, err := disk.ReadAt(b, 0)
	if err != nil {
		return nil, err
	}
	if n < idLen {
		return nil, fmt.Errorf("%d bytes: %w", n, ErrHeader)
	}
	for _, d := range dirs {
		block, err := d.ReadFile(p.sidecar(b), p.size)
		if err == nil || !errors.Is(err, unix.ENOENT) {
			return block, err
		}
	}
	return nil, fmt.Errorf("no file %s: %w", p.sidecar(b), ErrHeader)
}

func (p sidecarPlace) write(_ *backing.File, dirs []*backing.Dir, id envelope.ID, block []byte) ([]byte, error) {
	name := p.sidecar(id[:])
	var first *backing.Dir // where it is
	for _, d := range dirs {
		f, err := d.Open(name, unix.O_WRONLY, 0)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err == nil {
			// In place, so that every name of it sees it. It is one page, or is
			// done again from the redo record of the write that follows.
			err = f.WriteAt(block, 0)
			if cerr := f.Close(); err == nil {
				err = cerr
			}
		}
		if err != nil {
			return nil, err
		}
		first = d
		break
	}
	for _, d := range dirs {
		var err error
		if first == nil {
			err = lifted(d, func() error { return d.WriteNew(name, block, 0o600, false) })
			first = d
		} else {
			err = lifted(d, func() error { return first.Link(name, d, name) })
		}
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, err
		}
	}
	return id[:], nil
}

func (p sidecarPlace) sync(dirs []*backing.Dir, id envelope.ID) error {
	for _, d := range dirs {
		f, err := d.Open(p.sidecar(id[:]), unix.O_RDONLY, 0)
		if err != nil {
			return err
		}
		err = f.Sync()
		_ = f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func (sidecarPlace) sidecar(b []byte) string {
	if len(b) < idLen {
		return ""
	}
	return sidecarPrefix + envelope.ID(b[:idLen]).String()
}

// sidecarOf returns the name of the file that must be beside an entry: a header's
// sidecar or a long symlink target; "" if there is none. It reads the beginning
// of the store file, or the link.
func (v *Volume) sidecarOf(dir *backing.Dir, entry string, st backing.Stat) (string, error) {
	if isLongLink(st) {
		raw, err := dir.Readlink(entry)
		if err != nil || !isTargetFile(raw) {
			return "", err
		}
		return raw, nil
	}
	if v.place.sidecar(make([]byte, idLen)) == "" || st.Type() != unix.S_IFREG || st.Size == 0 {
		return "", nil
	}
	f, err := v.openEntry(dir, entry, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	b := make([]byte, idLen)
	n, err := f.ReadAt(b, 0)
	if err != nil {
		return "", err
	}
	return v.place.sidecar(b[:n]), nil
}

// dropSidecar removes a sidecar from a directory in which its file had a name
// just now, unless it still has one there or another file needs the sidecar.
func (v *Volume) dropSidecar(dir *backing.Dir, name string, st backing.Stat) {
	if name == "" {
		return
	}
	if st.Nlink > 1 {
		still := false
		err := dir.Each(func(e backing.Entry) bool {
			still = e.Ino == st.Ino && e.Name != name
			return !still
		})
		if err != nil || still {
			return
		}
	}
	v.removeUnshared(dir, name, st.Ino)
}
