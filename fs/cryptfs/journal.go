package cryptfs

import (
	"crypto/hmac"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/record"
)

// journal is the store's list of files being written, and a redo record for
// each of them. A file is entered before its first change and leaves when its
// end on the disk is sealed. Entries are authenticated under the store key:
// whoever could add one could have a file that they cut sealed again.
type journal struct {
	meta *backing.Dir
	key  *keymem.Key

	mu   sync.Mutex
	list *backing.File
	free []int
	next int
	redo map[int]*backing.File
}

func newJournal(meta *backing.Dir, key *keymem.Key) (*journal, error) {
	f, err := meta.Open(writingFile, unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		return nil, err
	}
	return &journal{meta: meta, key: key, list: f, redo: map[int]*backing.File{}}, nil
}

func (j *journal) close() {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, f := range j.redo {
		_ = f.Close()
	}
	_ = j.list.Close()
	j.key.Wipe()
}

// begin enters a file and returns its slot.
func (j *journal) begin(id envelope.ID, ino uint64) (int, error) {
	j.mu.Lock()
	slot := j.next
	if n := len(j.free); n > 0 {
		slot, j.free = j.free[n-1], j.free[:n-1]
	} else {
		j.next++
	}
	j.mu.Unlock()
	err := j.write(slot, id, ino, 0)
	if err != nil {
		j.mu.Lock()
		j.free = append(j.free, slot)
		j.mu.Unlock()
	}
	return slot, err
}

// write enters what is true of a slot's file now; durable is the plaintext size
// that an fsync promised.
func (j *journal) write(slot int, id envelope.ID, ino uint64, durable int64) error {
	w := record.Writing{Slot: slot, File: id, Ino: ino, Durable: durable}
	w.MAC = hmacSum(j.key, w.Body())
	return wrapf(j.list.WriteAt(w.Encode(), int64(slot)*record.WritingLen), "writing list")
}

// end frees a slot.
func (j *journal) end(slot int) error {
	if err := j.list.WriteAt(make([]byte, record.WritingLen), int64(slot)*record.WritingLen); err != nil {
		return wrapf(err, "writing list")
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if f := j.redo[slot]; f != nil {
		delete(j.redo, slot)
		_ = f.Close()
		_ = j.meta.Unlink(redoName(slot)) // stale ones name another file and are skipped
	}
	j.free = append(j.free, slot)
	return nil
}

func redoName(slot int) string { return redoPrefix + strconv.Itoa(slot) }

// record replaces a slot's redo record; no operations: there is none any more.
func (j *journal) record(slot int, id envelope.ID, ops []record.Op) error {
	j.mu.Lock()
	f := j.redo[slot]
	j.mu.Unlock()
	if len(ops) == 0 {
		if f == nil {
			return nil
		}
		return f.Truncate(0)
	}
	if f == nil {
		var err error
		if f, err = j.meta.Open(redoName(slot), unix.O_RDWR|unix.O_CREAT|unix.O_TRUNC, 0o600); err != nil {
			return wrapf(err, "redo record")
		}
		j.mu.Lock()
		j.redo[slot] = f
		j.mu.Unlock()
	}
	buf := redoBufs.Get().(*[]byte)
	defer redoBufs.Put(buf)
	b, mac := record.AppendRedo((*buf)[:0], id, ops)
	sum := hmacSum(j.key, b)
	copy(b[mac:], sum[:])
	*buf = b
	return wrapf(f.WriteAt(b, 0), "redo record")
}

var redoBufs = sync.Pool{New: func() any { return new([]byte) }}

// entries reads the whole list. Slots that are damaged or not ours are told in
// bad, and left alone.
func (j *journal) entries() (out []*record.Writing, bad []error, err error) {
	size, err := j.list.Size()
	if err != nil {
		return nil, nil, err
	}
	b := make([]byte, record.WritingLen)
	for slot := 0; int64(slot)*record.WritingLen < size; slot++ {
		j.next = slot + 1
		n, err := j.list.ReadAt(b, int64(slot)*record.WritingLen)
		if err != nil {
			return nil, nil, err
		}
		w, err := record.ParseWriting(b[:n], slot)
		if err == nil && w != nil {
			if sum := hmacSum(j.key, w.Body()); !hmac.Equal(sum[:], w.MAC[:]) {
				err = fmt.Errorf("writing list slot %d: %w", slot, ErrRecord)
			}
		}
		switch {
		case err != nil:
			bad = append(bad, err)
		case w == nil:
			j.free = append(j.free, slot)
		default:
			out = append(out, w)
		}
	}
	return out, bad, nil
}

// pending returns the redo operations of a slot, if there is a whole record for
// this file.
func (j *journal) pending(slot int, id envelope.ID) ([]record.Op, error) {
	b, err := j.meta.ReadFile(redoName(slot), record.MaxRedo)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	file, ops, mac, signed, err := record.ParseRedo(b)
	if err != nil || file != id {
		return nil, nil // torn, so not begun; or of the slot's file before
	}
	if sum := hmacSum(j.key, signed); !hmac.Equal(sum[:], mac[:]) {
		return nil, nil // torn
	}
	return ops, nil
}

// reset empties the list if nothing is in it, and clears away what belonged to
// entries of before, and temporaries.
func (j *journal) reset() error {
	err := j.meta.Each(func(e backing.Entry) bool {
		if isTemp(e.Name) || strings.HasPrefix(e.Name, redoPrefix) {
			_ = j.meta.Unlink(e.Name) // they do no harm
		}
		return true
	})
	j.free, j.next = nil, 0
	return errors.Join(err, j.list.Truncate(0))
}
