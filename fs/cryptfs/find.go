package cryptfs

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// Find returns the node of an ID that some mount of the store gave out, with a
// reference; ESTALE if the file is gone. The first search for a node that nobody
// refers to reads every directory of the store. The caller compares generations.
func (v *Volume) Find(ctx context.Context, id uint64) (*Node, Attr, error) {
	if id == RootID {
		a, err := v.Getattr(v.nodes.root)
		v.nodes.hold(v.nodes.root)
		return v.nodes.root, a, err
	}
	if id&passing != 0 {
		return nil, Attr{}, unix.ESTALE
	}
	if err := v.nodes.seen.learn(v); err != nil {
		return nil, Attr{}, err
	}
	s := search{v: v, ctx: ctx, above: map[uint64]bool{}}
	n, a, err := s.find(id & (1<<inoBits - 1))
	for _, dir := range s.held {
		v.Forget(dir, 1)
	}
	if err == nil && n.ID() != id { // another file has the number now
		v.Forget(n, 1)
		err = unix.ESTALE
	}
	return n, a, err
}

// Hold adds a reference to a node; false if it has none any more, and is not to
// be used.
func (v *Volume) Hold(n *Node) bool {
	v.nodes.mu.Lock()
	defer v.nodes.mu.Unlock()
	if n.refs <= 0 {
		return false
	}
	n.refs++
	return true
}

// Parent returns the directory that a directory is in, with a reference; the
// root is in itself.
func (v *Volume) Parent(n *Node) (*Node, Attr, error) {
	v.ns.RLock()
	l, ok := n.where()
	switch {
	case n == v.nodes.root:
		l.parent = n
	case n.dir == nil:
		v.ns.RUnlock()
		return nil, Attr{}, unix.ENOTDIR
	case !ok:
		v.ns.RUnlock()
		return nil, Attr{}, unix.ESTALE
	}
	v.nodes.hold(l.parent)
	v.ns.RUnlock()
	a, err := v.Getattr(l.parent)
	if err != nil {
		v.Forget(l.parent, 1)
	}
	return l.parent, a, err
}

// search finds a node by its inode number, by way of the directories that have
// been seen to hold it.
type search struct {
	v     *Volume
	ctx   context.Context
	above map[uint64]bool // directories being searched for: what was seen when may go round in circles
	steps int
	held  []*Node // directories found, which are kept until the search ends
}

// maxSteps bounds a search: a directory that has moved a lot was seen in many
// places.
const maxSteps = 10_000

// find returns the node of an inode, with a reference; ESTALE if it is not where
// it was seen.
func (s *search) find(ino uint64) (*Node, Attr, error) {
	for _, place := range s.v.nodes.seen.of(ino) {
		dir, err := s.dir(place)
		if err != nil && !errors.Is(err, unix.ESTALE) {
			return nil, Attr{}, err
		}
		if err != nil {
			continue
		}
		n, a, err := s.in(dir, ino)
		if !errors.Is(err, unix.ESTALE) {
			return n, a, err
		}
	}
	return nil, Attr{}, unix.ESTALE
}

// dir returns the node of a directory, which the search holds.
func (s *search) dir(ino uint64) (*Node, error) {
	n := s.v.nodes.holdDir(ino)
	if n == nil {
		if s.steps++; s.above[ino] || s.steps > maxSteps {
			return nil, unix.ESTALE
		}
		s.above[ino] = true
		var err error
		n, _, err = s.find(ino)
		delete(s.above, ino)
		if err != nil {
			return nil, err
		}
	}
	s.held = append(s.held, n)
	if n.dir == nil {
		return nil, unix.ESTALE
	}
	return n, nil
}

// in looks an inode up in a directory, as listing it and looking its name up
// would.
func (s *search) in(dir *Node, ino uint64) (*Node, Attr, error) {
	v := s.v
	cipher, err := v.load(s.ctx, dir)
	if err != nil {
		return nil, Attr{}, gone(err)
	}
	entries, err := v.entriesOf(dir, ino)
	if err != nil {
		return nil, Attr{}, gone(err)
	}
	for _, e := range entries {
		n, a, err := v.lookupSealed(dir, cipher, e)
		if err != nil {
			continue // no file of the tree, or gone meanwhile
		}
		if n.key.ino == ino {
			return n, a, nil
		}
		v.Forget(n, 1)
	}
	return nil, Attr{}, unix.ESTALE
}

// gone makes ESTALE of the absence of a directory on the way.
func gone(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return unix.ESTALE
	}
	return err
}

// entriesOf returns the entries of a directory that are names of an inode.
func (v *Volume) entriesOf(dir *Node, ino uint64) (out []string, err error) {
	v.ns.RLock()
	defer v.ns.RUnlock()
	ref, err := v.use(dir)
	if err != nil {
		return nil, err
	}
	defer ref.release()
	err = lifted(ref.Dir, func() error {
		out = out[:0]
		return ref.Each(func(e backing.Entry) bool {
			if e.Ino == ino && !isInternal(e.Name) {
				out = append(out, e.Name)
			}
			return true
		})
	})
	return out, err
}

