package envelope_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// anyFile creates a file of any id and wipes its key.
func (b *bench) anyFile() (*envelope.Header, error) {
	h, k, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(envelope.ID{}), envelope.DefaultHeader)
	if err == nil && k.Check(h) != nil {
		b.t.Errorf("Create: the header does not commit to its key")
	}
	k.Wipe()
	return h, err
}

func (b *bench) mustAnyFile() *envelope.Header {
	b.t.Helper()
	h, err := b.anyFile()
	if err != nil {
		b.t.Fatalf("Create: %v", err)
	}
	return h
}

func TestPoolHidesTheLatency(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		const n = 1000
		b.svc.set(func() { b.svc.delay = 20 * time.Millisecond })
		begin := time.Now()
		files := map[envelope.ID]*envelope.Header{}
		for range n {
			h := b.mustAnyFile()
			files[h.File] = h
			time.Sleep(time.Millisecond)
		}
		// Each of two recipients takes 20 ms; one after the other it would be 40 s.
		if got := time.Since(begin); got > 2*time.Second {
			t.Errorf("%d files, one each millisecond, took %v, want at most 2s", n, got)
		}
		if len(files) != n {
			t.Errorf("got %d file ids for %d files", len(files), n)
		}
		s := b.m.Stats()
		if s.PoolHits+s.PoolMisses != n || s.PoolMisses > 100 || s.PoolKeys == 0 || s.PoolKeys > 256 {
			t.Errorf("got stats %+v, want few misses and a filled pool", s)
		}
		opened := 0
		for _, h := range files { // as after a new mount
			if opened++; opened > 50 {
				break
			}
			b.m.Forget(h)
			b.mustOpen(reparse(t, h))
		}
	})
}

func TestPoolIsNotMadeForAFile(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		for range 3 {
			b.mustAnyFile()
			time.Sleep(time.Second)
		}
		wantCalls(t, "three files, a second apart", b.svc.count("GenerateDataKey", keyA), 3)
		for range 2 {
			h, k, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(envelope.NewID()), 512)
			if err != nil {
				t.Fatal(err)
			}
			k.Wipe()
			b.mustOpen(h)
		}
		wantCalls(t, "files with ids of their own", b.svc.count("GenerateDataKey", keyA), 5)
		_, _, err := b.m.Create(context.Background(), b.class, keywrap.PurposeNames, envelope.Fixed{}, 512)
		wantErr(t, "name key without an id", err, envelope.ErrInvalid)
	})
}

func TestPoolIsBounded(t *testing.T) {
	for _, size := range []int{-1, 8} {
		bubble(t, envelope.Options{PoolSize: size}, func(t *testing.T, b *bench) {
			b.class.Cache = 0
			b.svc.set(func() { b.svc.delay = 20 * time.Millisecond })
			for range 20 {
				var wg sync.WaitGroup
				for range 50 {
					wg.Go(func() { b.mustAnyFile() })
				}
				wg.Wait()
			}
			time.Sleep(time.Second)
			synctest.Wait()
			want := max(size, 0)
			if s := b.m.Stats(); s.PoolKeys != want || b.svc.count("GenerateDataKey", keyA) != 1000+want {
				t.Errorf("pool of %d: got %d keys, %d generated, want %d and %d", size, s.PoolKeys, b.svc.count("GenerateDataKey", keyA), want, 1000+want)
			}
		})
	}
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		b.svc.set(func() { b.svc.delay = time.Second })
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				for range 20 {
					b.mustAnyFile()
				}
			})
		}
		wg.Wait()
		synctest.Wait()
		if got := b.svc.peak; got > 20+64 {
			t.Errorf("got %d requests at a time for 20 creators, want at most 64 more", got)
		}
	})
}

// warm fills the pool and returns the number of keys in it.
func (b *bench) warm() int {
	b.t.Helper()
	for range 40 {
		b.mustAnyFile()
	}
	time.Sleep(time.Second)
	synctest.Wait()
	n := b.m.Stats().PoolKeys
	if n < 4 {
		b.t.Fatalf("got %d keys in the pool after 40 files, want some", n)
	}
	return n
}

