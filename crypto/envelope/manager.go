package envelope

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

const (
	// defaultBudget is the providers' own 10 s and a margin, so that their
	// error, which says more, comes first.
	defaultBudget     = 12 * time.Second
	defaultGrace      = 3 * time.Second
	defaultMaxEntries = 16384 // 1 MiB of locked memory

	// failureTime is how long a failed call answers for the next ones. Longer
	// would turn a short outage into a long one.
	failureTime = time.Second
	// closeTime bounds how long Close waits for a provider that ignores its
	// cancelled context.
	closeTime = 5 * time.Second
)

// Class is what the manager needs to know of a class.
type Class struct {
	Name    string        // goes into the encryption context
	Keys    []string      // recipients of new keys, resolved URIs; the first generates
	Allowed []string      // keys that may unwrap; includes Keys
	Cache   time.Duration // how long an unwrapped key is kept after the call; 0: not at all
}

// Options configure a Manager. The zero value of each field means its default.
type Options struct {
	Budget     time.Duration // deadline of one call to the key service, default 12 s
	Grace      time.Duration // how long a caller's cancellation is ignored, default 3 s
	MaxEntries int           // bound of the cache, in keys, default 16,384

	// SameKey reports whether two URIs name the same key material, such as the
	// replicas of a multi-Region key. It is asked when a header's URI is not
	// literally among the allowed ones; the call then names the allowed URI.
	// Default: nothing but equal URIs.
	SameKey func(a, b string) bool

	Now func() time.Time // default time.Now
	Log *slog.Logger     // default: nothing is logged
}

// Stats counts since NewManager. Entries and the last error are the present.
type Stats struct {
	Calls       uint64    `json:"calls"`         // calls to the key service, Create's included
	CacheHits   uint64    `json:"cache_hits"`    // opens answered without one
	Shared      uint64    `json:"shared"`        // opens that joined a call under way
	Failures    uint64    `json:"failures"`      // calls that failed
	Entries     int       `json:"entries"`       // keys in the cache
	LastError   string    `json:"last_error"`    // of the newest failed call, "" if none failed
	LastErrorAt time.Time `json:"last_error_at"` // zero if none failed
}

// Manager makes and unwraps the data keys of one store. All methods are safe
// for concurrent use. Calls to the key service run in goroutines of their own,
// under deadlines of their own: a caller that gives up (an interrupted system
// call) does not end them, and their results go to the cache.
type Manager struct {
	provider keywrap.Provider
	store    ID
	opts     Options
	base     context.Context // parent of every call; ends with Close
	cancel   context.CancelFunc

	mu      sync.Mutex
	cache   cache
	stats   Stats
	closed  bool
	running int           // goroutines that call the provider
	idle    chan struct{} // closed when closed and running is 0
}

// NewManager returns the manager of store's keys at p. Close ends it.
func NewManager(p keywrap.Provider, store ID, o Options) *Manager {
	if o.Budget <= 0 {
		o.Budget = defaultBudget
	}
	if o.Grace <= 0 {
		o.Grace = defaultGrace
	}
	if o.MaxEntries <= 0 {
		o.MaxEntries = defaultMaxEntries
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	m := &Manager{provider: p, store: store, opts: o, idle: make(chan struct{})}
	m.base, m.cancel = context.WithCancel(context.Background())
	m.cache.init(o.MaxEntries)
	return m
}

// Stats returns the counters.
func (m *Manager) Stats() Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.stats
	s.Entries = m.cache.lru.Len()
	return s
}

// Forget wipes what the cache holds for h, so that the next Open asks the key
// service. FileKeys that were handed out are their owners' and stay.
func (m *Manager) Forget(h *Header) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range h.Recipients {
		for _, p := range [...]keywrap.Purpose{keywrap.PurposeData, keywrap.PurposeNames, keywrap.PurposeStore} {
			if e := m.cache.entries[newCacheKey(&h.Recipients[i], p, h)]; e != nil {
				m.cache.drop(e)
			}
		}
	}
}

// Close wipes every key in the cache, cancels the calls under way and waits for
// them, at most 5 s; a key that arrives later is wiped on arrival. Create and
// Open answer ErrClosed from then on. FileKeys that were handed out stay their
// owners'. Further calls of Close only wait.
func (m *Manager) Close() {
	m.mu.Lock()
	if !m.closed {
		m.closed = true
		m.cache.dropAll()
		if m.running == 0 {
			close(m.idle)
		}
	}
	m.mu.Unlock()
	m.cancel()
	t := time.NewTimer(closeTime)
	defer t.Stop()
	select {
	case <-m.idle:
	case <-t.C:
		m.opts.Log.Warn("key service did not return from a cancelled call")
	}
}

// start runs f, which calls the provider, in a goroutine that Close waits for.
// m.mu is held, and m is not closed.
func (m *Manager) start(f func()) {
	m.running++
	go func() {
		f()
		m.mu.Lock()
		defer m.mu.Unlock()
		m.running--
		if m.closed && m.running == 0 {
			close(m.idle)
		}
	}()
}

// call runs one call to the provider under its deadline and counts it; none
// after Close. A failure comes back as *keywrap.CallError.
func call[T any](m *Manager, op, key string, f func(context.Context) (T, error)) (T, error) {
	if m.base.Err() != nil {
		var none T
		return none, fmt.Errorf("%s %s: %w", op, key, ErrClosed)
	}
	ctx, cancel := context.WithTimeout(m.base, m.opts.Budget)
	defer cancel()
	v, err := f(ctx)
	if err != nil {
		err = callError(op, key, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stats.Calls++
	if err != nil {
		if m.closed { // whatever it says, the cause is Close
			return v, fmt.Errorf("%s %s: %w", op, key, ErrClosed)
		}
		m.stats.Failures++
		m.stats.LastError, m.stats.LastErrorAt = err.Error(), m.opts.Now()
	}
	return v, err
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
	end   *time.Timer // running since the cancellation was seen
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
