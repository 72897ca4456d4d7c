package envelope_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// bubble runs f under a clock of its own. It fails if a goroutine of the
// manager outlives f, or a key its owners.
func bubble(t *testing.T, o envelope.Options, f func(t *testing.T, b *bench)) {
	t.Helper()
	live := keymem.Live()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, o)
		f(t, b)
		b.m.Close()
	})
	if got := keymem.Live(); got != live {
		t.Errorf("got %d live keys after Close, want %d", got, live)
	}
}

func TestCreateThenOpenGivesTheSameKey(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		f := fixed(envelope.NewID())
		f.Sparse, f.BlockSize = true, 7 // ignored
		h, k, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, f, 2048)
		if err != nil {
			t.Fatal(err)
		}
		defer k.Wipe()
		if h.Store != b.store || h.File != f.File || h.BlockSize != 2048 || !h.Sparse || len(h.Recipients) != 2 {
			t.Errorf("Create: got header %+v", h)
		}
		for i, want := range b.class.Keys {
			if r := h.Recipients[i]; r.Wrapped.Key != want || r.Class != b.class.Name {
				t.Errorf("recipient %d: got key %s, class %s", i, r.Wrapped.Key, r.Class)
			}
		}
		for _, when := range []string{"from the cache", "by the first recipient", "by the second recipient"} {
			got, err := b.m.Open(context.Background(), b.class, keywrap.PurposeData, reparse(t, h))
			if err != nil {
				t.Fatalf("Open %s: %v", when, err)
			}
			if !got.PRK().Equal(k.PRK()) {
				t.Errorf("Open %s: got another key than Create", when)
			}
			got.Wipe()
			b.m.Forget(h)
			if when == "by the first recipient" {
				b.svc.set(func() { b.svc.fail[keyA] = keywrap.ErrUnavailable })
			}
		}
		wantCalls(t, "first recipient", b.svc.count("Decrypt", keyA), 2)
		wantCalls(t, "second recipient", b.svc.count("Decrypt", keyB), 1)
	})
}

func TestConcurrentOpensMakeOneCall(t *testing.T) {
	for _, cache := range []time.Duration{0, time.Minute} {
		bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
			const n = 1000
			b.class.Cache = cache
			h := b.create()
			calls := b.m.Stats().Calls
			b.svc.set(func() { b.svc.delay = time.Second })
			var wg sync.WaitGroup
			for range n {
				wg.Go(func() { b.mustOpen(h) })
			}
			wg.Wait()
			wantCalls(t, fmt.Sprintf("cache %v", cache), b.svc.count("Decrypt", keyA), 1)
			s := b.m.Stats()
			if s.Calls-calls != 1 || s.Shared != n-1 || s.CacheHits != 0 {
				t.Errorf("cache %v: got stats %+v, want 1 call, %d shared, 0 hits", cache, s, n-1)
			}
			if want := min(1, int(cache)); s.Entries != want {
				t.Errorf("cache %v: got %d entries, want %d", cache, s.Entries, want)
			}
		})
	}
}

func TestSharedFailureReachesAll(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		h := b.create()
		b.svc.set(func() {
			b.svc.delay = time.Second
			b.svc.fail[keyA], b.svc.fail[keyB] = keywrap.ErrThrottled, keywrap.ErrDenied
		})
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() { wantErr(t, "Open", b.open(h), keywrap.ErrThrottled) })
		}
		wg.Wait()
		wantCalls(t, "first recipient", b.svc.count("Decrypt", keyA), 1)
		wantCalls(t, "second recipient", b.svc.count("Decrypt", keyB), 1)
	})
}

