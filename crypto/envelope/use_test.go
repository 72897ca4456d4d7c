package envelope_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

var errAudit = errors.New("the audit log is full")

// diary collects what a manager tells, and can refuse.
type diary struct {
	mu         sync.Mutex
	uses       []envelope.Use
	calls      []envelope.CallRecord
	callers    []any // of uses, by callerKey
	callCtx    []any // of calls
	refuseUse  bool
	refuseCall func(c envelope.CallRecord) bool
}

type callerKey struct{}

func (d *diary) options(o envelope.Options) envelope.Options {
	o.Observe = func(ctx context.Context, u envelope.Use) error {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.uses, d.callers = append(d.uses, u), append(d.callers, ctx.Value(callerKey{}))
		if d.refuseUse {
			return errAudit
		}
		return nil
	}
	o.Call = func(ctx context.Context, c envelope.CallRecord) error {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.calls, d.callCtx = append(d.calls, c), append(d.callCtx, ctx.Value(callerKey{}))
		if ctx.Err() != nil {
			return fmt.Errorf("record under a cancelled context: %w", ctx.Err())
		}
		if d.refuseCall != nil && d.refuseCall(c) {
			return errAudit
		}
		return nil
	}
	return o
}

func (d *diary) set(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}

// last returns the newest use.
func (d *diary) last(t testing.TB) envelope.Use {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.uses) == 0 {
		t.Fatal("no use was told")
	}
	return d.uses[len(d.uses)-1]
}

func TestObserveTellsWhereAKeyCameFrom(t *testing.T) {
	d := &diary{}
	bubble(t, d.options(envelope.Options{}), func(t *testing.T, b *bench) {
		check := func(what string, want envelope.Use) {
			t.Helper()
			u := d.last(t)
			want.Class, want.Purpose = "phi", keywrap.PurposeData
			if u.Op != want.Op || u.Class != want.Class || u.Purpose != want.Purpose || u.File != want.File || u.Key != want.Key ||
				u.Source != want.Source || !slices.Equal(u.Requests, want.Requests) || !errors.Is(u.Err, want.Err) || !u.Branch.IsZero() {
				t.Errorf("%s:\ngot  %+v\nwant %+v", what, u, want)
			}
		}
		file := envelope.NewID()
		h, k, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(file), envelope.DefaultHeader)
		if err != nil {
			t.Fatal(err)
		}
		k.Wipe()
		both := []string{"req-1", "req-2"}
		check("Create", envelope.Use{Op: "create", File: file, Key: keyA, Source: envelope.SourceCall, Requests: both})
		b.mustOpen(h)
		check("from Create's entry", envelope.Use{Op: "open", File: file, Key: keyA, Source: envelope.SourceCache, Requests: both})
		b.m.Forget(h)
		b.mustOpen(h)
		check("by a call", envelope.Use{Op: "open", File: file, Key: keyA, Source: envelope.SourceCall, Requests: []string{"req-3"}})
		b.mustOpen(h)
		check("from its entry", envelope.Use{Op: "open", File: file, Key: keyA, Source: envelope.SourceCache, Requests: []string{"req-3"}})

		b.m.Forget(h)
		b.svc.set(func() { b.svc.delay = time.Second })
		var wg sync.WaitGroup
		wg.Go(func() { b.mustOpen(h) })
		synctest.Wait()
		wg.Go(func() { time.Sleep(time.Millisecond); b.mustOpen(h) })
		wg.Wait()
		sources := []string{d.uses[len(d.uses)-2].Source, d.last(t).Source}
		slices.Sort(sources)
		if want := []string{envelope.SourceCall, envelope.SourceJoined}; !slices.Equal(sources, want) {
			t.Errorf("two at a time: got sources %v, want %v", sources, want)
		}

		b.m.Forget(h)
		b.svc.set(func() {
			b.svc.delay = 0
			b.svc.fail[keyA], b.svc.fail[keyB] = keywrap.ErrDenied, keywrap.ErrThrottled
		})
		failed := envelope.Use{Op: "open", File: file, Key: keyB, Source: envelope.SourceCall, Requests: []string{"req-5", "req-6"}, Err: keywrap.ErrThrottled}
		_ = b.open(h)
		check("both recipients fail", failed)
		_ = b.open(h)
		failed.Source = envelope.SourceCache
		check("the failure is remembered", failed)
		b.class.Allowed = []string{keyEvil}
		_ = b.open(h)
		check("refused without a call", envelope.Use{Op: "open", File: file, Key: keyB, Err: envelope.ErrNotAllowed})
	})
}

