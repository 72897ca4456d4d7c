package keymem

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

// secret is printable, so that any leak is easy to search for.
const secret = "TOPSECRETTOPSECRETTOPSECRETTOPSE"

func TestKeyDoesNotPrint(t *testing.T) {
	k := Copy([]byte(secret))
	defer k.Wipe()
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "key", k)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "key", k)
	j, err := json.Marshal(struct{ K *Key }{k})
	if err != nil {
		t.Fatal(err)
	}
	outs := []string{
		log.String(), string(j),
		fmt.Sprint(k), fmt.Sprintf("%v %+v %#v %s %q %x %X %d", k, k, k, k, k, k, k, k),
		fmt.Sprintf("%+v", struct{ K *Key }{k}),
	}
	for _, out := range outs {
		for _, bad := range []string{secret, fmt.Sprintf("%x", secret), fmt.Sprintf("%X", secret), "84 79 80"} {
			if strings.Contains(out, bad) {
				t.Errorf("key shows in %q", out)
			}
		}
	}
}

func TestTakeWipesSourceAndWipeZeroes(t *testing.T) {
	src := []byte(secret)
	k := Take(src)
	if !bytes.Equal(src, make([]byte, len(src))) {
		t.Error("Take left the source")
	}
	alias := k.Bytes()
	if string(alias) != secret {
		t.Fatalf("Bytes = %q", alias)
	}
	before := Live()
	k.Wipe()
	k.Wipe()
	if got := Live(); got != before-1 {
		t.Errorf("Live = %d, want %d", got, before-1)
	}
	if !bytes.Equal(alias, make([]byte, len(alias))) {
		t.Error("Wipe left the bytes")
	}
	if k.Len() != 0 || k.Bytes() != nil {
		t.Error("a wiped key still has bytes")
	}
}

func TestEqualAndClone(t *testing.T) {
	a := Random(32)
	b := a.Clone()
	c := Random(32)
	if !a.Equal(b) || a.Equal(c) || a.Equal(&Key{}) {
		t.Error("Equal is wrong")
	}
	a.Wipe()
	if b.Len() != 32 {
		t.Error("wiping a key wiped its clone")
	}
	b.Wipe()
	c.Wipe()
}

func TestManyKeysKeepApart(t *testing.T) {
	const n = 3000
	var ks []*Key
	for i := range n {
		ks = append(ks, Copy(fmt.Appendf(nil, "%032d", i)))
	}
	for i, k := range ks {
		if got, want := string(k.Bytes()), fmt.Sprintf("%032d", i); got != want {
			t.Fatalf("key %d = %q, want %q", i, got, want)
		}
		k.Wipe()
	}
}

func TestLengthIsChecked(t *testing.T) {
	for _, n := range []int{0, MaxLen + 1} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("a key of %d bytes was accepted", n)
				}
			}()
			Copy(make([]byte, n))
		}()
	}
}
