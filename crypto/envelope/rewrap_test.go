package envelope_test

import (
	"context"
	"fmt"
	"slices"
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

const (
	keyC = "keyring:c"
	keyD = "keyring:d"
)

// recipientKeys returns "class/key" of h's recipients, the class left out if it
// is "phi".
func recipientKeys(h *envelope.Header) (out []string) {
	for _, r := range h.Recipients {
		out = append(out, strings.TrimPrefix(r.Class+"/"+strings.TrimPrefix(r.Wrapped.Key, "keyring:"), "phi/"))
	}
	return out
}

func TestRewrapRecipients(t *testing.T) {
	for _, tt := range []struct {
		r       envelope.Recipients
		want    string
		changed bool
		calls   int
	}{
		{envelope.Recipients{Keys: []string{keyA, keyB}}, "a b other/a", false, 0},
		{envelope.Recipients{Keys: []string{keyB, keyA}}, "b a other/a", true, 0},
		{envelope.Recipients{Keys: []string{keyA}}, "a other/a", true, 0},
		{envelope.Recipients{Keys: []string{keyA, keyB, keyC}}, "a b c other/a", true, 1},
		{envelope.Recipients{Keys: []string{keyC, keyD, keyC}}, "c d other/a", true, 2},
		{envelope.Recipients{From: keyA, To: keyC}, "c b other/a", true, 1},
		{envelope.Recipients{From: keyB, To: keyC}, "a c other/a", true, 1},
		{envelope.Recipients{From: keyA, To: keyB}, "b other/a", true, 0},
		{envelope.Recipients{From: keyA, To: keyA}, "a b other/a", true, 1},
		{envelope.Recipients{From: keyA, To: keyC, Keys: []string{keyD}}, "c b other/a", true, 1},
		{envelope.Recipients{From: keyA, Keys: []string{keyC, keyB, keyD}}, "c d b other/a", true, 2},
		{envelope.Recipients{From: keyA}, "b other/a", true, 0},
		{envelope.Recipients{From: keyD, To: keyC}, "a b other/a", false, 0},
		{envelope.Recipients{From: keyEvil, To: keyEvil}, "a b other/a", false, 0},
	} {
		for _, isShared := range []bool{false, true} {
			bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
				what := fmt.Sprintf("%+v, shared %v", tt.r, isShared)
				b.class.Shared = isShared
				h := b.create()
				h.Recipients = append(h.Recipients, recipient("other", keyA, 40, ""))
				h = reparse(t, h)
				orig := clone(h)
				old, err := b.m.Open(context.Background(), b.class, keywrap.PurposeData, h)
				if err != nil {
					t.Fatal(err)
				}
				defer old.Wipe()
				b.class.Keys, b.class.Allowed = []string{keyC}, []string{keyC, keyD, keyA, keyB} // a and b are retired
				before := b.svc.total()
				got, changed, err := b.m.Rewrap(context.Background(), h, b.class, tt.r)
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				if keys := strings.Join(recipientKeys(got), " "); keys != tt.want || changed != tt.changed {
					t.Errorf("%s: got %s, changed %v, want %s, %v", what, keys, changed, tt.want, tt.changed)
				}
				wantCalls(t, what, b.svc.total()-before, tt.calls)
				wantCalls(t, what+": ReEncrypt", b.svc.count("ReEncrypt", keyA)+b.svc.count("ReEncrypt", keyC)+b.svc.count("ReEncrypt", keyD), tt.calls)
				if again := reparse(t, h); !slices.EqualFunc(again.Recipients, orig.Recipients, sameRecipient) {
					t.Errorf("%s: the header given was changed", what)
				}
				got = reparse(t, got)
				if got.Commitment != h.Commitment || got.Fixed != h.Fixed || got.Branch != h.Branch || got.Sealed != h.Sealed {
					t.Errorf("%s: got header %+v, want nothing but other recipients", what, got)
				}
				for i, r := range got.Recipients { // each of them opens
					if r.Class != "phi" {
						continue
					}
					one := clone(got)
					one.Recipients = one.Recipients[i : i+1]
					k, err := b.m.Open(context.Background(), b.class, keywrap.PurposeData, one)
					if err != nil {
						t.Fatalf("%s: Open by %s: %v", what, r.Wrapped.Key, err)
					}
					if !k.PRK().Equal(old.PRK()) {
						t.Errorf("%s: %s gives another key", what, r.Wrapped.Key)
					}
					k.Wipe()
				}
			})
		}
	}
}

func sameRecipient(a, b envelope.Recipient) bool {
	return a.Class == b.Class && a.Wrapped.Key == b.Wrapped.Key && string(a.Wrapped.Blob) == string(b.Wrapped.Blob)
}

