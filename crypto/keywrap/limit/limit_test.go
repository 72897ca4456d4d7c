package limit_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keywraptest"
	"github.com/kmsfs/kmsfs/crypto/keywrap/limit"
)

// TestContract: limits change nothing of what a provider promises.
func TestContract(t *testing.T) {
	k := keyring.NewMemory()
	defer k.Close()
	n := 0
	name := func(uri string) string { return strings.TrimPrefix(uri, "keyring:") }
	must := func(t testing.TB, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	keywraptest.Run(t, keywraptest.Setup{
		Provider: limit.New(k, limit.Options{}),
		NewKey: func(t testing.TB) string {
			n++
			must(t, k.CreateKey(fmt.Sprintf("key%d", n)))
			return fmt.Sprintf("keyring:key%d", n)
		},
		Disable: func(t testing.TB, key string) { must(t, k.Disable(name(key))) },
		Enable:  func(t testing.TB, key string) { must(t, k.Enable(name(key))) },
		ScheduleDeletion: func(t testing.TB, key string) {
			must(t, k.ScheduleDeletion(name(key), 7))
		},
		CancelDeletion: func(t testing.TB, key string) { must(t, k.CancelDeletion(name(key))) },
		Rotate:         func(t testing.TB, key string) { must(t, k.Rotate(name(key))) },
		Unknown:        "keyring:none",
		NotCovered:     map[string]string{keywraptest.CaseAlias: "the keyring has names, no aliases"},
	})
}

// TestAdmission: 2,000 callers at 50 calls a second all succeed, although the
// last waits 40 s and the budget is 10.
func TestAdmission(t *testing.T) {
	bubble(t, func(t *testing.T, s *service, ctx context.Context) {
		var waited atomic.Int64
		p := limit.New(s, limit.Options{PerSecond: 50, Observe: func(c limit.Call) {
			waited.Store(max(waited.Load(), int64(c.Waited)))
			if c.Took > 50*time.Millisecond || c.Err != nil || len(c.Attempts) != 1 {
				t.Errorf("call %+v", c)
			}
		}})
		start := time.Now()
		var wg sync.WaitGroup
		for i := range 2000 {
			wg.Go(func() {
				if err := decrypt(ctx, p, "k", fmt.Sprint(i)); err != nil {
					t.Errorf("caller %d: %v", i, err)
				}
			})
		}
		synctest.Wait()
		if st := p.Stats(); st.Waiting != 1950 || st.InFlight != 50 || st.PerSecond != 50 || st.State != "closed" {
			t.Errorf("stats of the first instant: %+v", st)
		}
		wg.Wait()
		between(t, "all", time.Since(start), 38*time.Second, 40*time.Second)
		between(t, "the longest wait", time.Duration(waited.Load()), 38*time.Second, 40*time.Second)
		if st := p.Stats(); st.Calls != 2000 || st.Failed != 0 || st.Waiting != 0 || st.InFlight != 0 || st.Rate != 0 {
			t.Errorf("stats: %+v", st)
		}
	})
}

func TestConcurrency(t *testing.T) {
	bubble(t, func(t *testing.T, s *service, ctx context.Context) {
		p := limit.New(s, limit.Options{Concurrent: 8})
		start := time.Now()
		var wg sync.WaitGroup
		for range 80 {
			wg.Go(func() { _ = decrypt(ctx, p, "k", "") })
		}
		wg.Wait()
		if s.top != 8 {
			t.Errorf("%d calls at a time, want 8", s.top)
		}
		between(t, "80 calls", time.Since(start), 200*time.Millisecond, 200*time.Millisecond)
	})
}

// TestThrottling: a service that takes 50 calls a second, and a scan of 2,000
// files by 32 processes: no error, and the rate settles near the limit.
func TestThrottling(t *testing.T) {
	for _, burst := range []float64{1, 50} {
		t.Run(fmt.Sprint("burst ", burst), func(t *testing.T) {
			bubble(t, func(t *testing.T, s *service, ctx context.Context) {
				s.perSec, s.tokens = 50, burst
				p := limit.New(s, limit.Options{})
				var next atomic.Int64
				var wg sync.WaitGroup
				start := time.Now()
				for range 32 {
					wg.Go(func() {
						for next.Add(1) <= 2000 {
							if err := decrypt(ctx, p, "k", ""); err != nil {
								t.Error(err)
							}
						}
					})
				}
				time.Sleep(20 * time.Second)
				before := 0
				s.set(func() { before = s.refusals })
				if r := p.Stats().Rate; r < 30 || r > 75 {
					t.Errorf("rate after 20 s = %.1f, want near 50", r)
				}
				wg.Wait()
				took := time.Since(start)
				between(t, "2,000 calls", took, 38*time.Second, 50*time.Second)
				if s.refusals > 300 || s.refusals-before > 100 {
					t.Errorf("%d throttled, %d of these after 20 s: the client does not settle", s.refusals, s.refusals-before)
				}
				if st := p.Stats(); st.Throttled != uint64(s.refusals) || st.Failed != 0 {
					t.Errorf("stats %+v, service throttled %d", st, s.refusals)
				}
				s.perSec = 0 // the quota was raised
				time.Sleep(3 * time.Minute)
				if r := p.Stats().Rate; r != 0 {
					t.Errorf("rate after 3 minutes without throttling = %.1f, want none", r)
				}
			})
		})
	}
}

// TestThrottledForGood: a service that only throttles fails calls after the
// budget, those that wait as well, and is found again.
func TestThrottledForGood(t *testing.T) {
	bubble(t, func(t *testing.T, s *service, ctx context.Context) {
		s.perSec = -1
		p := limit.New(s, limit.Options{Concurrent: 4})
		start := time.Now()
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() {
				err := decrypt(ctx, p, "k", "")
				if !errors.Is(err, keywrap.ErrThrottled) {
					t.Errorf("Decrypt = %v, want %v", err, keywrap.ErrThrottled)
				}
				between(t, "one caller", time.Since(start), 10*time.Second, 15*time.Second)
			})
		}
		wg.Wait()
		if st := p.Stats(); st.State != "closed" || st.Failed != 200 {
			t.Errorf("stats: %+v", st)
		}
		if s.calls > 100 {
			t.Errorf("%d requests to a service that throttles", s.calls)
		}
		s.set(func() { s.perSec = 0 })
		if err := decrypt(ctx, p, "k", ""); err != nil {
			t.Error(err)
		}
	})
}