// lookupSealed is Lookup by an entry of the store.
func (v *Volume) lookupSealed(dir *Node, cipher *nameenc.Cipher, entry string) (*Node, Attr, error) {
	v.ns.RLock()
	ref, err := v.use(dir)
	v.ns.RUnlock()
	if err != nil {
		return nil, Attr{}, err
	}
	defer ref.release()
	name, ok, err := dir.unseal(cipher, ref.Dir, entry)
	if err != nil {
		return nil, Attr{}, err
	}
	if !ok {
		return nil, Attr{}, ErrName
	}
	return v.lookupEntry(dir, entry, name)
}

// holdDir returns the node of a directory, with a reference, if it is known.
func (t *nodeTable) holdDir(ino uint64) *Node {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.dirs[ino]
	if n != nil {
		n.refs++
	}
	return n
}

// whereabouts says which directories hold an inode, or held it. It is empty and
// costs nothing until somebody asks, which takes a walk over the store; from then
// on every name that a node gets is noted, so that together they leave out
// nothing. What is in it is a hint: it is looked at again when it is used.
type whereabouts struct {
	learning sync.Mutex // held during the walk

	mu     sync.Mutex
	on     bool
	whole  bool       // the walk has ended
	sorted []sighting // by inode, then directory
	fresh  []sighting // noted since; not in sorted
	limit  int        // of both, beyond which it is all forgotten
}

type sighting struct{ ino, dir uint64 }

func compareSightings(a, b sighting) int {
	return cmp.Or(cmp.Compare(a.ino, b.ino), cmp.Compare(a.dir, b.dir))
}

const (
	maxFresh  = 4096
	maxPlaces = 1 << 20 // more than after the walk
)

// note is called with every name that a node gets.
func (w *whereabouts) note(n, parent *Node) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.on {
		w.add(sighting{n.key.ino, parent.key.ino})
	}
}

// add is called with w.mu held.
func (w *whereabouts) add(p sighting) {
	if _, ok := slices.BinarySearchFunc(w.sorted, p, compareSightings); ok {
		return
	}
	w.fresh = append(w.fresh, p)
	if len(w.fresh) < max(maxFresh, len(w.sorted)/8) {
		return
	}
	w.sort()
	if w.whole && len(w.sorted) > w.limit { // most of it can only be out of date
		w.on, w.whole, w.sorted = false, false, nil
	}
}

func (w *whereabouts) sort() {
	w.sorted = append(w.sorted, w.fresh...)
	w.fresh = w.fresh[:0]
	slices.SortFunc(w.sorted, compareSightings)
	w.sorted = slices.Clip(slices.Compact(w.sorted))
}

// of returns the directories that hold or held an inode.
func (w *whereabouts) of(ino uint64) (out []uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	at, _ := slices.BinarySearchFunc(w.sorted, sighting{ino: ino}, compareSightings)
	for ; at < len(w.sorted) && w.sorted[at].ino == ino; at++ {
		out = append(out, w.sorted[at].dir)
	}
	for i := len(w.fresh) - 1; i >= 0; i-- {
		if w.fresh[i].ino == ino {
			out = append(out, w.fresh[i].dir)
		}
	}
	return out
}

// learn walks over the store, unless that was done.
func (w *whereabouts) learn(v *Volume) error {
	w.learning.Lock()
	defer w.learning.Unlock()
	w.mu.Lock()
	whole := w.whole
	w.on = true
	w.mu.Unlock()
	if whole {
		return nil
	}
	if err := w.walk(v); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sort()
	w.whole, w.limit = true, len(w.sorted)+maxPlaces
	return nil
}

// walkTries is how often the walk is done if directories moved meanwhile, perhaps
// from where it had not been yet to where it had. The last time they have to wait.
const walkTries = 3

func (w *whereabouts) walk(v *Volume) error {
	for try := 1; try < walkTries; try++ {
		moves := v.countMoves()
		if err := w.walkDir(v.root, v.nodes.root.key.ino); err != nil || moves == v.countMoves() {
			return err
		}
	}
	v.ns.RLock()
	defer v.ns.RUnlock()
	return w.walkDir(v.root, v.nodes.root.key.ino)
}

// countMoves returns how many directories have moved so far, none of them
// half-way.
func (v *Volume) countMoves() uint64 {
	v.ns.RLock()
	defer v.ns.RUnlock()
	return v.moves
}

func (w *whereabouts) walkDir(d *backing.Dir, ino uint64) error {
	var subs []backing.Entry
	err := lifted(d, func() error {
		subs = subs[:0]
		var places []sighting
		err := d.Each(func(e backing.Entry) bool {
			if isInternal(e.Name) {
				return true
			}
			places = append(places, sighting{e.Ino, ino})
			if e.Type == unix.S_IFDIR || e.Type == 0 {
				subs = append(subs, e)
			}
			return true
		})
		w.learned(places)
		return err
	})
	for _, e := range subs {
		if err != nil {
			break
		}
		err = w.walkInto(d, e)
	}
	return err
}

// walkInto walks over a directory below another. One that was removed, or that
// the process may not open, is left out: nothing in it can be had by name either.
func (w *whereabouts) walkInto(d *backing.Dir, e backing.Entry) error {
	var sub *backing.Dir
	err := lifted(d, func() (err error) { sub, err = d.OpenDir(e.Name); return err })
	if err == nil {
		err = w.walkDir(sub, e.Ino)
		_ = sub.Close()
	}
	for _, left := range []unix.Errno{unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.EACCES} {
		if errors.Is(err, left) {
			return nil
		}
	}
	return err
}

func (w *whereabouts) learned(places []sighting) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sorted = append(w.sorted, places...) // in order when the walk ends
}
