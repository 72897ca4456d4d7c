package envelope

import (
	"context"
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// Extend returns a header for the same data key as h whose recipients are the
// keys of class to, made from h's recipients of class from by ReEncrypt alone:
// no plaintext key and no right to decrypt is needed (two services excepted,
// see keywrap.Mux). h is not changed. The commitment stays: it does not cover
// recipients. Errors are those of Open, ErrDoesNotFit, and ErrShared: a branch
// key wrapped for another class would open every file of the branch there.
func (m *Manager) Extend(ctx context.Context, h *Header, from, to Class, purpose keywrap.Purpose) (*Header, error) {
	var arr [MaxRecipients]recipientCall
	calls, err := m.usable(arr[:0], &from, purpose, h)
	if err != nil {
		return nil, err
	}
	if h.Shared && from.Name != to.Name {
		return nil, fmt.Errorf("file %v, class %s to %s: %w", h.File, from.Name, to.Name, ErrShared)
	}
	out := *h
	out.Recipients = nil
	if err := checkFit(&to, &out); err != nil {
		return nil, err
	}
	for _, key := range to.Keys {
		w, err := m.reEncrypt(&reEncryption{ctx: ctx, calls: calls, h: h, from: &from, to: &to, purpose: purpose}, key)
		if err != nil {
			return nil, err
		}
		out.Recipients = append(out.Recipients, Recipient{Class: to.Name, Wrapped: w})
		if err := checkFit(&to, &out); err != nil {
			return nil, err
		}
	}
	return &out, nil
}

// reEncryption is what the ReEncrypt calls for one header have in common.
type reEncryption struct {
	ctx        context.Context
	calls      []recipientCall // of h, of class from
	h          *Header
	from, to   *Class
	purpose    keywrap.Purpose
	background bool // nobody waits, and ctx ends the call
}

// reEncrypt wraps the key of n.h under key. It tries the recipients in turn and
// answers the first one's error if none serves.
func (m *Manager) reEncrypt(n *reEncryption, key string) (keywrap.Wrapped, error) {
	r := request{ctx: n.ctx, op: keywrap.OpReEncrypt, key: key, class: n.to.Name, purpose: n.purpose, id: n.h.wrapID(), background: n.background}
	source := r
	source.class = n.from.Name
	var first error
	for _, c := range n.calls {
		w, _, err := call(m, r, func(keywrap.Wrapped) {}, func(ctx context.Context) (keywrap.Wrapped, error) {
			return m.provider.ReEncrypt(ctx, c.wrapped, m.context(&source), key, m.context(&r))
		})
		if err == nil {
			if _, ok := m.callable(w.Key, n.to.Allowed); !ok {
				return w, fmt.Errorf("class %s, key %s from the key service: %w", n.to.Name, w.Key, ErrNotAllowed)
			}
			return w, nil
		}
		if first == nil {
			first = err
		}
		if n.ctx.Err() != nil {
			break
		}
	}
	return keywrap.Wrapped{}, first
}