// TestOutage: one caller pays the budget, those under way two seconds, the
// others nothing; one a second tries again; the end shows within two seconds.
func TestOutage(t *testing.T) {
	bubble(t, func(t *testing.T, s *service, ctx context.Context) {
		var log strings.Builder
		p := limit.New(s, limit.Options{Concurrent: 2, Log: slog.New(slog.NewTextHandler(&log, nil))})
		s.down = true
		start := time.Now()
		cost := func(call func() error) time.Duration {
			from := time.Now()
			if err := call(); fault.Of(err) != fault.KeyUnavailable {
				t.Errorf("during the outage: %v", err)
			}
			return time.Since(from)
		}
		one := func() error { return decrypt(ctx, p, "k", "") }
		var wg sync.WaitGroup
		wg.Go(func() { between(t, "the first", cost(one), 10*time.Second, 10*time.Second) })
		time.Sleep(5 * time.Second)
		wg.Go(func() { between(t, "one under way", cost(one), 7*time.Second, 7*time.Second) })
		synctest.Wait()
		wg.Go(func() { between(t, "one that waits", cost(one), 5*time.Second, 5*time.Second) })
		wg.Wait() // 12 s: the breaker is open since 10 s
		if st := p.Stats(); st.State != "open" || len(st.Outages) != 1 || st.Outages[0].Key != "k" || !st.Outages[0].Since.Equal(start.Add(10*time.Second)) {
			t.Errorf("stats: %+v", st)
		}
		wg.Go(func() { between(t, "the probe", cost(one), 2*time.Second, 2*time.Second) })
		synctest.Wait()
		sent := s.calls // nothing but the probe runs, and it hangs
		for range 100 {
			between(t, "others", cost(one), 0, 0)
		}
		if s.calls != sent {
			t.Errorf("%d calls sent while the probe is under way", s.calls-sent)
		}
		// Another key has a breaker of its own; a look at the key is let through.
		wg.Go(func() {
			between(t, "Describe", cost(func() error { _, err := p.Describe(ctx, "k"); return err }), 2*time.Second, 2*time.Second)
		})
		wg.Wait()
		s.set(func() { s.down = false })
		if err := decrypt(ctx, p, "other", ""); err != nil {
			t.Errorf("another key: %v", err)
		}
		from := time.Now()
		for one() != nil {
			time.Sleep(10 * time.Millisecond)
		}
		between(t, "recovery", time.Since(from), 0, 2*time.Second)
		if st := p.Stats(); st.State != "closed" || st.Refused < 101 {
			t.Errorf("stats: %+v", st)
		}
		if got := strings.Count(log.String(), "\n"); got != 2 {
			t.Errorf("%d lines in the log, want one of the outage and one of its end:\n%s", got, log.String())
		}
	})
}

