package limit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

const (
	defaultConcurrent = 64
	defaultBudget     = 10 * time.Second

	firstPause   = 50 * time.Millisecond // after a throttling answer
	longestPause = time.Second
)

// Options configure a Provider. The zero value of each field means its default.
type Options struct {
	PerSecond  float64       // calls per second; 0: no fixed limit, only what throttling teaches
	Burst      int           // calls at once within PerSecond, default one second's worth
	Concurrent int           // calls at a time, default 64
	Budget     time.Duration // of one call from its turn on, default 10 s
	Log        *slog.Logger  // of outages and throttling, default none
	// Observe is told of every call when it has ended, by the caller's
	// goroutine and without locks held. The Call's slices are the observer's.
	Observe func(Call)
}

// Call is one call as Observe learns of it.
type Call struct {
	Op, Key    string
	Context    keywrap.Context // of ReEncrypt the source's
	Background bool
	Check      bool // only asked, see keywrap.Checker
	Start      time.Time
	Waited     time.Duration // for turns, and in pauses
	Took       time.Duration // at the service
	Attempts   []keywrap.Attempt
	Err        error

	sent bool // it had a turn
}

// Provider is a key service with limits. Methods are safe for concurrent use.
type Provider struct {
	next     keywrap.Provider
	o        Options
	gate     *gate
	breakers *breakers
	counters counters
	pausing  atomic.Int64
}

var (
	_ keywrap.Provider = (*Provider)(nil)
	_ keywrap.Checker  = (*Provider)(nil)
)

