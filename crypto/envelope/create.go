package envelope

import (
	"context"
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// Create makes a data key for f.File (or for the name key or store of that id)
// and the header that carries it, in a block of headerSize bytes: generated
// under c.Keys[0], encrypted under the others, one recipient each, all of which
// must succeed. f.Store is the manager's store or zero, which means the same;
// f.BlockSize and f.Shared are ignored. The FileKey is the caller's, and is in
// the cache as well, for c.Cache.
//
// A file whose f.File is zero gets a fresh id: of a key made ahead of need, if
// there is one. Where c is Shared, the file's data key is made here and wrapped
// under the class's branch key, and the recipients are those of that.
//
// As in Open, a cancelled ctx is ignored for Options.Grace, after which Create
// answers ctx.Err() and what the calls still bring is not used, except for
// files to come.
//
// Errors: ErrDoesNotFit, as early as it can be known; ErrInvalid; ErrNotAllowed
// if a key of c is not among c.Allowed; ErrForeignStore; ErrClosed; and the
// service's, as *keywrap.CallError.
func (m *Manager) Create(ctx context.Context, c Class, purpose keywrap.Purpose, f Fixed, headerSize int) (*Header, *FileKey, error) {
	f.BlockSize = headerSize
	f.Shared = c.Shared && c.Cache > 0 && purpose == keywrap.PurposeData
	if f.Store.IsZero() {
		f.Store = m.store
	}
	h := &Header{Fixed: f}
	k, from, err := m.create(ctx, &c, purpose, h)
	k, err = m.observed(ctx, Use{Op: "create", Class: c.Name, Purpose: purpose, File: h.File, Branch: h.Branch}, from, k, err)
	if err != nil {
		return nil, nil, err
	}
	if !h.Shared { // a file that was just written is likely to be read
		m.mu.Lock()
		defer m.mu.Unlock()
		m.keep(&c, purpose, h, k.prk, from.requests)
	}
	return h, k, nil
}

// create completes h.
func (m *Manager) create(ctx context.Context, c *Class, purpose keywrap.Purpose, h *Header) (k *FileKey, from origin, err error) {
	if err = m.checkCreate(c, purpose, h); err != nil {
		return nil, from, err
	}
	switch {
	case h.Shared:
		k, from, err = m.createShared(ctx, c, h)
	case h.File.IsZero():
		k, from, err = m.createAny(ctx, c, h)
	default:
		k, from, err = m.createOne(ctx, c, purpose, h)
	}
	if err != nil {
		return nil, from, err
	}
	if err := checkFit(c, h); err != nil { // made for another header size
		k.Wipe()
		return nil, from, err
	}
	k.Commit(h)
	return k, from, nil
}

// checkCreate refuses what needs no call to be refused.
func (m *Manager) checkCreate(c *Class, purpose keywrap.Purpose, h *Header) error {
	if h.Store != m.store {
		return fmt.Errorf("file %v, store %v: %w", h.File, h.Store, ErrForeignStore)
	}
	if err := h.Fixed.check(); err != nil {
		return err
	}
	if purpose == keywrap.PurposeData && h.ChunkSize == 0 {
		return fmt.Errorf("file %v has no chunk size: %w", h.File, ErrInvalid)
	}
	if purpose != keywrap.PurposeData && h.File.IsZero() {
		return fmt.Errorf("key for %s has no id: %w", purpose, ErrInvalid)
	}
	if len(c.Keys) == 0 {
		return fmt.Errorf("class %s has no key: %w", c.Name, ErrInvalid)
	}
	if err := m.checkKeys(c, c.Keys); err != nil {
		return err
	}
	return checkFit(c, h)
}

// checkKeys refuses keys that cannot be recipients of c.
func (m *Manager) checkKeys(c *Class, keys []string) error {
	for _, key := range keys {
		if _, ok := m.callable(key, c.Allowed); !ok {
			return fmt.Errorf("class %s, key %s: %w", c.Name, key, ErrNotAllowed)
		}
		// The blob stands for one that is not made yet, of the least length.
		r := Recipient{Class: c.Name, Wrapped: keywrap.Wrapped{Key: key, Blob: zeros[:1]}}
		if err := r.check(); err != nil {
			return err
		}
	}
	return nil
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

// creation is a Create under way for an id of the caller's. Manager.mu guards
// ended and abandoned.
type creation struct {
	making
	done chan struct{}

	ended     bool // k and err are final
	abandoned bool // nobody takes k
	k         *FileKey
	err       error
}

// createOne makes a key for h.File.
func (m *Manager) createOne(ctx context.Context, c *Class, purpose keywrap.Purpose, h *Header) (*FileKey, origin, error) {
	from := origin{key: c.Keys[0], source: SourceCall}
	n := &creation{making: making{ctx: ctx, class: *c, purpose: purpose, h: &Header{Fixed: h.Fixed}}, done: make(chan struct{})}
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil, from, ErrClosed
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
		return nil, from, err
	}
	from.requests, h.Recipients = n.ids, n.h.Recipients
	return n.k, from, n.err
}

func (m *Manager) runCreate(n *creation) {
	k, err := m.makeKey(&n.making)
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

// making is a key being made by calls: a data key, or the branch key of h.
type making struct {
	ctx        context.Context // of the caller, for its values
	background bool
	class      Class
	purpose    keywrap.Purpose
	h          *Header  // fixed part and branch; recipients are added
	ids        []string // of the requests
}

// makeKey makes the calls. The result belongs to n.h's wrapID.
func (m *Manager) makeKey(n *making) (*FileKey, error) {
	h, c := n.h, &n.class
	r := request{ctx: n.ctx, op: keywrap.OpGenerate, key: c.Keys[0], class: c.Name, purpose: n.purpose, id: h.wrapID(), background: n.background}
	wipe := func(dk keywrap.DataKey) { dk.Plain.Wipe() }
	dk, ids, err := call(m, r, wipe, func(ctx context.Context) (keywrap.DataKey, error) {
		return m.provider.GenerateDataKey(ctx, r.key, m.context(&r))
	})
	n.ids = append(n.ids, ids...)
	if err != nil {
		return nil, err
	}
	defer dk.Plain.Wipe()
	if err := m.addRecipient(n, dk.Wrapped); err != nil {
		return nil, err
	}
	for _, key := range c.Keys[1:] {
		r.op, r.key = keywrap.OpEncrypt, key
		w, ids, err := call(m, r, func(keywrap.Wrapped) {}, func(ctx context.Context) (keywrap.Wrapped, error) {
			return m.provider.Encrypt(ctx, r.key, m.context(&r), dk.Plain)
		})
		if err != nil {
			n.ids = ids
			return nil, err
		}
		n.ids = append(n.ids, ids...)
		if err := m.addRecipient(n, w); err != nil {
			return nil, err
		}
	}
	return newFileKey(dk.Plain, h.Store, r.id)
}

// addRecipient refuses a wrapped key that Open would refuse: the file could
// never be read again.
func (m *Manager) addRecipient(n *making, w keywrap.Wrapped) error {
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

// keep caches what h's first recipient wraps. prk stays the caller's. m.mu is
// held.
func (m *Manager) keep(c *Class, purpose keywrap.Purpose, h *Header, prk *keymem.Key, ids []string) {
	if c.Cache <= 0 || m.closed {
		return
	}
	r := &h.Recipients[0]
	uri, _ := m.callable(r.Wrapped.Key, c.Allowed)
	e := &entry{key: newCacheKey(r, purpose, h), uri: uri, done: make(chan struct{}),
		prk: prk.Clone(), ids: ids, filled: m.opts.Now()}
	close(e.done)
	m.cache.add(e)
	m.cache.keep(e, c.Cache, m.expire(e))
}
