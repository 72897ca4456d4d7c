package cryptfs

import (
	"container/list"
	"context"
	"fmt"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/record"
)

// dirState is what the volume knows of a directory. Guarded by Node.mu, except
// for ref, which is the cache's.
type dirState struct {
	name    string // plaintext name in its parent; "" for the root
	loaded  bool
	id      nameenc.DirID
	class   *class // of the files in it, by its record
	agrees  bool   // the policy names the same class
	fresh   bool   // its record may not be on the disk yet
	unsure  bool   // a sync of it was tried, and has not succeeded
	dacl    aclState
	ref     *dirRef
	inCache *list.Element
}

// aclState says whether a directory has a default ACL.
type aclState uint8

const (
	aclUnknown aclState = iota
	aclNone
	aclDefault
)

// dirRef is an open directory with users.
type dirRef struct {
	*backing.Dir
	cache *dirCache
	users int
	dead  bool
}

// dirCache keeps a bounded number of directories open.
type dirCache struct {
	mu    sync.Mutex
	max   int
	order *list.List // of *Node, most recently used first
	root  *Node
}

func (c *dirCache) init(root *backing.Dir, n *Node) {
	c.max = min(max(descriptorLimit()/8, 16), 1024)
	c.order, c.root = list.New(), n
	n.dir.ref = &dirRef{Dir: root, cache: c, users: 1} // for ever: the volume closes it
}

// release gives an open directory back.
func (r *dirRef) release() {
	r.cache.mu.Lock()
	defer r.cache.mu.Unlock()
	r.users--
	r.closeIfDone()
}

func (r *dirRef) closeIfDone() {
	if r.dead && r.users == 0 {
		_ = r.Dir.Close() // a directory: nothing to lose
	}
}

// get returns a node's open directory if it is there.
func (c *dirCache) get(n *Node) *dirRef {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := n.dir.ref
	if r == nil {
		return nil
	}
	r.users++
	if n.dir.inCache != nil {
		c.order.MoveToFront(n.dir.inCache)
	}
	return r
}

// put enters a directory just opened, unless somebody else was faster, and
// closes those that were used longest ago.
func (c *dirCache) put(n *Node, d *backing.Dir) *dirRef {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r := n.dir.ref; r != nil {
		_ = d.Close()
		r.users++
		return r
	}
	r := &dirRef{Dir: d, cache: c, users: 1}
	n.dir.ref = r
	n.dir.inCache = c.order.PushFront(n)
	for e := c.order.Back(); e != nil && c.order.Len() > c.max; e = c.order.Back() {
		c.evict(e.Value.(*Node))
	}
	return r
}

func (c *dirCache) evict(n *Node) {
	if n.dir.inCache == nil {
		return
	}
	c.order.Remove(n.dir.inCache)
	r := n.dir.ref
	n.dir.ref, n.dir.inCache = nil, nil
	r.dead = true
	r.closeIfDone()
}

// remove lets go of a node's directory.
func (c *dirCache) remove(n *Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.evict(n)
}

func (c *dirCache) closeAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.order != nil && c.order.Len() > 0 {
		c.evict(c.order.Back().Value.(*Node))
	}
}

// use opens a directory node, through its parents where none is cached. The
// caller holds v.ns shared, and releases the result.
func (v *Volume) use(n *Node) (*dirRef, error) {
	if n.dir == nil {
		return nil, unix.ENOTDIR
	}
	if r := v.dirs.get(n); r != nil {
		return r, nil
	}
	l, ok := n.where()
	if !ok {
		return nil, unix.ENOENT // removed
	}
	parent, err := v.use(l.parent)
	if err != nil {
		return nil, err
	}
	defer parent.release()
	d, err := parent.OpenDir(l.entry)
	if err != nil {
		return nil, err
	}
	st, err := d.Stat("")
	if err == nil && keyOf(st) != n.key {
		err = unix.ESTALE
	}
	if err != nil {
		_ = d.Close()
		return nil, err
	}
	return v.dirs.put(n, d), nil
}

