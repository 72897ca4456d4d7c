package keymem

import (
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"io"
	"log/slog"
	"sync"
)

// MaxLen is the longest key, in bytes.
const MaxLen = 64

const redacted = "[redacted]"

// Key is a secret of 1 to MaxLen bytes. The zero Key and a wiped Key have
// length 0. Methods are safe for concurrent use, except that the slice which
// Bytes returns must not be used after Wipe: whoever owns a Key wipes it, after
// its last user is done.
type Key struct {
	mu   sync.Mutex
	slot []byte
	n    int
}

// Take copies b into locked memory and wipes b. It panics if b is empty or
// longer than MaxLen: key lengths are decided by code, not by input.
func Take(b []byte) *Key {
	k := Copy(b)
	clear(b)
	return k
}

// Copy is Take without wiping b, for callers that do not own it.
func Copy(b []byte) *Key {
	k := alloc(len(b))
	copy(k.slot, b)
	return k
}

// Random returns a fresh key of n bytes from the system's random generator.
func Random(n int) *Key {
	k := alloc(n)
	_, _ = rand.Read(k.slot[:n]) // crypto/rand.Read never fails (Go 1.24)
	return k
}

func alloc(n int) *Key {
	if n < 1 || n > MaxLen {
		panic(fmt.Sprintf("keymem: key of %d bytes", n))
	}
	return &Key{slot: keys.get(), n: n}
}

// Bytes returns the key itself, not a copy; nil after Wipe. The caller must
// neither keep it beyond the Key's life nor write to it.
func (k *Key) Bytes() []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.slot == nil {
		return nil
	}
	return k.slot[:k.n:k.n]
}

// Len returns the key's length in bytes, 0 after Wipe.
func (k *Key) Len() int { return len(k.Bytes()) }

// Clone returns a copy with a life of its own, or an empty Key after Wipe.
func (k *Key) Clone() *Key {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.slot == nil {
		return &Key{}
	}
	return Copy(k.slot[:k.n])
}

// Wipe zeroes the key and gives its memory back. Further calls do nothing.
func (k *Key) Wipe() {
	if k == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.slot != nil {
		keys.put(k.slot)
		k.slot, k.n = nil, 0
	}
}

// Equal compares in constant time (for keys of equal length).
func (k *Key) Equal(o *Key) bool {
	return subtle.ConstantTimeCompare(k.Bytes(), o.Bytes()) == 1
}

// Locked reports whether every key so far lies in locked memory.
func Locked() bool {
	keys.mu.Lock()
	defer keys.mu.Unlock()
	return !keys.unlocked
}

// Live returns the number of keys that exist and were not wiped.
func Live() int {
	keys.mu.Lock()
	defer keys.mu.Unlock()
	return keys.live
}

// String returns "[redacted]".
func (*Key) String() string { return redacted }

// GoString returns "[redacted]", for %#v.
func (*Key) GoString() string { return redacted }

// Format writes "[redacted]" for every verb, so that %x and %d do not print
// the fields.
func (*Key) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, redacted) }

// LogValue returns "[redacted]", for slog.
func (*Key) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON returns the string "[redacted]".
func (*Key) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// MarshalText returns "[redacted]", for encoders other than JSON.
func (*Key) MarshalText() ([]byte, error) { return []byte(redacted), nil }
