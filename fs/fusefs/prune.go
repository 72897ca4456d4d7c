package fusefs

import (
	"log/slog"
	"slices"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// maxKnown is how many nodes the kernel may know before it is asked to forget
// some. It remembers every name that it was told until it needs the memory for
// something else, and for each of them there is a node here, which the kernel's
// need for memory does not know of: this many are about 150 MiB.
const maxKnown = 200_000

// pruneBatch is how many nodes one notification names.
const pruneBatch = 4096

// A pass over nodes that are all in use frees nothing; the next ones wait
// longer, as others come that may be freed.
const (
	prunePause    = 20 * time.Millisecond
	maxPrunePause = 5 * time.Second
)

// pruner keeps the kernel from knowing too many nodes. What it is asked to
// forget it forgets only where nobody uses it, as if it needed the memory:
// nothing open, no working directory, no directory with known names in it. Its
// FORGETs come later, like all others.
type pruner struct {
	count  func() int
	sample func(n int) []uint64
	forget func(nodes []uint64) fuse.Status
	max    int
	wake   chan struct{} // holds one wake-up
	log    *slog.Logger
}

// crowded wakes the pruner up if there is something to do. It never waits.
func (p *pruner) crowded(inShard int) {
	if inShard*tableShards <= p.max {
		return
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// run prunes until done is closed, or the kernel turns out not to know how
// (before Linux 6.18).
func (p *pruner) run(done <-chan struct{}) {
	pause := prunePause
	for {
		select {
		case <-done:
			return
		case <-p.wake:
		}
		before := p.count()
		// Somewhat below the limit, or there would be a pass for every new node.
		excess := before - p.max + p.max/8
		if before <= p.max {
			continue
		}
		// Any nodes: what is used again is looked up again, and whoever goes
		// through more than fits, over and over, is better off than if the oldest
		// went each time.
		for batch := range slices.Chunk(p.sample(excess), pruneBatch) {
			if s := p.forget(batch); !s.Ok() {
				p.log.Debug("the kernel is not asked to forget names", "err", s)
				return
			}
		}
		select {
		case <-done:
			return
		case <-time.After(pause):
		}
		if p.count() > before-excess/2 {
			pause = min(2*pause, maxPrunePause)
		} else {
			pause = prunePause
		}
	}
}

// crowd returns how many nodes there are in the shard of id.
func (t *nodeTable[N]) crowd(id uint64) int { return t.shard(id).size() }

func (s *nodeShard[N]) size() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.nodes)
}

// count returns how many nodes there are.
func (t *nodeTable[N]) count() (n int) {
	for i := range t.shards {
		n += t.shards[i].size()
	}
	return n
}

// sample returns about n ids, in no order, other than the root's.
func (t *nodeTable[N]) sample(n int) []uint64 {
	out := make([]uint64, 0, n+tableShards)
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.RLock()
		left := n/tableShards + 1
		for id := range s.nodes { // begins anywhere
			if left == 0 {
				break
			}
			if id != fuse.FUSE_ROOT_ID {
				out = append(out, id)
				left--
			}
		}
		s.mu.RUnlock()
	}
	return out
}