func TestPoolAgesAndShrinks(t *testing.T) {
	bubble(t, envelope.Options{PoolAge: time.Minute}, func(t *testing.T, b *bench) {
		b.class.Cache = 0
		live := keymem.Live()
		n := b.warm()
		if got := keymem.Live() - live; got != n {
			t.Errorf("got %d live keys for a pool of %d", got, n)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := keymem.Live(); got != live || b.m.Stats().PoolKeys != 0 {
			t.Errorf("after a minute: got %d live keys, want %d, and %d in the pool, want 0", got, live, b.m.Stats().PoolKeys)
		}
		before := b.svc.count("GenerateDataKey", keyA)
		b.mustAnyFile()
		time.Sleep(time.Minute)
		wantCalls(t, "the next file", b.svc.count("GenerateDataKey", keyA)-before, 1)

		// What is used within the age stays, and no more.
		b.warm()
		for range 300 {
			b.mustAnyFile()
			time.Sleep(10 * time.Second)
		}
		if got := b.m.Stats().PoolKeys; got < 1 || got > 7 {
			t.Errorf("a file each 10 s: got %d keys in the pool, want 1 to 7", got)
		}
	})
}

func TestPoolEndsWithTheClassesKeys(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		b.class.Cache = 0
		live := keymem.Live()
		b.warm()
		b.svc.set(func() { b.svc.delay = time.Second })
		old := b.class
		b.mustAnyFile() // from the pool; its refill is under way
		b.class.Keys, b.class.Allowed = []string{"keyring:new"}, []string{"keyring:new", keyA, keyB}
		for range 5 {
			h := b.mustAnyFile()
			if len(h.Recipients) != 1 || h.Recipients[0].Wrapped.Key != "keyring:new" {
				t.Errorf("got recipients %+v, want one under the new key", h.Recipients)
			}
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if got, n := keymem.Live()-live, b.m.Stats().PoolKeys; got != n {
			t.Errorf("got %d live keys, want the %d of the new pool", got, n)
		}
		// A key that is not allowed any more is not handed out, even if it was
		// when it was made.
		b.class = old
		b.class.Keys, b.class.Allowed = old.Keys[:1], old.Keys[:1]
		if h := b.mustAnyFile(); len(h.Recipients) != 1 || h.Recipients[0].Wrapped.Key != keyA {
			t.Errorf("got recipients %+v, want one under %s", h.Recipients, keyA)
		}
	})
}

func TestPoolIsWipedAtClose(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		b.class.Cache = 0
		live := keymem.Live()
		b.warm()
		b.svc.set(func() { b.svc.delay, b.svc.stubborn = 2*time.Second, true })
		b.mustAnyFile() // refills go on over Close
		b.m.Close()
		if got := keymem.Live(); got != live {
			t.Errorf("got %d live keys after Close, want %d", got, live)
		}
		_, err := b.anyFile()
		wantErr(t, "Create after Close", err, envelope.ErrClosed)
	})
}

func TestPoolOverAnOutage(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		b.class.Cache = 0
		n := b.warm()
		b.svc.set(func() { b.svc.fail[keyA] = keywrap.ErrUnavailable })
		before := b.svc.total()
		for range n {
			b.mustAnyFile()
		}
		synctest.Wait()
		// One volley of refills has failed, and no other follows within a second.
		if got := b.svc.total() - before; got > n {
			t.Errorf("got %d calls during the outage, want at most %d", got, n)
		}
		before = b.svc.total()
		for range 10 {
			_, err := b.anyFile()
			wantErr(t, "Create with an empty pool", err, keywrap.ErrUnavailable)
		}
		wantCalls(t, "ten creations during the outage", b.svc.total()-before, 10)
		b.svc.set(func() { delete(b.svc.fail, keyA) })
		b.mustAnyFile()
		time.Sleep(time.Second)
		b.warm()
	})
}

