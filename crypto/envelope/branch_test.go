package envelope_test

import (
	"context"
	"errors"
	"fmt"
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

func newShared(t testing.TB, o envelope.Options) *bench {
	b := newBench(t, o)
	b.class.Shared = true
	return b
}

func shared(t *testing.T, o envelope.Options, f func(t *testing.T, b *bench)) {
	t.Helper()
	bubble(t, o, func(t *testing.T, b *bench) {
		b.class.Shared = true
		f(t, b)
	})
}

// F-45
func TestSharedFilesTakeOneCall(t *testing.T) {
	d := &diary{}
	shared(t, d.options(envelope.Options{}), func(t *testing.T, b *bench) {
		b.svc.set(func() { b.svc.delay = 20 * time.Millisecond })
		hs, prks := map[envelope.ID]*envelope.Header{}, map[string]envelope.ID{}
		for range 100 {
			h, k, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(envelope.ID{}), envelope.DefaultHeader)
			if err != nil {
				t.Fatal(err)
			}
			if !h.Shared || len(h.Recipients) != 2 {
				t.Errorf("got header %+v, want a shared key with two recipients", h)
			}
			hs[h.File], prks[string(k.PRK().Bytes())] = reparse(t, h), h.File
			k.Wipe()
		}
		if len(hs) != 100 || len(prks) != 100 {
			t.Errorf("got %d ids and %d keys for 100 files", len(hs), len(prks))
		}
		wantCalls(t, "100 files", b.svc.total(), 2)
		if u := d.last(t); u.Source != envelope.SourceBranch || u.Key != keyA || len(u.Requests) != 2 || u.Branch != hs[u.File].Branch {
			t.Errorf("Create: got use %+v", u)
		}
		m2 := envelope.NewManager(b.svc, b.store, envelope.Options{})
		defer m2.Close()
		c := b.class
		c.Shared = false // opening goes by the header
		for prk, id := range prks {
			k, err := m2.Open(context.Background(), c, keywrap.PurposeData, hs[id])
			if err != nil {
				t.Fatal(err)
			}
			if string(k.PRK().Bytes()) != prk {
				t.Errorf("Open: got another key than Create")
			}
			k.Wipe()
		}
		wantCalls(t, "100 files after a new mount", b.svc.total(), 3)
		for _, h := range hs {
			b.m.Forget(h)
			b.mustOpen(h)
			if u := d.last(t); u.Source != envelope.SourceCall || u.Branch != h.Branch || len(u.Requests) != 1 {
				t.Errorf("Open: got use %+v", u)
			}
			c.Cache = 0
			before := b.svc.total()
			k, err := b.m.Open(context.Background(), c, keywrap.PurposeData, h)
			if err != nil {
				t.Fatal(err)
			}
			k.Wipe()
			wantCalls(t, "a class without cache", b.svc.total()-before, 1)
			break
		}
	})
}

func TestFirstSharedFilesShareTheCall(t *testing.T) {
	shared(t, envelope.Options{}, func(t *testing.T, b *bench) {
		b.svc.set(func() { b.svc.delay = time.Second })
		create := func(want error) {
			var wg sync.WaitGroup
			for range 200 {
				wg.Go(func() {
					_, err := b.anyFile()
					if !errors.Is(err, want) {
						t.Errorf("Create: got error %v, want %v", err, want)
					}
				})
			}
			wg.Wait()
		}
		b.svc.set(func() { b.svc.fail[keyB] = keywrap.ErrDenied })
		create(keywrap.ErrDenied)
		wantCalls(t, "200 files, second recipient denied", b.svc.total(), 2)
		b.svc.set(func() { delete(b.svc.fail, keyB) })
		create(nil)
		wantCalls(t, "200 files", b.svc.total(), 4)
	})
}

