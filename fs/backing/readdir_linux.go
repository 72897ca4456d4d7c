package backing

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Entry is one name of a directory, as getdents64(2) tells it.
type Entry struct {
	Name string
	Ino  uint64
	Type uint32 // S_IFMT bits, 0 where the file system does not say
}

// ReadDir returns every entry except "." and "..", in the file system's order.
// It opens the directory anew, so that concurrent readers do not share a
// position.
func (d *Dir) ReadDir() ([]Entry, error) {
	var out []Entry
	err := d.Each(func(e Entry) bool { out = append(out, e); return true })
	return out, err
}

// Each calls f for every entry until f returns false.
func (d *Dir) Each(f func(Entry) bool) error {
	own, err := d.OpenDir(".")
	if err != nil {
		return err
	}
	defer func() { _ = own.Close() }()
	buf := make([]byte, 32<<10)
	for {
		var n int
		err := own.do(&Op{Call: "readdir"}, func() error {
			return retry(func() (err error) { n, err = unix.Getdents(own.fd, buf); return err })
		})
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		if !parseDirents(buf[:n], f) {
			return nil
		}
	}
}

// parseDirents walks struct linux_dirent64 records: ino 8, off 8, reclen 2,
// type 1, name NUL-terminated.
func parseDirents(b []byte, f func(Entry) bool) bool {
	const head = 19
	for len(b) > head {
		reclen := int(binary.NativeEndian.Uint16(b[16:]))
		if reclen <= head || reclen > len(b) {
			return true
		}
		name := b[head:reclen]
		if i := bytes.IndexByte(name, 0); i >= 0 {
			name = name[:i]
		}
		e := Entry{Name: string(name), Ino: binary.NativeEndian.Uint64(b), Type: uint32(b[18]) << 12}
		b = b[reclen:]
		if e.Name == "." || e.Name == ".." {
			continue
		}
		if !f(e) {
			return false
		}
	}
	return true
}
