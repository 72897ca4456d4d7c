package cryptfs

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

const quarantineDir = "quarantine" // in metaDir

// openQuarantine opens the directory for what does not belong into the tree and
// may yet be wanted.
func (v *Volume) openQuarantine() (*backing.Dir, error) {
	if err := v.meta.Mkdir(quarantineDir, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, err
	}
	return v.meta.OpenDir(quarantineDir)
}

func quarantineName(entry string) string {
	return entry[:min(len(entry), 200)] + "." + backing.TempName()[len(backing.TempPrefix):]
}

// quarantine moves an entry out of the tree, rather than deleting it.
func (v *Volume) quarantine(d *backing.Dir, entry string) error {
	q, err := v.openQuarantine()
	if err != nil {
		return err
	}
	defer func() { _ = q.Close() }()
	return d.Rename(entry, q, quarantineName(entry), 0)
}

// quarantineBytes keeps what is about to be replaced.
func (v *Volume) quarantineBytes(name string, b []byte) error {
	q, err := v.openQuarantine()
	if err != nil {
		return err
	}
	defer func() { _ = q.Close() }()
	return q.WriteNew(quarantineName(name), b, 0o600, true)
}

// quarantineCopy keeps the bytes of a store file that is about to be cut.
func (v *Volume) quarantineCopy(entry string, f *backing.File) error {
	q, err := v.openQuarantine()
	if err != nil {
		return err
	}
	defer func() { _ = q.Close() }()
	out, err := q.Open(quarantineName(entry), unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for off := int64(0); err == nil; off += int64(len(buf)) {
		var n int
		if n, err = f.ReadAt(buf, off); err == nil {
			err = out.WriteAt(buf[:n], off)
		}
		if n < len(buf) {
			break
		}
	}
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return err
}