// F-45
func TestBranchIsBounded(t *testing.T) {
	shared(t, envelope.Options{}, func(t *testing.T, b *bench) {
		branches := func(n int) map[envelope.ID]int {
			seen := map[envelope.ID]int{}
			for range n {
				seen[b.mustAnyFile().Branch]++
			}
			return seen
		}
		if got := branches(envelope.BranchFiles); len(got) != 1 {
			t.Errorf("%d files: got %d branches, want 1", envelope.BranchFiles, len(got))
		}
		if got := branches(1); len(got) != 1 || b.svc.count("GenerateDataKey", keyA) != 2 {
			t.Errorf("one file more: got %d branches in all, want 2", b.svc.count("GenerateDataKey", keyA))
		}
		time.Sleep(59 * time.Minute)
		branches(1)
		wantCalls(t, "within the hour", b.svc.count("GenerateDataKey", keyA), 2)
		time.Sleep(time.Minute)
		branches(1)
		wantCalls(t, "after an hour", b.svc.count("GenerateDataKey", keyA), 3)

		b.class.Keys = []string{keyB}
		if h := b.mustAnyFile(); len(h.Recipients) != 1 || h.Recipients[0].Wrapped.Key != keyB {
			t.Errorf("other keys: got recipients %+v", h.Recipients)
		}
		b.class.Cache = 0
		if h := b.mustAnyFile(); h.Shared {
			t.Errorf("class without cache: got a shared key, which every open would not call for")
		}
	})
}

func TestBranchKeyIsWiped(t *testing.T) {
	shared(t, envelope.Options{Grace: time.Second}, func(t *testing.T, b *bench) {
		live := keymem.Live()
		want := func(what string, n int) {
			t.Helper()
			synctest.Wait()
			if got := keymem.Live() - live; got != n {
				t.Errorf("%s: got %d live keys, want %d", what, got, n)
			}
		}
		b.mustAnyFile()
		want("after a file", 2) // for new files, and in the cache
		time.Sleep(time.Minute)
		want("after the cache's time", 1)
		time.Sleep(envelope.BranchTime)
		want("after the branch's time", 0)
		b.mustAnyFile()
		b.class.Keys = b.class.Keys[:1]
		b.svc.set(func() { b.svc.delay = 10 * time.Second })
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_, _, err := b.m.Create(ctx, b.class, keywrap.PurposeData, fixed(envelope.ID{}), envelope.DefaultHeader)
		wantErr(t, "interrupted", err, context.Canceled)
		want("while another branch is made", 1)
		b.class.Keys = []string{keyB}
		wait := make(chan error)
		go func() { _, err := b.anyFile(); wait <- err }()
		synctest.Wait()
		if err := <-wait; err != nil {
			t.Errorf("Create: %v", err)
		}
		time.Sleep(2 * time.Minute)
		want("after a branch that nobody took", 1)
		b.class.Shared = false
		b.class.Cache = 0
		b.mustAnyFile()
		want("when the class shares no more", 0)
		b.class.Shared, b.class.Cache = true, time.Minute
		b.mustAnyFile()
		b.m.Close()
		want("after Close", 0)
		_, err = b.anyFile()
		wantErr(t, "Create after Close", err, envelope.ErrClosed)
	})
}

func TestSharedKeyThatDoesNotFit(t *testing.T) {
	shared(t, envelope.Options{}, func(t *testing.T, b *bench) {
		long := "keyring:" + strings.Repeat("k", 512-84-56-6-len("keyring:")-len("phi"))
		b.class.Keys, b.class.Allowed = []string{long}, []string{long}
		_, _, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(envelope.ID{}), 512)
		wantErr(t, "long URI", err, envelope.ErrDoesNotFit)
		wantCalls(t, "long URI", b.svc.total(), 0)
		b.class.Keys, b.class.Allowed = []string{keyA}, []string{keyA}
		b.svc.set(func() { b.svc.blobLen = 250 })
		b.class.Keys, b.class.Allowed = []string{keyA, keyB}, []string{keyA, keyB}
		b.mustAnyFile() // 1,024 bytes
		_, k, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(envelope.ID{}), 512)
		wantErr(t, "branch made for a larger header", err, envelope.ErrDoesNotFit)
		if k != nil {
			t.Errorf("got a key beside the error")
		}
	})
}

