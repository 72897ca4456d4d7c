package keywraptest

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

func sampleContext() keywrap.Context {
	return keywrap.Context{
		Store:   "000102030405060708090a0b0c0d0e0f",
		Class:   "phi",
		Purpose: keywrap.PurposeData,
		ID:      "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff",
	}
}

func generate(t testing.TB, p keywrap.Provider, key string, ec keywrap.Context) keywrap.DataKey {
	t.Helper()
	dk, err := p.GenerateDataKey(context.Background(), key, ec)
	if err != nil {
		t.Fatalf("GenerateDataKey: %v", err)
	}
	t.Cleanup(dk.Plain.Wipe)
	return dk
}

// mustOpen fails t unless w opens under ec to want.
func mustOpen(t testing.TB, p keywrap.Provider, w keywrap.Wrapped, ec keywrap.Context, want *keymem.Key) {
	t.Helper()
	got, err := p.Decrypt(context.Background(), w, ec)
	if err != nil {
		t.Fatalf("Decrypt: %v", err)
	}
	defer got.Wipe()
	if !got.Equal(want) {
		t.Fatal("Decrypt gives another data key")
	}
}

// mustRefuse fails t unless w is refused under ec, and returns the error.
func mustRefuse(t testing.TB, p keywrap.Provider, w keywrap.Wrapped, ec keywrap.Context) error {
	t.Helper()
	got, err := p.Decrypt(context.Background(), w, ec)
	if err == nil {
		got.Wipe()
		t.Fatal("Decrypt gives a key, want an error")
	}
	checkCallError(t, err, "Decrypt", w.Key)
	return err
}

// checkCallError wants what a log line needs: operation, key, and a kind, so
// that the mount need not answer an unexplained EIO.
func checkCallError(t testing.TB, err error, op, key string) {
	t.Helper()
	var ce *keywrap.CallError
	if !errors.As(err, &ce) {
		t.Fatalf("error is %T, want *keywrap.CallError: %v", err, err)
	}
	if ce.Op != op || ce.Key != key {
		t.Errorf("CallError is about %q %q, want %q %q", ce.Op, ce.Key, op, key)
	}
	if fault.Of(err) == fault.None && !errors.Is(err, context.Canceled) {
		t.Errorf("error has no kind: %v", err)
	}
}

func wantKind(t testing.TB, err error, kinds ...fault.Kind) {
	t.Helper()
	for _, k := range kinds {
		if fault.Of(err) == k {
			return
		}
	}
	t.Errorf("kind = %v, want %v: %v", fault.Of(err), kinds, err)
}

// checkWrapped wants a wrapped key as it may go into a file header.
func checkWrapped(t testing.TB, w keywrap.Wrapped, key string) {
	t.Helper()
	if w.Key != key {
		t.Errorf("Wrapped.Key = %q, want %q", w.Key, key)
	}
	if strings.Contains(w.Key, "alias/") {
		t.Errorf("Wrapped.Key is an alias: %q", w.Key)
	}
	if len(w.Blob) == 0 {
		t.Error("Wrapped.Blob is empty")
	}
}

// refusals calls every operation that uses key and wants each to fail with one
// of kinds. w is under key.
func refusals(t testing.TB, s Setup, key string, w keywrap.Wrapped, kinds ...fault.Kind) {
	t.Helper()
	ctx, ec, p := context.Background(), sampleContext(), s.Provider
	plain := keymem.Random(keywrap.DataKeyLen)
	defer plain.Wipe()

	dk, err := p.GenerateDataKey(ctx, key, ec)
	if err == nil {
		dk.Plain.Wipe()
		t.Fatal("GenerateDataKey works, want an error")
	}
	checkCallError(t, err, "GenerateDataKey", key)
	wantKind(t, err, kinds...)

	if _, err = p.Encrypt(ctx, key, ec, plain); err == nil {
		t.Fatal("Encrypt works, want an error")
	}
	checkCallError(t, err, "Encrypt", key)
	wantKind(t, err, kinds...)

	if len(w.Blob) != 0 {
		wantKind(t, mustRefuse(t, p, w, ec), kinds...)
		if _, err = p.ReEncrypt(ctx, w, ec, s.NewKey(t), ec); err == nil {
			t.Fatal("ReEncrypt works, want an error")
		}
		checkCallError(t, err, "ReEncrypt", w.Key)
		wantKind(t, err, kinds...)
	}
}

func wantState(t testing.TB, p keywrap.Provider, key string, want keywrap.State) keywrap.Description {
	t.Helper()
	d, err := p.Describe(context.Background(), key)
	if err != nil {
		t.Fatalf("Describe: %v", err)
	}
	if d.State != want {
		t.Errorf("state = %q, want %q", d.State, want)
	}
	return d
}
