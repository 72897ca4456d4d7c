package cryptfs

import (
	"context"
	"errors"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

func isInternal(entry string) bool {
	return strings.HasPrefix(entry, internalPrefix) && !strings.HasPrefix(entry, longEntry)
}

// Unlink removes a name that is no directory. Of the file's companions the
// entry goes first, so that a crash leaves at most an orphan.
func (v *Volume) Unlink(ctx context.Context, dir *Node, name string) error {
	return v.remove(ctx, dir, name, func(ref *backing.Dir, entry string, st backing.Stat) error {
		if st.Type() == unix.S_IFDIR {
			return unix.EISDIR
		}
		side, err := v.sidecarOf(ref, entry, st)
		if err != nil {
			return err
		}
		if err := ref.Unlink(entry); err != nil {
			return err
		}
		v.dropSidecar(ref, side, st)
		return nil
	})
}

// Rmdir removes an empty directory: it gets a temporary name, which no user
// sees, and is taken apart under that.
func (v *Volume) Rmdir(ctx context.Context, dir *Node, name string) error {
	return v.remove(ctx, dir, name, func(ref *backing.Dir, entry string, st backing.Stat) error {
		if st.Type() != unix.S_IFDIR {
			return unix.ENOTDIR
		}
		if err := checkEmpty(ref, entry); err != nil {
			return err
		}
		tmp := backing.TempName()
		if err := ref.Rename(entry, ref, tmp, 0); err != nil {
			return err
		}
		removeDir(ref, tmp)
		return nil
	})
}

// checkEmpty answers ENOTEMPTY if a directory has any entry that is not the
// store's own: also one that cannot be read is somebody's file.
func checkEmpty(d *backing.Dir, entry string) error {
	sub, err := d.OpenDir(entry)
	if err != nil {
		return err
	}
	defer func() { _ = sub.Close() }()
	empty := true
	err = lifted(sub, func() error {
		return sub.Each(func(e backing.Entry) bool {
			empty = isInternal(e.Name)
			return empty
		})
	})
	if err == nil && !empty {
		return unix.ENOTEMPTY
	}
	return err
}

func (v *Volume) remove(ctx context.Context, dir *Node, name string, do func(ref *backing.Dir, entry string, st backing.Stat) error) error {
	if err := v.mayChange(); err != nil {
		return err
	}
	cipher, err := v.load(ctx, dir)
	if err != nil {
		return err
	}
	s, err := dir.seal(cipher, name)
	if err != nil {
		return err
	}
	v.ns.RLock()
	defer v.ns.RUnlock()
	ref, err := v.use(dir)
	if err != nil {
		return err
	}
	defer ref.release()
	st, err := ref.Stat(s.entry)
	if err != nil {
		return err
	}
	n := v.nodes.find(keyOf(st))
	if n != nil && n.dir != nil {
		// Who has it open may still ask about it.
		if sub, err := v.use(n); err == nil {
			defer sub.release()
		}
	}
	unpin, err := v.pin(n)
	if err != nil {
		return err
	}
	defer unpin()
	g := v.raise(n, ref.Dir, s.entry, st)
	if err := do(ref.Dir, s.entry, st); err != nil {
		v.lay(g)
		return err
	}
	dropName(ref.Dir, s.entry)
	if n != nil {
		v.setGhost(n, g)
		v.unlink(n, dir, s.entry, st.Nlink <= 1 || n.IsDir())
	}
	return nil
}

// Rename is renameat2(2), with flags 0, RENAME_NOREPLACE and RENAME_EXCHANGE.
// Across classes it is ErrCrossClass (EXDEV), and a directory that the policy
// has a rule for stays where it is.
func (v *Volume) Rename(ctx context.Context, dir *Node, name string, newDir *Node, newName string, flags uint32) error {
	if flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) != 0 {
		return unix.EINVAL
	}
	fromCipher, err := v.loadForWrite(ctx, dir)
	if err != nil {
		return err
	}
	toCipher, err := v.loadForWrite(ctx, newDir)
	if err != nil {
		return err
	}
	from, err := dir.seal(fromCipher, name)
	if err != nil {
		return err
	}
	to, err := newDir.seal(toCipher, newName)
	if err != nil {
		return err
	}
	if dir.dirClass() != newDir.dirClass() {
		return ErrCrossClass
	}
	if err := v.syncTarget(dir, newDir); err != nil {
		return err
	}
	if flags&unix.RENAME_EXCHANGE != 0 {
		if err := v.syncTarget(newDir, dir); err != nil {
			return err
		}
	}
	r := &renaming{v: v, flags: flags}
	r.from, r.to = side{n: dir, name: name, s: from}, side{n: newDir, name: newName, s: to}
	v.ns.Lock()
	defer v.ns.Unlock()
	return r.run()
}