func TestSharedUnderManyCreators(t *testing.T) {
	live := keymem.Live()
	b := newShared(t, envelope.Options{})
	b.class.Cache = time.Millisecond
	other := b.class
	other.Keys = other.Keys[:1]
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := range 100 {
				c := b.class
				if g == 0 && i%20 == 0 {
					c = other
				}
				h, k, err := b.m.Create(context.Background(), c, keywrap.PurposeData, fixed(envelope.ID{}), envelope.DefaultHeader)
				if err != nil {
					if !errors.Is(err, envelope.ErrClosed) {
						t.Errorf("Create: %v", err)
					}
					continue
				}
				got, err := b.m.Open(context.Background(), c, keywrap.PurposeData, h)
				if err == nil && !got.PRK().Equal(k.PRK()) || err != nil && !errors.Is(err, envelope.ErrClosed) {
					t.Errorf("Open: another key, or %v", err)
				}
				got.Wipe()
				k.Wipe()
				if g == 1 && i == 90 {
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
}

// The attacks of someone who can write the store, on shared keys. All end in an
// error of kind integrity or bad-format, or in that of the key service.

// F-13, F-47
func TestEveryBitOfASharedHeaderCounts(t *testing.T) {
	for _, careless := range []bool{false, true} {
		b := newShared(t, envelope.Options{})
		b.svc.careless = careless
		h := b.create()
		b.mustOpen(h) // the branch key is in the cache
		block, err := h.Encode(envelope.DefaultHeader)
		if err != nil {
			t.Fatal(err)
		}
		trailer := len(block)
		for block[trailer-1] == 0 {
			trailer--
		}
		trailer -= 56
		live := keymem.Live()
		for bit := range len(block) * 8 {
			at := bit / 8
			if at >= 84 && at < trailer { // recipients: see the attacks below
				continue
			}
			block[at] ^= 1 << (bit % 8)
			got, err := envelope.Parse(block)
			if err == nil {
				if err = b.open(got); got.Branch != h.Branch {
					b.m.Forget(got) // a careless service gave a key for it
				}
			}
			if kind := fault.Of(err); kind != fault.Integrity && kind != fault.BadFormat {
				t.Errorf("bit %d of byte %d flipped: got error %v, want integrity or bad-format", bit%8, at, err)
			}
			block[at] ^= 1 << (bit % 8)
		}
		if got := keymem.Live(); got != live {
			t.Errorf("got %d live keys, want %d", got, live)
		}
		b.mustOpen(h)
	}
}

// attack opens an edited header, with the caches cold and warm.
func (b *bench) attack(what string, warm []*envelope.Header, h *envelope.Header) {
	b.t.Helper()
	for _, hot := range []bool{false, true} {
		for _, w := range append(warm, h) {
			b.m.Forget(w)
		}
		if hot {
			for _, w := range warm {
				b.mustOpen(w)
			}
		}
		live := keymem.Live()
		again := reparse(b.t, h)
		k, err := b.m.Open(context.Background(), b.class, keywrap.PurposeData, again)
		if kind := fault.Of(err); k != nil || kind != fault.Integrity && kind != fault.BadFormat {
			b.t.Errorf("%s, warm %v: got key %v, error %v, want integrity or bad-format", what, hot, k, err)
		}
		b.m.Forget(again)
		if got := keymem.Live(); got > live {
			b.t.Errorf("%s, warm %v: got %d live keys, want at most %d", what, hot, got, live)
		}
	}
}

// F-46, F-47
func TestBranchFromElsewhereDoesNotOpen(t *testing.T) {
	for _, careless := range []bool{false, true} { // true: only our own cryptography stands between
		t.Run(fmt.Sprintf("careless %v", careless), func(t *testing.T) {
			b := newShared(t, envelope.Options{})
			b.svc.careless = careless
			victim, sibling := b.create(), b.create()
			if victim.Branch != sibling.Branch {
				t.Fatal("two branches for two files")
			}
			b.class.Keys, b.class.Allowed = []string{keyB, keyA}, []string{keyB, keyA}
			stranger := b.create() // of another branch of the class
			b.class.Keys, b.class.Allowed = []string{keyA, keyB}, []string{keyA, keyB}
			c := b.class
			b.class.Shared = false
			single := b.create() // not shared
			b.class = c
			warm := []*envelope.Header{victim, sibling, stranger, single}

			edit := func(what string, f func(h *envelope.Header)) {
				t.Helper()
				h := clone(victim)
				f(h)
				b.attack(what, warm, h)
			}
			edit("data key of a file of the same branch", func(h *envelope.Header) { h.Sealed = sibling.Sealed })
			edit("header of another file's id", func(h *envelope.Header) { h.File = sibling.File })
			edit("data key of another branch", func(h *envelope.Header) { h.Sealed = stranger.Sealed })
			edit("recipients of another branch", func(h *envelope.Header) { h.Recipients = stranger.Recipients })
			edit("other branch", func(h *envelope.Header) { h.Recipients, h.Branch = stranger.Recipients, stranger.Branch })
			edit("other branch and its data key", func(h *envelope.Header) {
				h.Recipients, h.Branch, h.Sealed = stranger.Recipients, stranger.Branch, stranger.Sealed
			})
			edit("branch id", func(h *envelope.Header) { h.Branch = envelope.NewID() })
			edit("data key of a file that is not shared as the branch", func(h *envelope.Header) { h.Recipients, h.Branch = single.Recipients, single.File })
			edit("downgrade to version 1", func(h *envelope.Header) {
				h.Shared, h.Branch, h.Sealed = false, envelope.ID{}, [envelope.SealedLen]byte{}
			})
			edit("branch key as the data key of a file of its id", func(h *envelope.Header) {
				h.File = h.Branch
				h.Shared, h.Branch, h.Sealed = false, envelope.ID{}, [envelope.SealedLen]byte{}
			})
			upgraded := clone(single)
			upgraded.Shared, upgraded.Branch, upgraded.Sealed = true, single.File, victim.Sealed
			b.attack("upgrade to version 2", warm, upgraded)
			for _, h := range warm {
				b.mustOpen(h)
			}
		})
	}
}

// F-46
func TestBranchOfAnotherClassOrStoreDoesNotOpen(t *testing.T) {
	for _, careless := range []bool{false, true} {
		b := newShared(t, envelope.Options{})
		b.svc.careless = careless
		victim := b.create()
		phi := b.class
		b.class.Name = "general"
		other := b.create()
		b.class = phi
		err := b.open(other)
		wantErr(t, "header of another class", err, envelope.ErrForeignClass)
		relabelled := clone(other)
		for i := range relabelled.Recipients {
			relabelled.Recipients[i].Class = b.class.Name
		}
		b.attack("relabelled header of another class", []*envelope.Header{victim}, relabelled)
		grafted := clone(victim)
		grafted.Recipients, grafted.Branch, grafted.Sealed = relabelled.Recipients, relabelled.Branch, relabelled.Sealed
		b.attack("branch of another class", []*envelope.Header{victim}, grafted)

		foreign := envelope.NewManager(b.svc, envelope.NewID(), envelope.Options{})
		h2, k, err := foreign.Create(context.Background(), b.class, keywrap.PurposeData, fixed(victim.File), envelope.DefaultHeader)
		foreign.Close()
		if err != nil {
			t.Fatal(err)
		}
		k.Wipe()
		wantErr(t, "header of another store", b.open(reparse(t, h2)), envelope.ErrForeignStore)
		grafted = clone(victim)
		grafted.Recipients, grafted.Branch, grafted.Sealed = h2.Recipients, h2.Branch, h2.Sealed
		b.attack("branch of another store", []*envelope.Header{victim}, grafted)

		// A branch key under a key that the class does not allow.
		evil := clone(victim)
		for i := range evil.Recipients {
			evil.Recipients[i].Wrapped.Key = keyEvil
		}
		before := b.svc.total()
		wantErr(t, "foreign key", b.open(reparse(t, evil)), envelope.ErrNotAllowed)
		wantCalls(t, "foreign key", b.svc.total()-before, 0)
	}
}

func TestExtendOfASharedKey(t *testing.T) {
	shared(t, envelope.Options{}, func(t *testing.T, b *bench) {
		h := b.create()
		before := b.svc.total()
		to := envelope.Class{Name: "general", Keys: []string{keyA}, Allowed: []string{keyA}}
		_, err := b.m.Extend(context.Background(), h, b.class, to, keywrap.PurposeData)
		wantErr(t, "to another class", err, envelope.ErrShared)
		wantKind(t, "to another class", err, fault.Unsupported)
		wantCalls(t, "to another class", b.svc.total()-before, 0)
		to = b.class
		to.Keys, to.Allowed = []string{"keyring:c"}, []string{"keyring:c"}
		ext, err := b.m.Extend(context.Background(), h, b.class, to, keywrap.PurposeData)
		if err != nil {
			t.Fatal(err)
		}
		b.class = to
		b.mustOpen(reparse(t, ext))
	})
}
