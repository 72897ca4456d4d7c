package placement

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// xattrPlace: the header is an extended attribute of the store file.
type xattrPlace struct{}

func (xattrPlace) Read(disk *backing.File, _ []*backing.Dir) ([]byte, error) {
	block, err := disk.Attrs().Get(envelope.XattrName)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, fmt.Errorf("no %s attribute: %w", envelope.XattrName, ErrHeader)
	}
	return block, err
}

func (xattrPlace) Write(disk *backing.File, _ []*backing.Dir, _ envelope.ID, block []byte) ([]byte, error) {
	err := disk.Attrs().Set(envelope.XattrName, block, 0)
	if !errors.Is(err, unix.EACCES) {
		return nil, err
	}
	// The mode keeps out even an owner who has the file open: see Open.
	st, serr := disk.Stat()
	if serr != nil || disk.Chmod(st.Mode&0o7777|0o600) != nil {
		return nil, err
	}
	err = disk.Attrs().Set(envelope.XattrName, block, 0)
	if cerr := disk.Chmod(st.Mode & 0o7777); err == nil {
		err = cerr
	}
	return nil, err
}

func (p xattrPlace) Rewrite(disk *backing.File, _ []*backing.Dir, id envelope.ID, block []byte) error {
	if _, err := p.Write(disk, nil, id, block); err != nil {
		return err
	}
	return disk.Sync() // an attribute is no data: fdatasync may leave it out
}

func (xattrPlace) Body() bool                             { return false }
func (xattrPlace) Sync([]*backing.Dir, envelope.ID) error { return nil }
func (xattrPlace) Sidecar([]byte) string                  { return "" }
