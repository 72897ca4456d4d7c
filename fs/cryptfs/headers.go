package cryptfs

import (
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/placement"
)

const idLen = placement.IDLen

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
	if v.place.Sidecar(make([]byte, idLen)) == "" || st.Type() != unix.S_IFREG || st.Size == 0 {
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
	return v.place.Sidecar(b[:n]), nil
}

// dropSidecar removes a sidecar from a directory in which its file had a name
// just now, unless it still has one there or another file needs the sidecar.
func (v *Volume) dropSidecar(dir *backing.Dir, name string, st backing.Stat) {
	if name == "" {
		return
	}
	if st.Nlink > 1 {
		if own, err := dir.Stat(name); err != nil || own.Nlink == 1 {
			return // a directory that is not known yet has a name of the file: it is looked for there
		}
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
