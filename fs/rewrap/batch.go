package rewrap

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/placement"
	"github.com/kmsfs/kmsfs/fs/record"
)

// SameFile reports whether two header blocks are of one file in one state: all
// that the data key authenticates is equal. Blocks that are no headers are not.
func SameFile(a, b []byte) bool {
	c := envelope.Committed(a)
	return len(a) == len(b) && c != nil && bytes.Equal(c, envelope.Committed(b))
}

// Replace returns the block of a header with new recipients: those of next, which
// is another block of the same file (else ErrChanged). A shared header keeps its
// branch and its data key.
func Replace(have, next []byte) ([]byte, error) {
	if !SameFile(have, next) {
		return nil, ErrChanged
	}
	h, err := envelope.Parse(have)
	if err != nil {
		return nil, err
	}
	n, err := envelope.Parse(next)
	if err != nil {
		return nil, err
	}
	if h.Branch != n.Branch || h.Sealed != n.Sealed {
		return nil, ErrChanged
	}
	h.Recipients = n.Recipients
	return h.Encode(len(have))
}

// Batch is the file that the headers of a batch are in while they are written
// in place. It belongs to whoever has the store's lock.
type Batch struct {
	root  *backing.Dir
	meta  *backing.Dir
	place placement.Place

	mu sync.Mutex
}

// NewBatch returns the batch file of the store whose root and .kmsfs these are.
// They stay the caller's.
func NewBatch(root, meta *backing.Dir, place placement.Place) *Batch {
	return &Batch{root: root, meta: meta, place: place}
}

// Do makes the batch durable, calls write, which writes its headers in place,
// durably, and clears the batch. What write left undone because the process
// ended is done by Recover.
func (b *Batch) Do(files []record.Rewrapped, write func()) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	f, err := b.meta.Open(record.RewrapFile, unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	// Cut first: the batch of before is done, and a tail of it would make this
	// one look torn.
	err = f.Truncate(0)
	if err == nil {
		err = f.WriteAt(record.EncodeRewrap(files), 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = b.meta.Sync()
	}
	if err != nil {
		return fmt.Errorf("rewrap batch: %w", err)
	}
	write()
	if err = f.Truncate(0); err == nil {
		err = f.Sync()
	}
	if err != nil {
		return fmt.Errorf("rewrap batch: %w", err)
	}
	return nil
}

// Recover writes the headers of a batch once more that a crash left. A batch
// that is torn was never begun. What cannot be written stays for the next time.
func (b *Batch) Recover(log *slog.Logger) error {
	data, err := b.meta.ReadFile(record.RewrapFile, record.MaxRewrap)
	if errors.Is(err, unix.ENOENT) || err == nil && len(data) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	files, err := record.ParseRewrap(data)
	if errors.Is(err, record.ErrFormat) {
		log.Warn("rewrap: a batch that a crash tore was not begun, and is dropped", "error", err)
		return b.clear()
	}
	if err != nil {
		return err
	}
	if err := b.again(files, log); err != nil {
		return err
	}
	return b.clear()
}

func (b *Batch) clear() error {
	f, err := b.meta.Open(record.RewrapFile, unix.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if err := f.Truncate(0); err != nil {
		return err
	}
	return f.Sync()
}

// again writes the headers of files: where they were, and, as files may have
// been renamed before the crash, wherever else the same header is.
func (b *Batch) again(files []record.Rewrapped, log *slog.Logger) error {
	var missing []record.Rewrapped
	for _, f := range files {
		found, err := b.one(f)
		if err != nil {
			return fmt.Errorf("rewrap batch, %s: %w", f.Path, err)
		}
		if !found {
			missing = append(missing, f)
		}
	}
	log.Warn("rewrap: headers of a batch written again after a crash", "files", len(files)-len(missing))
	if len(missing) == 0 {
		return nil
	}
	return b.blocks(b.root, "", func(at string, block []byte) error {
		for _, f := range missing {
			if SameFile(block, f.Block) {
				f.Path = at
				_, err := b.one(f)
				return err
			}
		}
		return nil
	})
}

// one writes one header of a batch, if the file is there and still has what the
// data key authenticates. The recipients on the disk may be torn, and are not
// looked at.
func (b *Batch) one(f record.Rewrapped) (found bool, err error) {
	dir, entry, err := OpenDir(b.root, f.Path)
	if err != nil {
		return false, ignoreGone(err)
	}
	defer func() { _ = dir.Close() }()
	disk, err := placement.Open(dir, entry, unix.O_RDWR)
	if err != nil {
		return false, ignoreGone(err)
	}
	defer func() { _ = disk.Close() }()
	have, err := b.place.Read(disk, []*backing.Dir{dir})
	if err != nil {
		if errors.Is(err, placement.ErrHeader) {
			return false, nil
		}
		return false, err
	}
	if !SameFile(have, f.Block) {
		return false, nil
	}
	h, err := envelope.Parse(f.Block)
	if err != nil {
		return false, err
	}
	return true, b.place.Rewrite(disk, []*backing.Dir{dir}, h.File, f.Block)
}

// blocks calls f for the header block of every file, whether or not it parses.
func (b *Batch) blocks(d *backing.Dir, at string, f func(at string, block []byte) error) error {
	entries, err := d.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range entries {
		if isInternal(e.Name) {
			continue
		}
		where := path.Join(at, e.Name)
		if sub, err := d.OpenDir(e.Name); err == nil {
			err = b.blocks(sub, where, f)
			_ = sub.Close()
			if err != nil {
				return err
			}
			continue
		}
		if st, err := d.Stat(e.Name); err != nil || st.Type() != unix.S_IFREG || st.Size == 0 {
			continue
		}
		disk, err := placement.Open(d, e.Name, unix.O_RDONLY)
		if err != nil {
			return err
		}
		block, err := b.place.Read(disk, []*backing.Dir{d})
		_ = disk.Close()
		if err != nil {
			continue // no header, so not the one that is looked for
		}
		if err := f(where, block); err != nil {
			return err
		}
	}
	return nil
}

func ignoreGone(err error) error {
	if gone(err) {
		return nil
	}
	return err
}
