package keyring

import (
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// FuzzParse: no file makes the parser panic, ask for unbounded work, or give
// anything but its own kinds of failure; what it takes, it can write and use.
func FuzzParse(f *testing.F) {
	for _, v := range loadVectors(f) {
		f.Add(v.payload)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var key *keymem.Key
		c, err := parse(append([]byte(nil), data...), func(p *protection) (*keymem.Key, error) {
			if p.Passes > 2 || p.MemoryKiB > 1024 { // within the bounds, but slow
				return nil, ErrNeedPassphrase
			}
			key = p.derive([]byte(vectorPass))
			return key, nil
		})
		defer key.Wipe()
		if err != nil {
			if k := fault.Of(err); k != fault.BadFormat && k != fault.KeyDenied {
				t.Fatalf("kind = %v: %v", k, err)
			}
			return
		}
		out, err := c.encode(key)
		if err != nil {
			t.Fatalf("encode: %v", err)
		}
		again, err := parse(out, func(*protection) (*keymem.Key, error) { return key, nil })
		if err != nil {
			t.Fatalf("parse what encode wrote: %v", err)
		}
		if got, want := summary(again), summary(c); got != want {
			t.Fatalf("keys = %q, want %q", got, want)
		}
		useAll(t, again)
	})
}

func useAll(t *testing.T, c *contents) {
	plain := keymem.Random(keywrap.DataKeyLen)
	defer plain.Wipe()
	for _, e := range c.keys {
		w, err := e.wrap(keywrap.Context{Store: "s", ID: "i"}, plain)
		if err != nil {
			t.Fatalf("wrap: %v", err)
		}
		got, err := e.unwrap(keywrap.Context{Store: "s", ID: "i"}, w.Blob)
		if err != nil || !got.Equal(plain) {
			t.Fatalf("unwrap: %v", err)
		}
		got.Wipe()
	}
}

// FuzzUnwrap: no blob makes a key open to something or panic.
func FuzzUnwrap(f *testing.F) {
	e, err := newEntry("general", fixedEntry(f, "x", keywrap.Enabled, 1).created)
	if err != nil {
		f.Fatal(err)
	}
	plain := keymem.Random(keywrap.DataKeyLen)
	ec := keywrap.Context{Class: "phi"}
	w, err := e.wrap(ec, plain)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(w.Blob)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, blob []byte) {
		got, err := e.unwrap(ec, blob)
		if err != nil {
			if k := fault.Of(err); k != fault.Integrity {
				t.Fatalf("kind = %v: %v", k, err)
			}
			return
		}
		defer got.Wipe()
		if !got.Equal(plain) {
			t.Fatal("a made-up blob opens")
		}
	})
}
