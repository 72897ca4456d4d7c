package envelope

import (
	"context"
	"slices"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

const (
	// poolRefills bounds the refills of one pool that are under way at a time.
	poolRefills = 64
	// poolFirst is the size that a pool begins with, once creations follow each
	// other within poolPause. A single file makes no pool: it would cost a call
	// that nobody needs.
	poolFirst = 4
	poolPause = time.Second
	// poolGather is how long a few keys may be lacking before they are called for.
	poolGather = 50 * time.Millisecond
	// poolRetry is how long a pool is not refilled after a failure. Create calls
	// all the same, and its caller sees the error.
	poolRetry = time.Second
)

// pool holds data keys of a class that were made ahead of need, each with its
// file id, which is in the encryption context. A creation that finds none makes
// a call, and takes whatever comes first. Manager.mu guards it.
type pool struct {
	class   Class
	fixed   Fixed
	max     int
	ready   []*pooled     // oldest first
	waiting []*poolCaller // longest waiting first
	calls   int           // under way; one for each that waits, the others fill the pool
	refills int           // those of the calls that began as such
	spare   []*poolFill   // calls that creations began and do not wait for any more
	target  int           // keys that shall be ready or coming
	served  int           // keys handed out since target grew
	missed  time.Time     // when a creation last found no key
	retryAt time.Time     // no refill before
	timer   *time.Timer   // wipes what is too old; nil if nothing is ready
	dead    bool          // takes no more keys

	gathering bool // a refill comes
}

// pooled is a key that nobody has yet.
type pooled struct {
	file       ID
	k          *FileKey
	recipients []Recipient
	ids        []string
	made       time.Time
}

// poolCaller is a Create that found the pool empty.
type poolCaller struct {
	done chan struct{} // closed when got or err is set
	fill *poolFill     // brings the error if nothing else brings a key
	own  *poolFill     // the call that it began
	from origin
	got  *pooled
	err  error
}

// poolFill is a call that makes one key. Its owner gets the error.
type poolFill struct {
	making
	owner *poolCaller // nil: a refill, or the owner has a key or gave up
}

// createAny makes a key for a fresh id or takes one from the pool, and sets
// h.File and h.Recipients.
func (m *Manager) createAny(ctx context.Context, c *Class, h *Header) (*FileKey, origin, error) {
	from := origin{key: c.Keys[0], source: SourcePool}
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil, from, ErrClosed
	}
	p, now := m.poolOf(c, h), m.opts.Now()
	e := p.take(now, m.opts.PoolAge)
	if e != nil {
		m.stats.PoolHits++
		m.refill(p, now)
		m.mu.Unlock()
	} else {
		m.stats.PoolMisses++
		p.miss(now)
		w := m.startCaller(ctx, p)
		m.refill(p, now)
		m.mu.Unlock()
		if err := m.await(ctx, p, w); err != nil {
			return nil, w.from, err
		}
		e, from = w.got, w.from
	}
	from.requests = e.ids
	h.File, h.Recipients = e.file, e.recipients
	return e.k, from, nil
}

// poolOf returns the pool of c, a new one if c's keys are not those of before.
// m.mu is held.
func (m *Manager) poolOf(c *Class, h *Header) *pool {
	if b := m.branches[c.Name]; b != nil { // the class was shared before
		m.dropBranch(b)
	}
	p := m.pools[c.Name]
	if p != nil && sameKeys(&p.class, c) {
		p.fixed = h.Fixed
		return p
	}
	if p != nil {
		p.kill()
	}
	p = &pool{class: *c, fixed: h.Fixed, max: max(m.opts.PoolSize, 0)}
	p.class.Keys, p.class.Allowed = slices.Clone(c.Keys), slices.Clone(c.Allowed)
	m.pools[c.Name] = p
	return p
}

// take hands out the oldest key that is younger than age.
func (p *pool) take(now time.Time, age time.Duration) *pooled {
	p.expire(now, age)
	if len(p.ready) == 0 {
		return nil
	}
	e := p.ready[0]
	p.ready[0] = nil // nobody else finds it
	p.ready = p.ready[1:]
	p.served++
	return e
}

// expire wipes what is too old, and aims lower by as much.
func (p *pool) expire(now time.Time, age time.Duration) {
	n := 0
	for n < len(p.ready) && now.Sub(p.ready[n].made) >= age {
		p.ready[n].k.Wipe()
		n++
	}
	p.ready = slices.Delete(p.ready, 0, n)
	p.target = max(p.target-n, 0)
}

// miss lets the target grow, at most once for half as many keys as it stands
// for: many creations at one moment are one lack.
func (p *pool) miss(now time.Time) {
	if now.Sub(p.missed) < poolPause && 2*p.served >= p.target {
		p.target, p.served = min(max(2*p.target, poolFirst), p.max), 0
	}
	p.missed = now
}

// drain wipes the keys that nobody has.
func (p *pool) drain() {
	for _, e := range p.ready {
		e.k.Wipe()
	}
	p.ready, p.target = nil, 0
}

// kill wipes the pool. Callers that wait still get what their calls bring.
func (p *pool) kill() {
	p.dead = true
	p.drain()
	if p.timer != nil {
		p.timer.Stop()
	}
}

