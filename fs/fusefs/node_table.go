package fusefs

import "sync"

// tableShards is 2 to the power of shardBits.
const (
	shardBits   = 4
	tableShards = 1 << shardBits
)

// nodeTable maps the inode numbers that the kernel knows to nodes and counts
// the kernel's references ("lookups"). It is safe for concurrent use. N is
// *cryptfs.Node; the tests use something smaller.
type nodeTable[N comparable] struct {
	shards [tableShards]nodeShard[N]
}

type nodeShard[N comparable] struct {
	mu    sync.RWMutex
	nodes map[uint64]nodeRef[N]
}

type nodeRef[N comparable] struct {
	node    N
	lookups uint64
	owed    uint64 // references of nodes that had the id before, and which the kernel still gives back
}

func newNodeTable[N comparable]() *nodeTable[N] {
	t := &nodeTable[N]{}
	for i := range t.shards {
		t.shards[i].nodes = make(map[uint64]nodeRef[N])
	}
	return t
}

// shard mixes the bits of an id: inode numbers may all be even, with a sidecar
// beside each file.
func (t *nodeTable[N]) shard(id uint64) *nodeShard[N] {
	return &t.shards[id*0x9e3779b97f4a7c15>>(64-shardBits)]
}

// get returns the node that the kernel knows as id.
func (t *nodeTable[N]) get(id uint64) (N, bool) {
	s := t.shard(id)
	s.mu.RLock()
	r, ok := s.nodes[id]
	s.mu.RUnlock()
	return r.node, ok && r.lookups > 0
}

// add takes over one reference on node, before the reply that tells the
// kernel about it is sent. If another node had the id, add returns it with the
// references on it, to give back: its file is gone, the kernel tells the two
// apart by their generations and asks for the old one no more.
func (t *nodeTable[N]) add(id uint64, node N) (old N, refs uint64) {
	s := t.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.nodes[id]
	if r.node != node {
		old, refs = r.node, r.lookups
		r.owed += r.lookups
		r.node, r.lookups = node, 0
	}
	r.lookups++
	s.nodes[id] = r
	return old, refs
}

// forget takes n of the kernel's references on id away and returns the node
// and the number of references the caller must give back; that is 0 if the
// kernel forgets what it does not know.
func (t *nodeTable[N]) forget(id, n uint64) (N, uint64) {
	s := t.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.nodes[id]
	before := min(n, r.owed)
	r.owed -= before
	n = min(n-before, r.lookups)
	r.lookups -= n
	if r.lookups+r.owed == 0 {
		delete(s.nodes, id)
	} else {
		s.nodes[id] = r
	}
	return r.node, n
}

// drain empties the table and calls give for every node with the references
// that the kernel never gave back, as at the end of a mount.
func (t *nodeTable[N]) drain(give func(node N, refs uint64)) {
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		nodes := s.nodes
		s.nodes = make(map[uint64]nodeRef[N])
		s.mu.Unlock()
		for _, r := range nodes {
			if r.lookups > 0 {
				give(r.node, r.lookups)
			}
		}
	}
}

// handleTable maps the file handle numbers that the kernel holds to H. It is
// safe for concurrent use. Numbers are not used again.
type handleTable[H any] struct {
	mu   sync.RWMutex
	open map[uint64]H
	last uint64
}

func newHandleTable[H any]() *handleTable[H] {
	return &handleTable[H]{open: make(map[uint64]H)}
}

// add stores h and returns its number.
func (t *handleTable[H]) add(h H) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last++
	t.open[t.last] = h
	return t.last
}

func (t *handleTable[H]) get(fh uint64) (H, bool) {
	t.mu.RLock()
	h, ok := t.open[fh]
	t.mu.RUnlock()
	return h, ok
}

// remove forgets fh and returns what it stood for.
func (t *handleTable[H]) remove(fh uint64) (H, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	h, ok := t.open[fh]
	delete(t.open, fh)
	return h, ok
}

// drain empties the table and calls end for everything that was open.
func (t *handleTable[H]) drain(end func(H)) {
	t.mu.Lock()
	open := t.open
	t.open = make(map[uint64]H)
	t.mu.Unlock()
	for _, h := range open {
		end(h)
	}
}
