package cryptfs

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// What lies in a rekey's staging directory beside the job record, and what a
// crash makes of it:
//
//	.kmsfs.tmp.*  a copy that has no name yet: removed
//	.kmsfs.h.ID   a sidecar, new or replaced, that a directory may hold for
//	              nothing: looked for in all directories
//	old.N, new.N  a file with several names, and what replaces it: both are
//	              there while the names change over, one after the other
//	dir.ID        a directory under change, by its id; its times are those that
//	              the directory had
const (
	swapOld = "old."
	swapNew = "new."
	dirMark = "dir."
)

// rekeyDirState is a directory in which files are replaced. Its times are put
// back when the last user leaves: its names are what they were.
type rekeyDirState struct {
	dir *backing.Dir
	key inoKey
	id  [16]byte

	users  int           // guarded by rekeyer.mu
	gone   chan struct{} // closed when the last user has settled it
	broken atomic.Bool   // the next open's recovery has to see to it

	mu      sync.Mutex
	marked  bool
	times   [2]unix.Timespec
	replace []replaced
}

// replaced is a sidecar that goes from a directory when that is durable, and from
// the staging directory when it is gone from all.
type replaced struct {
	old, new string
	ino      uint64 // of the store file that needed it
	left     *atomic.Int32
}

// enter returns the state of a directory, with a user more.
func (r *rekeyer) enter(t *treeDir) (*rekeyDirState, error) {
	st, err := t.dir.Stat("")
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	key := keyOf(st)
	for d := r.dirs[key]; d != nil; d = r.dirs[key] {
		if d.users > 0 {
			d.users++
			return d, nil
		}
		r.mu.Unlock() // its times are being put back
		<-d.gone
		r.mu.Lock()
	}
	var own *backing.Dir
	err = r.v.let(t.dir, func() (err error) { own, err = t.dir.OpenDir("."); return err })
	if err != nil {
		return nil, err
	}
	d := &rekeyDirState{dir: own, key: key, id: t.id, users: 1, gone: make(chan struct{})}
	d.broken.Store(r.spoiled[key])
	r.dirs[key] = d
	return d, nil
}

// spoil leaves a directory to the recovery: a sidecar may be in it for nothing.
func (d *rekeyDirState) spoil(s staged) {
	if s.side != "" {
		d.broken.Store(true)
	}
}

func (r *rekeyer) stay(d *rekeyDirState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	d.users++
}

// leave gives a directory back; the last one makes it durable, removes what was
// replaced, and puts its times back. What fails there is left to the recovery.
func (r *rekeyer) leave(d *rekeyDirState) {
	r.mu.Lock()
	d.users--
	last := d.users == 0
	r.mu.Unlock()
	if !last {
		return
	}
	defer func() {
		r.mu.Lock()
		delete(r.dirs, d.key)
		r.mu.Unlock()
		close(d.gone)
		_ = d.dir.Close()
	}()
	err := error(nil)
	if d.marked && !d.broken.Load() {
		err = r.settle(d)
	}
	if err != nil || d.broken.Load() {
		r.mu.Lock()
		r.spoiled[d.key] = true
		r.mu.Unlock()
		r.v.log.Warn("a directory is left for the next mount to tidy", "ino", d.key.ino, "error", err)
	}
}

func (r *rekeyer) settle(d *rekeyDirState) error {
	if err := r.v.let(d.dir, d.dir.Sync); err != nil {
		return err
	}
	for _, s := range d.replace {
		if err := r.v.step("remove sidecar"); err != nil {
			return err
		}
		if err := r.v.let(d.dir, func() error { return r.v.removeReplaced(d.dir, s) }); err != nil {
			return err
		}
		if s.left.Add(-1) == 0 {
			_ = r.stage.Unlink(s.old)
			_ = r.stage.Unlink(s.new)
		}
	}
	if err := r.v.step("put times back"); err != nil {
		return err
	}
	if err := r.v.let(d.dir, func() error { return d.dir.SetTimes(".", d.times[0], d.times[1]) }); err != nil {
		return err
	}
	return r.stage.Unlink(dirMark + hex.EncodeToString(d.id[:]))
}

