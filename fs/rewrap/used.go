package rewrap

import (
	"encoding/json"
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/record"
)

const (
	// usedEvery is how often keys-used is written at most.
	usedEvery = time.Minute
	maxUsed   = 1 << 20 // bytes
	maxUsedBy = 4096    // keys
)

// Usage remembers when each key was last used, in the store's keys-used file
// (docs/format.md, F-56). It is information for people: nobody authenticates it,
// and nothing depends on it. Its methods are safe for concurrent use.
type Usage struct {
	meta *backing.Dir
	now  func() time.Time

	mu      sync.Mutex
	keys    map[string]time.Time
	dirty   bool
	written time.Time
}

// NewUsage returns the usage of the store whose .kmsfs meta is; it stays the
// caller's. now is time.Now if nil.
func NewUsage(meta *backing.Dir, now func() time.Time) *Usage {
	if now == nil {
		now = time.Now
	}
	u := &Usage{meta: meta, now: now, keys: map[string]time.Time{}, written: now()}
	if old, err := readUsed(meta); err == nil {
		u.keys = old
	}
	return u
}

// Note says that a key was used now. It writes at most once a minute; a file
// that cannot be written is no reason not to use a key.
func (u *Usage) Note(key string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := u.now()
	if _, known := u.keys[key]; known || len(u.keys) < maxUsedBy {
		u.keys[key], u.dirty = now.UTC().Truncate(time.Second), true
	}
	if now.Sub(u.written) >= usedEvery {
		_ = u.write()
	}
}

// Flush writes what is not written yet.
func (u *Usage) Flush() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.write()
}

func (u *Usage) write() error {
	if !u.dirty {
		return nil
	}
	u.written = u.now()
	b, err := json.Marshal(u.keys)
	if err != nil {
		return err
	}
	if err := u.meta.Replace(record.KeysUsedFile, append(b, '\n'), 0o600); err != nil {
		return err
	}
	u.dirty = false
	return nil
}

// readUsed reads keys-used; none is empty.
func readUsed(meta *backing.Dir) (map[string]time.Time, error) {
	b, err := meta.ReadFile(record.KeysUsedFile, maxUsed)
	if errors.Is(err, unix.ENOENT) {
		return map[string]time.Time{}, nil
	}
	if err != nil {
		return nil, err
	}
	out := map[string]time.Time{}
	if err := json.Unmarshal(b, &out); err != nil {
		return nil, err
	}
	if out == nil { // the text was "null"
		out = map[string]time.Time{}
	}
	return out, nil
}

// LastUsed returns when this store's mounts last used each key, as far as they
// noted it.
func (s *Store) LastUsed() (map[string]time.Time, error) {
	return readUsed(s.meta)
}
