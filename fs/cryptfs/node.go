package cryptfs

import (
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// Node is an inode of the store. Every call that returns one adds a reference;
// Volume.Forget gives references back.
type Node struct {
	identity
	key  inoKey
	typ  uint32 // S_IFMT bits
	refs int64  // guarded by nodeTable.mu; a link to a parent holds one of the parent's

	// opening is held while the open file comes and goes, so that who opens it
	// next sees it as the last one left it. handles and gen are guarded by it.
	opening sync.Mutex
	handles int
	gen     uint64 // goes up whenever the store file may have changed

	bare atomic.Bool // made here, and never given an attribute: it has no capabilities

	mu    sync.Mutex
	class *class // of the file's directory; for a directory, of the directory that it is in
	file  *openFile
	ghost *ghost    // set when the last name went and the file was not open
	dir   *dirState // directories only

	pins atomic.Int32 // names that are being removed: the open file keeps its descriptor

	// linksMu is apart from mu, which a file's owner may hold while the file
	// waits for the links.
	linksMu sync.Mutex
	links   []link // where the node is known to be; empty once it is unlinked
}

// link is a name of a node. entry is the name in the store, which for a long
// name is not the ciphertext name itself.
type link struct {
	parent *Node
	entry  string
}

// inoKey identifies an inode. The birth time tells a new file from an older
// one whose inode number it got.
type inoKey struct {
	dev, ino uint64
	born     int64
}

func keyOf(st backing.Stat) inoKey {
	return inoKey{st.Dev, st.Ino, st.Btime.Sec*1e9 + int64(st.Btime.Nsec)}
}

// RootID is the root's Node.ID.
const RootID = 1

// ID and Generation together are unique in the volume, for the node's life and
// after; see identity. While a node that has no name is still referred to, one
// with its number may have its ID.
func (n *Node) ID() uint64 { return n.id }

// Generation belongs to ID.
func (n *Node) Generation() uint32 { return n.generation }

// IsDir reports whether the node is a directory.
func (n *Node) IsDir() bool { return n.typ == unix.S_IFDIR }

// Ino returns the inode number in the store.
func (n *Node) Ino() uint64 { return n.key.ino }

// where returns one place where the node is; ok is false for the root and for
// what is unlinked.
func (n *Node) where() (l link, ok bool) {
	n.linksMu.Lock()
	defer n.linksMu.Unlock()
	if len(n.links) == 0 {
		return link{}, false
	}
	return n.links[0], true
}

// places returns all places where the node is known to be.
func (n *Node) places() []link {
	n.linksMu.Lock()
	defer n.linksMu.Unlock()
	return slices.Clone(n.links)
}

func (n *Node) openFile() *openFile {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.file
}

// nodeTable holds the nodes that somebody refers to.
type nodeTable struct {
	mu    sync.Mutex
	byKey map[inoKey]*Node
	dirs  map[uint64]*Node // of byKey the directories, by inode number
	next  atomic.Uint64    // passing ids
	root  *Node
	seen  whereabouts
}

// intern returns the node of an inode, with a reference more, and remembers
// that it is at parent/entry (parent nil: without a name). who tells its identity,
// cl is the class of files in parent; name is kept for directories, to find their
// rules.
func (t *nodeTable) intern(st backing.Stat, who func() identity, parent *Node, entry, name string, cl *class) *Node {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.known(st)
	if n == nil {
		t.mu.Unlock()
		id := who()
		t.mu.Lock()
		if n = t.known(st); n == nil {
			n = t.enter(st, id, name, cl)
		}
	}
	n.refs++
	if parent != nil {
		t.addLink(n, link{parent, entry})
	}
	return n
}

// known returns the node of an inode, if there is one. t.mu is held.
func (t *nodeTable) known(st backing.Stat) *Node {
	if n := t.byKey[keyOf(st)]; n != nil && n.typ == st.Type() {
		return n
	}
	return nil
}

// enter makes the node of an inode, without references. t.mu is held.
func (t *nodeTable) enter(st backing.Stat, who identity, name string, cl *class) *Node {
	if who.id == 0 {
		who.id = passing | t.next.Add(1)
	}
	n := &Node{identity: who, key: keyOf(st), typ: st.Type(), class: cl}
	if n.IsDir() {
		n.dir = &dirState{name: name}
		if t.root == nil || n.key.dev == t.root.key.dev {
			t.dirs[n.key.ino] = n
		}
	}
	t.byKey[n.key] = n
	return n
}

// addLink is called with t.mu held.
func (t *nodeTable) addLink(n *Node, l link) {
	n.linksMu.Lock()
	defer n.linksMu.Unlock()
	if slices.Contains(n.links, l) {
		return
	}
	l.parent.refs++
	t.seen.note(n, l.parent)
	if n.IsDir() && len(n.links) > 0 { // moved behind our back: a directory has one place
		n.links[0].parent.refs--
		n.links[0] = l
		return
	}
	n.links = append(n.links, l)
}

// unlink forgets that a node is at parent/entry; gone says that it has no name
// left at all, so that its inode number may come again.
func (v *Volume) unlink(n *Node, parent *Node, entry string, gone bool) {
	v.nodes.mu.Lock()
	defer v.nodes.mu.Unlock()
	n.linksMu.Lock()
	var out []link
	n.links = slices.DeleteFunc(n.links, func(l link) bool {
		if gone || l == (link{parent, entry}) {
			out = append(out, l)
			return true
		}
		return false
	})
	n.linksMu.Unlock()
	if gone && n.openFile() == nil {
		v.nodes.remove(n)
	}
	for _, l := range out {
		v.drop(l.parent, 1)
	}
}

// relink notes that a node moved.
func (v *Volume) relink(n *Node, from, to link) {
	v.unlink(n, from.parent, from.entry, false)
	v.nodes.mu.Lock()
	defer v.nodes.mu.Unlock()
	v.nodes.addLink(n, to)
}

// hold adds a reference to a node that has one.
func (t *nodeTable) hold(n *Node) {
	if n == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	n.refs++
}

// remove takes a node out of the table, whose inode number may come again.
func (t *nodeTable) remove(n *Node) {
	if t.byKey[n.key] == n {
		delete(t.byKey, n.key)
	}
	if t.dirs[n.key.ino] == n {
		delete(t.dirs, n.key.ino)
	}
}

// find returns the node of an inode if it is known; no reference is added.
func (t *nodeTable) find(key inoKey) *Node {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byKey[key]
}

// Forget gives references back. A node without any is dropped, and lets go of
// its parents.
func (v *Volume) Forget(n *Node, refs uint64) {
	v.nodes.mu.Lock()
	defer v.nodes.mu.Unlock()
	v.drop(n, int64(refs))
}

func (v *Volume) drop(n *Node, refs int64) {
	n.refs -= refs
	if n.refs > 0 || n == v.nodes.root {
		return
	}
	v.nodes.remove(n)
	n.linksMu.Lock()
	links := n.links
	n.links = nil
	n.linksMu.Unlock()
	n.mu.Lock()
	v.lay(n.ghost)
	n.ghost = nil
	n.mu.Unlock()
	if n.dir != nil {
		v.dirs.remove(n)
	}
	for _, l := range links {
		v.drop(l.parent, 1)
	}
}

// Root returns the root, which needs no Forget.
func (v *Volume) Root() *Node { return v.nodes.root }

func (v *Volume) openRootNode() error {
	st, err := v.root.Stat("")
	if err != nil {
		return err
	}
	v.nodes.byKey, v.nodes.dirs = map[inoKey]*Node{}, map[uint64]*Node{}
	v.nodes.root = v.nodes.intern(st, func() identity { return identity{id: RootID} }, nil, "", "", nil)
	v.dirs.init(v.root, v.nodes.root)
	return nil
}
