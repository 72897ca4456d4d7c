package fusefs

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestArrivals: a write waits for the request before it, and not for long for one
// that is no write.
func TestArrivals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newArrivals()
		wait := func(unique uint64) time.Duration {
			began := time.Now()
			a.awaitBefore(unique)
			return time.Since(began)
		}
		a.came(100)
		if d := wait(102); d != 0 {
			t.Errorf("the one before is here: waited %v", d)
		}
		go func() { time.Sleep(time.Millisecond); a.came(104) }()
		if d := wait(106); d != time.Millisecond {
			t.Errorf("the one before comes after 1ms: waited %v", d)
		}
		if d := wait(200); d != overtaken {
			t.Errorf("the one before is no write: waited %v, want %v", d, overtaken)
		}
		a.came(102 + requestStep*uint64(len(a.recent))) // at the place of 102 in the ring
		if d := wait(104); d != overtaken {
			t.Errorf("the one before is too old to be known: waited %v, want %v", d, overtaken)
		}
		if len(a.wanted) != 0 {
			t.Errorf("%d requests are still waited for", len(a.wanted))
		}
	})
}