func TestInterruptIsIgnoredForGrace(t *testing.T) {
	bubble(t, envelope.Options{Grace: 3 * time.Second}, func(t *testing.T, b *bench) {
		h := b.create()
		b.svc.set(func() { b.svc.delay = 2 * time.Second })
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		k, err := b.m.Open(ctx, b.class, keywrap.PurposeData, h)
		if err != nil {
			t.Fatalf("interrupted, call of 2 s: got error %v, want none", err)
		}
		k.Wipe()
		// A cached key needs no patience at all.
		k, err = b.m.Open(ctx, b.class, keywrap.PurposeData, h)
		if err != nil {
			t.Fatalf("interrupted, key cached: got error %v, want none", err)
		}
		k.Wipe()
	})
}

func TestCallOutlivesItsCaller(t *testing.T) {
	bubble(t, envelope.Options{Grace: 3 * time.Second}, func(t *testing.T, b *bench) {
		h := b.create()
		b.svc.set(func() { b.svc.delay = 8 * time.Second })
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(time.Second, cancel)
		begin := time.Now()
		_, err := b.m.Open(ctx, b.class, keywrap.PurposeData, h)
		wantErr(t, "interrupted, call of 8 s", err, context.Canceled)
		if got := time.Since(begin); got != 4*time.Second {
			t.Errorf("interrupted after 1 s: returned after %v, want 4s", got)
		}
		time.Sleep(time.Second)
		begin = time.Now()
		b.mustOpen(h) // joins the call
		if got := time.Since(begin); got != 3*time.Second {
			t.Errorf("joined: returned after %v, want 3s", got)
		}
		b.mustOpen(h)
		wantCalls(t, "all opens", b.svc.count("Decrypt", keyA), 1)
		if got := b.m.Stats().CacheHits; got != 1 {
			t.Errorf("got %d cache hits, want 1", got)
		}
	})
}

func TestGraceIsSpentOnceOverAllRecipients(t *testing.T) {
	bubble(t, envelope.Options{Grace: 3 * time.Second}, func(t *testing.T, b *bench) {
		h := b.create()
		b.svc.set(func() {
			b.svc.delay = 2 * time.Second
			b.svc.fail[keyA] = keywrap.ErrUnavailable
		})
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		begin := time.Now()
		_, err := b.m.Open(ctx, b.class, keywrap.PurposeData, h)
		wantErr(t, "Open", err, context.Canceled)
		if got := time.Since(begin); got != 3*time.Second {
			t.Errorf("returned after %v, want 3s", got)
		}
		time.Sleep(2 * time.Second)
		b.mustOpen(h) // the second recipient's call has filled the cache
		wantCalls(t, "second recipient", b.svc.count("Decrypt", keyB), 1)
	})
}

func TestAbandonedCreateLeavesNothing(t *testing.T) {
	bubble(t, envelope.Options{Grace: 3 * time.Second}, func(t *testing.T, b *bench) {
		b.svc.set(func() { b.svc.delay = 2 * time.Second })
		live := keymem.Live()
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		create := func() error {
			_, k, err := b.m.Create(ctx, b.class, keywrap.PurposeData, fixed(envelope.NewID()), envelope.DefaultHeader)
			k.Wipe()
			return err
		}
		wantErr(t, "two calls of 2 s", create(), context.Canceled)
		time.Sleep(5 * time.Second)
		if got := keymem.Live(); got != live {
			t.Errorf("got %d live keys after an abandoned Create, want %d", got, live)
		}
		b.svc.set(func() { b.svc.delay = time.Second })
		if err := create(); err != nil {
			t.Errorf("interrupted, two calls of 1 s: got error %v, want none", err)
		}
	})
}

func TestFailuresAreRetriedAfterASecond(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		b.class.Keys = b.class.Keys[:1]
		h := b.create()
		b.svc.set(func() { b.svc.fail[keyA] = keywrap.ErrThrottled })
		wantErr(t, "throttled", b.open(h), keywrap.ErrThrottled)
		time.Sleep(999 * time.Millisecond)
		wantErr(t, "within the second", b.open(h), keywrap.ErrThrottled)
		wantCalls(t, "within the second", b.svc.count("Decrypt", keyA), 1)
		b.svc.set(func() { b.svc.fail = map[string]error{} })
		time.Sleep(time.Millisecond)
		b.mustOpen(h)
		wantCalls(t, "after the second", b.svc.count("Decrypt", keyA), 2)
		s := b.m.Stats()
		if s.Failures != 1 || !strings.Contains(s.LastError, "throttles") || s.LastErrorAt.IsZero() {
			t.Errorf("got stats %+v, want one failure and its text", s)
		}
	})
}

