package cryptfs

import (
	"context"
	"encoding/hex"
	"errors"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// halfRekeyed is what a rekey that was killed left in its staging directory.
type halfRekeyed struct {
	v     *Volume
	stage *backing.Dir
	temps []string
	swaps map[inoKey]string       // old file -> what comes after swapOld
	side  map[string]string       // the same -> sidecar of the new file
	cars  map[string]bool         // sidecars that may be somewhere for nothing
	marks map[string]backing.Stat // directory id, hexadecimal -> its times
	count int
}

// finishRekey brings the store to a state that anybody may see. The job itself
// is not gone on with.
func (v *Volume) finishRekey(ctx context.Context) error {
	stage, err := v.meta.OpenDir(rekeyDir)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = stage.Close() }()
	h := &halfRekeyed{v: v, stage: stage, swaps: map[inoKey]string{}, side: map[string]string{}, cars: map[string]bool{}, marks: map[string]backing.Stat{}}
	if err := h.look(); err != nil {
		return err
	}
	if len(h.swaps)+len(h.cars)+len(h.marks) > 0 {
		v.log.Warn("a rekey was interrupted: finishing the files that it was at", "files", len(h.swaps), "directories", len(h.marks))
		if _, err := h.dir(ctx, v.root); err != nil {
			return err
		}
	}
	if err := h.clear(); err != nil {
		return err
	}
	if _, err := stage.Stat(jobFile); errors.Is(err, unix.ENOENT) {
		return v.endStage(stage, rekeyDir)
	}
	return nil
}

// look reads the staging directory. A file with only one of its two links there
// was not begun, or is done.
func (h *halfRekeyed) look() error {
	entries, err := h.stage.ReadDir()
	if err != nil {
		return err
	}
	there := map[string]backing.Stat{}
	for _, e := range entries {
		st, err := h.stage.Stat(e.Name)
		if err != nil {
			return err
		}
		there[e.Name] = st
		id, mark := strings.CutPrefix(e.Name, dirMark)
		switch {
		case isTemp(e.Name):
			h.temps = append(h.temps, e.Name)
		case strings.HasPrefix(e.Name, sidecarPrefix):
			h.cars[e.Name] = true
		case mark:
			h.marks[id] = st
		}
	}
	for name, st := range there {
		if n, ok := strings.CutPrefix(name, swapNew); ok {
			old, armed := there[swapOld+n]
			if !armed {
				h.temps = append(h.temps, name)
				continue
			}
			h.swaps[keyOf(old)] = n
			if h.side[n], err = h.v.sidecarOf(h.stage, name, st); err != nil {
				return err
			}
		}
		if n, ok := strings.CutPrefix(name, swapOld); ok {
			if _, armed := there[swapNew+n]; !armed {
				h.temps = append(h.temps, name)
			}
		}
	}
	return nil
}

// dir finishes a directory and what is below it. It needs no key.
func (h *halfRekeyed) dir(ctx context.Context, d *backing.Dir) (more bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	var entries []backing.Entry
	if err := h.v.let(d, func() error { entries, err = d.ReadDir(); return err }); err != nil {
		return false, err
	}
	for _, e := range entries {
		if e.Name == metaDir || isInternal(e.Name) {
			continue
		}
		if e.Type == unix.S_IFDIR || e.Type == 0 {
			var sub *backing.Dir
			if err := h.v.let(d, func() (err error) { sub, err = d.OpenDir(e.Name); return err }); err == nil {
				_, err = h.dir(ctx, sub)
				_ = sub.Close()
				if err != nil {
					return false, err
				}
				continue
			}
		}
		if err := h.name(d, e.Name); err != nil {
			return false, err
		}
	}
	return true, h.tidy(d, entries)
}

// name moves a name that an interrupted rekey has not moved.
func (h *halfRekeyed) name(d *backing.Dir, entry string) error {
	if len(h.swaps) == 0 {
		return nil
	}
	var st backing.Stat
	err := h.v.let(d, func() (err error) { st, err = d.Stat(entry); return err })
	if err != nil {
		return err
	}
	n, ok := h.swaps[keyOf(st)]
	if !ok {
		return nil
	}
	if side := h.side[n]; side != "" {
		err := h.v.let(d, func() error { return h.stage.Link(side, d, side) })
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	h.count++
	h.v.counters.repairs.Add(1)
	return h.v.moveName(h.stage, swapNew+n, d, entry)
}

// tidy removes sidecars that nothing in the directory needs, and puts its times
// back.
func (h *halfRekeyed) tidy(d *backing.Dir, before []backing.Entry) error {
	if len(h.cars) > 0 {
		if err := h.removeSidecars(d, before); err != nil {
			return err
		}
	}
	if len(h.marks) == 0 {
		return nil
	}
	var id string
	err := h.v.let(d, func() error {
		rec, _, err := readDirRecord(d)
		if err == nil {
			id = hex.EncodeToString(rec.ID[:])
		}
		return err
	})
	if errors.Is(err, ErrDirRecord) {
		return nil // not one that a rekey changes
	}
	st, ok := h.marks[id]
	if err != nil || !ok {
		return err
	}
	if err := h.v.let(d, d.Sync); err != nil {
		return err
	}
	return h.v.let(d, func() error { return d.SetTimes(".", statxTime(st.Atime), statxTime(st.Mtime)) })
}

func (h *halfRekeyed) removeSidecars(d *backing.Dir, before []backing.Entry) error {
	var here []string
	for _, e := range before {
		if h.cars[e.Name] {
			here = append(here, e.Name)
		}
	}
	if len(here) == 0 {
		return nil
	}
	if err := h.v.let(d, d.Sync); err != nil { // the names that made them needless
		return err
	}
	needed, err := h.v.companions(d)
	if err != nil {
		return err
	}
	for _, name := range here {
		if len(needed[name]) > 0 {
			continue
		}
		if err := h.v.step("remove sidecar"); err != nil {
			return err
		}
		if err := h.v.let(d, func() error { return d.Unlink(name) }); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}

// clear empties the staging directory but for the job record. Of a file whose
// names moved the old link goes first: the new one alone means done.
func (h *halfRekeyed) clear() error {
	names := h.temps
	for _, n := range h.swaps {
		names = append(names, swapOld+n, swapNew+n)
	}
	for name := range h.cars {
		names = append(names, name)
	}
	for id := range h.marks {
		names = append(names, dirMark+id)
	}
	for _, name := range names {
		if err := h.v.step("clear staging"); err != nil {
			return err
		}
		if err := h.stage.Unlink(name); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}
