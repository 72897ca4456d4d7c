package audit

import (
	"sync/atomic"
	"time"
)

// batchLimit bounds the events of one write(2), and so the writer's buffer.
const batchLimit = 1024

// writer is the goroutine of a Log; but for dropped, only it uses its fields.
type writer struct {
	log     *Log
	tape    *tape
	dropped atomic.Uint64 // lost events that no "lost" line tells of yet

	lines    int  // since the head was written
	failing  bool // the last attempt failed
	stuck    bool // the last rotation failed; the next is tried at the next tick
	closeErr error
	events   []Event
}

// run commits what is queued until the log is closed. The timer runs only
// while something is unfinished, so that an idle mount does not wake up.
func (w *writer) run() {
	defer close(w.log.ended)
	timer := time.NewTimer(w.log.o.HeadInterval)
	timer.Stop()
	ticking := false
	if w.tape.due() {
		w.append(nil)
		w.log.poke() // for the head
	}
	for {
		select {
		case <-w.log.wake:
		case <-timer.C:
			ticking = false
			w.tick()
		}
		for {
			batch, orders, closing := w.log.take()
			if len(batch) > 0 {
				w.commit(batch)
			}
			for _, o := range orders {
				o.done <- o.do(w)
			}
			if len(batch) == 0 && len(orders) == 0 {
				if closing {
					w.closeErr = w.sync()
					return
				}
				break
			}
		}
		if !ticking && w.unfinished() {
			timer.Reset(w.log.o.HeadInterval)
			ticking = true
		}
	}
}

// take gives the writer its next batch. Orders come with the batch that
// empties the queue, so that they see everything that was queued before.
func (l *Log) take() (batch []entry, orders []order, closing bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := min(len(l.queue), batchLimit)
	batch = l.queue[:n:n]
	l.queue = l.queue[n:]
	if len(l.queue) == 0 {
		l.queue = nil // a burst's memory goes
		orders, l.orders = l.orders, nil
	}
	l.room.Broadcast()
	return batch, orders, l.closing
}

func (w *writer) unfinished() bool {
	return w.tape.end != w.tape.headed || w.dropped.Load() > 0 || w.tape.due()
}

// tick does what waits for time to pass.
func (w *writer) tick() {
	w.stuck = false
	if w.dropped.Load() > 0 || w.tape.due() {
		w.append(nil)
	}
	w.head()
}

// commit writes a batch and answers its writers.
func (w *writer) commit(batch []entry) {
	w.events = w.events[:0]
	for i := range batch {
		w.events = append(w.events, batch[i].event)
	}
	n, err := w.append(w.events)
	if err == nil && w.log.o.Required && w.log.o.Sync {
		if err = w.tape.f.Sync(); err != nil {
			w.report(err)
			n = 0 // they are in the file, but nobody can say for how long
		}
	}
	for i, e := range batch {
		if e.done == nil {
			continue
		}
		if i < n {
			e.done <- nil
		} else {
			e.done <- err
		}
	}
	if w.lines >= w.log.o.HeadLines {
		w.head()
	}
}

// append writes events, with the "lost" line before them that is due, and
// counts what could not be written.
func (w *writer) append(events []Event) (int, error) {
	now := w.log.o.Now()
	if limit := w.log.o.MaxSize; limit > 0 && w.tape.size >= limit && !w.stuck {
		if err := w.rotate(); err != nil {
			w.stuck = true
			w.log.o.Log.Warn("the audit log could not be rotated and goes on in the same file", "file", w.log.place.path, "error", err)
		}
	}
	all, own := events, 0
	lost := w.dropped.Load()
	if lost > 0 {
		all = make([]Event, 0, len(events)+1)
		all = append(append(all, Event{Kind: KindLost, Time: now, Mount: clip(w.log.o.Mount, maxMount), Store: clip(w.log.o.Store, maxField), Lost: lost}), events...)
		own = 1
	}
	n, err := w.tape.append(all, now)
	w.lines += n
	if n > 0 && own > 0 {
		w.dropped.Add(-lost)
	}
	n = max(0, n-own)
	missed := uint64(len(events) - n)
	w.dropped.Add(missed)
	w.log.count(uint64(n), missed, err)
	w.report(err)
	if w.tape.headed.seq == 0 {
		w.head() // a log without a head would look like one whose end was cut off
	}
	return n, err
}

func (l *Log) count(written, lost uint64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stats.Written += written
	l.stats.Lost += lost
	l.stats.Failing, l.stats.Error = err != nil, ""
	if err != nil {
		l.stats.Error = err.Error()
	}
}

// report logs the first failure of a row, and its end.
func (w *writer) report(err error) {
	switch {
	case err != nil && !w.failing && w.log.o.Required:
		w.log.o.Log.Error("the audit log cannot be written: keys are refused until it can", "file", w.log.place.path, "error", err)
	case err != nil && !w.failing:
		w.log.o.Log.Error("the audit log cannot be written: events are lost, and counted", "file", w.log.place.path, "error", err)
	case err == nil && w.failing:
		w.log.o.Log.Warn("the audit log can be written again", "file", w.log.place.path, "lost", w.log.Stats().Lost)
	}
	w.failing = err != nil
}

// head writes FILE.head. A failure leaves the older head, which is true as
// well, and is tried again at the next tick.
func (w *writer) head() {
	if err := w.tape.sync(w.log.o.Now()); err != nil {
		w.log.o.Log.Debug("the audit log's head could not be written", "file", w.log.place.path, "error", err)
		return
	}
	w.lines = 0
}

func (w *writer) sync() error {
	if w.dropped.Load() > 0 || w.tape.due() {
		if _, err := w.append(nil); err != nil {
			return err
		}
	}
	err := w.tape.sync(w.log.o.Now())
	if err == nil {
		w.lines = 0
	}
	return err
}

func (w *writer) rotate() error { return w.tape.rotate(w.log.o.Now()) }
