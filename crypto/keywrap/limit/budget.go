package limit

import (
	"context"
	"sync"
	"time"
)

// budget is a context with a deadline that can be brought forward, which those
// of package context have not.
type budget struct {
	parent context.Context
	done   chan struct{}
	detach func() bool // from parent

	mu       sync.Mutex
	err      error
	deadline time.Time
	timer    *time.Timer
}

var _ context.Context = (*budget)(nil)

// newBudget returns a context that ends after d, or with parent. Its owner calls
// end when the call is over.
func newBudget(parent context.Context, d time.Duration) *budget {
	b := &budget{parent: parent, done: make(chan struct{}), deadline: time.Now().Add(d)}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.timer = time.AfterFunc(d, func() { b.end(context.DeadlineExceeded) })
	b.detach = context.AfterFunc(parent, func() { b.end(parent.Err()) })
	return b
}

// shorten brings the deadline forward to d from now, if it is later.
func (b *budget) shorten(d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if at := time.Now().Add(d); b.err == nil && at.Before(b.deadline) {
		b.deadline = at
		b.timer.Reset(d)
	}
}

func (b *budget) end(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil {
		return
	}
	b.err = err
	b.timer.Stop()
	b.detach()
	close(b.done)
}

// Deadline implements context.Context.
func (b *budget) Deadline() (time.Time, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if d, ok := b.parent.Deadline(); ok && d.Before(b.deadline) {
		return d, true
	}
	return b.deadline, true
}

// Done implements context.Context.
func (b *budget) Done() <-chan struct{} { return b.done }

// Err implements context.Context.
func (b *budget) Err() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// Value implements context.Context.
func (b *budget) Value(key any) any { return b.parent.Value(key) }
