package cryptfs

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// finishDir is the second pass: it makes a staged directory, above/entry, equal
// to its source. a are the attributes that it shall have.
func (r *reclassifier) finishDir(ctx context.Context, src, dst *treeDir, above *backing.Dir, entry string, a fileAttrs) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	items, err := src.items(r.v, func(path string, err error) error { return fmt.Errorf("%s: %w", path, err) })
	if err != nil {
		return err
	}
	keep := map[string]bool{dirFile: true}
	for _, it := range items {
		s, err := dst.seal(it.name)
		if err == nil {
			err = r.finishItem(ctx, src, dst, it, s)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", src.child(it.name), err)
		}
		keep[s.entry], keep[s.companion()] = true, true
		st, err := dst.dir.Stat(s.entry)
		if err != nil {
			return err
		}
		side, err := r.v.sidecarOf(dst.dir, s.entry, st)
		if err != nil {
			return err
		}
		keep[side] = true
	}
	if err := r.removeOthers(dst, keep); err != nil {
		return err
	}
	if err := r.v.step("finish directory"); err != nil {
		return err
	}
	if err := a.apply(entryChanger{above, entry}, above.Attrs(entry)); err != nil {
		return err
	}
	return lifted(dst.dir, dst.dir.Sync)
}

// removeOthers removes what a staged directory has and the source has not: what
// was removed there since a run before, and what that left half done.
func (r *reclassifier) removeOthers(dst *treeDir, keep map[string]bool) error {
	entries, err := dst.list()
	if err != nil {
		return err
	}
	for _, e := range entries {
		if keep[e.Name] {
			continue
		}
		if err := r.v.step("remove needless"); err != nil {
			return err
		}
		if err := r.v.removeTree(dst.dir, e.Name); err != nil {
			return err
		}
	}
	return nil
}

func (r *reclassifier) finishItem(ctx context.Context, src, dst *treeDir, it treeItem, s stored) error {
	if it.st.Type() != unix.S_IFDIR {
		f := r.first[linkKey{keyOf(it.st), dst.class}]
		if it.st.Nlink < 2 || f == nil {
			return nil
		}
		return r.link(dst, s, f)
	}
	sub, err := r.v.subDir(ctx, src, it)
	if err != nil {
		return err
	}
	defer func() { _ = sub.dir.Close() }()
	to, err := r.openStaged(ctx, dst, s.entry, sub.path)
	if err != nil {
		return err
	}
	defer func() { _ = to.dir.Close() }()
	var raw fileAttrs
	err = r.v.let(src.dir, func() (err error) { raw, err = readAttrs(src.dir.Attrs(it.entry), it.st); return err })
	if err != nil {
		return err
	}
	a, err := raw.reseal(src.class, dst.class, src.cipher, dst.cipher)
	if err != nil {
		return err
	}
	return r.finishDir(ctx, sub, to, dst.dir, s.entry, a)
}

// link makes an entry another name of a copy.
func (r *reclassifier) link(dst *treeDir, s stored, f *firstCopy) error {
	from, err := openPath(r.stage, f.way)
	if err != nil {
		return err
	}
	defer func() { _ = from.Close() }()
	// The directory of the copy may be complete, with a mode that keeps out even
	// its owner.
	return r.v.let(from, func() error { return r.linkFrom(from, dst, s, f) })
}

func (r *reclassifier) linkFrom(from *backing.Dir, dst *treeDir, s stored, f *firstCopy) error {
	want, err := from.Stat(f.entry)
	if err != nil {
		return err
	}
	if have, err := dst.dir.Stat(s.entry); err == nil && keyOf(have) == keyOf(want) {
		return nil
	}
	side, err := r.v.sidecarOf(from, f.entry, want)
	if err != nil {
		return err
	}
	if err := r.v.step("link copy"); err != nil {
		return err
	}
	if side != "" {
		if err := from.Link(side, dst.dir, side); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	if err := placeName(dst.dir, s); err != nil {
		return err
	}
	tmp := backing.TempName()
	if err := from.Link(f.entry, dst.dir, tmp); err != nil {
		return err
	}
	return dst.dir.Rename(tmp, dst.dir, s.entry, 0)
}
