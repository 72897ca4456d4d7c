package limit_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/limit"
)

var ec = keywrap.Context{Store: "00", Class: "phi", Purpose: keywrap.PurposeData, ID: "01"}

// service is a key service in a bubble's time: it takes latency for a call,
// throttles by a token bucket, is down, or answers by hook.
type service struct {
	keywrap.Provider // nil: what is not defined here is not called
	latency          time.Duration

	mu       sync.Mutex
	perSec   float64 // 0: no throttling; negative: nothing else
	tokens   float64
	filled   time.Time
	down     bool // calls hang until their context ends
	hook     func(op, key string) error
	now, top int
	order    []string // Context.ID of the calls answered, in order
	times    []time.Time
	calls    int
	refusals int // throttled
}

func (s *service) fail(op, key, id string, err error) error {
	return &keywrap.CallError{Op: op, Key: key, RequestID: id, Hint: "none", Err: err}
}

func (s *service) call(ctx context.Context, op, key string, c keywrap.Context) error {
	s.mu.Lock()
	s.calls++
	id := fmt.Sprintf("request-%d", s.calls)
	s.now++
	s.top = max(s.top, s.now)
	start := time.Now()
	verdict := s.verdict(op, key)
	down := s.down
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.now--
	}()
	code, wait := "", time.After(s.latency)
	if down {
		wait = nil
	}
	var err error
	select {
	case <-wait:
		if verdict != nil {
			err, code = s.fail(op, key, id, verdict), keywrap.CodeOf(verdict)
		}
	case <-ctx.Done():
		err, id, code = s.fail(op, key, "", fmt.Errorf("%w: %w", keywrap.ErrUnavailable, ctx.Err())), "", keywrap.NoAnswer
		if errors.Is(ctx.Err(), context.Canceled) {
			err = s.fail(op, key, "", context.Canceled)
		}
	}
	keywrap.TraceOf(ctx).Add(keywrap.Attempt{Op: op, Key: key, RequestID: id, At: start, Took: time.Since(start), Code: code})
	if err == nil {
		s.mu.Lock()
		s.order, s.times = append(s.order, c.ID), append(s.times, time.Now())
		s.mu.Unlock()
	}
	return err
}

func (s *service) verdict(op, key string) error {
	if s.hook != nil {
		if err := s.hook(op, key); err != nil {
			return err
		}
	}
	if s.perSec == 0 {
		return nil
	}
	now := time.Now()
	s.tokens = min(max(1, s.perSec), s.tokens+now.Sub(s.filled).Seconds()*s.perSec)
	s.filled = now
	if s.perSec < 0 || s.tokens < 1 {
		s.refusals++
		return keywrap.ErrThrottled
	}
	s.tokens--
	return nil
}

func (s *service) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *service) Decrypt(ctx context.Context, w keywrap.Wrapped, c keywrap.Context) (*keymem.Key, error) {
	return nil, s.call(ctx, keywrap.OpDecrypt, w.Key, c)
}

func (s *service) ReEncrypt(ctx context.Context, _ keywrap.Wrapped, _ keywrap.Context, key string, to keywrap.Context) (keywrap.Wrapped, error) {
	return keywrap.Wrapped{}, s.call(ctx, keywrap.OpReEncrypt, key, to)
}

func (s *service) Describe(ctx context.Context, key string) (keywrap.Description, error) {
	return keywrap.Description{}, s.call(ctx, keywrap.OpDescribe, key, keywrap.Context{})
}

func (s *service) Check(ctx context.Context, c keywrap.Check) error {
	return s.call(ctx, c.Op, c.KeyURI(), c.Context)
}

func decrypt(ctx context.Context, p *limit.Provider, key, id string) error {
	c := ec
	c.ID = id
	_, err := p.Decrypt(ctx, keywrap.Wrapped{Key: key}, c)
	return err
}

// bubble runs f in a bubble, which fails on goroutines that are left.
func bubble(t *testing.T, f func(t *testing.T, s *service, ctx context.Context)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f(t, &service{latency: 20 * time.Millisecond, tokens: 1e9, filled: time.Now()}, t.Context())
	})
}

func between(t *testing.T, what string, got, least, most time.Duration) {
	t.Helper()
	if got < least || got > most {
		t.Errorf("%s: %v, want %v to %v", what, got, least, most)
	}
}
