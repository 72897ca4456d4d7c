package envelope

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

const (
	// defaultBudget is a last resort. Providers bound a call themselves, and
	// waiting for admission to a slow service may take minutes.
	defaultBudget     = 5 * time.Minute
	defaultGrace      = 3 * time.Second
	defaultMaxEntries = 16384 // 1 MiB of locked memory
	defaultPoolSize   = 256
	defaultPoolAge    = 5 * time.Minute
	// defaultAhead makes 1,600 unwraps a second of a service that takes 20 ms.
	defaultAhead = 32

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
	Allowed []string      // keys that may unwrap; includes Keys, and retired keys besides
	Cache   time.Duration // how long an unwrapped key is kept after the call; 0: not at all
	// Shared makes new files share the key service's work: their data keys are
	// wrapped under a branch key, one call for up to BranchFiles files. Without
	// Cache, where every open shall be a call of its own, it has no effect.
	// Opening goes by the header alone.
	Shared bool
}

// Options configure a Manager. The zero value of each field means its default.
type Options struct {
	Budget     time.Duration // deadline of one call to the key service, admission included, default 5 min
	Grace      time.Duration // how long a caller's cancellation is ignored, default 3 s
	MaxEntries int           // bound of the cache, in keys, default 16,384

	// SameKey reports whether two URIs name the same key material, such as the
	// replicas of a multi-Region key. It is asked when a header's URI is not
	// literally among the allowed ones; the call then names the allowed URI.
	// Default: nothing but equal URIs.
	SameKey func(a, b string) bool

	PoolSize int           // bound of each class's pool of data keys ahead of need, default 256; negative: no pool
	PoolAge  time.Duration // after which a key in the pool is wiped unused, default 5 min
	Ahead    int           // bound of the unwraps that Ahead has under way at a time, default 32

	// Observe is told of every Create and Open, before the key is handed out,
	// with the caller's context. After a success its error refuses the key:
	// the key is wiped, and Create or Open answers the error, wrapped. Default:
	// nobody is told.
	Observe func(ctx context.Context, u Use) error
	// Call is told of every call to the key service when it has returned, those
	// that nobody waits for included; ctx has the values of the caller that
	// began it, and not its cancellation. After a successful call its error
	// makes the result unusable: it is wiped, and the call has failed with the
	// error, wrapped. Default: nobody is told.
	Call func(ctx context.Context, c CallRecord) error
	// Background marks the context of calls that nobody waits for: refills of
	// the pool, Ahead, Rewrap. Default: no mark.
	Background func(ctx context.Context) context.Context

	Now func() time.Time // default time.Now
	Log *slog.Logger     // default: nothing is logged
}

// Stats counts since NewManager. Entries, PoolKeys and the last error are
// the present.
type Stats struct {
	Calls       uint64    `json:"calls"`         // calls to the key service, Create's included
	CacheHits   uint64    `json:"cache_hits"`    // opens answered without one
	Shared      uint64    `json:"shared"`        // opens that joined a call under way
	Failures    uint64    `json:"failures"`      // calls that failed
	Entries     int       `json:"entries"`       // keys in the cache
	PoolHits    uint64    `json:"pool_hits"`     // creations answered by a key ahead of need
	PoolMisses  uint64    `json:"pool_misses"`   // creations that found the pool empty
	PoolKeys    int       `json:"pool_keys"`     // keys in the pools
	Ahead       uint64    `json:"ahead"`         // unwraps begun by Ahead
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

	mu       sync.Mutex
	cache    cache
	pools    map[string]*pool   // by class
	branches map[string]*branch // by class; those that new files may still join
	memo     memo
	ahead    int // unwraps of Ahead under way
	stats    Stats
	closed   bool
	running  int           // goroutines that call the provider
	idle     chan struct{} // closed when closed and running is 0
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
	if o.PoolSize == 0 {
		o.PoolSize = defaultPoolSize
	}
	if o.PoolAge <= 0 {
		o.PoolAge = defaultPoolAge
	}
	if o.Ahead <= 0 {
		o.Ahead = defaultAhead
	}
	if o.Background == nil {
		o.Background = func(ctx context.Context) context.Context { return ctx }
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	m := &Manager{provider: p, store: store, opts: o, idle: make(chan struct{}),
		pools: map[string]*pool{}, branches: map[string]*branch{}}
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
	for _, p := range m.pools {
		s.PoolKeys += len(p.ready)
	}
	return s
}

// Forget wipes what the cache holds for h, so that the next Open asks the key
// service. FileKeys that were handed out are their owners' and stay. Of a
// shared key that is the branch key, and so what the cache holds for every file
// of the branch.
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

// Close wipes every key that the manager holds, cancels the calls under way and waits for
// them, at most 5 s; a key that arrives later is wiped on arrival. Create and
// Open answer ErrClosed from then on. FileKeys that were handed out stay their
// owners'. Further calls of Close only wait.
func (m *Manager) Close() {
	m.mu.Lock()
	if !m.closed {
		m.closed = true
		m.cache.dropAll()
		for _, p := range m.pools {
			p.kill()
		}
		for _, b := range m.branches {
			m.dropBranch(b)
		}
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
