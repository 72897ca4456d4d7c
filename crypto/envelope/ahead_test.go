package envelope_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

func TestAheadFillsTheCache(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		var hs []*envelope.Header
		for range 300 {
			hs = append(hs, b.create())
		}
		b.svc.set(func() { b.svc.delay = 20 * time.Millisecond })
		begin := time.Now()
		next := 0
		for i, h := range hs {
			for next = max(next, i+1); next < len(hs) && b.m.Ahead(b.class, hs[next]); next++ {
			}
			b.mustOpen(h)
		}
		if got := time.Since(begin); got > 300*time.Millisecond {
			t.Errorf("300 files took %v, want at most 300ms (6 s one after the other)", got)
		}
		wantCalls(t, "300 files", b.svc.count("Decrypt", keyA), 300)
		if got := b.m.Stats().Ahead; got < 250 {
			t.Errorf("got %d unwraps ahead, want nearly all of 300", got)
		}
	})
}

func TestAheadIsBounded(t *testing.T) {
	bubble(t, envelope.Options{Ahead: 3}, func(t *testing.T, b *bench) {
		var hs []*envelope.Header
		for range 5 {
			hs = append(hs, b.create())
		}
		b.svc.set(func() { b.svc.delay, b.svc.peak = time.Second, 0 })
		for i, h := range hs {
			if got, want := b.m.Ahead(b.class, h), i < 3; got != want {
				t.Errorf("Ahead %d: got %v, want %v", i, got, want)
			}
			synctest.Wait()
		}
		if !b.m.Ahead(b.class, hs[0]) {
			t.Errorf("Ahead of a key under way: got false, want true")
		}
		b.mustOpen(hs[0]) // joins
		synctest.Wait()
		if !b.m.Ahead(b.class, hs[0]) || !b.m.Ahead(b.class, hs[4]) {
			t.Errorf("Ahead of a cached key, and with capacity again: got false, want true")
		}
		time.Sleep(2 * time.Second)
		wantCalls(t, "four files", b.svc.count("Decrypt", keyA), 4)
		if b.svc.peak != 3 {
			t.Errorf("got %d calls at a time, want 3", b.svc.peak)
		}
	})
}

func TestAheadDoesNothingWhereEveryOpenIsACall(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		h := b.create()
		live := keymem.Live()
		for what, edit := range map[string]func(c *envelope.Class){
			"no cache":        func(c *envelope.Class) { c.Cache = 0 },
			"key not allowed": func(c *envelope.Class) { c.Allowed = []string{keyEvil} },
			"other class":     func(c *envelope.Class) { c.Name = "pci" },
		} {
			c := b.class
			edit(&c)
			if !b.m.Ahead(c, h) {
				t.Errorf("%s: got false, want true", what)
			}
		}
		synctest.Wait()
		wantCalls(t, "nothing to do", b.svc.count("Decrypt", keyA), 0)

		// A failure is Open's to report, through the other recipient if need be.
		b.svc.set(func() { b.svc.fail[keyA] = keywrap.ErrUnavailable })
		b.m.Ahead(b.class, h)
		synctest.Wait()
		b.mustOpen(h)
		wantCalls(t, "second recipient", b.svc.count("Decrypt", keyB), 1)
		b.m.Forget(h)
		b.svc.set(func() { b.svc.fail[keyB] = keywrap.ErrDenied })
		b.m.Ahead(b.class, h)
		synctest.Wait()
		wantErr(t, "Open after a failed Ahead", b.open(h), keywrap.ErrUnavailable)
		if got := keymem.Live(); got != live {
			t.Errorf("got %d live keys, want %d", got, live)
		}
		b.m.Close()
		if !b.m.Ahead(b.class, h) {
			t.Errorf("Ahead after Close: got false, want true")
		}
	})
}

func TestAheadOutlivesNothing(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		h := b.create()
		want := clone(h)
		b.svc.set(func() { b.svc.delay = time.Minute })
		b.m.Ahead(b.class, h)
		h.Recipients[0].Class, h.File = "gone", envelope.NewID() // the caller's header is the caller's
		synctest.Wait()
		b.m.Close()
		if _, err := b.m.Open(context.Background(), b.class, keywrap.PurposeData, want); err == nil {
			t.Errorf("Open after Close: got no error")
		}
		wantCalls(t, "Ahead", b.svc.count("Decrypt", keyA), 1)
	})
}
