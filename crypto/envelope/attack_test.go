package envelope_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// What someone who can write the store tries; see the threat model.

// F-13
func TestEveryBitOfTheFixedPartIsAuthenticated(t *testing.T) {
	b := newBench(t, envelope.Options{})
	h := b.create()
	k, err := b.m.Open(context.Background(), b.class, keywrap.PurposeData, h)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Wipe()
	block, err := h.Encode(envelope.DefaultHeader)
	if err != nil {
		t.Fatal(err)
	}
	const fixedPart = 84 // with the count and length of the recipients
	for bit := range fixedPart * 8 {
		block[bit/8] ^= 1 << (bit % 8)
		got, err := envelope.Parse(block)
		if err == nil {
			if err = k.Check(got); err != nil {
				wantErr(t, "Check", err, envelope.ErrCommitment)
				if openErr := b.open(got); got.ChunkSize == 0 { // a name key's header, for all that Parse can tell
					wantErr(t, "Open without contents", openErr, envelope.ErrFormat)
				} else {
					wantKind(t, "Open", openErr, fault.Integrity)
				}
			}
		}
		if kind := fault.Of(err); kind != fault.Integrity && kind != fault.BadFormat {
			t.Errorf("bit %d of byte %d flipped: got error %v, want integrity or bad-format", bit%8, bit/8, err)
		}
		block[bit/8] ^= 1 << (bit % 8)
	}
	if again, err := envelope.Parse(block); err != nil || k.Check(again) != nil {
		t.Errorf("untouched header: Parse %v", err)
	}
}

// F-14
func TestForeignKeyIsRejectedWithoutACall(t *testing.T) {
	b := newBench(t, envelope.Options{})
	file := envelope.NewID()
	evilClass := envelope.Class{Name: "phi", Keys: []string{keyEvil}, Allowed: []string{keyEvil}}
	// A perfect header, in every respect but the key.
	evil, k, err := b.m.Create(context.Background(), evilClass, keywrap.PurposeData, fixed(file), envelope.DefaultHeader)
	if err != nil {
		t.Fatal(err)
	}
	k.Wipe()
	before := b.svc.total()
	err = b.open(reparse(t, evil))
	wantErr(t, "foreign key", err, envelope.ErrNotAllowed)
	wantKind(t, "foreign key", err, fault.KeyRejected)
	wantCalls(t, "foreign key", b.svc.total()-before, 0)

	// Nor is it called when it stands before or after an honest recipient.
	h := b.create()
	b.svc.set(func() { b.svc.fail[keyA] = keywrap.ErrDenied })
	mixed := clone(h)
	mixed.Recipients = append([]envelope.Recipient{evil.Recipients[0]}, mixed.Recipients[:1]...)
	mixed.Recipients = append(mixed.Recipients, evil.Recipients[0])
	wantErr(t, "foreign key beside an honest one", b.open(reparse(t, mixed)), keywrap.ErrDenied)
	wantCalls(t, "foreign key beside an honest one", b.svc.count("Decrypt", keyEvil), 0)

	// A class without allowed keys opens nothing.
	b.class.Allowed = nil
	wantErr(t, "no allowed keys", b.open(h), envelope.ErrNotAllowed)
}

func TestRecipientMovedFromElsewhereDoesNotOpen(t *testing.T) {
	for _, careless := range []bool{false, true} {
		b := newBench(t, envelope.Options{})
		b.svc.careless = careless // true: only the commitment stands between
		victim, other := b.create(), b.create()
		b.mustOpen(other) // and the cache holds the other file's key

		moved := clone(victim)
		moved.Recipients = other.Recipients
		wantKind(t, "recipient of another file", b.open(reparse(t, moved)), fault.Integrity)

		moved = clone(victim)
		moved.File = other.File
		wantKind(t, "header under another file's id", b.open(reparse(t, moved)), fault.Integrity)

		foreign := envelope.NewManager(b.svc, envelope.NewID(), envelope.Options{})
		h2, k, err := foreign.Create(context.Background(), b.class, keywrap.PurposeData, fixed(victim.File), envelope.DefaultHeader)
		foreign.Close()
		if err != nil {
			t.Fatal(err)
		}
		k.Wipe()
		before := b.svc.total()
		wantErr(t, "header of another store", b.open(reparse(t, h2)), envelope.ErrForeignStore)
		wantCalls(t, "header of another store", b.svc.total()-before, 0)
		moved = clone(victim)
		moved.Recipients = h2.Recipients
		wantKind(t, "recipient of another store", b.open(reparse(t, moved)), fault.Integrity)
	}
}

