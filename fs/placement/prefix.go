package placement

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// prefixPlace: the header is the first bytes of the store file.
type prefixPlace struct{ size int }

func (p prefixPlace) Read(disk *backing.File, _ []*backing.Dir) ([]byte, error) {
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

func (p prefixPlace) Write(_ *backing.File, _ []*backing.Dir, _ envelope.ID, block []byte) ([]byte, error) {
	return block, nil
}

// Rewrite leaves the file's modification time as it is: it is the plaintext's,
// which does not change.
func (p prefixPlace) Rewrite(disk *backing.File, _ []*backing.Dir, _ envelope.ID, block []byte) error {
	st, err := disk.Stat()
	if err != nil {
		return err
	}
	if err := disk.WriteAt(block, 0); err != nil {
		return err
	}
	mtime := unix.Timespec{Sec: st.Mtime.Sec, Nsec: int64(st.Mtime.Nsec)}
	if err := disk.SetTimes(unix.Timespec{Nsec: unix.UTIME_OMIT}, mtime); err != nil {
		return err
	}
	return disk.Datasync()
}

func (prefixPlace) Body() bool                             { return true }
func (prefixPlace) Sync([]*backing.Dir, envelope.ID) error { return nil }
func (prefixPlace) Sidecar([]byte) string                  { return "" }