func TestFailuresTakeBoundedMemory(t *testing.T) {
	bubble(t, envelope.Options{MaxEntries: 3}, func(t *testing.T, b *bench) {
		b.class.Keys = b.class.Keys[:1]
		var hs []*envelope.Header
		for range 9 {
			hs = append(hs, b.create())
		}
		b.svc.set(func() { b.svc.fail[keyA] = keywrap.ErrDenied })
		for _, h := range hs {
			wantErr(t, "Open", b.open(h), keywrap.ErrDenied)
		}
		if got := b.m.Remembered(); got < 1 || got > 3 {
			t.Errorf("after 9 failures: got %d remembered, want 1 to 3", got)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := b.m.Remembered(); got != 0 {
			t.Errorf("a second later: got %d remembered, want 0", got)
		}
	})
}

func TestCacheTimeZeroCallsEachTime(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		b.class.Cache = 0
		h := b.create()
		live := keymem.Live()
		for range 3 {
			b.mustOpen(h)
		}
		wantCalls(t, "three opens", b.svc.count("Decrypt", keyA), 3)
		if got := keymem.Live(); got != live {
			t.Errorf("got %d live keys between opens, want %d", got, live)
		}
	})
}

func TestExpiryWipesWithoutAnAccess(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		h := b.create()
		live := keymem.Live()
		b.mustOpen(h)
		time.Sleep(59 * time.Second)
		b.mustOpen(h) // an access does not prolong it
		if got := keymem.Live(); got != live+1 {
			t.Errorf("after 59 s: got %d live keys, want %d", got, live+1)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := keymem.Live(); got != live {
			t.Errorf("after a minute: got %d live keys, want %d", got, live)
		}
		if got := b.m.Stats().Entries; got != 0 {
			t.Errorf("after a minute: got %d entries, want 0", got)
		}
		b.mustOpen(h)
		wantCalls(t, "after a minute", b.svc.count("Decrypt", keyA), 2)
	})
}

func TestOpenFileOutlivesItsCacheEntry(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		h := b.create()
		k, err := b.m.Open(context.Background(), b.class, keywrap.PurposeData, h)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		b.m.Forget(h)
		if err := k.Check(h); err != nil {
			t.Errorf("Check after the entry's end: %v", err)
		}
		k.Wipe()
	})
}

func TestLRUBound(t *testing.T) {
	bubble(t, envelope.Options{MaxEntries: 3}, func(t *testing.T, b *bench) {
		live := keymem.Live()
		var hs []*envelope.Header
		for range 4 {
			hs = append(hs, b.create())
		}
		for _, i := range []int{0, 1, 2, 0, 3} { // 3 pushes out 1
			b.mustOpen(hs[i])
		}
		if s := b.m.Stats(); s.Entries != 3 || keymem.Live() != live+3 {
			t.Errorf("got %d entries, %d more live keys, want 3 of each", s.Entries, keymem.Live()-live)
		}
		before := b.svc.count("Decrypt", keyA)
		for _, i := range []int{0, 2, 3} {
			b.mustOpen(hs[i])
		}
		wantCalls(t, "recently used", b.svc.count("Decrypt", keyA)-before, 0)
		b.mustOpen(hs[1])
		wantCalls(t, "least recently used", b.svc.count("Decrypt", keyA)-before, 1)
	})
}

