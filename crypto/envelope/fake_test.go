package envelope_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

const (
	keyA    = "keyring:a"
	keyB    = "keyring:b"
	keyEvil = "keyring:evil"
)

// fakeService is a key service in memory. Keys exist as soon as they are named.
// URIs that end in the same "mrk-…" are replicas of one key.
type fakeService struct {
	mu       sync.Mutex
	calls    map[string]int   // by "Op key"
	fail     map[string]error // by key URI
	delay    time.Duration    // of every call
	stubborn bool             // ignores its context
	careless bool             // does not authenticate the encryption context
	respond  func(w keywrap.Wrapped) *keymem.Key
	resolve  map[string]string // what wrapping names a key, where not by its own URI
	blobLen  int               // pads blobs to this length
	requests int               // so far
	failNth  int               // every n-th request fails as throttled; 0: none
	material string            // key-material id, default "v1"
	inFlight int
	peak     int // most requests at a time
}

func newFake() *fakeService {
	return &fakeService{calls: map[string]int{}, fail: map[string]error{}}
}

func (f *fakeService) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// total returns the number of calls so far.
func (f *fakeService) total() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, c := range f.calls {
		n += c
	}
	return n
}

func (f *fakeService) count(op, key string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[op+" "+key]
}

func (f *fakeService) enter(ctx context.Context, op, key string) error {
	f.mu.Lock()
	f.calls[op+" "+key]++
	f.requests++
	f.inFlight++
	f.peak = max(f.peak, f.inFlight)
	a := keywrap.Attempt{Op: op, Key: key, RequestID: fmt.Sprintf("req-%d", f.requests)}
	nth := f.failNth > 0 && f.requests%f.failNth == 0
	delay, stubborn := f.delay, f.stubborn
	f.mu.Unlock()
	defer f.set(func() { f.inFlight-- })
	if delay > 0 {
		t := time.NewTimer(delay)
		defer t.Stop()
		done := ctx.Done()
		if stubborn {
			done = nil
		}
		select {
		case <-t.C:
		case <-done:
			a.Code = keywrap.NoAnswer
			keywrap.TraceOf(ctx).Add(a)
			return ctx.Err() // raw: the manager has to cope with a sloppy provider
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.fail[key]
	if err == nil && nth {
		err = keywrap.ErrThrottled
	}
	if err != nil {
		a.Code = "SomeException"
	}
	keywrap.TraceOf(ctx).Add(a)
	if err != nil {
		return &keywrap.CallError{Op: op, Key: key, RequestID: "r-1", Err: err}
	}
	return nil
}

func aead(key string) cipher.AEAD {
	if i := strings.Index(key, "mrk-"); i >= 0 {
		key = key[i:]
	}
	sum := sha256.Sum256([]byte(key))
	block, err := aes.NewCipher(sum[:])
	if err != nil {
		panic(err)
	}
	g, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return g
}

func (f *fakeService) aad(ec keywrap.Context) []byte {
	if f.careless {
		return nil
	}
	return fmt.Appendf(nil, "%q", []string{ec.Store, ec.Class, string(ec.Purpose), ec.ID})
}

func (f *fakeService) wrap(key string, ec keywrap.Context, dek []byte) keywrap.Wrapped {
	if to := f.resolve[key]; to != "" {
		key = to
	}
	nonce := make([]byte, 12)
	_, _ = rand.Read(nonce)
	sealed := aead(key).Seal(nonce, nonce, dek, f.aad(ec))
	blob := append([]byte{byte(len(sealed))}, sealed...)
	if pad := f.blobLen - len(blob); pad > 0 {
		blob = append(blob, make([]byte, pad)...)
	}
	return keywrap.Wrapped{Key: key, Blob: blob, Material: cmp.Or(f.material, "v1")}
}

func (f *fakeService) GenerateDataKey(ctx context.Context, key string, ec keywrap.Context) (keywrap.DataKey, error) {
	if err := f.enter(ctx, "GenerateDataKey", key); err != nil {
		return keywrap.DataKey{}, err
	}
	plain := keymem.Random(keywrap.DataKeyLen)
	return keywrap.DataKey{Plain: plain, Wrapped: f.wrap(key, ec, plain.Bytes())}, nil
}

func (f *fakeService) Encrypt(ctx context.Context, key string, ec keywrap.Context, plain *keymem.Key) (keywrap.Wrapped, error) {
	if err := f.enter(ctx, "Encrypt", key); err != nil {
		return keywrap.Wrapped{}, err
	}
	return f.wrap(key, ec, plain.Bytes()), nil
}

func (f *fakeService) Decrypt(ctx context.Context, w keywrap.Wrapped, ec keywrap.Context) (*keymem.Key, error) {
	if err := f.enter(ctx, "Decrypt", w.Key); err != nil {
		return nil, err
	}
	return f.unwrap("Decrypt", w, ec)
}

func (f *fakeService) unwrap(op string, w keywrap.Wrapped, ec keywrap.Context) (*keymem.Key, error) {
	if f.respond != nil {
		return f.respond(w), nil
	}
	if len(w.Blob) > 0 && len(w.Blob) > int(w.Blob[0]) && w.Blob[0] > 12 {
		sealed := w.Blob[1 : 1+int(w.Blob[0])]
		if dek, err := aead(w.Key).Open(nil, sealed[:12], sealed[12:], f.aad(ec)); err == nil {
			return keymem.Take(dek), nil
		}
	}
	return nil, &keywrap.CallError{Op: op, Key: w.Key, Err: keywrap.ErrCiphertext}
}

func (f *fakeService) ReEncrypt(ctx context.Context, w keywrap.Wrapped, from keywrap.Context, key string, to keywrap.Context) (keywrap.Wrapped, error) {
	if err := f.enter(ctx, "ReEncrypt", key); err != nil {
		return keywrap.Wrapped{}, err
	}
	f.mu.Lock()
	err := f.fail[w.Key]
	f.mu.Unlock()
	if err != nil {
		return keywrap.Wrapped{}, &keywrap.CallError{Op: "ReEncrypt", Key: key, Err: err}
	}
	plain, err := f.unwrap("ReEncrypt", w, from)
	if err != nil {
		return keywrap.Wrapped{}, err
	}
	defer plain.Wipe()
	return f.wrap(key, to, plain.Bytes()), nil
}

func (f *fakeService) Describe(_ context.Context, key string) (keywrap.Description, error) {
	return keywrap.Description{Key: key, State: keywrap.Enabled}, nil
}

var _ keywrap.Provider = (*fakeService)(nil)

// bench holds what most tests start from: a service, a manager, a class.
type bench struct {
	t     testing.TB
	svc   *fakeService
	m     *envelope.Manager
	store envelope.ID
	class envelope.Class
}

func newBench(t testing.TB, o envelope.Options) *bench {
	t.Helper()
	b := &bench{t: t, svc: newFake(), store: envelope.NewID(), class: envelope.Class{
		Name: "phi", Keys: []string{keyA, keyB}, Allowed: []string{keyA, keyB}, Cache: time.Minute}}
	b.m = envelope.NewManager(b.svc, b.store, o)
	t.Cleanup(b.m.Close)
	return b
}

func fixed(file envelope.ID) envelope.Fixed {
	return envelope.Fixed{Suite: 1, ChunkSize: 64 << 10, File: file}
}

// create makes a file of the class and returns its header as it comes back from
// disk, with nothing of it in the cache.
func (b *bench) create() *envelope.Header {
	b.t.Helper()
	h, k, err := b.m.Create(context.Background(), b.class, keywrap.PurposeData, fixed(envelope.NewID()), envelope.DefaultHeader)
	if err != nil {
		b.t.Fatalf("Create: %v", err)
	}
	k.Wipe()
	b.m.Forget(h)
	return reparse(b.t, h)
}

func reparse(t testing.TB, h *envelope.Header) *envelope.Header {
	t.Helper()
	block, err := h.Encode(h.BlockSize)
	if err != nil {
		t.Fatalf("Encode: %v", err)
	}
	again, err := envelope.Parse(block)
	if err != nil {
		t.Fatalf("Parse: %v", err)
	}
	return again
}

func (b *bench) open(h *envelope.Header) error {
	k, err := b.m.Open(context.Background(), b.class, keywrap.PurposeData, h)
	if err == nil && k.PRK().Len() != 32 {
		b.t.Errorf("Open: PRK of %d bytes, want 32", k.PRK().Len())
	}
	if err != nil && k != nil {
		b.t.Errorf("Open: both a key and an error")
	}
	k.Wipe()
	return err
}

func (b *bench) mustOpen(h *envelope.Header) {
	b.t.Helper()
	if err := b.open(h); err != nil {
		b.t.Fatalf("Open: %v", err)
	}
}

func wantErr(t testing.TB, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: got error %v, want %v", what, got, want)
	}
}

func wantKind(t testing.TB, what string, got error, want fault.Kind) {
	t.Helper()
	if fault.Of(got) != want {
		t.Errorf("%s: got error %v of kind %v, want kind %v", what, got, fault.Of(got), want)
	}
}

func wantCalls(t testing.TB, what string, got, want int) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %d calls to the key service, want %d", what, got, want)
	}
}

// clone returns a deep copy of h for an attacker to edit.
func clone(h *envelope.Header) *envelope.Header {
	c := *h
	c.Recipients = nil
	for _, r := range h.Recipients {
		r.Wrapped.Blob = bytes.Clone(r.Wrapped.Blob)
		c.Recipients = append(c.Recipients, r)
	}
	return &c
}
