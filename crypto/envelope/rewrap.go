package envelope

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// Recipients says which recipients of a class a header shall have.
type Recipients struct {
	// Keys are URIs, resolved, in order. Without From, the header shall have
	// these and no others of the class.
	Keys []string
	// From, if not empty, is the key to be replaced: recipients under it go, in
	// their place come those of To, or of Keys where To is empty, as far as the
	// header does not have them, and all others stay. A header without From is
	// left unchanged. From equal to To wraps again under the same key, which
	// after a rotation is its newest material.
	From string
	To   string
	// Purpose of the key, default data. Name keys and the store key are rewrapped
	// with theirs.
	Purpose keywrap.Purpose
}

// Rewrap returns a header for the same data key as h with other recipients of
// class c, and whether it differs from h, which is not changed. New recipients
// are made by ReEncrypt alone, as Extend's; those that stay are not touched, nor
// those of other classes. The commitment is that of before. Calls are marked by
// Options.Background and end with ctx.
//
// Of a shared key, the branch key is wrapped, once for all headers that share it
// and are rewrapped within a few minutes.
//
// Errors: ErrInvalid if no recipient would be left; ErrNotAllowed if a new one
// is not under one of c.Allowed, or none of h's is; ErrForeignStore,
// ErrForeignClass and ErrDoesNotFit, the last before any call where the least
// sizes tell; ErrClosed; and the service's, as *keywrap.CallError.
func (m *Manager) Rewrap(ctx context.Context, h *Header, c Class, r Recipients) (*Header, bool, error) {
	if r.Purpose == "" {
		r.Purpose = keywrap.PurposeData
	}
	out := *h
	out.Recipients = slices.Clone(h.Recipients)
	if h.Store == m.store && r.From != "" && !slices.ContainsFunc(h.Recipients, r.replaces(c.Name)) {
		return &out, false, nil // whether c can use it or not
	}
	calls, err := m.usable(nil, &c, r.Purpose, h)
	if err != nil {
		return nil, false, err
	}
	out.Recipients, err = m.planRecipients(h, &c, &r)
	if err != nil {
		return nil, false, err
	}
	changed := !slices.EqualFunc(out.Recipients, h.Recipients, func(a, b Recipient) bool {
		return a.Class == b.Class && a.Wrapped.Key == b.Wrapped.Key && bytes.Equal(a.Wrapped.Blob, b.Wrapped.Blob)
	})
	n := &reEncryption{ctx: ctx, calls: calls, h: h, from: &c, to: &c, purpose: r.Purpose, background: true}
	for i := range out.Recipients {
		to := &out.Recipients[i]
		if to.Wrapped.Blob != nil {
			to.Wrapped.Blob = bytes.Clone(to.Wrapped.Blob)
			continue
		}
		if to.Wrapped, err = m.reEncryptOnce(n, to.Wrapped.Key); err != nil {
			return nil, false, err
		}
		if err := to.check(); err != nil {
			return nil, false, err
		}
	}
	if n := out.size(); n > out.BlockSize {
		return nil, false, fmt.Errorf("file %v: %d bytes in a block of %d: %w", h.File, n, out.BlockSize, ErrDoesNotFit)
	}
	return &out, changed, nil
}

// planRecipients returns the recipients that h shall have; those to be made have
// no blob.
func (m *Manager) planRecipients(h *Header, c *Class, r *Recipients) ([]Recipient, error) {
	var plan []Recipient
	if r.From == "" {
		plan = planAll(h, c.Name, r.Keys)
	} else {
		plan = planReplace(h, c.Name, r)
	}
	size := h.size() - h.recipientsSize()
	var made []string
	own := 0
	for i := range plan {
		w := &plan[i].Wrapped
		if plan[i].Class == c.Name {
			own++
		}
		if w.Blob == nil {
			made = append(made, w.Key)
			size += keywrap.DataKeyLen // no wrapped key is shorter than the key
		}
		size += plan[i].size()
	}
	if own == 0 {
		return nil, fmt.Errorf("file %v: no recipient of class %s left: %w", h.File, c.Name, ErrInvalid)
	}
	if err := m.checkKeys(c, made); err != nil {
		return nil, err
	}
	if len(plan) > MaxRecipients || size > h.BlockSize {
		return nil, fmt.Errorf("file %v: %d recipients need at least %d bytes, the header has %d: %w",
			h.File, len(plan), size, h.BlockSize, ErrDoesNotFit)
	}
	return plan, nil
}

// planAll takes exactly keys for class, and what h has of other classes.
func planAll(h *Header, class string, keys []string) (plan []Recipient) {
	for _, key := range keys {
		plan = appendKey(plan, h.Recipients, class, key)
	}
	for _, r := range h.Recipients {
		if r.Class != class {
			plan = append(plan, r)
		}
	}
	return plan
}

// replaces tells the recipients of class under r.From.
func (r *Recipients) replaces(class string) func(Recipient) bool {
	return func(o Recipient) bool { return o.Class == class && o.Wrapped.Key == r.From }
}