// removeReplaced removes a sidecar that no file of the directory needs.
func (v *Volume) removeReplaced(d *backing.Dir, s replaced) error {
	if v.shared(d, s.old, s.ino) {
		return nil
	}
	if err := d.Unlink(s.old); !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// mark notes a directory's times before its first change.
func (r *rekeyer) mark(d *rekeyDirState) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.marked {
		return nil
	}
	name := dirMark + hex.EncodeToString(d.id[:])
	st, err := r.stage.Stat(name)
	if err == nil { // it was left to the recovery
		d.times = [2]unix.Timespec{statxTime(st.Atime), statxTime(st.Mtime)}
		d.marked = true
		return nil
	}
	if st, err = d.dir.Stat(""); err != nil {
		return err
	}
	d.times = [2]unix.Timespec{statxTime(st.Atime), statxTime(st.Mtime)}
	if err := r.v.step("mark directory"); err != nil {
		return err
	}
	tmp := backing.TempName()
	if err := r.stage.WriteNew(tmp, nil, 0o600, false); err != nil {
		return err
	}
	if err := r.stage.SetTimes(tmp, d.times[0], d.times[1]); err != nil {
		return err
	}
	if err := r.stage.Rename(tmp, r.stage, name, 0); err != nil {
		return err
	}
	d.marked = true
	return nil
}

// replace puts a copy under a new key in the place of a file.
func (r *rekeyer) replace(ctx context.Context, d *rekeyDirState, t *treeDir, it treeItem) error {
	v := r.v
	src, err := v.openSource(ctx, d.dir, it.entry, t.class)
	if err != nil {
		return err
	}
	defer src.close()
	if keyOf(src.st) != keyOf(it.st) {
		return unix.ESTALE
	}
	attrs, err := readAttrs(src.disk.Attrs(), src.st)
	if err != nil {
		return err
	}
	names := []linkName{{t.entry, it.entry, t.class}}
	if it.st.Nlink > 1 {
		if names = r.links[keyOf(it.st)]; len(names) == 0 {
			return unix.ESTALE // not there when the job was planned
		}
		if slices.ContainsFunc(names, func(n linkName) bool { return n.class != t.class }) {
			return fmt.Errorf("names in directories of several classes: %w", ErrHeader)
		}
	}
	var old string
	err = v.let(d.dir, func() (err error) { old, err = v.sidecarOf(d.dir, it.entry, it.st); return err })
	if err != nil {
		return err
	}
	s, err := v.copyFile(ctx, src, t.class, r.stage, v.jobs.newID(&r.job), attrs)
	if err != nil {
		return err
	}
	if len(names) > 1 {
		err = r.swap(ctx, d, it, names, s, old)
	} else {
		err = r.put(d, it, s, old)
	}
	if err != nil && !errors.Is(err, errStep) {
		_ = r.stage.Unlink(s.name) // its sidecar may be somewhere else by now
	}
	return err
}

// put gives the copy the name of a file that has no other.
func (r *rekeyer) put(d *rekeyDirState, it treeItem, s staged, old string) error {
	err := r.mark(d)
	if err == nil {
		err = r.bringSidecars(d, s, old)
	}
	if err == nil {
		err = r.v.step("rename")
	}
	if err == nil {
		err = r.v.let(d.dir, func() error { return r.stage.Rename(s.name, d.dir, it.entry, 0) })
	}
	if err != nil {
		d.spoil(s)
		return err
	}
	if old != "" {
		superseded(old, s, it.st.Ino, d)
	}
	return nil
}

// superseded notes that directories need a sidecar no more.
func superseded(old string, s staged, ino uint64, dirs ...*rekeyDirState) {
	left := &atomic.Int32{}
	left.Store(int32(len(dirs)))
	for _, d := range dirs {
		d.mu.Lock()
		d.replace = append(d.replace, replaced{old, s.side, ino, left})
		d.mu.Unlock()
	}
}

