package envelope

import (
	"context"
	"slices"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// Ahead begins to unwrap the key of h, a file's, into the cache, so that an
// Open soon after finds it there or under way. It does not wait, and tells
// nobody of an error: Open will. It answers false when Options.Ahead unwraps
// are under way, and does nothing, answering true, where there is nothing to
// do: the key is in the cache or under way, or c has no cache, so that every
// open is a call of its own.
func (m *Manager) Ahead(c Class, h *Header) bool {
	if c.Cache <= 0 {
		return true
	}
	own := *h // h is the caller's, to change as it likes
	own.Recipients = slices.Clone(h.Recipients)
	h = &own
	calls, err := m.usable(nil, &c, keywrap.PurposeData, h)
	if err != nil {
		return true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return true
	}
	now := m.opts.Now()
	for i := range calls {
		key := newCacheKey(calls[i].recipient, keywrap.PurposeData, h)
		if e := m.cache.lookup(key, calls[i].wrapped.Key, c.Cache, now); e != nil && (!e.ended() || e.err == nil) {
			return true
		}
	}
	if m.ahead >= m.opts.Ahead {
		return false
	}
	m.ahead++
	m.stats.Ahead++
	m.start(func() {
		p := patience{ctx: context.Background(), background: true}
		prk, _, _ := m.unwrapAny(&p, calls, &c, keywrap.PurposeData, h)
		prk.Wipe()
		m.mu.Lock()
		defer m.mu.Unlock()
		m.ahead--
	})
	return true
}
