package lease

import (
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
)

func FuzzParse(f *testing.F) {
	key := keymem.Copy(make([]byte, 32))
	r := record{interval: time.Second, beat: 7, process: process{1, 2, 3}, begun: 9, host: "host"}
	f.Add(r.encode(key))
	f.Add(r.encode(nil))
	f.Add(r.encode(key)[:100])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, k := range []*keymem.Key{key, nil} {
			got, ok := parse(b, k)
			if !ok || k == nil && got.signed {
				continue
			}
			with := k
			if !got.signed {
				with = nil
			}
			if again, ok := parse(got.encode(with), k); !ok || again != got {
				t.Errorf("got %+v, %v, want %+v", again, ok, got)
			}
		}
	})
}

func TestRecord(t *testing.T) {
	key, other := keymem.Random(32), keymem.Random(32)
	long := "h"
	for len(long) < 100 {
		long += long
	}
	want := record{signed: true, interval: 10 * time.Second, beat: 1 << 40, token: [16]byte{1}, machine: [32]byte{2}, boot: [32]byte{3},
		process: process{4, 5, 6}, begun: 7, host: long}
	b := want.encode(key)
	want.host = long[:maxHost]
	if got, ok := parse(b, key); !ok || got != want {
		t.Errorf("got %+v, %v, want %+v", got, ok, want)
	}
	if _, ok := parse(b, other); ok {
		t.Error("a lease under another key is taken for authentic")
	}
	if got, ok := parse(b, nil); !ok || got != want {
		t.Errorf("without a key: got %+v, %v, want %+v", got, ok, want)
	}
	for i := range b {
		c := append([]byte{}, b...)
		c[i] ^= 0x80
		if _, ok := parse(c, key); ok {
			t.Errorf("byte %d is not authenticated", i)
		}
	}
	want.signed = false
	if got, ok := parse(want.encode(nil), key); !ok || got != want {
		t.Errorf("unsigned: got %+v, %v, want %+v", got, ok, want)
	}
}
