package cryptfs

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
	"github.com/kmsfs/kmsfs/fs/record"
)

// recover finishes what a crash left: files in the writing list are brought to
// a whole state, and temporaries that nobody saw go. What cannot be repaired
// now, because a key is not to be had, stays in the list for the next time.
func (v *Volume) recover(ctx context.Context) error {
	entries, bad, err := v.journal.entries()
	if err != nil {
		return err
	}
	for _, b := range bad {
		v.log.Error("writing list: entry left alone", "error", b, "audit", true)
	}
	if len(entries) == 0 {
		if len(bad) == 0 {
			return v.journal.reset()
		}
		return nil
	}
	v.log.Warn("the store was not unmounted cleanly: finishing files that were being written", "files", len(entries))
	found, err := v.locate(entries)
	if err != nil {
		return err
	}
	for _, w := range entries {
		v.recoverOne(ctx, w, found[w.Slot])
	}
	return nil
}

// lost is a file of the writing list, found again.
type lost struct {
	dir   *backing.Dir // closed by recoverOne
	entry string
}

// locate finds the files of the list in the store: by inode number, and those
// that are not where they were (the store was copied) by the id in their header.
func (v *Volume) locate(entries []*record.Writing) (map[int]lost, error) {
	byIno, byID := map[uint64]*record.Writing{}, map[envelope.ID]*record.Writing{}
	for _, w := range entries {
		byIno[w.Ino], byID[w.File] = w, w
	}
	found := map[int]lost{}
	take := func(w *record.Writing, d *backing.Dir, entry string) {
		if own, err := d.OpenDir("."); err == nil {
			found[w.Slot] = lost{own, entry}
		}
	}
	err := v.walk(func(d *backing.Dir, e backing.Entry) bool {
		if isTemp(e.Name) {
			v.clearTemp(d, e)
			return true
		}
		if w := byIno[e.Ino]; w != nil && !isInternal(e.Name) && e.Type != unix.S_IFDIR {
			if _, again := found[w.Slot]; !again && v.idOf(d, e.Name) == w.File {
				take(w, d, e.Name)
			}
		}
		return true
	})
	if err != nil || len(found) == len(entries) {
		return found, err
	}
	err = v.walk(func(d *backing.Dir, e backing.Entry) bool {
		if isInternal(e.Name) || e.Type != unix.S_IFREG {
			return true
		}
		w := byID[v.idOf(d, e.Name)]
		if w == nil {
			return true
		}
		if _, again := found[w.Slot]; !again {
			take(w, d, e.Name)
		}
		return len(found) < len(entries)
	})
	return found, err
}

// idOf returns the file id in an entry's header, zero if it has none.
func (v *Volume) idOf(d *backing.Dir, entry string) envelope.ID {
	f, err := v.openEntry(d, entry, unix.O_RDONLY)
	if err != nil {
		return envelope.ID{}
	}
	defer func() { _ = f.Close() }()
	block, err := v.place.Read(f, []*backing.Dir{d})
	if err != nil {
		return envelope.ID{}
	}
	h, err := envelope.Parse(block)
	if err != nil {
		return envelope.ID{}
	}
	return h.File
}

func (v *Volume) recoverOne(ctx context.Context, w *record.Writing, at lost) {
	id := envelope.ID(w.File)
	if at.dir == nil {
		v.finishTorn(w)
		return
	}
	defer func() { _ = at.dir.Close() }()
	did, err := v.repair(ctx, w, at)
	if err != nil {
		v.log.Error("file could not be repaired; it stays in the list", "file", id, "entry", at.entry, "error", err, "audit", true)
		return
	}
	if did != "" {
		v.counters.repairs.Add(1)
		v.log.Warn("file repaired after a crash", "file", id, "entry", at.entry, "did", did)
	}
	if err := v.journal.end(w.Slot); err != nil {
		v.log.Error("writing list", "error", err)
	}
}

// finishTorn ends an entry whose file is not in the store: it was removed, or
// the crash came before its header. An empty file is all that is left of the
// latter, and is cut to that.
func (v *Volume) finishTorn(w *record.Writing) {
	var cut error
	_ = v.walk(func(d *backing.Dir, e backing.Entry) bool {
		if e.Ino != w.Ino || isInternal(e.Name) || e.Type == unix.S_IFDIR {
			return true
		}
		cut = v.cutTorn(d, e.Name, w)
		return false
	})
	if cut != nil {
		v.log.Error("file could not be repaired; it stays in the list", "file", envelope.ID(w.File), "error", cut, "audit", true)
		return
	}
	if err := v.journal.end(w.Slot); err != nil {
		v.log.Error("writing list", "error", err)
	}
}

