package keywraptest

import (
	"context"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

func testDisabled(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	dk := generate(t, s.Provider, key, ec)
	s.Disable(t, key)
	wantState(t, s.Provider, key, keywrap.Disabled)
	refusals(t, s, key, dk.Wrapped, fault.KeyMissing)
	s.Enable(t, key)
	wantState(t, s.Provider, key, keywrap.Enabled)
	mustOpen(t, s.Provider, dk.Wrapped, ec, dk.Plain)
	generate(t, s.Provider, key, ec)
}

func testPending(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	dk := generate(t, s.Provider, key, ec)
	s.ScheduleDeletion(t, key)
	if d := wantState(t, s.Provider, key, keywrap.PendingDeletion); d.DeletionAt.IsZero() {
		t.Error("a key pending deletion has no deletion date")
	}
	refusals(t, s, key, dk.Wrapped, fault.KeyRevoked)
}

func testCancelled(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	dk := generate(t, s.Provider, key, ec)
	s.ScheduleDeletion(t, key)
	s.CancelDeletion(t, key)
	if d := wantState(t, s.Provider, key, keywrap.Disabled); !d.DeletionAt.IsZero() {
		t.Errorf("deletion was cancelled, and the date is still %v", d.DeletionAt)
	}
	refusals(t, s, key, dk.Wrapped, fault.KeyMissing)
	s.Enable(t, key)
	mustOpen(t, s.Provider, dk.Wrapped, ec, dk.Plain)
}

func testRotation(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	old := generate(t, s.Provider, key, ec)
	s.Rotate(t, key)
	fresh := generate(t, s.Provider, key, ec)
	checkWrapped(t, fresh.Wrapped, key)
	mustOpen(t, s.Provider, old.Wrapped, ec, old.Plain)
	mustOpen(t, s.Provider, fresh.Wrapped, ec, fresh.Plain)
}

func testMaterial(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	old := generate(t, s.Provider, key, ec)
	if old.Wrapped.Material == "" {
		t.Fatal("the wrapped key has no material id")
	}
	if d := wantState(t, s.Provider, key, keywrap.Enabled); d.Material != old.Wrapped.Material {
		t.Errorf("Describe: material %q, want %q", d.Material, old.Wrapped.Material)
	}
	s.Rotate(t, key)
	fresh := generate(t, s.Provider, key, ec)
	if fresh.Wrapped.Material == "" || fresh.Wrapped.Material == old.Wrapped.Material {
		t.Errorf("material after rotation = %q, before = %q", fresh.Wrapped.Material, old.Wrapped.Material)
	}
	if d := wantState(t, s.Provider, key, keywrap.Enabled); d.Material != fresh.Wrapped.Material {
		t.Errorf("Describe after rotation: material %q, want %q", d.Material, fresh.Wrapped.Material)
	}
	re, err := s.Provider.ReEncrypt(context.Background(), old.Wrapped, ec, key, ec)
	if err != nil {
		t.Fatalf("ReEncrypt: %v", err)
	}
	if re.Material != fresh.Wrapped.Material {
		t.Errorf("ReEncrypt: material %q, want the newest, %q", re.Material, fresh.Wrapped.Material)
	}
	mustOpen(t, s.Provider, old.Wrapped, ec, old.Plain)
	mustOpen(t, s.Provider, fresh.Wrapped, ec, fresh.Plain)
	mustOpen(t, s.Provider, re, ec, old.Plain)
}

func testDescribe(t *testing.T, s Setup) {
	key := s.NewKey(t)
	d := wantState(t, s.Provider, key, keywrap.Enabled)
	if d.Key != key {
		t.Errorf("Describe: key %q, want %q", d.Key, key)
	}
	if d.Created.IsZero() {
		t.Error("Describe: no creation time")
	}
	if !d.DeletionAt.IsZero() {
		t.Errorf("Describe: deletion date %v of an enabled key", d.DeletionAt)
	}
}

func testAlias(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	alias := s.NewAlias(t, key)
	d := wantState(t, s.Provider, alias, keywrap.Enabled)
	if d.Key != key {
		t.Errorf("Describe(%q): key %q, want %q", alias, d.Key, key)
	}
	dk := generate(t, s.Provider, alias, ec)
	checkWrapped(t, dk.Wrapped, key)
	mustOpen(t, s.Provider, dk.Wrapped, ec, dk.Plain)

	w, err := s.Provider.Encrypt(context.Background(), alias, ec, dk.Plain)
	if err != nil {
		t.Fatalf("Encrypt: %v", err)
	}
	checkWrapped(t, w, key)
	re, err := s.Provider.ReEncrypt(context.Background(), w, ec, alias, ec)
	if err != nil {
		t.Fatalf("ReEncrypt: %v", err)
	}
	checkWrapped(t, re, key)
	mustOpen(t, s.Provider, re, ec, dk.Plain)

	w.Key = alias
	wantKind(t, mustRefuse(t, s.Provider, w, ec), fault.Invalid)
}