// Every caller gets a key or an error, whichever calls fail.
func TestPoolFailuresReachWhoWaits(t *testing.T) {
	for _, nth := range []int{1, 2, 3, 7} {
		bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
			b.class.Cache, b.class.Keys = 0, b.class.Keys[:1]
			b.svc.set(func() { b.svc.delay, b.svc.failNth = 20*time.Millisecond, nth })
			var mu sync.Mutex
			made, failed := 0, 0
			var wg sync.WaitGroup
			for range 40 {
				wg.Go(func() {
					for range 25 {
						_, err := b.anyFile()
						mu.Lock()
						if err == nil {
							made++
						} else if failed++; !errors.Is(err, keywrap.ErrThrottled) {
							t.Errorf("got error %v, want throttled", err)
						}
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			if made+failed != 1000 || (nth == 1) != (made == 0) || failed == 0 {
				t.Errorf("every %d. call fails: got %d keys and %d failures of 1000", nth, made, failed)
			}
		})
	}
}

func TestPoolKeepsWhatAnInterruptedCallerWanted(t *testing.T) {
	bubble(t, envelope.Options{Grace: time.Second}, func(t *testing.T, b *bench) {
		b.class.Cache = 0
		live := keymem.Live()
		b.svc.set(func() { b.svc.delay = 2 * time.Second })
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_, k, err := b.m.Create(ctx, b.class, keywrap.PurposeData, fixed(envelope.ID{}), envelope.DefaultHeader)
		wantErr(t, "interrupted", err, context.Canceled)
		if k != nil {
			t.Errorf("got a key beside the error")
		}
		time.Sleep(4 * time.Second)
		synctest.Wait()
		if got := keymem.Live(); got != live+1 || b.m.Stats().PoolKeys != 1 {
			t.Errorf("got %d live keys, want %d, and %d in the pool, want 1", got, live+1, b.m.Stats().PoolKeys)
		}
		before := b.svc.total()
		b.mustAnyFile()
		wantCalls(t, "the next file", b.svc.total()-before, 0)
	})
}

func TestPooledKeyThatDoesNotFit(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		b.class.Cache = 0
		b.svc.set(func() { b.svc.blobLen = 230 })
		n := b.warm()
		live := keymem.Live()
		_, k, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(envelope.ID{}), 512)
		wantErr(t, "smaller header", err, envelope.ErrDoesNotFit)
		synctest.Wait()
		if k != nil || keymem.Live() > live || b.m.Stats().PoolKeys > n {
			t.Errorf("got key %v, %d live keys, want none and at most %d", k, keymem.Live(), live)
		}
	})
}

// TestPoolUnderManyCreators is for the race detector: no key goes to two files,
// and none is left.
func TestPoolUnderManyCreators(t *testing.T) {
	live := keymem.Live()
	b := newBench(t, envelope.Options{PoolSize: 16, PoolAge: 5 * time.Millisecond})
	b.class.Cache = time.Millisecond
	b.svc.delay = 100 * time.Microsecond
	other := b.class
	other.Keys = other.Keys[:1]
	var mu sync.Mutex
	ids, prks, closed := map[envelope.ID]bool{}, map[string]bool{}, 0
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := range 200 {
				c := b.class
				if g == 0 && i%50 == 0 { // the policy changes to and fro
					c = other
				}
				ctx, cancel := context.WithCancel(context.Background())
				if i%9 == 0 {
					cancel()
				}
				h, k, err := b.m.Create(ctx, c, keywrap.PurposeData, fixed(envelope.ID{}), envelope.DefaultHeader)
				cancel()
				mu.Lock()
				switch {
				case errors.Is(err, envelope.ErrClosed):
					closed++
				case err != nil:
					t.Errorf("Create: %v", err)
				case ids[h.File] || prks[string(k.PRK().Bytes())] || k.Check(h) != nil || len(h.Recipients) != len(c.Keys):
					t.Errorf("file %v: key or id handed out twice, or not its own", h.File)
				default:
					ids[h.File], prks[string(k.PRK().Bytes())] = true, true
				}
				mu.Unlock()
				k.Wipe()
				if g == 1 && i == 180 {
					b.m.Close()
				}
			}
		})
	}
	wg.Wait()
	b.m.Close()
	if got := keymem.Live(); got != live {
		t.Errorf("got %d live keys, want %d", got, live)
	}
	if len(ids) < 1000 || closed == 0 {
		t.Errorf("got %d files and %d refusals after Close: the test did not do its work", len(ids), closed)
	}
}
