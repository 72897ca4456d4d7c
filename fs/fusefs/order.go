package fusefs

import (
	"sync"
	"time"
)

// arrivals tells which write requests have come to their handler. Several are
// read from the kernel at a time, and a short one is read sooner: the last part of
// a large file would come before the one that leads up to it. The kernel numbers
// requests in the order in which it sends them.
type arrivals struct {
	mu     sync.Mutex
	recent [64]uint64               // number of a request at its place in the ring
	wanted map[uint64]chan struct{} // closed when the request comes
}

const (
	// requestStep is how far apart the numbers of two requests are
	// (FUSE_REQ_ID_STEP; fuse(4) has "unique").
	requestStep = 2
	// overtaken bounds how long a write waits for the request before it. Reading
	// 1 MiB takes less, unless the machine is loaded; and what is not a write, or
	// no request at all, is waited for in vain.
	overtaken = 5 * time.Millisecond
)

func newArrivals() *arrivals { return &arrivals{wanted: map[uint64]chan struct{}{}} }

func (a *arrivals) place(unique uint64) *uint64 {
	return &a.recent[unique/requestStep%uint64(len(a.recent))]
}

// came notes that a write is here, has waited for the one before if it had to, and
// is about to queue for its file.
func (a *arrivals) came(unique uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	*a.place(unique) = unique
	if ch := a.wanted[unique]; ch != nil {
		close(ch)
		delete(a.wanted, unique)
	}
}

// awaitBefore returns when the request before this one has come, or it does not
// seem to be a write.
func (a *arrivals) awaitBefore(unique uint64) {
	before := unique - requestStep
	a.mu.Lock()
	if *a.place(before) == before {
		a.mu.Unlock()
		return
	}
	ch := make(chan struct{}) // nobody else waits for it: one request comes next
	a.wanted[before] = ch
	a.mu.Unlock()
	timeout := time.NewTimer(overtaken)
	defer timeout.Stop()
	select {
	case <-ch:
	case <-timeout.C:
		a.mu.Lock()
		delete(a.wanted, before)
		a.mu.Unlock()
	}
}