func TestCreateFillsTheCache(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		for _, cache := range []time.Duration{time.Minute, 0} {
			b.class.Cache = cache
			h, k, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(envelope.NewID()), envelope.DefaultHeader)
			if err != nil {
				t.Fatal(err)
			}
			k.Wipe()
			before := b.svc.count("Decrypt", keyA)
			b.mustOpen(reparse(t, h))
			want := 1
			if cache > 0 {
				want = 0
			}
			wantCalls(t, fmt.Sprintf("cache %v", cache), b.svc.count("Decrypt", keyA)-before, want)
		}
	})
}

func TestForgetDuringACall(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		h := b.create()
		b.svc.set(func() { b.svc.delay = time.Second })
		var wg sync.WaitGroup
		wg.Go(func() { b.mustOpen(h) })
		synctest.Wait()
		b.m.Forget(h)
		wg.Go(func() { b.mustOpen(h) }) // a call of its own
		synctest.Wait()
		b.m.Forget(h)
		wg.Wait()
		wantCalls(t, "opens around Forget", b.svc.count("Decrypt", keyA), 2)
		if got := b.m.Stats().Entries; got != 0 {
			t.Errorf("got %d entries after Forget, want 0", got)
		}
	})
}

func TestNextRecipientAndErrorChoice(t *testing.T) {
	unclassified := errors.New("no provider knows this")
	for _, tt := range []struct {
		a, b error
		want error // nil: opens through b
	}{
		{keywrap.ErrUnavailable, nil, nil},
		{keywrap.ErrDenied, nil, nil},
		{keywrap.ErrDisabled, nil, nil},
		{keywrap.ErrPending, nil, nil},
		{keywrap.ErrExpired, nil, nil},
		{keywrap.ErrBadURI, nil, nil},
		{keywrap.ErrCiphertext, nil, keywrap.ErrCiphertext},
		{keywrap.ErrWrongKey, nil, keywrap.ErrWrongKey},
		{unclassified, nil, unclassified},
		{keywrap.ErrDenied, keywrap.ErrUnavailable, keywrap.ErrUnavailable},
		{keywrap.ErrThrottled, keywrap.ErrDenied, keywrap.ErrThrottled},
		{keywrap.ErrThrottled, keywrap.ErrUnavailable, keywrap.ErrThrottled},
		{keywrap.ErrDisabled, keywrap.ErrDenied, keywrap.ErrDisabled},
		{keywrap.ErrDenied, keywrap.ErrPending, keywrap.ErrPending},
		{keywrap.ErrExpired, keywrap.ErrPending, keywrap.ErrPending},
		{keywrap.ErrNotFound, keywrap.ErrExpired, keywrap.ErrExpired},
		{keywrap.ErrBadURI, keywrap.ErrDenied, keywrap.ErrDenied},
	} {
		bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
			h := b.create()
			b.svc.set(func() { b.svc.fail[keyA], b.svc.fail[keyB] = tt.a, tt.b })
			what := fmt.Sprintf("first %v, second %v", tt.a, tt.b)
			err := b.open(h)
			if !errors.Is(err, tt.want) {
				t.Errorf("%s: got error %v, want %v", what, err, tt.want)
			}
			var ce *keywrap.CallError
			if tt.want != nil && (!errors.As(err, &ce) || ce.RequestID != "r-1") {
				t.Errorf("%s: got error %v, want the CallError within", what, err)
			}
		})
	}
}

func TestCachedSecondRecipientSparesTheFirst(t *testing.T) {
	var log strings.Builder
	bubble(t, envelope.Options{Log: slog.New(slog.NewTextHandler(&log, nil))}, func(t *testing.T, b *bench) {
		h := b.create()
		b.svc.set(func() { b.svc.fail[keyA] = keywrap.ErrUnavailable })
		b.mustOpen(h)
		time.Sleep(10 * time.Second) // the failure is forgotten
		b.mustOpen(h)
		wantCalls(t, "first recipient", b.svc.count("Decrypt", keyA), 1)
		wantCalls(t, "second recipient", b.svc.count("Decrypt", keyB), 1)
	})
	if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, keyA) || !strings.Contains(got, keyB) {
		t.Errorf("got log %q, want one line with both keys", got)
	}
}

