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
	id   uint64
	key  inoKey
	typ  uint32 // S_IFMT bits
	refs int64  // guarded by nodeTable.mu; a link to a parent holds one of the parent's

	// opening is held while the open file comes and goes, so that who opens it
	// next sees it as the last one left it. handles and gen are guarded by it.
	opening sync.Mutex
	handles int
	gen     uint64 // goes up whenever the store file may have changed

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

// ID is unique in the volume, for the node's life and after.
func (n *Node) ID() uint64 { return n.id }

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
	next  atomic.Uint64
	root  *Node
}

// intern returns the node of an inode, with a reference more, and remembers
// that it is at parent/entry (parent nil: without a name). cl is the class of
// files in parent; name is kept for directories, to find their rules.
func (t *nodeTable) intern(st backing.Stat, parent *Node, entry, name string, cl *class) *Node {
	key := keyOf(st)
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.byKey[key]
	if n == nil || n.typ != st.Type() {
		n = &Node{id: t.next.Add(1), key: key, typ: st.Type(), class: cl}
		if n.IsDir() {
			n.dir = &dirState{name: name}
		}
		t.byKey[key] = n
	}
	n.refs++
	if parent != nil {
		t.addLink(n, link{parent, entry})
	}
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
	if gone && n.openFile() == nil && v.nodes.byKey[n.key] == n {
		delete(v.nodes.byKey, n.key)
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
	if v.nodes.byKey[n.key] == n {
		delete(v.nodes.byKey, n.key)
	}
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
	v.nodes.byKey = map[inoKey]*Node{}
	v.nodes.next.Store(RootID - 1)
	v.nodes.root = v.nodes.intern(st, nil, "", "", nil)
	v.dirs.init(v.root, v.nodes.root)
	return nil
}
