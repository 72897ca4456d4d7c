package limit

import (
	"container/list"
	"context"
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// backgroundTurn is how many turns others have, at most, before one of the
// background's.
const backgroundTurn = 15

// waiter is a call that wants a turn. It has one at a time.
type waiter struct {
	about      *subject
	background bool
	again      bool      // had a turn and was throttled, or is a probe: goes first
	since      time.Time // first wait

	ready chan error // nil: admitted
	queue *list.List // nil: not waiting
	place *list.Element
}

// gate admits calls: how many at a time, how many a second, in which order.
type gate struct {
	concurrent int
	fixed      *rate.Limiter // nil: no fixed rate

	mu         sync.Mutex
	pace       pace
	found      *rate.Limiter // at the pace's rate, if it has one
	lastAnswer time.Time     // other than throttling
	first      list.List     // of *waiter: again and not background
	front      list.List
	back       list.List
	inFlight   int
	inBack     int // of these, background
	streak     int // turns since the background's last one, while it waits
	timer      *time.Timer
}

func newGate(o Options) *gate {
	g := &gate{concurrent: o.Concurrent, found: rate.NewLimiter(rate.Inf, 1)}
	if o.PerSecond > 0 {
		g.fixed = rate.NewLimiter(rate.Limit(o.PerSecond), o.Burst)
	}
	return g
}

// enter waits for w's turn. After nil the caller owes a leave.
func (g *gate) enter(ctx context.Context, w *waiter) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	w.ready = make(chan error, 1)
	g.mu.Lock()
	if w.since.IsZero() {
		w.since = time.Now()
	}
	g.push(w)
	g.admit()
	g.mu.Unlock()
	select {
	case err := <-w.ready:
		return err
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if w.queue != nil {
		g.remove(w)
	} else if err := <-w.ready; err == nil { // it had its turn just now
		g.free(w)
	}
	g.admit()
	return ctx.Err()
}

func (g *gate) push(w *waiter) {
	switch {
	case w.background && w.again:
		w.queue = &g.back
		w.place = g.back.PushFront(w)
		return
	case w.background:
		w.queue = &g.back
	case w.again:
		w.queue = &g.first
	default:
		w.queue = &g.front
	}
	w.place = w.queue.PushBack(w)
}

func (g *gate) remove(w *waiter) {
	w.queue.Remove(w.place)
	w.queue, w.place = nil, nil
}

func (g *gate) free(w *waiter) {
	g.inFlight--
	if w.background {
		g.inBack--
	}
}

// leave gives the turn back. start is when it began.
func (g *gate) leave(w *waiter, start time.Time, how outcome) (lowered bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.free(w)
	now := time.Now()
	switch how {
	case answered:
		g.pace.answer(now)
		g.lastAnswer = now
	case throttled:
		lowered = g.pace.throttled(now, start)
	}
	g.admit()
	return lowered
}

// admit gives turns to as many as may have one now.
func (g *gate) admit() {
	for {
		w := g.next()
		if w == nil {
			return
		}
		now := time.Now()
		if d := g.delay(now); d > 0 {
			g.wake(d)
			return
		}
		g.take(now)
		g.remove(w)
		g.inFlight++
		if w.background {
			g.inBack++
			g.streak = 0
		} else if g.back.Len() > 0 {
			g.streak++
		}
		w.ready <- nil
	}
}

// next returns who is first, nil if nobody is or there is no place.
func (g *gate) next() *waiter {
	if g.inFlight >= g.concurrent {
		return nil
	}
	at := func(l *list.List) *waiter {
		if e := l.Front(); e != nil {
			return e.Value.(*waiter)
		}
		return nil
	}
	back := at(&g.back)
	if g.inBack >= max(1, g.concurrent/2) {
		back = nil
	}
	if back != nil && g.streak >= backgroundTurn {
		return back
	}
	if w := at(&g.first); w != nil {
		return w
	}
	if w := at(&g.front); w != nil {
		return w
	}
	return back
}

// delay returns how long the rates make the next turn wait.
func (g *gate) delay(now time.Time) time.Duration {
	d := wait(g.fixed, now)
	if r := g.pace.at(now); r > 0 {
		g.found.SetLimitAt(now, rate.Limit(r))
		g.found.SetBurstAt(now, max(1, int(r/20))) // what a late timer may miss
		d = max(d, wait(g.found, now))
	}
	return d
}

func wait(l *rate.Limiter, now time.Time) time.Duration {
	if l == nil {
		return 0
	}
	missing := 1 - l.TokensAt(now)
	if missing <= 0 || l.Limit() == rate.Inf {
		return 0
	}
	// A microsecond more, so that rounding does not make it wait again.
	return time.Duration(math.Ceil(missing/float64(l.Limit())*1e9)) + time.Microsecond
}

// take uses up what delay found to be there.
func (g *gate) take(now time.Time) {
	if g.fixed != nil {
		g.fixed.AllowN(now, 1)
	}
	if g.pace.rate > 0 {
		g.found.AllowN(now, 1)
	}
}

func (g *gate) wake(d time.Duration) {
	if g.timer == nil {
		g.timer = time.AfterFunc(d, func() {
			g.mu.Lock()
			defer g.mu.Unlock()
			g.admit()
		})
		return
	}
	g.timer.Reset(d)
}

// refuse ends the wait of those for whom why returns an error.
func (g *gate) refuse(why func(*waiter) error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, l := range []*list.List{&g.first, &g.front, &g.back} {
		for e := l.Front(); e != nil; {
			w := e.Value.(*waiter)
			e = e.Next()
			if err := why(w); err != nil {
				g.remove(w)
				w.ready <- err
			}
		}
	}
	g.admit()
}

// silent returns for how long the service has given no answer but throttling,
// counted from since at the earliest.
func (g *gate) silent(since time.Time) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.lastAnswer.After(since) {
		since = g.lastAnswer
	}
	return time.Since(since)
}

func (g *gate) state() (waiting, inFlight int, found float64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.first.Len() + g.front.Len() + g.back.Len(), g.inFlight, g.pace.at(time.Now())
}