// bringSidecars notes the sidecar that is about to be needless, and puts the new
// one into the directory.
func (r *rekeyer) bringSidecars(d *rekeyDirState, s staged, old string) error {
	if s.side == "" {
		return nil
	}
	if err := r.v.step("link sidecars"); err != nil {
		return err
	}
	if err := r.v.let(d.dir, func() error { return d.dir.Link(old, r.stage, old) }); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	if err := r.v.step("link new sidecar"); err != nil {
		return err
	}
	err := r.v.let(d.dir, func() error { return r.stage.Link(s.side, d.dir, s.side) })
	if errors.Is(err, unix.EEXIST) {
		err = nil
	}
	return err
}

// swap moves all names of a file to the copy. From the moment that both are in
// the staging directory a crash, too, ends with all names moved.
func (r *rekeyer) swap(ctx context.Context, d *rekeyDirState, it treeItem, names []linkName, s staged, old string) (err error) {
	v := r.v
	dirs, leave, err := r.enterAll(ctx, names)
	defer leave()
	defer func() {
		for _, o := range dirs {
			if err != nil {
				o.spoil(s)
			}
		}
	}()
	if err != nil {
		return err
	}
	for _, o := range dirs {
		if err := r.mark(o); err != nil {
			return err
		}
		if err := r.bringSidecars(o, s, old); err != nil {
			return err
		}
	}
	st, err := r.stage.Stat(s.name)
	if err != nil {
		return err
	}
	r.claim(st) // the walk may come by its other names
	n := strconv.FormatUint(it.st.Ino, 10)
	if err := v.step("keep old file"); err != nil {
		return err
	}
	if err := v.let(d.dir, func() error { return d.dir.Link(it.entry, r.stage, swapOld+n) }); err != nil {
		return err
	}
	if err := v.step("begin to move names"); err != nil {
		return err
	}
	if err := r.stage.Rename(s.name, r.stage, swapNew+n, 0); err != nil {
		return err
	}
	if err := r.moveNames(n, names, dirs); err != nil {
		for _, o := range dirs {
			o.broken.Store(true)
		}
		return fmt.Errorf("%w: %w", errHalf, err)
	}
	if old != "" {
		superseded(old, s, it.st.Ino, dirs...)
	}
	return nil
}

// moveNames moves the names one after the other, and forgets the old file when
// that is durable.
func (r *rekeyer) moveNames(n string, names []linkName, dirs []*rekeyDirState) error {
	if err := r.stage.Sync(); err != nil {
		return err
	}
	for i, name := range names {
		if err := r.v.moveName(r.stage, swapNew+n, dirs[i].dir, name.entry); err != nil {
			return fmt.Errorf("name %d of %d: %w", i+1, len(names), err)
		}
	}
	for _, o := range dirs {
		if err := r.v.let(o.dir, o.dir.Sync); err != nil {
			return err
		}
	}
	if err := r.v.step("forget old file"); err != nil {
		return err
	}
	if err := r.stage.Unlink(swapOld + n); err != nil {
		return err
	}
	return r.stage.Unlink(swapNew + n)
}

// enterAll enters the directory of each name.
func (r *rekeyer) enterAll(ctx context.Context, names []linkName) (dirs []*rekeyDirState, leave func(), err error) {
	leave = func() {
		for _, o := range dirs {
			r.leave(o)
		}
	}
	for _, n := range names {
		own, err := openPath(r.v.root, n.dir)
		if err != nil {
			return dirs, leave, err
		}
		t, err := r.v.newTreeDir(ctx, own, n.dir, "")
		var o *rekeyDirState
		if err == nil {
			o, err = r.enter(t)
		}
		_ = own.Close()
		if err != nil {
			return dirs, leave, err
		}
		dirs = append(dirs, o)
	}
	return dirs, leave, nil
}

// moveName makes an entry a name of a staged file, which keeps its own.
func (v *Volume) moveName(stage *backing.Dir, name string, d *backing.Dir, entry string) error {
	if err := v.step("move a name"); err != nil {
		return err
	}
	tmp := backing.TempName()
	if err := stage.Link(name, stage, tmp); err != nil {
		return err
	}
	err := v.let(d, func() error { return stage.Rename(tmp, d, entry, 0) })
	if err != nil {
		_ = stage.Unlink(tmp)
	}
	return err
}
