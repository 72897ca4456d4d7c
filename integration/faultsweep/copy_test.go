package faultsweep

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// copyTree copies a store with hard links, attributes, modes and times. It starts
// no program: that one would have the descriptors of other runs for a moment, and
// so their locks.
func copyTree(t testing.TB, from, to string) {
	t.Helper()
	links := map[uint64]string{}
	err := filepath.WalkDir(from, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		at := to + strings.TrimPrefix(path, from)
		if first := links[st.Ino]; first != "" {
			return os.Link(first, at)
		}
		if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			links[st.Ino] = at
		}
		return copyOne(path, at, &st)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func copyOne(from, to string, st *unix.Stat_t) error {
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		err = unix.Mkdir(to, 0o700)
	case unix.S_IFLNK:
		var target string
		if target, err = os.Readlink(from); err == nil {
			err = os.Symlink(target, to)
		}
	case unix.S_IFREG:
		var b []byte
		if b, err = os.ReadFile(from); err == nil {
			err = os.WriteFile(to, b, 0o600)
		}
	default:
		err = unix.Mknod(to, st.Mode, int(st.Rdev))
	}
	if err == nil {
		err = copyAttrs(from, to)
	}
	if err != nil || st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return err
	}
	if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, to, []unix.Timespec{st.Atim, st.Mtim}, 0)
}

func copyAttrs(from, to string) error {
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(from, buf)
	if err != nil {
		return err
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 1<<16)
		m, err := unix.Lgetxattr(from, name, value)
		if err == nil {
			err = unix.Lsetxattr(to, name, value[:m], 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