// planReplace replaces the recipients of class under r.From.
func planReplace(h *Header, class string, r *Recipients) (plan []Recipient) {
	goes := r.replaces(class)
	stay := slices.DeleteFunc(slices.Clone(h.Recipients), goes)
	keys := r.Keys
	if r.To != "" {
		keys = []string{r.To}
	}
	for i, o := range h.Recipients {
		if !goes(o) {
			plan = append(plan, o)
			continue
		}
		if slices.ContainsFunc(h.Recipients[:i], goes) {
			continue // replaced already
		}
		for _, key := range keys {
			if !slices.ContainsFunc(stay, func(s Recipient) bool { return s.Class == class && s.Wrapped.Key == key }) {
				plan = appendKey(plan, nil, class, key)
			}
		}
	}
	return plan
}

// appendKey appends the recipient of class under key that is among have, or one
// to be made, unless plan has it.
func appendKey(plan, have []Recipient, class, key string) []Recipient {
	is := func(r Recipient) bool { return r.Class == class && r.Wrapped.Key == key }
	if slices.ContainsFunc(plan, is) {
		return plan
	}
	if i := slices.IndexFunc(have, is); i >= 0 {
		return append(plan, have[i])
	}
	return append(plan, Recipient{Class: class, Wrapped: keywrap.Wrapped{Key: key}})
}

const (
	// memoTime is how long a rewrapped branch key serves other headers: not so
	// long that it outlives a rotation unnoticed.
	memoTime = 10 * time.Minute
	memoMax  = 1024 // branch keys; of 4 million files
)

// memo remembers the ReEncrypt calls for branch keys, which are the same for
// all headers of a branch. What it holds is not secret. Manager.mu guards it.
type memo struct {
	entries map[memoKey]*memoEntry
	order   []memoKey // oldest first
}

// memoKey identifies one call: all that goes into it.
type memoKey struct {
	from [sha256.Size]byte // all recipients that may be tried, since any of them may serve
	to   string
}

func newMemoKey(n *reEncryption, key string) memoKey {
	var b []byte
	for _, c := range n.calls {
		from := newCacheKey(c.recipient, n.purpose, n.h)
		b = appendField(append(b, from[:]...), c.wrapped.Key)
	}
	return memoKey{sha256.Sum256(b), key}
}

type memoEntry struct {
	done  chan struct{} // closed when w and err are set
	begun time.Time
	w     keywrap.Wrapped
	err   error
}

// reEncryptOnce is reEncrypt, and for the branch key of a shared key remembers
// the result. Failures are forgotten at once.
func (m *Manager) reEncryptOnce(n *reEncryption, key string) (keywrap.Wrapped, error) {
	if !n.h.Shared {
		return m.reEncrypt(n, key)
	}
	k := newMemoKey(n, key)
	for {
		e, mine := m.memo.join(m, k)
		if mine {
			e.w, e.err = m.reEncrypt(n, key)
			if e.err != nil {
				m.mu.Lock()
				m.memo.drop(k, e)
				m.mu.Unlock()
			}
			close(e.done)
		}
		select {
		case <-e.done:
		case <-n.ctx.Done():
			return keywrap.Wrapped{}, fmt.Errorf("envelope: waiting for the key service: %w", n.ctx.Err())
		}
		if e.err == nil {
			// The result has to be allowed for each caller's class as it is now.
			if _, ok := m.callable(e.w.Key, n.to.Allowed); !ok {
				return keywrap.Wrapped{}, fmt.Errorf("class %s, key %s: %w", n.to.Name, e.w.Key, ErrNotAllowed)
			}
			w := e.w
			w.Blob = bytes.Clone(w.Blob)
			return w, nil
		}
		if mine || !errors.Is(e.err, context.Canceled) {
			return keywrap.Wrapped{}, e.err
		}
		// Whoever made the call gave up, which is not this caller's concern.
	}
}

// join returns the entry of k, and whether the caller is to make its call.
func (o *memo) join(m *Manager, k memoKey) (e *memoEntry, mine bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.opts.Now()
	if e := o.entries[k]; e != nil && now.Sub(e.begun) < memoTime {
		return e, false
	}
	if o.entries == nil {
		o.entries = map[memoKey]*memoEntry{}
	}
	if len(o.order) >= memoMax {
		delete(o.entries, o.order[0])
		o.order = slices.Delete(o.order, 0, 1)
	}
	o.order = append(slices.DeleteFunc(o.order, func(x memoKey) bool { return x == k }), k)
	e = &memoEntry{done: make(chan struct{}), begun: now}
	o.entries[k] = e
	return e, true
}

// drop forgets e, unless another one is at its place. m.mu is held.
func (o *memo) drop(k memoKey, e *memoEntry) {
	if o.entries[k] == e {
		delete(o.entries, k)
		o.order = slices.DeleteFunc(o.order, func(x memoKey) bool { return x == k })
	}
}
