package keywraptest

import (
	"bytes"
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

func testRoundTrip(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	for _, purpose := range []keywrap.Purpose{keywrap.PurposeData, keywrap.PurposeNames, keywrap.PurposeStore} {
		ec.Purpose = purpose
		dk := generate(t, s.Provider, key, ec)
		if got := dk.Plain.Len(); got != keywrap.DataKeyLen {
			t.Fatalf("data key of %d bytes, want %d", got, keywrap.DataKeyLen)
		}
		if bytes.Contains(dk.Wrapped.Blob, dk.Plain.Bytes()) {
			t.Fatal("the wrapped key holds the data key in clear")
		}
		checkWrapped(t, dk.Wrapped, key)
		mustOpen(t, s.Provider, dk.Wrapped, ec, dk.Plain)
		mustOpen(t, s.Provider, dk.Wrapped, ec, dk.Plain)
	}
}

func testTwoDiffer(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	a, b := generate(t, s.Provider, key, ec), generate(t, s.Provider, key, ec)
	if a.Plain.Equal(b.Plain) {
		t.Error("two data keys are equal")
	}
	if bytes.Equal(a.Wrapped.Blob, b.Wrapped.Blob) {
		t.Error("two wrapped keys are equal")
	}
}

func testContextBound(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	dk := generate(t, s.Provider, key, ec)
	changed := map[string]func(*keywrap.Context){
		"store":         func(c *keywrap.Context) { c.Store = strings.Repeat("00", 16) },
		"class":         func(c *keywrap.Context) { c.Class = "general" },
		"purpose":       func(c *keywrap.Context) { c.Purpose = keywrap.PurposeNames },
		"id":            func(c *keywrap.Context) { c.ID = strings.Repeat("00", 16) },
		"values moved":  func(c *keywrap.Context) { c.Store, c.ID = c.ID, c.Store },
		"value cut":     func(c *keywrap.Context) { c.ID = c.ID[:len(c.ID)-1] },
		"letter case":   func(c *keywrap.Context) { c.Class = "PHI" },
		"trailing byte": func(c *keywrap.Context) { c.Class += " " },
	}
	for name, change := range changed {
		t.Run(name, func(t *testing.T) {
			other := ec
			change(&other)
			wantKind(t, mustRefuse(t, s.Provider, dk.Wrapped, other), fault.Integrity)
		})
	}
	mustOpen(t, s.Provider, dk.Wrapped, ec, dk.Plain)
}

// damaged gives a range of spoilt forms of blob: one bit of every byte, cuts,
// nothing, additions, and lengths beyond what a service takes.
func damaged(blob []byte) map[string][]byte {
	out := map[string][]byte{
		"nil":        nil,
		"empty":      {},
		"zeros":      make([]byte, len(blob)),
		"one byte":   blob[:1],
		"half":       blob[:len(blob)/2],
		"byte short": blob[:len(blob)-1],
		"byte added": append(bytes.Clone(blob), 0),
		"twice":      append(bytes.Clone(blob), blob...),
		"oversized":  append(bytes.Clone(blob), make([]byte, 8<<10)...),
	}
	for i := range blob {
		b := bytes.Clone(blob)
		b[i] ^= 1 << (i % 8)
		out["bit flipped in byte "+strconv.Itoa(i)] = b
	}
	return out
}

func testDamaged(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	dk := generate(t, s.Provider, key, ec)
	for name, blob := range damaged(dk.Wrapped.Blob) {
		w := dk.Wrapped
		w.Blob = blob
		err := mustRefuse(t, s.Provider, w, ec)
		if fault.Of(err) == fault.KeyUnavailable {
			t.Errorf("%s: looks like an outage: %v", name, err)
		}
	}
	mustOpen(t, s.Provider, dk.Wrapped, ec, dk.Plain)
}

func testDamagedKind(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	dk := generate(t, s.Provider, key, ec)
	for name, blob := range damaged(dk.Wrapped.Blob) {
		w := dk.Wrapped
		w.Blob = blob
		// A blob may say which key it is under; damage there looks like
		// another key's blob.
		k := fault.Of(mustRefuse(t, s.Provider, w, ec))
		if k != fault.Integrity && k != fault.KeyRejected {
			t.Errorf("%s: kind = %v, want %v or %v", name, k, fault.Integrity, fault.KeyRejected)
		}
	}
}

// moved is a data key wrapped under one key, presented as another's.
func moved(t *testing.T, s Setup) (keywrap.Wrapped, keywrap.Context) {
	ec := sampleContext()
	dk := generate(t, s.Provider, s.NewKey(t), ec)
	w := dk.Wrapped
	w.Key = s.NewKey(t)
	return w, ec
}

func testWrongKey(t *testing.T, s Setup) {
	w, ec := moved(t, s)
	mustRefuse(t, s.Provider, w, ec)
	if got, err := s.Provider.ReEncrypt(context.Background(), w, ec, w.Key, ec); err == nil {
		if plain, err := s.Provider.Decrypt(context.Background(), got, ec); err == nil {
			plain.Wipe()
			t.Error("ReEncrypt launders a key wrapped under another key")
		}
	}
}

func testWrongKeyKind(t *testing.T, s Setup) {
	w, ec := moved(t, s)
	wantKind(t, mustRefuse(t, s.Provider, w, ec), fault.Integrity, fault.KeyRejected)
	_, err := s.Provider.ReEncrypt(context.Background(), w, ec, w.Key, ec)
	if err == nil {
		t.Fatal("ReEncrypt takes a key wrapped under another key")
	}
	checkCallError(t, err, "ReEncrypt", w.Key)
	wantKind(t, err, fault.Integrity, fault.KeyRejected)
}

func testEncrypt(t *testing.T, s Setup) {
	a, b, ec := s.NewKey(t), s.NewKey(t), sampleContext()
	dk := generate(t, s.Provider, a, ec)
	w, err := s.Provider.Encrypt(context.Background(), b, ec, dk.Plain)
	if err != nil {
		t.Fatalf("Encrypt: %v", err)
	}
	checkWrapped(t, w, b)
	if got := dk.Plain.Len(); got != keywrap.DataKeyLen {
		t.Fatalf("Encrypt took the caller's key: %d bytes left", got)
	}
	mustOpen(t, s.Provider, w, ec, dk.Plain)
	other := ec
	other.Class = "general"
	wantKind(t, mustRefuse(t, s.Provider, w, other), fault.Integrity)

	for _, n := range []int{16, keywrap.DataKeyLen + 1} {
		short := keymem.Random(n)
		if _, err := s.Provider.Encrypt(context.Background(), b, ec, short); err == nil {
			t.Errorf("Encrypt wraps a key of %d bytes", n)
		} else {
			checkCallError(t, err, "Encrypt", b)
		}
		short.Wipe()
	}
}

func testReEncrypt(t *testing.T, s Setup) {
	ctx, p := context.Background(), s.Provider
	a, b, from := s.NewKey(t), s.NewKey(t), sampleContext()
	to := from
	to.Class, to.ID = "general", strings.Repeat("ab", 16)
	dk := generate(t, p, a, from)

	w, err := p.ReEncrypt(ctx, dk.Wrapped, from, b, to)
	if err != nil {
		t.Fatalf("ReEncrypt: %v", err)
	}
	checkWrapped(t, w, b)
	mustOpen(t, p, w, to, dk.Plain)
	wantKind(t, mustRefuse(t, p, w, from), fault.Integrity)
	mustOpen(t, p, dk.Wrapped, from, dk.Plain)

	same, err := p.ReEncrypt(ctx, dk.Wrapped, from, a, from)
	if err != nil {
		t.Fatalf("ReEncrypt under the same key: %v", err)
	}
	checkWrapped(t, same, a)
	mustOpen(t, p, same, from, dk.Plain)

	_, err = p.ReEncrypt(ctx, dk.Wrapped, to, b, to)
	if err == nil {
		t.Fatal("ReEncrypt takes a wrong source context")
	}
	checkCallError(t, err, "ReEncrypt", a)
	wantKind(t, err, fault.Integrity)

	_, err = p.ReEncrypt(ctx, dk.Wrapped, from, s.Unknown, to)
	if err == nil {
		t.Fatal("ReEncrypt takes an unknown destination")
	}
	wantKind(t, err, fault.KeyMissing)
}

func testUnknown(t *testing.T, s Setup) {
	refusals(t, s, s.Unknown, keywrap.Wrapped{}, fault.KeyMissing)
	ec := sampleContext()
	dk := generate(t, s.Provider, s.NewKey(t), ec)
	w := dk.Wrapped
	w.Key = s.Unknown
	wantKind(t, mustRefuse(t, s.Provider, w, ec), fault.KeyMissing)
	_, err := s.Provider.Describe(context.Background(), s.Unknown)
	if err == nil {
		t.Fatal("Describe knows a key that does not exist")
	}
	checkCallError(t, err, "Describe", s.Unknown)
	wantKind(t, err, fault.KeyMissing)
}

func testBadURI(t *testing.T, s Setup) {
	for _, uri := range []string{"", "keyring:", "keyring:../x", "arn:", "arn:aws:s3:::bucket", "alias/", "https://example.org", strings.Repeat("k", 5000)} {
		w := keywrap.Wrapped{Key: uri, Blob: []byte{1, 2, 3}}
		wantKind(t, mustRefuse(t, s.Provider, w, sampleContext()), fault.Invalid)
		_, err := s.Provider.GenerateDataKey(context.Background(), uri, sampleContext())
		if err == nil {
			t.Fatalf("GenerateDataKey takes %.40q", uri)
		}
		checkCallError(t, err, "GenerateDataKey", uri)
		wantKind(t, err, fault.Invalid)
	}
}

func testCancelledContext(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	dk := generate(t, s.Provider, key, ec)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	calls := map[string]func() error{
		"GenerateDataKey": func() error { _, err := s.Provider.GenerateDataKey(ctx, key, ec); return err },
		"Encrypt":         func() error { _, err := s.Provider.Encrypt(ctx, key, ec, dk.Plain); return err },
		"Decrypt":         func() error { _, err := s.Provider.Decrypt(ctx, dk.Wrapped, ec); return err },
		"ReEncrypt":       func() error { _, err := s.Provider.ReEncrypt(ctx, dk.Wrapped, ec, key, ec); return err },
		"Describe":        func() error { _, err := s.Provider.Describe(ctx, key); return err },
	}
	for op, call := range calls {
		err := call()
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v, want %v", op, err, context.Canceled)
			continue
		}
		checkCallError(t, err, op, key)
		if k := fault.Of(err); k != fault.None {
			t.Errorf("%s: the caller's cancellation has kind %v", op, k)
		}
	}
}

