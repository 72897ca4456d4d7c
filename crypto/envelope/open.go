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
// call; ErrCommitment; ErrSealed; ErrInvalid for contents without a cipher; ErrClosed; and
// the service's, as *keywrap.CallError. When all recipients fail, the error is
// that of the one with the best prospect.
func (m *Manager) Open(ctx context.Context, c Class, purpose keywrap.Purpose, h *Header) (*FileKey, error) {
	k, from, err := m.open(ctx, &c, purpose, h)
	return m.observed(ctx, Use{Op: "open", Class: c.Name, Purpose: purpose, File: h.File, Branch: h.Branch}, from, k, err)
}

func (m *Manager) open(ctx context.Context, c *Class, purpose keywrap.Purpose, h *Header) (*FileKey, origin, error) {
	var arr [MaxRecipients]recipientCall
	calls, err := m.usable(arr[:0], c, purpose, h)
	if err != nil {
		return nil, origin{}, err
	}
	prk, from := m.cached(calls, c.Cache, purpose, h)
	if prk == nil { // also when the manager is closed, which has no cache
		p := patience{ctx: ctx, grace: m.opts.Grace}
		defer p.stop()
		if prk, from, err = m.unwrapAny(&p, calls, c, purpose, h); err != nil {
			return nil, from, err
		}
	}
	k := &FileKey{prk: prk}
	if h.Shared {
		if k, err = unseal(prk, c.Name, h); err != nil {
			return nil, from, err
		}
	}
	// The cache answers for the wrapped key, not for the header around it.
	if err := k.Check(h); err != nil {
		k.Wipe()
		return nil, from, err
	}
	return k, from, nil
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
		return nil, &keywrap.CallError{Op: keywrap.OpDecrypt, Key: rejected, Err: ErrNotAllowed,
			Hint: "somebody put a wrapped key of their own into the header, or the class lost this key: compare with a backup, and with the policy"}
	}
	return nil, fmt.Errorf("file %v, class %s: %w", h.File, c.Name, ErrForeignClass)
}

// cached returns what is in the cache for one of calls, or nil. Every recipient
// is asked before any call: while the first one's service is down, the second
// one's key may be here. The result is the caller's.
func (m *Manager) cached(calls []recipientCall, ttl time.Duration, purpose keywrap.Purpose, h *Header) (*keymem.Key, origin) {
	if ttl <= 0 {
		return nil, origin{}
	}
	now := m.opts.Now()
	for i := range calls {
		key := newCacheKey(calls[i].recipient, purpose, h)
		if prk, from := m.hit(key, calls[i].wrapped.Key, ttl, now); prk != nil {
			return prk, from
		}
	}
	return nil, origin{}
}

func (m *Manager) hit(key cacheKey, uri string, ttl time.Duration, now time.Time) (*keymem.Key, origin) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.cache.lookup(key, uri, ttl, now)
	if e == nil || e.elem == nil {
		return nil, origin{}
	}
	m.stats.CacheHits++
	m.cache.lru.MoveToFront(e.elem)
	return e.prk.Clone(), origin{uri, SourceCache, e.ids}
}

// unwrapAny tries calls in order. The origin of a failure has the ids of all.
func (m *Manager) unwrapAny(p *patience, calls []recipientCall, c *Class, purpose keywrap.Purpose, h *Header) (*keymem.Key, origin, error) {
	var best error
	var failed origin
	for i := range calls {
		prk, from, err := m.unwrap(p, &calls[i], c, purpose, h)
		if err == nil {
			if i > 0 {
				m.opts.Log.Warn("first recipient unusable, opened through another", "file", h.File, "class", c.Name,
					"key", calls[i].wrapped.Key, "failed", calls[0].wrapped.Key, "error", best)
			}
			return prk, from, nil
		}
		failed.requests = append(failed.requests, from.requests...)
		if best == nil || !tryNext(err) || prospect(err) > prospect(best) {
			best, failed.key, failed.source = err, from.key, from.source
		}
		if !tryNext(err) {
			break
		}
	}
	return nil, failed, best
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

// unwrap returns what one recipient wraps, as a PRK: from the cache, from a call
// under way, or from a new one. The result is the caller's.
func (m *Manager) unwrap(p *patience, rc *recipientCall, c *Class, purpose keywrap.Purpose, h *Header) (*keymem.Key, origin, error) {
	from := origin{key: rc.wrapped.Key}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, from, ErrClosed
	}
	key := newCacheKey(rc.recipient, purpose, h)
	e := m.cache.lookup(key, rc.wrapped.Key, c.Cache, m.opts.Now())
	switch {
	case e == nil:
		from.source = SourceCall
		e = m.startUnwrap(p, key, rc, c, purpose, h)
	case !e.ended():
		from.source = SourceJoined
		m.stats.Shared++
	default: // filled since cached looked, or a failure
		from.source = SourceCache
		if e.err == nil {
			m.stats.CacheHits++
		}
	}
	e.waiters++
	m.mu.Unlock()
	err := p.wait(e.done)
	m.mu.Lock()
	e.waiters--
	defer e.release()
	if !e.ended() {
		return nil, from, err
	}
	// The outcome counts even if the grace ran out at the same moment.
	from.requests = e.ids
	if e.err != nil {
		return nil, from, e.err
	}
	return e.prk.Clone(), from, nil
}

// startUnwrap starts the call for rc. m.mu is held.
func (m *Manager) startUnwrap(p *patience, key cacheKey, rc *recipientCall, c *Class, purpose keywrap.Purpose, h *Header) *entry {
	e := &entry{key: key, uri: rc.wrapped.Key, done: make(chan struct{})}
	m.cache.add(e)
	w, ttl, store := rc.wrapped, c.Cache, h.Store
	r := request{ctx: p.ctx, op: keywrap.OpDecrypt, key: w.Key, class: c.Name, purpose: purpose, id: h.wrapID(), background: p.background}
	m.start(func() {
		dek, ids, err := call(m, r, (*keymem.Key).Wipe, func(ctx context.Context) (*keymem.Key, error) {
			return m.provider.Decrypt(ctx, w, m.context(&r))
		})
		var k *FileKey
		if err == nil {
			k, err = newFileKey(dek, store, r.id)
		}
		m.finish(e, k, ids, err, ttl)
	})
	return e
}

// finish records the outcome of e's call and wakes those who wait for it.
func (m *Manager) finish(e *entry, k *FileKey, ids []string, err error, ttl time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	defer close(e.done)
	if err == nil && m.closed {
		k.Wipe()
		err = ErrClosed
	}
	e.filled, e.ids, e.err = m.opts.Now(), ids, err
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