func TestDeadlineIsUnavailability(t *testing.T) {
	bubble(t, envelope.Options{Budget: 5 * time.Second}, func(t *testing.T, b *bench) {
		b.class.Keys = b.class.Keys[:1]
		h := b.create()
		b.svc.set(func() { b.svc.delay = time.Hour })
		begin := time.Now()
		err := b.open(h)
		wantErr(t, "Open", err, keywrap.ErrUnavailable)
		wantKind(t, "Open", err, fault.KeyUnavailable)
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			t.Errorf("got error %v, which looks like the caller's own deadline", err)
		}
		if got := time.Since(begin); got != 5*time.Second {
			t.Errorf("returned after %v, want 5s", got)
		}
	})
}

func TestCreateNeedsEveryRecipient(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		live := keymem.Live()
		b.svc.set(func() { b.svc.fail[keyB] = keywrap.ErrDenied })
		_, k, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(envelope.NewID()), envelope.DefaultHeader)
		wantErr(t, "second recipient denied", err, keywrap.ErrDenied)
		if k != nil || keymem.Live() != live {
			t.Errorf("got key %v and %d more live keys, want none", k, keymem.Live()-live)
		}
	})
}

func TestCreateRefusesAKeyThatOpenWouldRefuse(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		live := keymem.Live()
		b.svc.set(func() { b.svc.resolve = map[string]string{keyB: keyEvil} }) // an alias that was pointed elsewhere
		_, k, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(envelope.NewID()), envelope.DefaultHeader)
		wantErr(t, "Create", err, envelope.ErrNotAllowed)
		if k != nil || keymem.Live() != live {
			t.Errorf("got key %v and %d more live keys, want none", k, keymem.Live()-live)
		}
	})
}

func TestCreateRefusesEarly(t *testing.T) {
	long := "keyring:" + strings.Repeat("k", 600)
	nine := strings.Fields(strings.Repeat(keyA+" ", 9))
	for _, tt := range []struct {
		name  string
		edit  func(c *envelope.Class, f *envelope.Fixed, size, blobLen *int)
		want  error
		calls int
	}{
		{"nine keys", func(c *envelope.Class, _ *envelope.Fixed, _, _ *int) { c.Keys = nine }, envelope.ErrDoesNotFit, 0},
		{"long URI", func(c *envelope.Class, _ *envelope.Fixed, size, _ *int) {
			c.Keys, c.Allowed, *size = []string{long}, []string{long}, 512
		}, envelope.ErrDoesNotFit, 0},
		{"long class", func(c *envelope.Class, _ *envelope.Fixed, _, _ *int) { c.Name = strings.Repeat("c", 256) }, envelope.ErrDoesNotFit, 0},
		{"long first blob", func(_ *envelope.Class, _ *envelope.Fixed, _, n *int) { *n = 930 }, envelope.ErrDoesNotFit, 1},
		{"long second blob", func(_ *envelope.Class, _ *envelope.Fixed, _, n *int) { *n = 460 }, envelope.ErrDoesNotFit, 2},
		{"no key", func(c *envelope.Class, _ *envelope.Fixed, _, _ *int) { c.Keys = nil }, envelope.ErrInvalid, 0},
		{"no class", func(c *envelope.Class, _ *envelope.Fixed, _, _ *int) { c.Name = "" }, envelope.ErrInvalid, 0},
		{"key not allowed", func(c *envelope.Class, _ *envelope.Fixed, _, _ *int) { c.Allowed = []string{keyA} }, envelope.ErrNotAllowed, 0},
		{"no chunk size", func(_ *envelope.Class, f *envelope.Fixed, _, _ *int) { f.Suite, f.ChunkSize = 0, 0 }, envelope.ErrInvalid, 0},
		{"bad chunk size", func(_ *envelope.Class, f *envelope.Fixed, _, _ *int) { f.ChunkSize = 5000 }, envelope.ErrInvalid, 0},
		{"bad header size", func(_ *envelope.Class, _ *envelope.Fixed, size, _ *int) { *size = 1000 }, envelope.ErrInvalid, 0},
		{"other store", func(_ *envelope.Class, f *envelope.Fixed, _, _ *int) { f.Store = envelope.NewID() }, envelope.ErrForeignStore, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
				f, size := fixed(envelope.NewID()), envelope.DefaultHeader
				tt.edit(&b.class, &f, &size, &b.svc.blobLen)
				_, k, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, f, size)
				k.Wipe()
				wantErr(t, "Create", err, tt.want)
				wantCalls(t, "Create", b.svc.total(), tt.calls)
			})
		})
	}
}