// load makes sure that a directory's record was read and its class's name key
// unwrapped. It may call the key service, and so comes before any lock.
func (v *Volume) load(ctx context.Context, n *Node) (*nameenc.Cipher, error) {
	if n.dir == nil {
		return nil, unix.ENOTDIR
	}
	n.mu.Lock()
	loaded, cl := n.dir.loaded, n.dir.class
	n.mu.Unlock()
	if loaded {
		return v.names(ctx, cl)
	}
	v.ns.RLock()
	ref, err := v.use(n)
	if err != nil {
		v.ns.RUnlock()
		return nil, err
	}
	var d *record.Dir
	var second bool
	err = lifted(ref.Dir, func() (err error) { d, second, err = readDirRecord(ref.Dir); return err })
	ref.release()
	if err == nil {
		if cl = v.classes[d.Class]; cl == nil {
			err = fmt.Errorf("directory %d: class of its record: %w", n.key.ino, ErrNoClass)
		}
	}
	v.ns.RUnlock()
	if err != nil {
		return nil, v.note(n, err)
	}
	cipher, err := v.names(ctx, cl)
	if err != nil {
		return nil, err
	}
	if err := checkDirRecord(cipher, d); err != nil {
		return nil, v.note(n, fmt.Errorf("directory %d: %w", n.key.ino, err))
	}
	if second {
		v.log.Warn("directory record read from its second copy: run kmsfs fsck --repair", "ino", n.key.ino)
	}
	v.ns.RLock()
	defer v.ns.RUnlock()
	v.settleDir(n, nameenc.DirID(d.ID), cl, false)
	return cipher, nil
}

// settleDir enters what a directory's record says.
func (v *Volume) settleDir(n *Node, id nameenc.DirID, cl *class, fresh bool) {
	want := v.policy.ClassOf(v.pathOf(n))
	n.mu.Lock()
	defer n.mu.Unlock()
	d := n.dir
	if d.loaded {
		return
	}
	d.id, d.class, d.agrees, d.fresh, d.loaded = id, cl, want == cl.name, fresh, true
	if fresh {
		v.nodes.hold(n)
		v.loose.mu.Lock()
		v.loose.fresh[n] = struct{}{}
		v.loose.mu.Unlock()
	}
	if !d.agrees {
		v.log.Error("policy and directory record disagree: files can be read, not written; run kmsfs classify or reclassify",
			"ino", n.key.ino, "policy", want, "record", cl.name, "audit", true)
	}
}

// pathOf returns a directory's plaintext path, for the policy only. The caller
// holds v.ns.
func (v *Volume) pathOf(n *Node) string {
	var parts []string
	for n != v.nodes.root {
		parts = append(parts, n.dir.name)
		l, ok := n.where()
		if !ok {
			break
		}
		n = l.parent
	}
	var b strings.Builder
	for i := len(parts) - 1; i >= 0; i-- {
		b.WriteString("/" + parts[i])
	}
	if b.Len() == 0 {
		return "/"
	}
	return b.String()
}

func (v *Volume) childPath(dir *Node, name string) string {
	if p := v.pathOf(dir); p != "/" {
		return p + "/" + name
	}
	return "/" + name
}

// loadForWrite is load for an operation that makes something in the directory.
func (v *Volume) loadForWrite(ctx context.Context, n *Node) (*nameenc.Cipher, error) {
	if err := v.mayChange(); err != nil {
		return nil, err
	}
	cipher, err := v.load(ctx, n)
	if err != nil {
		return nil, err
	}
	if !n.dirAgrees() {
		return nil, &FileError{What: "directory", Class: v.wantedClass(n), Ino: n.key.ino, Err: ErrClassMismatch}
	}
	return cipher, nil
}

// wantedClass returns the class that the policy has for a directory.
func (v *Volume) wantedClass(n *Node) string {
	v.ns.RLock()
	defer v.ns.RUnlock()
	return v.policy.ClassOf(v.pathOf(n))
}

func (n *Node) dirAgrees() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dir.agrees
}

// dirClass returns the class of files in a loaded directory.
func (n *Node) dirClass() *class {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dir.class
}

func (n *Node) dirID() nameenc.DirID {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dir.id
}