func testOwnership(t *testing.T, s Setup) {
	ctx, key, ec := context.Background(), s.NewKey(t), sampleContext()
	dk := generate(t, s.Provider, key, ec)
	blob := bytes.Clone(dk.Wrapped.Blob)
	a, err := s.Provider.Decrypt(ctx, dk.Wrapped, ec)
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Provider.Decrypt(ctx, dk.Wrapped, ec)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Wipe()
	a.Wipe()
	if !b.Equal(dk.Plain) {
		t.Error("wiping one result changed another")
	}
	if !bytes.Equal(dk.Wrapped.Blob, blob) {
		t.Error("Decrypt changed the caller's wrapped key")
	}
	clear(dk.Wrapped.Blob)
	w := dk.Wrapped
	w.Blob = blob
	mustOpen(t, s.Provider, w, ec, dk.Plain)
}

func testConcurrent(t *testing.T, s Setup) {
	const workers, rounds = 8, 5
	ctx := context.Background()
	keys := []string{s.NewKey(t), s.NewKey(t)}
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() {
			ec := sampleContext()
			ec.ID = strings.Repeat(strconv.Itoa(i)+"f", 16)
			for r := range rounds {
				dk, err := s.Provider.GenerateDataKey(ctx, keys[(i+r)%2], ec)
				if err != nil {
					t.Errorf("GenerateDataKey: %v", err)
					return
				}
				got, err := s.Provider.Decrypt(ctx, dk.Wrapped, ec)
				if err != nil {
					t.Errorf("Decrypt: %v", err)
				} else if !got.Equal(dk.Plain) {
					t.Error("Decrypt gives somebody else's data key")
				}
				got.Wipe()
				dk.Plain.Wipe()
			}
		})
	}
	wg.Wait()
}
