package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// goldenAttr is how PAX archives keep extended attributes, which version
// control does not.
const goldenAttr = "SCHILY.xattr."

// goldenPack writes a directory to a new archive, attributes, links and times
// included.
func goldenPack(t *testing.T, dir, archive string) {
	t.Helper()
	var buf bytes.Buffer
	zip, err := gzip.NewWriterLevel(&buf, gzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	w, inodes := tar.NewWriter(zip), map[uint64]string{}
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		return goldenPackOne(w, path, name, inodes)
	})
	if err = errors.Join(err, w.Close(), zip.Close()); err != nil {
		t.Fatal(err)
	}
	goldenNew(t, archive, buf.Bytes())
}

func goldenPackOne(w *tar.Writer, path, name string, inodes map[uint64]string) error {
	fi, err := os.Lstat(path)
	if err != nil {
		return err
	}
	target := ""
	if fi.Mode().Type() == fs.ModeSymlink {
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(fi, target)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err
	}
	h.Name, h.Format, h.Uname, h.Gname = name, tar.FormatPAX, "", ""
	if st.Nlink > 1 && !fi.IsDir() {
		if first, twice := inodes[st.Ino]; twice {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else {
			inodes[st.Ino] = name
		}
	}
	attrs, err := readXattrs(path)
	if err != nil {
		return err
	}
	for name, value := range attrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[goldenAttr+name] = value
	}
	if err := w.WriteHeader(h); err != nil || h.Typeflag != tar.TypeReg {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}

// goldenUnpack is the inverse of goldenPack.
func goldenUnpack(t *testing.T, archive, dir string) {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zip, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	r := tar.NewReader(zip)
	var done []*tar.Header
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = goldenUnpackOne(r, h, filepath.Join(dir, h.Name), dir)
		}
		if err != nil {
			t.Fatalf("%s: %v", archive, err)
		}
		done = append(done, h)
	}
	for _, h := range slices.Backward(done) { // a directory after what is in it
		ts := unix.NsecToTimespec(h.ModTime.UnixNano())
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, h.Name), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			t.Fatal(err)
		}
	}
}

func goldenUnpackOne(r io.Reader, h *tar.Header, path, dir string) error {
	var err error
	switch h.Typeflag {
	case tar.TypeDir:
		err = os.Mkdir(path, 0o700)
	case tar.TypeSymlink:
		err = os.Symlink(h.Linkname, path)
	case tar.TypeFifo:
		err = unix.Mkfifo(path, 0o600)
	case tar.TypeLink:
		return os.Link(filepath.Join(dir, h.Linkname), path)
	default:
		var b []byte
		if b, err = io.ReadAll(r); err == nil {
			err = os.WriteFile(path, b, 0o600)
		}
	}
	if err == nil {
		err = os.Lchown(path, h.Uid, h.Gid)
	}
	if err == nil && h.Typeflag != tar.TypeSymlink {
		err = unix.Chmod(path, uint32(h.Mode)&0o7777)
	}
	for name, value := range h.PAXRecords {
		if attr, ok := strings.CutPrefix(name, goldenAttr); ok && err == nil {
			err = unix.Lsetxattr(path, attr, []byte(value), 0)
		}
	}
	return err
}
