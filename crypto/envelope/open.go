package envelope

import (
	"context"
	"fmt"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// Open unwraps the key of h, which Parse returned, for a caller in class c. The
// result is the caller's. It has met h's commitment, from the cache or not.
//
// Only recipients of class c whose key c allows are used, in the header's
// order; the next one is tried when the service fails, and not when it says
// that a wrapped key is not what the header claims. Concurrent Opens of one
// wrapped key make one call. ctx does not reach the service: after its
// cancellation Open waits for Options.Grace and then answers ctx.Err(), and the
// call goes on.
//
// Errors: ErrForeignStore, ErrForeignClass and ErrNotAllowed, all before any
// call; ErrCommitment; ErrInvalid for contents without a cipher; ErrClosed; and
// the service's, as *keywrap.CallError. When all recipients fail, the error is
// that of the one with the best prospect.
func (m *Manager) Open(ctx context.Context, c Class, purpose keywrap.Purpose, h *Header) (*FileKey, error) {
	var arr [MaxRecipients]recipientCall
	calls, err := m.usable(arr[:0], &c, purpose, h)
	if err != nil {
		return nil, err
	}
	k := m.cached(calls, c.Cache, purpose, h)
	if k == nil { // also when the manager is closed, which has no cache
		if k, err = m.unwrapAny(ctx, calls, &c, purpose, h); err != nil {
			return nil, err
		}
	}
	// The cache answers for the wrapped key, not for the header around it.
	if err := k.Check(h); err != nil {
		k.Wipe()
		return nil, err
	}
	return k, nil
}

// recipientCall is a recipient that may be tried, under the URI to be called.
type recipientCall struct {
	recipient *Recipient
	wrapped   keywrap.Wrapped // the recipient's, Key changed to the allowed URI
}

// usable appends the recipients of h that c allows. Everything that can be
// refused without the service is refused here.
func (m *Manager) usable(out []recipientCall, c *Class, purpose keywrap.Purpose, h *Header) ([]recipientCall, error) {
	if h.Store != m.store {
		return nil, fmt.Errorf("file %v, store %v: %w", h.File, h.Store, ErrForeignStore)
	}
	if purpose == keywrap.PurposeData && h.ChunkSize == 0 {
		return nil, fmt.Errorf("file %v: header is not that of a file: %w", h.File, ErrFormat)
	}
	if len(h.Recipients) > MaxRecipients {
		return nil, fmt.Errorf("file %v: %d recipients: %w", h.File, len(h.Recipients), ErrFormat)
	}
	rejected := ""
	for i := range h.Recipients {
		r := &h.Recipients[i]
		if r.Class != c.Name {
			continue
		}
		uri, ok := m.callable(r.Wrapped.Key, c.Allowed)
		if !ok {
			rejected = r.Wrapped.Key
			continue
		}
		w := r.Wrapped
		w.Key = uri
		out = append(out, recipientCall{r, w})
	}
	switch {
	case len(out) > 0:
		return out, nil
	case rejected != "":
		return nil, fmt.Errorf("file %v, class %s, key %s: %w", h.File, c.Name, rejected, ErrNotAllowed)
	}
	return nil, fmt.Errorf("file %v, class %s: %w", h.File, c.Name, ErrForeignClass)
}

// cached returns a key that is in the cache for one of calls, or nil. Every
// recipient is asked before any call: while the first one's service is down,
// the second one's key may be here.
func (m *Manager) cached(calls []recipientCall, ttl time.Duration, purpose keywrap.Purpose, h *Header) *FileKey {
	if ttl <= 0 {
		return nil
	}
	now := m.opts.Now()
	for i := range calls {
		key := newCacheKey(calls[i].recipient, purpose, h)
		if k := m.hit(key, calls[i].wrapped.Key, ttl, now); k != nil {
			return k
		}
	}
	return nil
}

func (m *Manager) hit(key cacheKey, uri string, ttl time.Duration, now time.Time) *FileKey {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.cache.lookup(key, uri, ttl, now)
	if e == nil || e.elem == nil {
		return nil
	}
	m.stats.CacheHits++
	m.cache.lru.MoveToFront(e.elem)
	return &FileKey{prk: e.prk.Clone()}
}

// unwrapAny tries calls in order.
func (m *Manager) unwrapAny(ctx context.Context, calls []recipientCall, c *Class, purpose keywrap.Purpose, h *Header) (*FileKey, error) {
	p := patience{ctx: ctx, grace: m.opts.Grace}
	defer p.stop()
	var best error
	for i := range calls {
		prk, err := m.unwrap(&p, &calls[i], c, purpose, h)
		if err == nil {
			if i > 0 {
				m.opts.Log.Warn("first recipient unusable, opened through another", "file", h.File, "class", c.Name,
					"key", calls[i].wrapped.Key, "failed", calls[0].wrapped.Key, "error", best)
			}
			return &FileKey{prk: prk}, nil
		}
		if !tryNext(err) {
			return nil, err
		}
		if best == nil || prospect(err) > prospect(best) {
			best = err
		}
	}
	return nil, best
}

// tryNext reports whether err says that a recipient is unusable for now, here,
// or for us. Integrity and KeyRejected say that someone edited it.
func tryNext(err error) bool {
	switch fault.Of(err) {
	case fault.KeyDenied, fault.KeyUnavailable, fault.KeyMissing, fault.KeyRevoked, fault.KeyExpired:
		return true
	case fault.Invalid, fault.Unsupported: // the program has no provider for such a key
		return true
	}
	return false
}

// prospect orders failures for the user: first what passes by itself, then what
// an administrator can undo, then denial, which is the normal answer of a
// recovery key. Among equals the first recipient's counts.
func prospect(err error) int {
	switch fault.Of(err) {
	case fault.KeyUnavailable:
		return 5
	case fault.KeyRevoked:
		return 4
	case fault.KeyExpired:
		return 3
	case fault.KeyMissing:
		return 2
	case fault.KeyDenied:
		return 1
	}
	return 0
}

// unwrap returns the PRK of one recipient, from the cache, from a call under
// way, or from a new one. The result is the caller's.
func (m *Manager) unwrap(p *patience, rc *recipientCall, c *Class, purpose keywrap.Purpose, h *Header) (*keymem.Key, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, ErrClosed
	}
	key := newCacheKey(rc.recipient, purpose, h)
	e := m.cache.lookup(key, rc.wrapped.Key, c.Cache, m.opts.Now())
	switch {
	case e == nil:
		e = m.startUnwrap(key, rc, c, purpose, h)
	case !e.ended():
		m.stats.Shared++
	case e.err == nil: // filled since cached looked
		m.stats.CacheHits++
	}
	e.waiters++
	m.mu.Unlock()
	err := p.wait(e.done)
	m.mu.Lock()
	e.waiters--
	defer e.release()
	switch {
	case e.ended() && e.err != nil:
		return nil, e.err
	case e.ended(): // even if the grace ran out at the same moment
		return e.prk.Clone(), nil
	}
	return nil, err
}

