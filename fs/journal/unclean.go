package journal

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// Unclean tells, without a key and so without authentication, whether a writer
// has the store just now, or ended without saying that all is done. It is for
// those who only want to know whether a mount is needed first.
func Unclean(meta *backing.Dir) (bool, error) {
	dir, err := meta.OpenDir(dirName)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("journal: %w", err)
	}
	defer func() { _ = dir.Close() }() // read only: nothing to lose
	var newest, done uint32
	for _, name := range fileNames {
		epoch, d, err := peek(dir, name)
		if err != nil {
			return false, fmt.Errorf("journal: %w", err)
		}
		newest, done = max(newest, epoch), max(done, d)
	}
	return done < newest, nil
}

// peek returns the epoch of a segment, and the greatest that it says is done.
func peek(dir *backing.Dir, name string) (epoch, finished uint32, err error) {
	f, err := dir.Open(name, unix.O_RDONLY, 0)
	if errors.Is(err, unix.ENOENT) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	defer func() { _ = f.Close() }()
	size, err := f.Size()
	if err != nil || size < headerLen {
		return 0, 0, err
	}
	w := &window{f: f, size: size}
	b, err := w.at(0, headerLen)
	if err != nil || len(b) < headerLen || string(b[:8]) != magic {
		return 0, 0, err
	}
	epoch = binary.BigEndian.Uint32(b[12:])
	for off := int64(headerLen); ; {
		record, err := w.record(off)
		if err != nil || record == nil {
			return epoch, finished, err
		}
		if Kind(record[0]) == done {
			finished = max(finished, binary.BigEndian.Uint32(record[recordHead:]))
		}
		off += int64(len(record))
	}
}
