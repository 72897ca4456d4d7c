package backing

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Handle returns what the file system calls name in d, "" for d itself, whatever
// its names (name_to_handle_at(2)), for comparison only. It is nil where the
// file system has no such thing.
func (d *Dir) Handle(name string) []byte { return handleAt(d.fd, name) }

// Handle is Dir.Handle for an open file.
func (f *File) Handle() []byte { return handleAt(f.fd, "") }

func handleAt(fd int, name string) []byte {
	flags := 0
	if name == "" {
		flags = unix.AT_EMPTY_PATH
	}
	var h unix.FileHandle
	err := retry(func() (err error) {
		h, _, err = unix.NameToHandleAt(fd, name, flags)
		return err
	})
	if err != nil {
		return nil
	}
	return binary.LittleEndian.AppendUint32(h.Bytes(), uint32(h.Type()))
}