func TestObserveSeesTheCallerAndMayRefuse(t *testing.T) {
	d := &diary{}
	bubble(t, d.options(envelope.Options{}), func(t *testing.T, b *bench) {
		h := b.create()
		shared := b.class
		shared.Name, shared.Shared = "general", true
		ctx := context.WithValue(context.Background(), callerKey{}, "uid 1000")
		live := keymem.Live()
		d.set(func() { d.refuseUse = true })
		for _, create := range []struct {
			c  envelope.Class
			id envelope.ID
		}{{b.class, envelope.NewID()}, {b.class, envelope.ID{}}, {shared, envelope.ID{}}} {
			got, k, err := b.m.Create(ctx, create.c, keywrap.PurposeData, fixed(create.id), envelope.DefaultHeader)
			wantErr(t, "Create", err, errAudit)
			if got != nil || k != nil {
				t.Errorf("Create: got header %v, key %v beside the refusal", got, k)
			}
		}
		b.class.Cache = 0
		k, err := b.m.Open(ctx, b.class, keywrap.PurposeData, h)
		wantErr(t, "Open", err, errAudit)
		if k != nil {
			t.Errorf("Open: got a key beside the refusal")
		}
		if got, want := keymem.Live(), live+2; got != want { // the branch key, for new files and in the cache
			t.Errorf("got %d live keys after refusals, want %d", got, want)
		}
		if got, want := d.callers[1:], []any{"uid 1000", "uid 1000", "uid 1000", "uid 1000"}; !slices.Equal(got, want) {
			t.Errorf("got callers %v, want %v", got, want)
		}
		// A failure stays the failure that it is.
		b.svc.set(func() { b.svc.fail[keyA], b.svc.fail[keyB] = keywrap.ErrDenied, keywrap.ErrDenied })
		wantErr(t, "denied and not logged", b.open(h), keywrap.ErrDenied)
	})
}

func TestEveryCallIsTold(t *testing.T) {
	d := &diary{}
	background := 0
	o := d.options(envelope.Options{Background: func(ctx context.Context) context.Context {
		d.set(func() { background++ })
		return ctx
	}})
	bubble(t, o, func(t *testing.T, b *bench) {
		ctx, cancel := context.WithCancel(context.WithValue(context.Background(), callerKey{}, "uid 1000"))
		cancel() // and the record is made all the same
		b.svc.set(func() { b.svc.delay = 20 * time.Millisecond })
		shared := b.class
		shared.Name, shared.Shared = "general", true
		for i := range 30 {
			c := b.class
			if i%3 == 0 {
				c = shared
			}
			h, k, err := b.m.Create(ctx, c, keywrap.PurposeData, fixed(envelope.ID{}), envelope.DefaultHeader)
			if err != nil {
				t.Fatal(err)
			}
			k.Wipe()
			if i%5 == 0 {
				b.m.Forget(h)
				b.m.Ahead(c, h)
			}
			if i%7 == 0 {
				if _, _, err := b.m.Rewrap(context.Background(), h, c, envelope.Recipients{From: keyA, To: keyA}); err != nil {
					t.Fatal(err)
				}
			}
		}
		time.Sleep(time.Second)
		synctest.Wait()
		told, inBackground, ids := map[string]int{}, 0, map[string]bool{}
		for i, c := range d.calls {
			for _, a := range c.Attempts {
				told[a.Op+" "+a.Key]++
				ids[a.RequestID] = true
			}
			if c.Background {
				inBackground++
			} else if d.callCtx[i] != "uid 1000" {
				t.Errorf("call %+v: got caller %v, want uid 1000", c, d.callCtx[i])
			}
			if c.ID.IsZero() || c.Class == "" || c.Err != nil || len(c.Attempts) == 0 {
				t.Errorf("got record %+v", c)
			}
		}
		for what, n := range b.svc.calls {
			if told[what] != n {
				t.Errorf("%s: got %d records, want %d", what, told[what], n)
			}
		}
		if got := int(b.m.Stats().Calls); got != len(d.calls) {
			t.Errorf("got %d calls counted and %d told", got, len(d.calls))
		}
		if inBackground == 0 || inBackground != background {
			t.Errorf("got %d background records, %d marked, want the same, not 0", inBackground, background)
		}
		for _, u := range d.uses {
			if len(u.Requests) == 0 {
				t.Errorf("use %+v joins with no call", u)
			}
			for _, id := range u.Requests {
				if !ids[id] {
					t.Errorf("use %+v: request %s is in no record", u, id)
				}
			}
		}
	})
}

func TestUnrecordedCallGivesNoKey(t *testing.T) {
	d := &diary{}
	bubble(t, d.options(envelope.Options{}), func(t *testing.T, b *bench) {
		h := b.create()
		live := keymem.Live()
		for _, op := range []string{keywrap.OpGenerate, keywrap.OpEncrypt, keywrap.OpDecrypt, keywrap.OpReEncrypt} {
			d.set(func() { d.refuseCall = func(c envelope.CallRecord) bool { return c.Op == op } })
			switch op {
			case keywrap.OpDecrypt:
				wantErr(t, op, b.open(h), errAudit)
				wantCalls(t, "second recipient", b.svc.count("Decrypt", keyB), 0)
			case keywrap.OpReEncrypt:
				_, _, err := b.m.Rewrap(context.Background(), h, b.class, envelope.Recipients{From: keyA, To: keyA})
				wantErr(t, op, err, errAudit)
			default:
				shared := b.class
				shared.Shared = true
				for _, c := range []envelope.Class{b.class, shared} {
					for _, id := range []envelope.ID{{}, envelope.NewID()} {
						_, k, err := b.m.Create(context.Background(), c, keywrap.PurposeData, fixed(id), envelope.DefaultHeader)
						wantErr(t, op, err, errAudit)
						if k != nil {
							t.Errorf("%s: got a key beside the refusal", op)
						}
					}
				}
			}
			if got := keymem.Live(); got != live {
				t.Errorf("%s: got %d live keys, want %d", op, got, live)
			}
		}
	})
}