// New returns p within limits. One Provider should serve all that one process
// asks of a service's account and Region. It has nothing to close.
func New(p keywrap.Provider, o Options) *Provider {
	if o.Concurrent <= 0 {
		o.Concurrent = defaultConcurrent
	}
	if o.Budget <= 0 {
		o.Budget = defaultBudget
	}
	if o.Burst <= 0 {
		o.Burst = max(1, int(math.Ceil(o.PerSecond)))
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Provider{next: p, o: o, gate: newGate(o), breakers: newBreakers(o.Log)}
}

type backgroundKey struct{}

// Background marks ctx's calls as such that nobody waits for: refills, keys
// read ahead, rewrapping.
func Background(ctx context.Context) context.Context {
	return context.WithValue(ctx, backgroundKey{}, true)
}

func isBackground(ctx context.Context) bool {
	on, _ := ctx.Value(backgroundKey{}).(bool)
	return on
}

// outcome is what an attempt says about the service.
type outcome uint8

const (
	unknown     outcome = iota // the caller gave up, or the error says nothing
	answered                   // the service answered, be it with a refusal
	throttled                  // it answered that it throttles
	unavailable                // it did not answer
)

// outcomeOf judges err. An unavailable service is the caller's doing if it was
// the caller's time that ran out.
func outcomeOf(ctx context.Context, err error) outcome {
	switch kind := fault.Of(err); {
	case err == nil:
		return answered
	case errors.Is(err, keywrap.ErrThrottled):
		return throttled
	case kind == fault.KeyUnavailable && ctx.Err() == nil:
		return unavailable
	case kind == fault.None, kind == fault.KeyUnavailable, kind == fault.Invalid:
		return unknown
	}
	return answered
}

// call makes one call of the service by fn, with everything that this package
// is for.
func (p *Provider) call(ctx context.Context, s *subject, check bool, fn func(context.Context) error) error {
	var trace keywrap.Trace
	c := Call{Op: s.op, Key: s.key(), Context: s.context, Background: isBackground(ctx), Check: check, Start: time.Now()}
	probe, err := p.breakers.enter(s)
	if err == nil {
		err = p.turns(ctx, s, probe, &c, func(ctx context.Context) error { return fn(keywrap.WithTrace(ctx, &trace)) })
	}
	c.Attempts, c.Err = trace.Attempts(), err
	to := keywrap.TraceOf(ctx)
	for _, a := range c.Attempts {
		to.Add(a)
	}
	p.counters.ended(&c)
	if p.o.Observe != nil {
		p.o.Observe(c)
	}
	return err
}

// turns gives the call turns until it is not throttled, or for good.
func (p *Provider) turns(ctx context.Context, s *subject, probe bool, c *Call, fn func(context.Context) error) error {
	w := &waiter{about: s, background: c.Background && !probe, again: probe}
	var last error // of the turn before: it was throttled
	left, least := p.o.Budget, min(probeBudget, p.o.Budget)
	if probe {
		left = least
	}
	var began time.Time
	for n := 0; ; n++ {
		from := time.Now()
		err := p.gate.enter(ctx, w)
		start := time.Now()
		c.Waited += start.Sub(from)
		if err != nil {
			p.leave(s, probe, unknown, err)
			return p.noTurn(s, err, last)
		}
		if n == 0 {
			began = start
		}
		// However much of it retries have used up, an attempt gets time to be
		// answered.
		how, err := p.attempt(ctx, s, probe, max(left, least), c, fn)
		took := time.Since(start)
		c.Took += took
		left -= took
		if p.gate.leave(w, start, how) {
			p.o.Log.Debug("the key service throttles; the rate is lowered", "key", s.key())
		}
		p.leave(s, probe, how, err)
		if how == throttled {
			p.counters.throttled()
		}
		if how != throttled || ctx.Err() != nil || p.gaveUp(began, err) {
			return err
		}
		probe, w.again, last = false, true, err
		c.Waited += p.pause(ctx, n)
	}
}

// attempt calls fn, unless a breaker opened since, within budget.
func (p *Provider) attempt(ctx context.Context, s *subject, probe bool, d time.Duration, c *Call, fn func(context.Context) error) (outcome, error) {
	f := newBudget(ctx, d)
	defer f.end(context.Canceled)
	if err := p.breakers.start(s, probe, f); err != nil {
		return unknown, err
	}
	defer p.breakers.end(s, f)
	c.sent = true
	err := fn(f)
	return outcomeOf(ctx, err), err
}

// leave tells the breakers, and, if one opens, those who wait for its key.
func (p *Provider) leave(s *subject, probe bool, how outcome, err error) {
	if key := p.breakers.leave(s, probe, how, err); key != "" {
		p.gate.refuse(func(w *waiter) error { return p.breakers.refusalOf(w.about, key) })
	}
}

// gaveUp reports whether a call that was throttled from began on has waited long
// enough: nobody had another answer for a whole budget. Then the others who have
// waited as long hear it too, rather than one after the other.
func (p *Provider) gaveUp(began time.Time, err error) bool {
	if p.gate.silent(began) < p.o.Budget {
		return false
	}
	p.o.Log.Warn("the key service does nothing but throttle", "for", p.o.Budget, "error", err)
	old := time.Now().Add(-p.o.Budget)
	p.gate.refuse(func(w *waiter) error {
		if w.since.After(old) {
			return nil
		}
		return refusal(callError(err, w.about), w.about)
	})
	return true
}

// noTurn is the failure of a call whose wait for a turn ended with err. last is
// what the service said to its turn before, if it had one.
func (p *Provider) noTurn(s *subject, err, last error) error {
	var refused *keywrap.CallError
	switch {
	case errors.As(err, &refused):
		return err
	case errors.Is(err, context.DeadlineExceeded) && last != nil:
		return last
	case errors.Is(err, context.DeadlineExceeded):
		return &keywrap.CallError{Op: s.op, Key: s.key(),
			Err:  fmt.Errorf("%w: no turn in the time there was: %w", keywrap.ErrThrottled, err),
			Hint: "more calls wait than the limits let through: raise the limits, or lengthen the class's cache time"}
	}
	return &keywrap.CallError{Op: s.op, Key: s.key(), Err: err}
}

// pause is full jitter: clients that were throttled together do not come back
// together.
func (p *Provider) pause(ctx context.Context, n int) time.Duration {
	p.pausing.Add(1)
	defer p.pausing.Add(-1)
	from := time.Now()
	t := time.NewTimer(rand.N(min(firstPause<<min(n, 10), longestPause)))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
	return time.Since(from)
}

// GenerateDataKey implements keywrap.Provider.
func (p *Provider) GenerateDataKey(ctx context.Context, key string, ec keywrap.Context) (dk keywrap.DataKey, err error) {
	err = p.call(ctx, &subject{op: keywrap.OpGenerate, keys: []string{key}, context: ec}, false, func(ctx context.Context) (err error) {
		dk, err = p.next.GenerateDataKey(ctx, key, ec)
		return err
	})
	return dk, err
}

// Encrypt implements keywrap.Provider.
func (p *Provider) Encrypt(ctx context.Context, key string, ec keywrap.Context, plain *keymem.Key) (w keywrap.Wrapped, err error) {
	err = p.call(ctx, &subject{op: keywrap.OpEncrypt, keys: []string{key}, context: ec}, false, func(ctx context.Context) (err error) {
		w, err = p.next.Encrypt(ctx, key, ec, plain)
		return err
	})
	return w, err
}

// Decrypt implements keywrap.Provider.
func (p *Provider) Decrypt(ctx context.Context, w keywrap.Wrapped, ec keywrap.Context) (plain *keymem.Key, err error) {
	err = p.call(ctx, &subject{op: keywrap.OpDecrypt, keys: []string{w.Key}, context: ec}, false, func(ctx context.Context) (err error) {
		plain, err = p.next.Decrypt(ctx, w, ec)
		return err
	})
	return plain, err
}

// ReEncrypt implements keywrap.Provider.
func (p *Provider) ReEncrypt(ctx context.Context, w keywrap.Wrapped, from keywrap.Context, key string, to keywrap.Context) (out keywrap.Wrapped, err error) {
	s := &subject{op: keywrap.OpReEncrypt, keys: both(w.Key, key), context: from}
	err = p.call(ctx, s, false, func(ctx context.Context) (err error) {
		out, err = p.next.ReEncrypt(ctx, w, from, key, to)
		return err
	})
	return out, err
}

func both(from, to string) []string {
	if from == to {
		return []string{from}
	}
	return []string{from, to}
}

// Describe implements keywrap.Provider. It passes an open breaker, and changes
// none: a service may describe a key that it cannot use.
func (p *Provider) Describe(ctx context.Context, key string) (d keywrap.Description, err error) {
	s := &subject{op: keywrap.OpDescribe, keys: []string{key}, passes: true, mute: true}
	err = p.call(ctx, s, false, func(ctx context.Context) (err error) {
		d, err = p.next.Describe(ctx, key)
		return err
	})
	return d, err
}

// Check implements keywrap.Checker, if the service does; it passes an open
// breaker, and closes it if there is an answer.
func (p *Provider) Check(ctx context.Context, c keywrap.Check) error {
	s := &subject{op: c.Op, keys: []string{c.KeyURI()}, context: c.Context, passes: true, mute: c.Op == keywrap.OpDescribe}
	if c.Op == keywrap.OpReEncrypt {
		s.keys = both(c.KeyURI(), c.ToKey)
	}
	return p.call(ctx, s, true, func(ctx context.Context) error { return keywrap.CheckWith(ctx, p.next, c) })
}
