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
// recipients. Errors are those of Open, and ErrDoesNotFit.
func (m *Manager) Extend(ctx context.Context, h *Header, from, to Class, purpose keywrap.Purpose) (*Header, error) {
	var arr [MaxRecipients]recipientCall
	calls, err := m.usable(arr[:0], &from, purpose, h)
	if err != nil {
		return nil, err
	}
	out := &Header{Fixed: h.Fixed, Commitment: h.Commitment}
	if err := checkFit(&to, out); err != nil {
		return nil, err
	}
	for _, key := range to.Keys {
		w, err := m.reEncrypt(ctx, calls, h, key, from, to, purpose)
		if err != nil {
			return nil, err
		}
		out.Recipients = append(out.Recipients, Recipient{Class: to.Name, Wrapped: w})
		if err := checkFit(&to, out); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// reEncrypt tries h's recipients in turn and answers the first one's error if
// none does.
func (m *Manager) reEncrypt(ctx context.Context, calls []recipientCall, h *Header, key string, from, to Class, purpose keywrap.Purpose) (keywrap.Wrapped, error) {
	ec := func(class string) keywrap.Context {
		return keywrap.Context{Store: h.Store.String(), Class: class, Purpose: purpose, ID: h.File.String()}
	}
	var first error
	for _, c := range calls {
		w, err := call(m, "ReEncrypt", key, func(ctx context.Context) (keywrap.Wrapped, error) {
			return m.provider.ReEncrypt(ctx, c.wrapped, ec(from.Name), key, ec(to.Name))
		})
		if err == nil {
			if _, ok := m.callable(w.Key, to.Allowed); !ok {
				return w, fmt.Errorf("class %s, key %s from the key service: %w", to.Name, w.Key, ErrNotAllowed)
			}
			return w, nil
		}
		if first == nil {
			first = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	return keywrap.Wrapped{}, first
}