// TestRecovery: whenever the service comes back, also while a probe hangs, a
// caller that tries every 100 ms works again within two seconds.
func TestRecovery(t *testing.T) {
	for _, after := range []time.Duration{0, 300 * time.Millisecond, time.Second, 1500 * time.Millisecond, 2500 * time.Millisecond} {
		bubble(t, func(t *testing.T, s *service, ctx context.Context) {
			p := limit.New(s, limit.Options{})
			s.down = true
			_ = decrypt(ctx, p, "k", "")
			back := time.Now().Add(after)
			time.AfterFunc(after, func() { s.set(func() { s.down = false }) })
			worked := make(chan time.Time, 1)
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() {
					for decrypt(ctx, p, "k", "") != nil || time.Now().Before(back) {
						time.Sleep(100 * time.Millisecond)
					}
					select {
					case worked <- time.Now():
					default:
					}
				})
			}
			wg.Wait()
			between(t, fmt.Sprint("back after ", after), (<-worked).Sub(back), 0, 2200*time.Millisecond)
		})
	}
}

// TestBreakerCloses: any answer closes the breaker, a refusal too; a check of
// the key is one.
func TestBreakerCloses(t *testing.T) {
	for name, answer := range map[string]error{"denied": keywrap.ErrDenied, "throttled": keywrap.ErrThrottled, "ok": nil} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *service, ctx context.Context) {
				p := limit.New(s, limit.Options{})
				s.hook = func(string, string) error { return keywrap.ErrUnavailable }
				if err := decrypt(ctx, p, "k", ""); !errors.Is(err, keywrap.ErrUnavailable) {
					t.Fatal(err)
				}
				var ce *keywrap.CallError
				_, err := p.ReEncrypt(ctx, keywrap.Wrapped{Key: "k"}, ec, "to", ec)
				if !errors.As(err, &ce) || ce.Op != "ReEncrypt" || ce.Key != "k" || ce.RequestID != "request-1" || ce.Hint != "none" || s.calls != 1 {
					t.Errorf("refused: %+v after %d calls, want the first failure", ce, s.calls)
				}
				n := 0
				s.hook = func(string, string) error {
					if n++; n == 1 {
						return answer
					}
					return nil
				}
				check := func() error { return p.Check(ctx, keywrap.Check{Op: keywrap.OpDecrypt, Key: "k"}) }
				if err := check(); answer != keywrap.ErrThrottled && !errors.Is(err, answer) {
					t.Errorf("Check = %v, want %v", err, answer)
				}
				if st := p.Stats(); st.State != "closed" {
					t.Errorf("state %q after an answer", st.State)
				}
				if err := decrypt(ctx, p, "k", ""); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestCallersTime: a caller whose own time runs out says nothing of the service.
func TestCallersTime(t *testing.T) {
	bubble(t, func(t *testing.T, s *service, ctx context.Context) {
		p := limit.New(s, limit.Options{Concurrent: 1})
		s.down = true
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if err := decrypt(short, p, "k", ""); fault.Of(err) != fault.KeyUnavailable {
			t.Error(err)
		}
		gone, leave := context.WithCancel(ctx)
		time.AfterFunc(time.Second, leave)
		if err := decrypt(gone, p, "k", ""); !errors.Is(err, context.Canceled) || fault.Of(err) != fault.None {
			t.Error(err)
		}
		if st := p.Stats(); st.State != "closed" || st.Failed != 1 {
			t.Errorf("stats: %+v", st)
		}
	})
}

// TestLeavingTheQueue: callers that give up while they wait cost nothing and
// leave no place taken.
func TestLeavingTheQueue(t *testing.T) {
	bubble(t, func(t *testing.T, s *service, ctx context.Context) {
		p := limit.New(s, limit.Options{Concurrent: 1, PerSecond: 10, Burst: 1})
		var wg sync.WaitGroup
		wg.Go(func() { _ = decrypt(ctx, p, "k", "") })
		synctest.Wait()
		for i := range 50 {
			wg.Go(func() {
				ctx, cancel := context.WithCancel(ctx)
				want := context.Canceled
				if i%2 == 0 {
					cancel()
					ctx, cancel = context.WithTimeout(t.Context(), 10*time.Millisecond)
					want = context.DeadlineExceeded
				} else {
					time.AfterFunc(10*time.Millisecond, cancel)
				}
				defer cancel()
				err := decrypt(ctx, p, "k", "")
				var ce *keywrap.CallError
				if !errors.Is(err, want) || !errors.As(err, &ce) || (fault.Of(err) == fault.KeyUnavailable) != (want == context.DeadlineExceeded) {
					t.Errorf("caller %d: %v", i, err)
				}
			})
		}
		wg.Wait()
		if st := p.Stats(); s.calls != 1 || st.Waiting != 0 || st.InFlight != 0 {
			t.Errorf("%d calls sent, stats %+v", s.calls, st)
		}
		start := time.Now()
		if err := decrypt(ctx, p, "k", ""); err != nil {
			t.Error(err)
		}
		between(t, "the next", time.Since(start), 20*time.Millisecond, 120*time.Millisecond)
	})
}

// TestBackground: background calls have half of the places, let others go
// first, and are not starved.
func TestBackground(t *testing.T) {
	bubble(t, func(t *testing.T, s *service, ctx context.Context) {
		p := limit.New(s, limit.Options{Concurrent: 8})
		var wg sync.WaitGroup
		for range 40 {
			wg.Go(func() { _ = decrypt(limit.Background(ctx), p, "k", "back") })
		}
		synctest.Wait()
		if st := p.Stats(); st.InFlight != 4 || st.Waiting != 36 {
			t.Errorf("background alone: %+v, want 4 in flight", st)
		}
		for range 200 {
			wg.Go(func() { _ = decrypt(ctx, p, "k", "front") })
		}
		wg.Wait()
		back := 0
		for _, id := range s.order[8:200] {
			if id == "back" {
				back++
			}
		}
		if back < 5 || back > 20 {
			t.Errorf("%d of 192 turns went to the background while others waited, want one of 16", back)
		}
		if len(s.order) != 240 {
			t.Errorf("%d calls, want 240", len(s.order))
		}
	})
}

// TestRetriesGoFirst: what was throttled has its turn before what never had one.
func TestRetriesGoFirst(t *testing.T) {
	bubble(t, func(t *testing.T, s *service, ctx context.Context) {
		p := limit.New(s, limit.Options{PerSecond: 1, Burst: 1})
		n := 0
		s.hook = func(string, string) error {
			if n++; n == 1 {
				return keywrap.ErrThrottled
			}
			return nil
		}
		var wg sync.WaitGroup
		for i := range 5 {
			wg.Go(func() { _ = decrypt(ctx, p, "k", fmt.Sprint(i)) })
			synctest.Wait()
		}
		wg.Wait()
		if got := strings.Join(s.order, " "); got != "0 1 2 3 4" {
			t.Errorf("order %q, want 0 first", got)
		}
	})
}

// TestObserve: a call tells its attempts, to the observer and to the caller's
// own trace, and may use the Provider from the observer.
func TestObserve(t *testing.T) {
	bubble(t, func(t *testing.T, s *service, ctx context.Context) {
		var seen []limit.Call
		var p *limit.Provider
		p = limit.New(s, limit.Options{Observe: func(c limit.Call) { _ = p.Stats(); seen = append(seen, c) }})
		n := 0
		s.hook = func(string, string) error {
			if n++; n < 3 {
				return keywrap.ErrThrottled
			}
			return keywrap.ErrDenied
		}
		var trace keywrap.Trace
		err := decrypt(limit.Background(keywrap.WithTrace(ctx, &trace)), p, "k", "7")
		if !errors.Is(err, keywrap.ErrDenied) || len(seen) != 1 {
			t.Fatalf("%v, observed %+v", err, seen)
		}
		c := seen[0]
		if c.Op != "Decrypt" || c.Key != "k" || c.Context.ID != "7" || !c.Background || c.Check || c.Err == nil || c.Took != 60*time.Millisecond || c.Waited == 0 {
			t.Errorf("observed %+v", c)
		}
		for i, want := range []string{"key-unavailable", "key-unavailable", "key-denied"} {
			if len(c.Attempts) != 3 || c.Attempts[i].Code != want || c.Attempts[i] != trace.Attempts()[i] || c.Attempts[i].RequestID == "" {
				t.Fatalf("attempts %+v, trace %+v", c.Attempts, trace.Attempts())
			}
		}
		st := p.Stats()
		if len(st.Failures) != 1 || st.Failures[0].Kind != "key-denied" || st.Failures[0].RequestID != "request-3" || st.Failures[0].Class != "phi" || st.Throttled != 2 {
			t.Errorf("stats %+v", st)
		}
		for range 100 {
			_ = decrypt(ctx, p, "k", "")
		}
		if got := len(p.Stats().Failures); got != 64 {
			t.Errorf("%d failures kept, want 64", got)
		}
	})
}
