package placement

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// sidecarPlace: the header is a file of its own, named by the file id, in every
// directory where the store file has a name. The store file begins with the id.
type sidecarPlace struct{ size int }

func (p sidecarPlace) Read(disk *backing.File, dirs []*backing.Dir) ([]byte, error) {
	b := make([]byte, IDLen)
	n, err := disk.ReadAt(b, 0)
	if err != nil {
		return nil, err
	}
	if n < IDLen {
		return nil, fmt.Errorf("%d bytes: %w", n, ErrHeader)
	}
	for _, d := range dirs {
		var block []byte
		err := Lifted(d, func() (err error) { block, err = d.ReadFile(p.Sidecar(b), p.size); return err })
		if err == nil || !errors.Is(err, unix.ENOENT) {
			return block, err
		}
	}
	return nil, fmt.Errorf("no file %s: %w", p.Sidecar(b), ErrHeader)
}

func (p sidecarPlace) Write(_ *backing.File, dirs []*backing.Dir, id envelope.ID, block []byte) ([]byte, error) {
	name := p.Sidecar(id[:])
	// In place, so that every name of it sees it. It is one page, or is done
	// again from the journal record of the change.
	first, err := p.overwrite(dirs, name, block, false)
	if err != nil {
		return nil, err
	}
	for _, d := range dirs {
		var err error
		if first == nil {
			err = Lifted(d, func() error { return d.WriteNew(name, block, 0o600, false) })
			first = d
		} else {
			err = Lifted(d, func() error { return first.Link(name, d, name) })
		}
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, err
		}
	}
	return id[:], nil
}

// overwrite writes the block into the sidecar that is there and returns the
// directory that it was found in; nil if there is none.
func (p sidecarPlace) overwrite(dirs []*backing.Dir, name string, block []byte, sync bool) (*backing.Dir, error) {
	for _, d := range dirs {
		f, err := d.Open(name, unix.O_WRONLY, 0)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err == nil {
			err = f.WriteAt(block, 0)
			if err == nil && sync {
				err = f.Sync()
			}
			if cerr := f.Close(); err == nil {
				err = cerr
			}
		}
		return d, err
	}
	return nil, nil
}

func (p sidecarPlace) Rewrite(_ *backing.File, dirs []*backing.Dir, id envelope.ID, block []byte) error {
	d, err := p.overwrite(dirs, p.Sidecar(id[:]), block, true)
	if err == nil && d == nil {
		return fmt.Errorf("no file %s: %w", p.Sidecar(id[:]), ErrHeader)
	}
	return err
}

func (p sidecarPlace) Sync(dirs []*backing.Dir, id envelope.ID) error {
	found := false
	for _, d := range dirs {
		f, err := d.Open(p.Sidecar(id[:]), unix.O_RDONLY, 0)
		if errors.Is(err, unix.ENOENT) { // this name was not known when the header was written
			continue
		}
		if err != nil {
			return err
		}
		found = true
		err = f.Sync()
		_ = f.Close()
		if err == nil {
			err = Lifted(d, d.Sync) // its name: what was promised is nothing without it
		}
		if err != nil {
			return err
		}
	}
	if !found {
		return fmt.Errorf("no file %s: %w", p.Sidecar(id[:]), ErrHeader)
	}
	return nil
}

func (sidecarPlace) Body() bool { return false }

func (sidecarPlace) Sidecar(b []byte) string {
	if len(b) < IDLen {
		return ""
	}
	return envelope.SidecarName(envelope.ID(b[:IDLen]))
}