func TestCloseEndsCallsAndWipes(t *testing.T) {
	live := keymem.Live()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, envelope.Options{})
		h, h2 := b.create(), b.create()
		b.mustOpen(h2) // in the cache
		b.svc.set(func() { b.svc.delay = time.Minute })
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() { wantErr(t, "Open during Close", b.open(h), envelope.ErrClosed) })
		}
		wg.Go(func() {
			_, _, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(envelope.NewID()), 1024)
			wantErr(t, "Create during Close", err, envelope.ErrClosed)
		})
		synctest.Wait()
		begin := time.Now()
		b.m.Close()
		b.m.Close()
		if got := time.Since(begin); got != 0 {
			t.Errorf("Close took %v with a provider that honours its context, want 0s", got)
		}
		wg.Wait()
		if got := keymem.Live(); got != live {
			t.Errorf("got %d live keys after Close, want %d", got, live)
		}
		wantErr(t, "Open after Close", b.open(h2), envelope.ErrClosed)
		_, _, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(envelope.NewID()), 1024)
		wantErr(t, "Create after Close", err, envelope.ErrClosed)
	})
}

func TestCloseDoesNotWaitForEver(t *testing.T) {
	live := keymem.Live()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, envelope.Options{})
		h := b.create()
		b.svc.set(func() { b.svc.delay, b.svc.stubborn = time.Minute, true })
		var wg sync.WaitGroup
		wg.Go(func() { wantErr(t, "Open", b.open(h), envelope.ErrClosed) })
		wg.Go(func() {
			_, _, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(envelope.NewID()), 1024)
			wantErr(t, "Create", err, envelope.ErrClosed)
		})
		synctest.Wait()
		begin := time.Now()
		b.m.Close()
		if got := time.Since(begin); got != 5*time.Second {
			t.Errorf("Close took %v with a provider that does not return, want 5s", got)
		}
		wg.Wait() // the calls succeed after a minute, and their keys are wiped
	})
	if got := keymem.Live(); got != live {
		t.Errorf("got %d live keys, want %d: one came after Close and stayed", got, live)
	}
}

// TestEverythingAtOnce is for the race detector.
func TestEverythingAtOnce(t *testing.T) {
	live := keymem.Live()
	b := newBench(t, envelope.Options{MaxEntries: 4})
	b.class.Cache = time.Millisecond
	var hs []*envelope.Header
	for range 8 {
		hs = append(hs, b.create())
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 200 {
				h := hs[(g*31+i)%len(hs)]
				ctx, cancel := context.WithCancel(context.Background())
				if i%5 == 0 {
					cancel()
				}
				k, err := b.m.Open(ctx, b.class, keywrap.PurposeData, h)
				if err != nil && !errors.Is(err, envelope.ErrClosed) {
					t.Errorf("Open: %v", err)
				}
				k.Wipe()
				cancel()
				if i%17 == 0 {
					b.m.Forget(h)
				}
				if g == 0 && i == 190 {
					b.m.Close()
				}
				_ = b.m.Stats()
			}
		})
	}
	wg.Wait()
	b.m.Close()
	if got := keymem.Live(); got != live {
		t.Errorf("got %d live keys, want %d", got, live)
	}
}
