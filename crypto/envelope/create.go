package envelope

import (
	"context"
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// Create makes a data key for f.File (or for the name key or store of that id)
// and the header that carries it, in a block of headerSize bytes: generated
// under c.Keys[0], encrypted under the others, one recipient each, all of which
// must succeed. f.Store is the manager's store or zero, which means the same;
// f.BlockSize is ignored. The FileKey is the caller's, and is in the cache as
// well, for c.Cache.
//
// As in Open, a cancelled ctx is ignored for Options.Grace, after which Create
// answers ctx.Err() and what the calls still bring is wiped.
//
// Errors: ErrDoesNotFit, as early as it can be known; ErrInvalid; ErrNotAllowed
// if a key of c is not among c.Allowed; ErrForeignStore; ErrClosed; and the
// service's, as *keywrap.CallError.
func (m *Manager) Create(ctx context.Context, c Class, purpose keywrap.Purpose, f Fixed, headerSize int) (*Header, *FileKey, error) {
	f.BlockSize = headerSize
	if f.Store.IsZero() {
		f.Store = m.store
	}
	if err := m.checkCreate(&c, purpose, &f); err != nil {
		return nil, nil, err
	}
	n := &creation{class: c, purpose: purpose, h: &Header{Fixed: f}, done: make(chan struct{})}
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil, nil, ErrClosed
	}
	m.start(func() { m.runCreate(n) })
	m.mu.Unlock()

	p := patience{ctx: ctx, grace: m.opts.Grace}
	defer p.stop()
	err := p.wait(n.done)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil && !n.ended {
		n.abandoned = true
		return nil, nil, err
	}
	if n.err != nil {
		return nil, nil, n.err
	}
	m.keepNew(n)
	return n.h, n.k, nil
}

// checkCreate refuses what needs no call to be refused.
func (m *Manager) checkCreate(c *Class, purpose keywrap.Purpose, f *Fixed) error {
	if f.Store != m.store {
		return fmt.Errorf("file %v, store %v: %w", f.File, f.Store, ErrForeignStore)
	}
	if err := f.check(); err != nil {
		return err
	}
	if purpose == keywrap.PurposeData && f.ChunkSize == 0 {
		return fmt.Errorf("file %v has no chunk size: %w", f.File, ErrInvalid)
	}
	if len(c.Keys) == 0 {
		return fmt.Errorf("class %s has no key: %w", c.Name, ErrInvalid)
	}
	for _, key := range c.Keys {
		if _, ok := m.callable(key, c.Allowed); !ok {
			return fmt.Errorf("class %s, key %s: %w", c.Name, key, ErrNotAllowed)
		}
		// The blob stands for one that is not made yet, of the least length.
		r := Recipient{Class: c.Name, Wrapped: keywrap.Wrapped{Key: key, Blob: zeros[:1]}}
		if err := r.check(); err != nil {
			return err
		}
	}
	return checkFit(c, &Header{Fixed: *f})
}

// checkFit answers ErrDoesNotFit if h cannot hold the recipients it has and the
// least that those of c's remaining keys will take.
func checkFit(c *Class, h *Header) error {
	n := h.size()
	for _, key := range c.Keys[len(h.Recipients):] {
		n += recipientLens + len(c.Name) + len(key) + 1
	}
	if len(c.Keys) > MaxRecipients || n > h.BlockSize {
		return fmt.Errorf("class %s: %d keys need at least %d bytes, the header has %d: %w",
			c.Name, len(c.Keys), n, h.BlockSize, ErrDoesNotFit)
	}
	return nil
}

// creation is a Create under way. Manager.mu guards ended and abandoned.
type creation struct {
	class   Class
	purpose keywrap.Purpose
	done    chan struct{}

	ended     bool // h, k and err are final
	abandoned bool // nobody takes k
	h         *Header
	k         *FileKey
	err       error
}

func (m *Manager) runCreate(n *creation) {
	k, err := m.newKey(n)
	m.mu.Lock()
	defer m.mu.Unlock()
	defer close(n.done)
	if err == nil && m.closed {
		err = ErrClosed
	}
	if err != nil || n.abandoned {
		k.Wipe()
		k = nil
	}
	n.k, n.err, n.ended = k, err, true
}

// newKey makes the calls and completes n.h.
func (m *Manager) newKey(n *creation) (*FileKey, error) {
	h, c := n.h, &n.class
	ec := keywrap.Context{Store: h.Store.String(), Class: c.Name, Purpose: n.purpose, ID: h.File.String()}
	dk, err := call(m, "GenerateDataKey", c.Keys[0], func(ctx context.Context) (keywrap.DataKey, error) {
		return m.provider.GenerateDataKey(ctx, c.Keys[0], ec)
	})
	if err != nil {
		return nil, err
	}
	defer dk.Plain.Wipe()
	if err := m.addRecipient(n, dk.Wrapped); err != nil {
		return nil, err
	}
	for _, key := range c.Keys[1:] {
		w, err := call(m, "Encrypt", key, func(ctx context.Context) (keywrap.Wrapped, error) {
			return m.provider.Encrypt(ctx, key, ec, dk.Plain)
		})
		if err != nil {
			return nil, err
		}
		if err := m.addRecipient(n, w); err != nil {
			return nil, err
		}
	}
	k, err := newFileKey(dk.Plain, h.Store, h.File)
	if err != nil {
		return nil, err
	}
	k.Commit(h)
	return k, nil
}

// addRecipient refuses a wrapped key that Open would refuse: the file could
// never be read again.
func (m *Manager) addRecipient(n *creation, w keywrap.Wrapped) error {
	if _, ok := m.callable(w.Key, n.class.Allowed); !ok {
		return fmt.Errorf("class %s, key %s from the key service: %w", n.class.Name, w.Key, ErrNotAllowed)
	}
	r := Recipient{Class: n.class.Name, Wrapped: w}
	if err := r.check(); err != nil {
		return err
	}
	n.h.Recipients = append(n.h.Recipients, r)
	return checkFit(&n.class, n.h)
}

// keepNew caches the new key under its first recipient: a file that was just
// written is likely to be read. m.mu is held.
func (m *Manager) keepNew(n *creation) {
	if n.class.Cache <= 0 || m.closed {
		return
	}
	r := &n.h.Recipients[0]
	uri, _ := m.callable(r.Wrapped.Key, n.class.Allowed)
	e := &entry{key: newCacheKey(r, n.purpose, n.h), uri: uri, done: make(chan struct{}),
		prk: n.k.prk.Clone(), filled: m.opts.Now()}
	close(e.done)
	m.cache.add(e)
	m.cache.keep(e, n.class.Cache, m.expire(e))
}