func TestRecipientOfAnotherClassOrPurposeDoesNotOpen(t *testing.T) {
	b := newBench(t, envelope.Options{})
	general := b.class
	general.Name = "general"
	file := envelope.NewID()
	h, k, err := b.m.Create(context.Background(), general, keywrap.PurposeData, fixed(file), envelope.DefaultHeader)
	if err != nil {
		t.Fatal(err)
	}
	k.Wipe()
	before := b.svc.total()
	err = b.open(reparse(t, h))
	wantErr(t, "recipient of another class", err, envelope.ErrForeignClass)
	wantKind(t, "recipient of another class", err, fault.Integrity)
	wantCalls(t, "recipient of another class", b.svc.total()-before, 0)
	relabelled := clone(h)
	for i := range relabelled.Recipients {
		relabelled.Recipients[i].Class = b.class.Name
	}
	wantErr(t, "recipient relabelled", b.open(reparse(t, relabelled)), keywrap.ErrCiphertext)

	// Names may be open to a caller whom the key policy denies contents.
	h = b.create()
	b.mustOpen(h) // the contents' key is in the cache
	_, err = b.m.Open(context.Background(), b.class, keywrap.PurposeNames, h)
	wantErr(t, "contents opened as names", err, keywrap.ErrCiphertext)
	names := envelope.Fixed{File: envelope.NewID()}
	nh, k, err := b.m.Create(context.Background(), b.class, keywrap.PurposeNames, names, envelope.MinHeader)
	if err != nil {
		t.Fatal(err)
	}
	k.Wipe()
	wantErr(t, "name key's header as a file's", b.open(reparse(t, nh)), envelope.ErrFormat)
	nh.Suite, nh.ChunkSize = 1, 4096
	wantErr(t, "name key's recipient as a file's", b.open(reparse(t, nh)), keywrap.ErrCiphertext)
}

// An AEAD that does not commit lets one blob open under two keys, and someone
// with the right to encrypt can wrap a data key of their own. Either way the
// unwrapped key is not the one that the header commits to.
func TestAnotherDataKeyFailsTheCommitment(t *testing.T) {
	b := newBench(t, envelope.Options{})
	h := b.create()
	evil := keymem.Random(keywrap.DataKeyLen)
	defer evil.Wipe()
	ec := keywrap.Context{Store: h.Store.String(), Class: "phi", Purpose: keywrap.PurposeData, ID: h.File.String()}
	w, err := b.svc.Encrypt(context.Background(), keyA, ec, evil)
	if err != nil {
		t.Fatal(err)
	}
	swapped := clone(h)
	swapped.Recipients = []envelope.Recipient{{Class: "phi", Wrapped: w}}
	for _, when := range []string{"first open", "from the cache"} {
		err := b.open(reparse(t, swapped))
		wantErr(t, when, err, envelope.ErrCommitment)
		wantKind(t, when, err, fault.Integrity)
	}
	if got := b.m.Stats().CacheHits; got != 1 {
		t.Errorf("got %d cache hits, want 1: the second check was not of a cached key", got)
	}

	b.svc.respond = func(keywrap.Wrapped) *keymem.Key { return evil.Clone() }
	wantErr(t, "blob that opens under two keys", b.open(h), envelope.ErrCommitment)
	b.m.Forget(h)
	for _, n := range []int{16, 31, 33, 64} {
		b.svc.respond = func(keywrap.Wrapped) *keymem.Key { return keymem.Random(n) }
		wantErr(t, "data key of wrong length", b.open(h), envelope.ErrDataKey)
		b.m.Forget(h)
	}
	b.svc.respond = func(keywrap.Wrapped) *keymem.Key { return nil }
	wantErr(t, "no data key", b.open(h), envelope.ErrDataKey)
}

func TestCachedKeyStillMeetsTheCommitment(t *testing.T) {
	b := newBench(t, envelope.Options{})
	h := b.create()
	b.mustOpen(h)
	before := b.svc.total()
	for name, edit := range map[string]func(*envelope.Header){
		"suite":      func(h *envelope.Header) { h.Suite = 2 },
		"chunk size": func(h *envelope.Header) { h.ChunkSize = 4096 },
		"sparse":     func(h *envelope.Header) { h.Sparse = true },
		"commitment": func(h *envelope.Header) { h.Commitment[31] ^= 1 },
	} {
		bad := clone(h)
		edit(bad)
		wantErr(t, name, b.open(reparse(t, bad)), envelope.ErrCommitment)
	}
	b.mustOpen(h)
	wantCalls(t, "cached opens", b.svc.total()-before, 0)
}

