package envelope

import (
	"container/list"
	"crypto/sha256"
	"encoding/binary"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// cacheKey identifies one wrapped key under one key URI and one encryption
// context. Nothing less may: whoever finds an entry could have had the same key
// from the service by the same call (CVE-2026-6550). The URI is the header's;
// the one that was called, where SameKey made it another, is in the entry.
type cacheKey [sha256.Size]byte

// newCacheKey hashes every input after its length, so that no two inputs run
// together. The store is h's, which the caller has compared.
func newCacheKey(r *Recipient, p keywrap.Purpose, h *Header) cacheKey {
	var stack [1024]byte // blob, context and URI of the usual key; longer ones move to the heap
	b := stack[:0]
	b = appendField(b, r.Wrapped.Blob)
	b = appendField(b, h.Store[:])
	b = appendField(b, r.Class)
	b = appendField(b, p)
	id := h.wrapID()
	b = appendField(b, id[:])
	b = appendField(b, r.Wrapped.Key)
	return sha256.Sum256(b)
}

func appendField[T ~string | ~[]byte](b []byte, field T) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(len(field)))
	return append(b, field...)
}

// entry is one unwrapping: under way, or its outcome.
type entry struct {
	key  cacheKey
	uri  string        // of the key that was called
	done chan struct{} // closed when the call has returned; prk, err, ids and filled are set before

	prk     *keymem.Key // of the file, or of the branch of a shared key; nil after a failure
	err     error
	ids     []string // of the requests that brought the outcome
	filled  time.Time
	waiters int           // callers that will still read the outcome
	elem    *list.Element // in the LRU list; nil for a failure, a call under way, a dropped entry
	timer   *time.Timer   // drops the entry
}

func (e *entry) ended() bool {
	select {
	case <-e.done:
		return true
	default:
		return false
	}
}

// release wipes the key when nobody will read it any more.
func (e *entry) release() {
	if e.waiters == 0 && e.elem == nil {
		e.prk.Wipe()
	}
}

// cache holds entries by key, the unwrapped ones in order of use. Manager.mu
// guards it.
type cache struct {
	entries map[cacheKey]*entry
	lru     *list.List // of *entry, newest first
	max     int
}

func (c *cache) init(limit int) {
	c.entries, c.lru, c.max = make(map[cacheKey]*entry), list.New(), limit
}

// lookup returns the entry that answers now for key, called as uri: one under
// way, a failure younger than failureTime, or a key younger than ttl. It drops one that is
// too old, whatever its timer says: the caller's class may have a shorter time
// now than when the entry was made.
func (c *cache) lookup(key cacheKey, uri string, ttl time.Duration, now time.Time) *entry {
	e := c.entries[key]
	if e == nil || e.uri != uri {
		return nil
	}
	if !e.ended() {
		return e
	}
	if e.err != nil {
		ttl = failureTime
	}
	if now.Sub(e.filled) >= ttl {
		c.drop(e)
		return nil
	}
	return e
}

// add makes e the entry of its key and drops the one before it.
func (c *cache) add(e *entry) {
	if old := c.entries[e.key]; old != nil {
		c.drop(old)
	}
	c.entries[e.key] = e
}

// keep puts an unwrapped key at the head of the LRU list, for ttl.
func (c *cache) keep(e *entry, ttl time.Duration, expire func()) {
	e.elem = c.lru.PushFront(e)
	e.timer = time.AfterFunc(ttl, expire)
	for c.lru.Len() > c.max {
		c.drop(c.lru.Back().Value.(*entry))
	}
}

// drop takes e out of the cache and wipes its key unless a caller still waits
// to read it. Dropping twice does nothing.
func (c *cache) drop(e *entry) {
	if c.entries[e.key] == e {
		delete(c.entries, e.key)
	}
	if e.timer != nil {
		e.timer.Stop()
	}
	if e.elem != nil {
		c.lru.Remove(e.elem)
		e.elem = nil
	}
	e.release()
}

func (c *cache) dropAll() {
	for _, e := range c.entries {
		c.drop(e)
	}
}