// side is one end of a rename.
type side struct {
	n    *Node // the directory
	name string
	s    stored
	ref  *dirRef
	st   backing.Stat // of what is there; zero if nothing is
	car  string       // its sidecar
}

func (s *side) isDir() bool  { return s.st.Type() == unix.S_IFDIR }
func (s *side) exists() bool { return s.st.Mode != 0 }

type renaming struct {
	v        *Volume
	flags    uint32
	from, to side
}

// run does the rename with v.ns held.
func (r *renaming) run() error {
	v := r.v
	for _, s := range []*side{&r.from, &r.to} {
		ref, err := v.use(s.n)
		if err != nil {
			return err
		}
		defer ref.release()
		s.ref = ref
	}
	if err := r.look(); err != nil {
		return err
	}
	if r.from.exists() && r.to.exists() && r.from.st.Dev == r.to.st.Dev && r.from.st.Ino == r.to.st.Ino {
		return nil // rename(2): two names of one file stay as they are
	}
	if err := r.checkRules(); err != nil {
		return err
	}
	if err := r.before(); err != nil {
		r.undo()
		return err
	}
	var g *ghost
	unpin, err := v.pin(r.replaced())
	if err != nil {
		r.undo()
		return err
	}
	defer unpin()
	if other := r.replaced(); other != nil {
		g = v.raise(other, r.to.ref.Dir, r.to.s.entry, r.to.st)
	}
	if err := r.move(); err != nil {
		v.lay(g)
		r.undo()
		return err
	}
	if g != nil {
		v.setGhost(r.replaced(), g)
	}
	r.after()
	if r.from.isDir() || r.to.isDir() {
		v.moves++
	}
	return nil
}

func (r *renaming) look() (err error) {
	if r.from.st, err = r.from.ref.Stat(r.from.s.entry); err != nil {
		return err
	}
	r.to.st, err = r.to.ref.Stat(r.to.s.entry)
	switch {
	case errors.Is(err, unix.ENOENT):
		if r.flags&unix.RENAME_EXCHANGE != 0 {
			return err
		}
		r.to.st = backing.Stat{}
	case err != nil:
		return err
	case r.flags&unix.RENAME_NOREPLACE != 0:
		return unix.EEXIST
	}
	if r.to.exists() && r.flags&unix.RENAME_EXCHANGE == 0 {
		if r.from.isDir() && !r.to.isDir() {
			return unix.ENOTDIR
		}
		if !r.from.isDir() && r.to.isDir() {
			return unix.EISDIR
		}
		if r.to.isDir() {
			if err := checkEmpty(r.to.ref.Dir, r.to.s.entry); err != nil {
				return err
			}
		}
	}
	if r.from.car, err = r.v.sidecarOf(r.from.ref.Dir, r.from.s.entry, r.from.st); err != nil {
		return err
	}
	if r.to.exists() {
		r.to.car, err = r.v.sidecarOf(r.to.ref.Dir, r.to.s.entry, r.to.st)
	}
	return err
}

// checkRules keeps directories with rules, or above one, in place, and nothing
// may get a place that a rule is waiting for; nor may a directory move to where
// the policy wants another class.
func (r *renaming) checkRules() error {
	v := r.v
	for _, m := range [][2]*side{{&r.from, &r.to}, {&r.to, &r.from}} {
		what, where := m[0], m[1]
		if !what.isDir() || (what == &r.to && r.flags&unix.RENAME_EXCHANGE == 0) {
			continue
		}
		now, then := v.childPath(what.n, what.name), v.childPath(where.n, where.name)
		if v.policy.Fixed(now) || v.policy.Fixed(then) {
			return errors.Join(unix.EBUSY, ErrFixed)
		}
		if v.policy.ClassOf(now) != v.policy.ClassOf(then) {
			return ErrCrossClass
		}
	}
	return nil
}

func (r *renaming) exchange() bool { return r.flags&unix.RENAME_EXCHANGE != 0 }

// across reports whether the rename changes directories.
func (r *renaming) across() bool { return r.from.n != r.to.n }

// before puts in place what must be there when the entry arrives: the long
// name's file, and the sidecar.
func (r *renaming) before() error {
	if err := placeName(r.to.ref.Dir, r.to.s); err != nil {
		return err
	}
	if r.exchange() {
		if err := placeName(r.from.ref.Dir, r.from.s); err != nil {
			return err
		}
	}
	if !r.across() {
		return nil
	}
	if err := r.v.linkSidecar(r.from.ref.Dir, r.to.ref.Dir, r.from.car); err != nil {
		return err
	}
	if r.exchange() {
		return r.v.linkSidecar(r.to.ref.Dir, r.from.ref.Dir, r.to.car)
	}
	return nil
}

