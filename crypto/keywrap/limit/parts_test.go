package limit

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestPace: one decrease for a round trip, a floor, and growth in three gaits.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pace
		for range 100 {
			time.Sleep(10 * time.Millisecond)
			p.answer(time.Now())
		}
		start := time.Now()
		time.Sleep(5 * time.Millisecond)
		if p.at(start) != 0 || !p.throttled(time.Now(), start) {
			t.Fatal("the first throttling does not set a rate")
		}
		first := p.rate
		if first < 70 || first > 80 {
			t.Errorf("rate = %.1f after 100 answers in a second, want four fifths", first)
		}
		if p.throttled(time.Now(), start) || p.rate != first {
			t.Errorf("a second answer to the same round lowers the rate to %.1f", p.rate)
		}
		time.Sleep(time.Second)
		if got := p.at(time.Now()); got < 1.9*first || got > 2.1*first {
			t.Errorf("rate after a second = %.1f, want twice %.1f: the limit is not known yet", got, first)
		}
		for range 50 { // nothing is answered any more
			start = time.Now()
			time.Sleep(lowerTime)
			p.throttled(time.Now(), start.Add(time.Millisecond))
			if p.throttled(time.Now(), time.Now()) {
				t.Error("two decreases at once")
			}
		}
		if p.rate != floorRate {
			t.Errorf("rate = %.2f, want the floor", p.rate)
		}
		// All that was one event: the limit is still looked for from below.
		time.Sleep(2 * time.Second)
		if got := p.at(time.Now()); got < 3.9 || got > 4.1 {
			t.Errorf("rate two seconds after the floor = %.2f, want four times as much", got)
		}
		p.rate, p.high, p.grown = 40, 40, time.Now()
		time.Sleep(2 * time.Second)
		if got := p.at(time.Now()); got < 43 || got > 46 {
			t.Errorf("rate = %.1f two seconds after 40, want a twentieth more a second", got)
		}
	})
}

// TestBudget: contexts below one follow it.
func TestBudget(t *testing.T) {
	type key struct{}
	synctest.Test(t, func(t *testing.T) {
		for name, tt := range map[string]struct {
			do    func(b *budget, cancel func())
			after time.Duration
			want  error
		}{
			"in time":       {func(*budget, func()) {}, 10 * time.Second, context.DeadlineExceeded},
			"shortened":     {func(b *budget, _ func()) { b.shorten(time.Second); b.shorten(time.Minute) }, time.Second, context.DeadlineExceeded},
			"caller's":      {func(_ *budget, cancel func()) { cancel() }, 0, context.Canceled},
			"over":          {func(b *budget, _ func()) { b.end(context.Canceled); b.shorten(time.Second) }, 0, context.Canceled},
			"twice at once": {func(b *budget, cancel func()) { b.end(context.DeadlineExceeded); cancel() }, 0, context.DeadlineExceeded},
		} {
			parent, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "v"))
			start := time.Now()
			b := newBudget(parent, 10*time.Second)
			child, stop := context.WithTimeout(context.WithValue(b, key{}, "w"), time.Hour)
			if d, ok := child.Deadline(); !ok || d.Sub(start) != 10*time.Second || b.Value(key{}) != "v" {
				t.Errorf("%s: deadline %v %v, value %v", name, d, ok, b.Value(key{}))
			}
			tt.do(b, cancel)
			<-child.Done()
			if got := time.Since(start); got != tt.after || !errors.Is(child.Err(), tt.want) || !errors.Is(b.Err(), tt.want) {
				t.Errorf("%s: %v and %v after %v, want %v after %v", name, child.Err(), b.Err(), got, tt.want, tt.after)
			}
			stop()
			cancel()
			b.end(context.Canceled)
		}
		parent, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		b := newBudget(parent, time.Minute)
		defer b.end(context.Canceled)
		if d, _ := b.Deadline(); time.Until(d) != time.Second {
			t.Errorf("deadline in %v, want the caller's", time.Until(d))
		}
	})
}