func TestCacheAnswersOnlyItsOwnCall(t *testing.T) {
	b := newBench(t, envelope.Options{})
	b.svc.careless = true // the service would hand the key out for any context
	h := b.create()
	b.mustOpen(h)
	open := func(what string, c envelope.Class, p keywrap.Purpose, h *envelope.Header) {
		t.Helper()
		hits, before := b.m.Stats().CacheHits, b.svc.total()
		k, _ := b.m.Open(context.Background(), c, p, h)
		k.Wipe()
		if got := b.m.Stats().CacheHits - hits; got != 0 {
			t.Errorf("%s: got %d cache hits, want 0", what, got)
		}
		wantCalls(t, what, b.svc.total()-before, 1)
	}
	one := clone(h)
	one.Recipients = one.Recipients[:1]

	edited := clone(one)
	edited.File = envelope.NewID()
	open("other file id", b.class, keywrap.PurposeData, edited)
	edited = clone(one)
	edited.Recipients[0].Class = "other"
	other := b.class
	other.Name = "other"
	open("other class", other, keywrap.PurposeData, edited)
	open("other purpose", b.class, keywrap.PurposeNames, one)
	edited = clone(one)
	edited.Recipients[0].Wrapped.Key = keyB
	open("other key URI", b.class, keywrap.PurposeData, edited)
	edited = clone(one)
	edited.Recipients[0].Wrapped.Blob[5] ^= 1
	open("other blob", b.class, keywrap.PurposeData, edited)
	// The boundary between blob and the fields after it does not move.
	edited = clone(one)
	edited.Recipients[0].Wrapped.Blob = append(edited.Recipients[0].Wrapped.Blob, 0)
	open("longer blob", b.class, keywrap.PurposeData, edited)

	// The key that filled the entry is no longer allowed.
	hits, before := b.m.Stats().CacheHits, b.svc.total()
	narrowed := b.class
	narrowed.Allowed = []string{keyB}
	_, err := b.m.Open(context.Background(), narrowed, keywrap.PurposeData, one)
	wantErr(t, "cached key no longer allowed", err, envelope.ErrNotAllowed)
	if got := b.m.Stats().CacheHits - hits; got != 0 {
		t.Errorf("cached key no longer allowed: got %d cache hits, want 0", got)
	}
	wantCalls(t, "cached key no longer allowed", b.svc.total()-before, 0)
}

func TestManagersShareNothing(t *testing.T) {
	b := newBench(t, envelope.Options{})
	h := b.create()
	b.mustOpen(h)
	m2 := envelope.NewManager(b.svc, envelope.NewID(), envelope.Options{})
	defer m2.Close()
	before := b.svc.total()
	_, err := m2.Open(context.Background(), b.class, keywrap.PurposeData, h)
	wantErr(t, "another store's manager", err, envelope.ErrForeignStore)
	wantCalls(t, "another store's manager", b.svc.total()-before, 0)
}

func TestIntegrityFailureDoesNotTryTheNextRecipient(t *testing.T) {
	b := newBench(t, envelope.Options{})
	h := clone(b.create())
	h.Recipients[0].Wrapped.Blob[20] ^= 1
	wantErr(t, "damaged first recipient", b.open(reparse(t, h)), keywrap.ErrCiphertext)
	wantCalls(t, "damaged first recipient", b.svc.count("Decrypt", keyB), 0)
}

// F-15
func TestHeaderCausesBoundedCalls(t *testing.T) {
	b := newBench(t, envelope.Options{})
	h := clone(b.create())
	for len(h.Recipients) < envelope.MaxRecipients+1 {
		r := h.Recipients[0]
		r.Wrapped.Blob = []byte{byte(len(h.Recipients))}
		h.Recipients = append(h.Recipients, r)
	}
	before := b.svc.total()
	wantErr(t, "nine recipients", b.open(h), envelope.ErrFormat)
	wantCalls(t, "nine recipients", b.svc.total()-before, 0)
	_, err := h.Encode(envelope.DefaultHeader)
	wantErr(t, "Encode of nine recipients", err, envelope.ErrDoesNotFit)
}

