package envelope

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// request describes a call to the provider.
type request struct {
	ctx        context.Context // of the caller, for its values; in the background, its end ends the call
	op         string
	key        string
	class      string
	purpose    keywrap.Purpose
	id         ID
	background bool
}

// context is the encryption context of r.
func (m *Manager) context(r *request) keywrap.Context {
	return keywrap.Context{Store: m.store.String(), Class: r.class, Purpose: r.purpose, ID: r.id.String()}
}

// call runs one call to the provider under its deadline, counts it and tells
// Options.Call; none after Close. wipe destroys a result that the caller does
// not get. The ids are those of the requests that the result, or the failure,
// came from. A failure of the service comes back as *keywrap.CallError.
func call[T any](m *Manager, r request, wipe func(T), f func(context.Context) (T, error)) (T, []string, error) {
	var none T
	if m.base.Err() != nil {
		return none, nil, fmt.Errorf("%s %s: %w", r.op, r.key, ErrClosed)
	}
	trace := new(keywrap.Trace)
	ctx, cancel := context.WithTimeout(keywrap.WithTrace(m.base, trace), m.opts.Budget)
	defer cancel()
	if r.background {
		ctx = m.opts.Background(ctx)
		defer context.AfterFunc(r.ctx, cancel)()
	}
	v, err := f(ctx)
	if err != nil {
		err = callError(r.op, r.key, err)
	}
	attempts := trace.Attempts()
	ids := requestIDs(attempts, err)
	if err == nil {
		if err = m.record(&r, attempts, nil); err != nil {
			wipe(v)
			v = none
		}
	} else {
		_ = m.record(&r, attempts, err) // the call has failed already, and says more
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stats.Calls++
	if err != nil {
		if m.closed { // whatever it says, the cause is Close
			return v, ids, fmt.Errorf("%s %s: %w", r.op, r.key, ErrClosed)
		}
		m.stats.Failures++
		m.stats.LastError, m.stats.LastErrorAt = err.Error(), m.opts.Now()
	}
	return v, ids, err
}

// record tells Options.Call of a call that ended with err.
func (m *Manager) record(r *request, attempts []keywrap.Attempt, err error) error {
	if m.opts.Call == nil {
		return nil
	}
	refusal := m.opts.Call(context.WithoutCancel(r.ctx), CallRecord{Op: r.op, Class: r.class, Purpose: r.purpose, ID: r.id,
		Key: r.key, Attempts: attempts, Background: r.background, Err: err})
	if refusal != nil {
		return fmt.Errorf("%s %s: record of the call: %w", r.op, r.key, refusal)
	}
	return nil
}

// callError holds a provider to its contract: callers find a *keywrap.CallError,
// and a deadline is an unavailable service.
func callError(op, key string, err error) error {
	if fault.Of(err) == fault.None && errors.Is(err, context.DeadlineExceeded) {
		return &keywrap.CallError{Op: op, Key: key, Err: fmt.Errorf("%w: no answer in time", keywrap.ErrUnavailable),
			Hint: "check the network and the key service's endpoint"}
	}
	var ce *keywrap.CallError
	if errors.As(err, &ce) {
		return err
	}
	return &keywrap.CallError{Op: op, Key: key, Err: err}
}

// callable returns the URI under which key may be called: the allowed one that
// it equals, or else one that names the same key.
func (m *Manager) callable(key string, allowed []string) (string, bool) {
	if slices.Contains(allowed, key) {
		return key, true
	}
	if m.opts.SameKey != nil {
		for _, a := range allowed {
			if m.opts.SameKey(a, key) {
				return a, true
			}
		}
	}
	return "", false
}

// patience waits for calls on behalf of one caller. Its grace is used up once,
// however many calls the caller waits for.
type patience struct {
	ctx   context.Context
	grace time.Duration

	background bool // the caller is nobody

	end *time.Timer // running since the cancellation was seen
}

// wait returns nil once done is closed, or the context's error when that
// happened a grace time ago.
func (p *patience) wait(done <-chan struct{}) error {
	if p.end == nil {
		select {
		case <-done:
			return nil
		case <-p.ctx.Done():
			p.end = time.NewTimer(p.grace)
		}
	}
	select {
	case <-done:
		return nil
	case <-p.end.C:
		return fmt.Errorf("envelope: waiting for the key service: %w", p.ctx.Err())
	}
}

func (p *patience) stop() {
	if p.end != nil {
		p.end.Stop()
	}
}