// replaced returns the node of the file that the rename replaces, if there is
// one and it is known.
func (r *renaming) replaced() *Node {
	if !r.to.exists() || r.exchange() {
		return nil
	}
	return r.v.nodes.find(keyOf(r.to.st))
}

func (v *Volume) linkSidecar(from, to *backing.Dir, name string) error {
	if name == "" {
		return nil
	}
	err := from.Link(name, to, name)
	if errors.Is(err, unix.EEXIST) {
		v.sharing.forget(to)
		return nil
	}
	return err
}

// move does the rename itself. An empty directory in the way has files of the
// store in it, so the two change places and it goes from the old one. If that
// fails they change back, or stay as an exchange would leave them.
func (r *renaming) move() error {
	from, to := r.from.ref.Dir, r.to.ref.Dir
	if r.to.exists() && r.to.isDir() && !r.exchange() {
		if err := from.Rename(r.from.s.entry, to, r.to.s.entry, unix.RENAME_EXCHANGE); err != nil {
			return err
		}
		tmp := backing.TempName()
		if err := from.Rename(r.from.s.entry, from, tmp, 0); err != nil {
			if from.Rename(r.from.s.entry, to, r.to.s.entry, unix.RENAME_EXCHANGE) != nil {
				r.flags |= unix.RENAME_EXCHANGE
				r.after()
			}
			return err
		}
		removeDir(from, tmp)
		return nil
	}
	return from.Rename(r.from.s.entry, to, r.to.s.entry, uint(r.flags))
}

// undo takes away what before put in place for nothing.
func (r *renaming) undo() {
	st, err := r.from.ref.Stat(r.from.s.entry)
	if err != nil || keyOf(st) != keyOf(r.from.st) {
		return // it may be done, whatever was told; what is too much is fsck's
	}
	if !r.to.exists() {
		dropName(r.to.ref.Dir, r.to.s.entry)
	}
	if r.across() {
		r.v.dropSidecar(r.to.ref.Dir, r.from.car, r.from.st)
	}
}

// after removes what the moved entries left behind, and moves the nodes.
func (r *renaming) after() {
	v := r.v
	moved, other := v.nodes.find(keyOf(r.from.st)), (*Node)(nil)
	if r.to.exists() {
		other = v.nodes.find(keyOf(r.to.st))
	}
	was := link{r.from.n, r.from.s.entry}
	now := link{r.to.n, r.to.s.entry}
	if r.exchange() {
		if r.across() {
			v.dropSidecar(r.from.ref.Dir, r.from.car, r.from.st)
			v.dropSidecar(r.to.ref.Dir, r.to.car, r.to.st)
		}
		v.moved(other, now, was, r.from.name)
		v.moved(moved, was, now, r.to.name)
		return
	}
	dropName(r.from.ref.Dir, r.from.s.entry)
	if r.across() {
		v.dropSidecar(r.from.ref.Dir, r.from.car, r.from.st)
	}
	if r.to.exists() {
		v.dropSidecar(r.to.ref.Dir, r.to.car, r.to.st)
	}
	if other != nil {
		v.unlink(other, now.parent, now.entry, r.to.st.Nlink <= 1 || other.IsDir())
	}
	v.moved(moved, was, now, r.to.name)
}

// moved notes that a node, if it is known, is somewhere else now.
func (v *Volume) moved(n *Node, from, to link, name string) {
	if n == nil {
		return
	}
	v.relink(n, from, to)
	if n.dir != nil {
		n.mu.Lock()
		n.dir.name = name
		n.mu.Unlock()
	}
}

// syncTarget makes a new directory's record durable before something from
// another gets a name there: what is durable of that must not be lost with the
// record.
func (v *Volume) syncTarget(dir, newDir *Node) error {
	v.ns.RLock()
	defer v.ns.RUnlock()
	if dir == newDir || !v.isFresh(newDir) {
		return nil
	}
	return v.syncRecords(newDir)
}

// isFresh reports whether the record of a directory, or of one above it, may not
// be on the disk.
func (v *Volume) isFresh(n *Node) bool {
	for {
		n.mu.Lock()
		fresh := n.dir.fresh
		n.mu.Unlock()
		l, ok := n.where()
		if fresh || !ok {
			return fresh
		}
		n = l.parent
	}
}