// refill starts the calls that p lacks: those of a quarter of its keys at once,
// fewer after poolGather. With a key service that answers at once, starting a call
// costs more than the call. m.mu is held, and m is not closed.
func (m *Manager) refill(p *pool, now time.Time) {
	switch n := p.lacks(now); {
	case n >= max(p.target/4, 1):
		m.fill(p, now)
	case n > 0 && !p.gathering:
		p.gathering = true
		time.AfterFunc(poolGather, func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			if p.gathering = false; !m.closed {
				m.fill(p, m.opts.Now())
			}
		})
	}
}

func (m *Manager) fill(p *pool, now time.Time) {
	for p.lacks(now) > 0 {
		p.refills++
		m.startFill(context.Background(), p, nil)
	}
}

// lacks returns how many calls p wants, and may begin.
func (p *pool) lacks(now time.Time) int {
	if p.dead || now.Before(p.retryAt) {
		return 0
	}
	return min(p.target-(len(p.ready)+p.calls-len(p.waiting)), poolRefills-p.refills)
}

// startCaller lets a creation wait that found no key, for a call that another
// one does not need any more or one of its own. So there are never more calls
// than there were creations at a time; refills are not counted on, since the key
// service may let them wait. m.mu is held.
func (m *Manager) startCaller(ctx context.Context, p *pool) *poolCaller {
	w := &poolCaller{done: make(chan struct{}), from: origin{key: p.class.Keys[0], source: SourceCall}}
	if len(p.spare) > 0 {
		w.fill = p.spare[0]
		w.fill.owner = w
		p.spare = slices.Delete(p.spare, 0, 1)
	} else {
		w.own = m.startFill(ctx, p, w)
		w.fill = w.own
	}
	p.waiting = append(p.waiting, w)
	return w
}

// startFill starts a call for owner, or for the pool. m.mu is held.
func (m *Manager) startFill(ctx context.Context, p *pool, owner *poolCaller) *poolFill {
	p.calls++
	f := &poolFill{owner: owner}
	fixed := p.fixed
	fixed.File = NewID()
	f.making = making{ctx: ctx, background: owner == nil, class: p.class, purpose: keywrap.PurposeData, h: &Header{Fixed: fixed}}
	m.start(func() {
		k, err := m.makeKey(&f.making)
		m.endFill(p, f, k, err)
	})
	return f
}

// endFill gives a new key to whoever waits longest, else to the pool.
func (m *Manager) endFill(p *pool, f *poolFill, k *FileKey, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p.calls--
	if f.background {
		p.refills--
	}
	p.spare = slices.DeleteFunc(p.spare, func(o *poolFill) bool { return o == f })
	if err == nil && m.closed {
		k.Wipe()
		err = ErrClosed
	}
	now := m.opts.Now()
	if err != nil {
		p.retryAt = now.Add(poolRetry)
		if fault.Of(err) != fault.KeyUnavailable {
			p.drain() // the key was taken away: no more files under it, but for those who have one
		}
		if w := f.owner; w != nil {
			w.err, w.from.requests = &CreateError{File: f.h.File, Err: err}, f.ids
			p.leave(w)
		}
		return
	}
	e := &pooled{file: f.h.File, k: k, recipients: f.h.Recipients, ids: f.ids, made: now}
	if len(p.waiting) == 0 {
		m.addPooled(p, e)
	} else {
		w := p.waiting[0]
		if w.own != f {
			w.from.source = SourcePool
		}
		if w.fill != f { // the call that w waited for goes on for f's owner
			if w.fill.owner = f.owner; f.owner != nil {
				f.owner.fill = w.fill
			} else {
				p.spare = append(p.spare, w.fill)
			}
		}
		w.got = e
		p.served++
		p.leave(w)
	}
	if !m.closed {
		m.refill(p, now)
	}
}

// leave ends w's waiting; its outcome is set.
func (p *pool) leave(w *poolCaller) {
	p.waiting = slices.DeleteFunc(p.waiting, func(o *poolCaller) bool { return o == w })
	close(w.done)
}

// addPooled puts e into the pool, if it has room. m.mu is held.
func (m *Manager) addPooled(p *pool, e *pooled) {
	if p.dead || m.closed || len(p.ready) >= p.max {
		e.k.Wipe()
		return
	}
	p.ready = append(p.ready, e)
	if p.timer == nil {
		m.armPool(p, m.opts.PoolAge)
	}
}

// armPool wipes what is too old after d, without waiting for a creation. m.mu
// is held.
func (m *Manager) armPool(p *pool, d time.Duration) {
	p.timer = time.AfterFunc(d, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		now := m.opts.Now()
		p.expire(now, m.opts.PoolAge)
		p.timer = nil
		if len(p.ready) > 0 && !p.dead {
			m.armPool(p, m.opts.PoolAge-now.Sub(p.ready[0].made))
		}
	})
}

// await waits until w has its outcome or its caller gives up.
func (m *Manager) await(ctx context.Context, p *pool, w *poolCaller) error {
	pt := patience{ctx: ctx, grace: m.opts.Grace}
	defer pt.stop()
	err := pt.wait(w.done)
	m.mu.Lock()
	defer m.mu.Unlock()
	if w.got == nil && w.err == nil { // gave up
		w.fill.owner = nil
		p.spare = append(p.spare, w.fill)
		p.leave(w)
		return err
	}
	return w.err
}