// cutTorn empties a file that has the entry's inode number and not even a whole
// header. Nothing of it was promised to anybody.
func (v *Volume) cutTorn(d *backing.Dir, entry string, w *record.Writing) error {
	st, err := d.Stat(entry)
	if err != nil || st.Type() != unix.S_IFREG || st.Size == 0 {
		return err
	}
	base := int64(v.layout.Placement.Base(v.layout.HeaderSize))
	if st.Size > base || w.Durable > 0 {
		return nil // another file that got the number
	}
	f, err := v.openEntry(d, entry, unix.O_RDWR)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	v.counters.repairs.Add(1)
	v.log.Warn("file repaired after a crash", "entry", entry, "did", "it had no whole header and is empty now")
	return f.Truncate(0)
}

func (v *Volume) repair(ctx context.Context, w *record.Writing, at lost) (string, error) {
	cl, err := v.classAt(ctx, at.dir)
	if err != nil {
		return "", err
	}
	disk, err := v.openEntry(at.dir, at.entry, unix.O_RDWR)
	if err != nil {
		return "", err
	}
	defer func() { _ = disk.Close() }()
	ops, err := v.journal.pending(w.Slot, w.File)
	if err == nil {
		err = chunkfile.Apply(disk, ops)
	}
	if err != nil {
		return "", err
	}
	st, err := disk.Stat()
	if err != nil || st.Size == 0 {
		return "", err
	}
	block, err := v.place.Read(disk, []*backing.Dir{at.dir})
	if err != nil {
		return "", err
	}
	sec, err := v.unwrap(ctx, cl, block)
	if err != nil {
		return "", err
	}
	defer sec.wipe()
	did, _, err := chunkfile.Repair(chunkfile.Config{
		Disk: disk, Geo: cl.geo, Codec: sec.codec, Size: st.Size, Sparse: sec.header.Sparse,
		Owner: &repairOwner{v: v, slot: w.Slot, id: w.File},
	}, w.Durable)
	if err == nil {
		err = disk.Sync()
	}
	return did, err
}

// classAt returns the class of files in a directory, checked.
func (v *Volume) classAt(ctx context.Context, dir *backing.Dir) (*class, error) {
	cl, _, _, err := v.dirAt(ctx, dir)
	return cl, err
}

// dirAt reads and checks a directory's record without a node.
func (v *Volume) dirAt(ctx context.Context, dir *backing.Dir) (*class, *record.Dir, *nameenc.Cipher, error) {
	d, _, err := readDirRecord(dir)
	if err != nil {
		return nil, nil, nil, err
	}
	cl := v.classes[d.Class]
	if cl == nil {
		return nil, d, nil, fmt.Errorf("class of the directory's record: %w", ErrNoClass)
	}
	cipher, err := v.names(ctx, cl)
	if err != nil {
		return cl, d, nil, err
	}
	return cl, d, cipher, checkDirRecord(cipher, d)
}

// repairOwner lets Repair use the redo record of the slot that the file has.
type repairOwner struct {
	v    *Volume
	slot int
	id   envelope.ID
}

var errRepairHeader = errors.New("cryptfs: repair does not write headers")

func (o *repairOwner) Begin() error                { return nil }
func (o *repairOwner) Redo(ops []record.Op) error  { return o.v.journal.record(o.slot, o.id, ops) }
func (o *repairOwner) Header(bool) ([]byte, error) { return nil, errRepairHeader }
func (o *repairOwner) Emptied()                    {}
func (o *repairOwner) Tight(int) bool              { return false }
func (o *repairOwner) Synced(int64) error          { return nil }

// isTemp reports whether an entry is a temporary: something that was never
// given its name.
func isTemp(entry string) bool {
	return len(entry) > len(backing.TempPrefix) && entry[:len(backing.TempPrefix)] == backing.TempPrefix
}

// clearTemp removes a temporary. A directory goes only if nothing but the
// store's own records is in it.
func (v *Volume) clearTemp(d *backing.Dir, e backing.Entry) {
	if e.Type == unix.S_IFDIR {
		if checkEmpty(d, e.Name) == nil {
			removeDir(d, e.Name)
		}
		return
	}
	_ = d.Unlink(e.Name)
}