// startUnwrap starts the call for rc. m.mu is held.
func (m *Manager) startUnwrap(key cacheKey, rc *recipientCall, c *Class, purpose keywrap.Purpose, h *Header) *entry {
	e := &entry{key: key, uri: rc.wrapped.Key, done: make(chan struct{})}
	m.cache.add(e)
	w, ttl, store, file := rc.wrapped, c.Cache, h.Store, h.File
	ec := keywrap.Context{Store: store.String(), Class: c.Name, Purpose: purpose, ID: file.String()}
	m.start(func() {
		dek, err := call(m, "Decrypt", w.Key, func(ctx context.Context) (*keymem.Key, error) {
			return m.provider.Decrypt(ctx, w, ec)
		})
		var k *FileKey
		if err == nil {
			k, err = newFileKey(dek, store, file)
		}
		m.finish(e, k, err, ttl)
	})
	return e
}

// finish records the outcome of e's call and wakes those who wait for it.
func (m *Manager) finish(e *entry, k *FileKey, err error, ttl time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	defer close(e.done)
	if err == nil && m.closed {
		k.Wipe()
		err = ErrClosed
	}
	e.filled, e.err = m.opts.Now(), err
	if err == nil {
		e.prk = k.prk
	}
	current := m.cache.entries[e.key] == e // not forgotten meanwhile
	switch {
	case current && err == nil && ttl > 0:
		m.cache.keep(e, ttl, m.expire(e))
	case current && err != nil && len(m.cache.entries)-m.cache.lru.Len() <= m.cache.max:
		e.timer = time.AfterFunc(failureTime, m.expire(e))
	default:
		m.cache.drop(e)
	}
}

func (m *Manager) expire(e *entry) func() {
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.cache.drop(e)
	}
}