func TestRewrapRefuses(t *testing.T) {
	nine := []string{keyA}
	for i := range 8 {
		nine = append(nine, fmt.Sprintf("keyring:n%d", i))
	}
	long := "keyring:" + strings.Repeat("k", 800)
	for _, tt := range []struct {
		name  string
		r     envelope.Recipients
		edit  func(b *bench, h *envelope.Header)
		want  error
		calls int
	}{
		{"nothing left", envelope.Recipients{}, nil, envelope.ErrInvalid, 0},
		{"key not allowed", envelope.Recipients{Keys: []string{keyA, keyEvil}}, nil, envelope.ErrNotAllowed, 0},
		{"To not allowed", envelope.Recipients{From: keyA, To: keyEvil}, nil, envelope.ErrNotAllowed, 0},
		{"nine keys", envelope.Recipients{Keys: nine}, func(b *bench, _ *envelope.Header) { b.class.Allowed = append(b.class.Allowed, nine...) }, envelope.ErrDoesNotFit, 0},
		{"long URI", envelope.Recipients{Keys: []string{keyA, keyB, long}}, func(b *bench, _ *envelope.Header) { b.class.Allowed = append(b.class.Allowed, long) }, envelope.ErrDoesNotFit, 0},
		{"long blob", envelope.Recipients{Keys: []string{keyA, keyC}}, func(b *bench, _ *envelope.Header) { b.svc.blobLen = 900 }, envelope.ErrDoesNotFit, 1},
		{"service names another key", envelope.Recipients{From: keyA, To: keyC}, func(b *bench, _ *envelope.Header) {
			b.svc.resolve = map[string]string{keyC: keyEvil}
		}, envelope.ErrNotAllowed, 1},
		{"other store", envelope.Recipients{From: keyA, To: keyC}, func(_ *bench, h *envelope.Header) { h.Store = envelope.NewID() }, envelope.ErrForeignStore, 0},
		{"other class", envelope.Recipients{Keys: []string{keyC}}, func(b *bench, _ *envelope.Header) { b.class.Name = "pci" }, envelope.ErrForeignClass, 0},
		{"no source allowed", envelope.Recipients{Keys: []string{keyC}}, func(b *bench, _ *envelope.Header) { b.class.Allowed = []string{keyC} }, envelope.ErrNotAllowed, 0},
		{"both sources fail", envelope.Recipients{Keys: []string{keyC}}, func(b *bench, _ *envelope.Header) {
			b.svc.fail[keyA], b.svc.fail[keyB] = keywrap.ErrPending, keywrap.ErrDenied
		}, keywrap.ErrPending, 2},
		{"other purpose", envelope.Recipients{Keys: []string{keyC}, Purpose: keywrap.PurposeNames}, nil, keywrap.ErrCiphertext, 2},
	} {
		for _, isShared := range []bool{false, true} {
			bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
				what := fmt.Sprintf("%s, shared %v", tt.name, isShared)
				b.class.Shared = isShared
				h := b.create()
				b.class.Allowed = []string{keyA, keyB, keyC}
				if tt.edit != nil {
					tt.edit(b, h)
				}
				live, before := keymem.Live(), b.svc.total()
				got, changed, err := b.m.Rewrap(context.Background(), h, b.class, tt.r)
				wantErr(t, what, err, tt.want)
				wantCalls(t, what, b.svc.total()-before, tt.calls)
				if got != nil || changed || keymem.Live() != live {
					t.Errorf("%s: got header %v, changed %v, %d more live keys", what, got, changed, keymem.Live()-live)
				}
			})
		}
	}
}

func TestRewrapLeavesOthersAlone(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		h := b.create()
		b.class.Allowed = []string{keyC}
		got, changed, err := b.m.Rewrap(context.Background(), h, b.class, envelope.Recipients{From: keyD, To: keyC})
		if err != nil || changed || !slices.EqualFunc(got.Recipients, h.Recipients, sameRecipient) {
			t.Errorf("no recipient under From, none usable: got %+v, changed %v, error %v", got, changed, err)
		}
		got.Recipients[0].Class = "gone"
		if h.Recipients[0].Class != "phi" {
			t.Errorf("the unchanged header shares its recipients")
		}
	})
}

func TestRewrapGivesTheNewestMaterial(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		h := b.create()
		b.svc.set(func() { b.svc.material, b.svc.fail[keyB] = "v2", keywrap.ErrUnavailable })
		got, changed, err := b.m.Rewrap(context.Background(), h, b.class, envelope.Recipients{From: keyA, To: keyA})
		if err != nil || !changed || got.Recipients[0].Wrapped.Material != "v2" || got.Recipients[1].Wrapped.Material != "v1" {
			t.Errorf("got header %+v, changed %v, error %v, want the first recipient under v2", got, changed, err)
		}
		// Names keys have headers, too.
		nh, k, err := b.m.Create(context.Background(), envelope.Class{Name: "phi", Keys: []string{keyA}, Allowed: b.class.Allowed},
			keywrap.PurposeNames, envelope.Fixed{File: envelope.NewID()}, 512)
		if err != nil {
			t.Fatal(err)
		}
		k.Wipe()
		b.class.Allowed = append(b.class.Allowed, keyC)
		nh, _, err = b.m.Rewrap(context.Background(), nh, b.class, envelope.Recipients{From: keyA, To: keyC, Purpose: keywrap.PurposeNames})
		if err != nil {
			t.Fatal(err)
		}
		if k, err = b.m.Open(context.Background(), b.class, keywrap.PurposeNames, reparse(t, nh)); err != nil {
			t.Errorf("Open of a rewrapped name key: %v", err)
		}
		k.Wipe()
	})
}