// F-14
func TestReplicaIsCalledByItsAllowedName(t *testing.T) {
	east, west := "arn:aws:kms:us-east-1:1:key/mrk-1", "arn:aws:kms:us-west-2:1:key/mrk-1"
	same := func(a, b string) bool { return (a == east || a == west) && (b == east || b == west) }
	b := newBench(t, envelope.Options{SameKey: same})
	b.class.Keys, b.class.Allowed = []string{east}, []string{east}
	h := b.create()
	b.mustOpen(h)
	b.class.Allowed = []string{keyA, west}
	b.mustOpen(h)
	wantCalls(t, "replica after the original was cached", b.svc.count("Decrypt", west), 1)
	b.mustOpen(h)
	b.m.Forget(h)
	b.mustOpen(h)
	wantCalls(t, "replica after Forget", b.svc.count("Decrypt", west), 2)
	wantCalls(t, "header's own region", b.svc.count("Decrypt", east), 1)
	b.class.Allowed = []string{keyA}
	wantErr(t, "replica not allowed", b.open(h), envelope.ErrNotAllowed)
}

func TestWipedKeyCommitsNothing(t *testing.T) {
	b := newBench(t, envelope.Options{})
	h := b.create()
	k, err := b.m.Open(context.Background(), b.class, keywrap.PurposeData, h)
	if err != nil {
		t.Fatal(err)
	}
	k.Wipe()
	k.Wipe()
	wantErr(t, "Check after Wipe", k.Check(h), envelope.ErrCommitment)
	defer func() {
		if recover() == nil {
			t.Errorf("Commit after Wipe: got a commitment that anybody can make, want a panic")
		}
	}()
	k.Commit(h)
}

func TestShorterCacheTimeAppliesToOldEntries(t *testing.T) {
	now := time.Unix(1e9, 0)
	b := newBench(t, envelope.Options{Now: func() time.Time { return now }})
	h := b.create()
	b.mustOpen(h)
	now = now.Add(20 * time.Second)
	b.mustOpen(h)
	wantCalls(t, "within a minute", b.svc.count("Decrypt", keyA), 1)
	b.class.Cache = 10 * time.Second
	b.mustOpen(h)
	wantCalls(t, "after the class's time was cut", b.svc.count("Decrypt", keyA), 2)
	b.class.Cache = 0
	b.mustOpen(h)
	wantCalls(t, "after caching was forbidden", b.svc.count("Decrypt", keyA), 3)
	if got := b.m.Stats().Entries; got != 0 {
		t.Errorf("after caching was forbidden: got %d entries, want 0", got)
	}
}

// F-66, F-67
func TestBirthIsAuthenticated(t *testing.T) {
	b := newBench(t, envelope.Options{})
	h := b.create()
	k, err := b.m.Open(context.Background(), b.class, keywrap.PurposeData, h)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Wipe()
	h.Birth = 7<<32 | 9
	k.Commit(h)
	block, err := h.Encode(envelope.DefaultHeader)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := envelope.Parse(block); err != nil || got.Birth != h.Birth || k.Check(got) != nil {
		t.Fatalf("untouched: %v", err)
	}
	for bit := range 92 * 8 { // with the count and length of the recipients
		block[bit/8] ^= 1 << (bit % 8)
		got, err := envelope.Parse(block)
		if err == nil {
			err = k.Check(got)
		}
		if kind := fault.Of(err); kind != fault.Integrity && kind != fault.BadFormat {
			t.Errorf("bit %d of byte %d flipped: %v", bit%8, bit/8, err)
		}
		block[bit/8] ^= 1 << (bit % 8)
	}
	for what, change := range map[string]func(b []byte) []byte{
		"no birth":          func(b []byte) []byte { clear(b[48:56]); return b },
		"version 1":         func(b []byte) []byte { b[7] = 1; return b },
		"version 1, moved":  func(b []byte) []byte { b[7] = 1; return append(append(b[:48:48], b[56:]...), make([]byte, 8)...) },
		"another's birth":   func(b []byte) []byte { b[55]++; return b },
		"version 2, shared": func(b []byte) []byte { b[7], b[11] = 2, b[11]|2; return b },
	} {
		got, err := envelope.Parse(change(bytes.Clone(block)))
		if err == nil {
			err = k.Check(got)
		}
		if kind := fault.Of(err); kind != fault.Integrity && kind != fault.BadFormat {
			t.Errorf("%s: %v", what, err)
		}
	}
}
