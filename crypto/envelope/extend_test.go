package envelope_test

import (
	"context"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

func TestExtend(t *testing.T) {
	bubble(t, envelope.Options{}, func(t *testing.T, b *bench) {
		ctx := context.Background()
		h := b.create()
		old, err := b.m.Open(ctx, b.class, keywrap.PurposeData, h)
		if err != nil {
			t.Fatal(err)
		}
		defer old.Wipe()
		to := envelope.Class{Name: "pci", Keys: []string{"keyring:c"}, Allowed: []string{"keyring:c"}}
		ext, err := b.m.Extend(ctx, h, b.class, to, keywrap.PurposeData)
		if err != nil {
			t.Fatal(err)
		}
		ext = reparse(t, ext)
		k, err := b.m.Open(ctx, to, keywrap.PurposeData, ext)
		if err != nil {
			t.Fatalf("Open as the new class: %v", err)
		}
		defer k.Wipe()
		if !k.PRK().Equal(old.PRK()) {
			t.Errorf("the new recipient holds another key")
		}
		wantErr(t, "Open as the old class", b.open(ext), envelope.ErrForeignClass)
		if len(h.Recipients) != 2 {
			t.Errorf("the old header has %d recipients, want 2", len(h.Recipients))
		}

		before := b.svc.total()
		narrow := b.class
		narrow.Allowed = []string{keyEvil}
		_, err = b.m.Extend(ctx, h, narrow, to, keywrap.PurposeData)
		wantErr(t, "from a key that is not allowed", err, envelope.ErrNotAllowed)
		many := to
		many.Keys = make([]string, envelope.MaxRecipients+1)
		_, err = b.m.Extend(ctx, h, b.class, many, keywrap.PurposeData)
		wantErr(t, "to nine keys", err, envelope.ErrDoesNotFit)
		wantCalls(t, "refused Extends", b.svc.total()-before, 0)
		to.Allowed = []string{keyEvil}
		_, err = b.m.Extend(ctx, h, b.class, to, keywrap.PurposeData)
		wantErr(t, "to a key that is not allowed", err, envelope.ErrNotAllowed)
		live := keymem.Live()
		b.svc.set(func() { b.svc.fail[keyA], b.svc.fail["keyring:c"] = keywrap.ErrDenied, keywrap.ErrDenied })
		_, err = b.m.Extend(ctx, h, b.class, to, keywrap.PurposeData)
		wantErr(t, "denied", err, keywrap.ErrDenied)
		if got := keymem.Live(); got != live {
			t.Errorf("got %d live keys after a denied Extend, want %d", got, live)
		}
		before = b.svc.total()
		b.m.Close()
		_, err = b.m.Extend(ctx, h, b.class, to, keywrap.PurposeData)
		wantErr(t, "after Close", err, envelope.ErrClosed)
		wantCalls(t, "after Close", b.svc.total()-before, 0)
	})
}