func TestRewrapEndsWithItsCaller(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		h := b.create()
		b.svc.set(func() { b.svc.delay = time.Minute })
		ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
		time.AfterFunc(time.Second, cancel)
		begin := time.Now()
		_, _, err := b.m.Rewrap(ctx, h, b.class, envelope.Recipients{From: keyA, To: keyB, Keys: nil})
		if err != nil { // no call is needed: the recipient is there
			t.Errorf("nothing to call: got error %v", err)
		}
		_, _, err = b.m.Rewrap(ctx, h, b.class, envelope.Recipients{From: keyA, To: keyA})
		wantErr(t, "interrupted", err, context.Canceled)
		if got := time.Since(begin); got != time.Second {
			t.Errorf("interrupted after 1 s: returned after %v", got)
		}
		go func() {
			time.Sleep(time.Second)
			b.m.Close()
		}()
		_, _, err = b.m.Rewrap(context.Background(), h, b.class, envelope.Recipients{From: keyA, To: keyA})
		wantErr(t, "closed", err, envelope.ErrClosed)
	})
}

// F-45
func TestRewrapOfABranchIsOneCall(t *testing.T) {
	shared(t, envelope.Options{}, func(t *testing.T, b *bench) {
		var hs []*envelope.Header
		for range 100 {
			hs = append(hs, b.create())
		}
		b.svc.set(func() { b.svc.delay = time.Second })
		b.class.Allowed = append(b.class.Allowed, keyC)
		r := envelope.Recipients{Keys: []string{keyC}}
		all := func(ctx context.Context, from int, want error) {
			t.Helper()
			var wg sync.WaitGroup
			for _, h := range hs[from:] {
				wg.Go(func() {
					got, changed, err := b.m.Rewrap(ctx, h, b.class, r)
					if want != nil {
						wantErr(t, "Rewrap", err, want)
						return
					}
					if err != nil || !changed {
						t.Errorf("Rewrap: changed %v, error %v", changed, err)
						return
					}
					k, err := b.m.Open(context.Background(), b.class, keywrap.PurposeData, reparse(t, got))
					if err != nil {
						t.Errorf("Open: %v", err)
					}
					k.Wipe()
				})
			}
			wg.Wait()
		}
		b.svc.set(func() { b.svc.fail[keyC] = keywrap.ErrThrottled })
		all(context.Background(), 0, keywrap.ErrThrottled) // one call, and one by the second recipient
		wantCalls(t, "100 files, throttled", b.svc.count("ReEncrypt", keyC), 2)
		b.svc.set(func() { delete(b.svc.fail, keyC) })

		// Who gives up does not take the others along.
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _, err := b.m.Rewrap(ctx, hs[0], b.class, r)
			wantErr(t, "Rewrap given up", err, context.Canceled)
		})
		synctest.Wait()
		time.AfterFunc(time.Second/2, cancel)
		all(context.Background(), 1, nil)
		wg.Wait()
		wantCalls(t, "100 files", b.svc.count("ReEncrypt", keyC), 4)
		all(context.Background(), 0, nil)
		wantCalls(t, "100 files again", b.svc.count("ReEncrypt", keyC), 4)
		wantCalls(t, "opens of the rewrapped branch", b.svc.count("Decrypt", keyC), 1)
		time.Sleep(10 * time.Minute)
		hs = hs[:1]
		all(context.Background(), 0, nil)
		wantCalls(t, "ten minutes later", b.svc.count("ReEncrypt", keyC), 5)
	})
}

// A header that someone has edited does not spoil what the others of its branch
// get.
func TestRewrapOfAForgedBranchStaysThere(t *testing.T) {
	shared(t, envelope.Options{}, func(t *testing.T, b *bench) {
		honest, forged := b.create(), b.create()
		b.class.Allowed = append(b.class.Allowed, keyC)
		ec := keywrap.Context{Store: b.store.String(), Class: "phi", Purpose: keywrap.PurposeData, ID: honest.Branch.String()}
		evil := keymem.Random(keywrap.DataKeyLen)
		defer evil.Wipe()
		forged.Recipients[1].Wrapped = b.svc.wrap(keyB, ec, evil.Bytes()) // by someone who may encrypt
		b.svc.set(func() { b.svc.fail[keyA] = keywrap.ErrDenied })
		for _, h := range []*envelope.Header{forged, honest} {
			got, _, err := b.m.Rewrap(context.Background(), h, b.class, envelope.Recipients{Keys: []string{keyC}})
			if err != nil {
				t.Fatal(err)
			}
			if err := b.open(reparse(t, got)); (err == nil) != (h == honest) || h == forged && fault.Of(err) != fault.Integrity {
				t.Errorf("forged %v: Open: got error %v", h == forged, err)
			}
		}
	})
}
