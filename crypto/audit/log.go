package audit

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Options of a Log. The zero value is the default mode.
type Options struct {
	// Required makes Write wait until its line was written, and fail if that
	// failed. Without it, Write never waits and never fails.
	Required bool
	// Sync makes Write of a Required log wait for fsync(2) as well. Concurrent
	// writes share one.
	Sync bool

	MaxSize int64 // bytes from which FILE is rotated, default 64 MiB; negative: never
	Queue   int   // events that may wait for the writer, default 16,384

	HeadLines    int           // lines after which FILE.head is written, default 10,000
	HeadInterval time.Duration // time after which it is, default 1 s

	Mount string // put into events that have none
	Store string

	Log *slog.Logger     // told once when writing begins to fail, and once when it works again; nil: nobody
	Now func() time.Time // default time.Now
}

// The defaults of Options.
const (
	DefaultMaxSize      = 64 << 20
	DefaultQueue        = 16384
	DefaultHeadLines    = 10000
	DefaultHeadInterval = time.Second
)

func (o Options) withDefaults() Options {
	if o.MaxSize == 0 {
		o.MaxSize = DefaultMaxSize
	}
	if o.Queue <= 0 {
		o.Queue = DefaultQueue
	}
	if o.HeadLines <= 0 {
		o.HeadLines = DefaultHeadLines
	}
	if o.HeadInterval <= 0 {
		o.HeadInterval = DefaultHeadInterval
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return o
}

// Log is an open audit log. All methods are safe for concurrent use.
type Log struct {
	o     Options
	place *place
	lock  *os.File
	wake  chan struct{} // holds one token while there is work
	ended chan struct{} // closed when the writer has returned

	mu      sync.Mutex
	room    sync.Cond // the queue of a Required log has room
	queue   []entry
	orders  []order
	closing bool
	stats   Stats

	closeOnce sync.Once
	closeErr  error

	w writer
}

// entry is an event on its way; done is nil in the default mode.
type entry struct {
	event Event
	done  chan error
}

// order is something else for the writer to do.
type order struct {
	do   func(*writer) error
	done chan error
}

// Stats are counters since Open.
type Stats struct {
	Written uint64 `json:"written"` // events in the file
	Lost    uint64 `json:"lost"`    // events that are not
	Failing bool   `json:"failing"` // the last write failed
	Error   string `json:"error,omitempty"`
}

// Open opens the log at path, making it (mode 0600) if need be, and locks it
// until Close. What a crash left incomplete is set aside with a "torn" line.
// Errors: ErrLocked, ErrFile, and the operating system's.
func Open(path string, o Options) (*Log, error) {
	p, err := openPlace(path)
	if err != nil {
		return nil, err
	}
	lock, err := p.lock()
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	t, err := openTape(p)
	if err != nil {
		return nil, errors.Join(err, lock.Close(), p.close())
	}
	return newLog(p, lock, t, o), nil
}

func newLog(p *place, lock *os.File, t *tape, o Options) *Log {
	l := &Log{o: o.withDefaults(), place: p, lock: lock, wake: make(chan struct{}, 1), ended: make(chan struct{})}
	l.room.L = &l.mu
	l.w.log, l.w.tape = l, t
	go l.w.run()
	return l
}

// Write adds e to the log. In the default mode it returns at once and always
// nil. With Options.Required it returns when the line was written, or
// ErrNotLogged joined with the cause; ErrClosed after Close. e stays the
// caller's.
func (l *Log) Write(e Event) error {
	e = e.bounded()
	if e.Mount == "" {
		e.Mount = clip(l.o.Mount, maxMount)
	}
	if e.Store == "" {
		e.Store = clip(l.o.Store, maxField)
	}
	if e.Time.IsZero() {
		e.Time = l.o.Now()
	}
	done, err := l.enqueue(e)
	if !l.o.Required {
		return nil
	}
	if err == nil {
		err = <-done
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotLogged, err)
	}
	return nil
}

func (l *Log) enqueue(e Event) (done chan error, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.o.Required {
		done = make(chan error, 1)
		for len(l.queue) >= l.o.Queue && !l.closing {
			l.room.Wait()
		}
	}
	if l.closing {
		l.stats.Lost++
		return nil, ErrClosed
	}
	if len(l.queue) >= l.o.Queue {
		l.stats.Lost++
		l.w.dropped.Add(1)
		return nil, nil
	}
	l.queue = append(l.queue, entry{e, done})
	l.poke()
	return done, nil
}

// poke tells the writer that there is work.
func (l *Log) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// call has the writer do something after all that was queued before.
func (l *Log) call(do func(*writer) error) error {
	done := make(chan error, 1)
	l.mu.Lock()
	if l.closing {
		l.mu.Unlock()
		return ErrClosed
	}
	l.orders = append(l.orders, order{do, done})
	l.poke()
	l.mu.Unlock()
	return <-done
}

// Sync returns when every event of earlier Writes is in the file or lost, and
// the file and its head are on disk.
func (l *Log) Sync() error { return l.call((*writer).sync) }

// Reopen starts a new FILE: it renames the present one to FILE.1, unless
// somebody has moved it away already, as logrotate does. The chain goes on. On
// failure the log goes on in the old file.
func (l *Log) Reopen() error { return l.call((*writer).rotate) }

// Stats returns the counters.
func (l *Log) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stats
}

// Close writes what is queued and the head, and lets go of the log. Calls
// after the first return the same.
func (l *Log) Close() error {
	l.closeOnce.Do(func() {
		l.mu.Lock()
		l.closing = true
		l.room.Broadcast()
		l.poke()
		l.mu.Unlock()
		<-l.ended
		l.closeErr = errors.Join(l.w.closeErr, l.w.tape.f.Close(), l.place.close(), l.lock.Close())
	})
	return l.closeErr
}
