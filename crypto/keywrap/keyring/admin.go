package keyring

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// KeyInfo tells about a key of the keyring.
type KeyInfo struct {
	Name       string        `json:"name"`
	URI        string        `json:"uri"` // "keyring:" and the name
	State      keywrap.State `json:"state"`
	Created    time.Time     `json:"created"`
	Rotated    time.Time     `json:"rotated,omitzero"`     // zero if never
	DeletionAt time.Time     `json:"deletion_at,omitzero"` // zero if not pending
	Material   string        `json:"material"`             // id of the newest version
	Versions   int           `json:"versions"`
}

func (e *entry) info() KeyInfo {
	return KeyInfo{Name: e.name, URI: uriPrefix + e.name, State: e.state, Created: e.created, Rotated: e.rotated,
		DeletionAt: e.deletionAt, Material: materialID(e.primary), Versions: len(e.ids)}
}

// List returns the keys by name, without those whose waiting period is over.
func (k *Keyring) List() ([]KeyInfo, error) {
	c, err := k.read()
	if err != nil {
		return nil, err
	}
	out := make([]KeyInfo, 0, len(c.keys))
	for _, name := range slices.Sorted(maps.Keys(c.keys)) {
		if e := c.keys[name]; !e.gone(k.now()) {
			out = append(out, e.info())
		}
	}
	return out, nil
}

// Info returns one key; keywrap.ErrNotFound if there is none.
func (k *Keyring) Info(name string) (KeyInfo, error) {
	c, err := k.read()
	if err != nil {
		return KeyInfo{}, err
	}
	e, err := c.find(name, k.now())
	if err != nil {
		return KeyInfo{}, err
	}
	return e.info(), nil
}

func (c *contents) find(name string, now time.Time) (*entry, error) {
	if !validName(name) {
		return nil, fmt.Errorf("%.70q: %w", name, ErrName)
	}
	e := c.keys[name]
	if e == nil || e.gone(now) {
		return nil, fmt.Errorf("key %q: %w", name, keywrap.ErrNotFound)
	}
	return e, nil
}

// update runs fn on a copy of the newest contents and writes the result. It
// holds the file lock throughout, so that no other process's change is lost.
// Keys whose waiting period is over go at this moment. fn returns the key for
// the new body, or nil for the present one.
func (k *Keyring) update(fn func(c *contents, now time.Time) (*keymem.Key, error)) error {
	if k.path != "" {
		unlock, err := lockFile(k.path, lockWait)
		if err != nil {
			return err
		}
		defer unlock()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	old, err := k.refresh()
	if err != nil {
		return err
	}
	c, now := old.clone(), k.now().UTC().Truncate(time.Second)
	maps.DeleteFunc(c.keys, func(_ string, e *entry) bool { return e.gone(now) })
	key, err := fn(c, now)
	if err != nil {
		return err
	}
	if k.path == "" {
		k.current = c
		return nil
	}
	if key != nil {
		if err := k.write(c, key); err != nil {
			if key != k.key { // not taken over
				key.Wipe()
			}
			return err
		}
		return nil
	}
	return k.write(c, k.key)
}

// change replaces one key by what fn makes of it.
func (k *Keyring) change(name string, fn func(e entry, now time.Time) (*entry, error)) error {
	return k.update(func(c *contents, now time.Time) (*keymem.Key, error) {
		e, err := c.find(name, now)
		if err != nil {
			return nil, err
		}
		out, err := fn(*e, now)
		if err != nil {
			return nil, fmt.Errorf("key %q: %w", name, err)
		}
		c.keys[name] = out
		return nil, nil
	})
}

// CreateKey makes an enabled key. ErrExists if the name is taken, also by a key
// pending deletion; ErrName if it is no name.
func (k *Keyring) CreateKey(name string) error {
	return k.update(func(c *contents, now time.Time) (*keymem.Key, error) {
		if !validName(name) {
			return nil, fmt.Errorf("%.70q: %w", name, ErrName)
		}
		if c.keys[name] != nil {
			return nil, fmt.Errorf("key %q: %w", name, ErrExists)
		}
		if len(c.keys) >= maxKeys {
			return nil, fmt.Errorf("%d keys: %w", len(c.keys), ErrFull)
		}
		e, err := newEntry(name, now)
		c.keys[name] = e
		return nil, err
	})
}

// Rotate adds a version, which wraps from now on. What older versions wrapped
// still opens. The key must be enabled.
func (k *Keyring) Rotate(name string) error {
	return k.change(name, func(e entry, now time.Time) (*entry, error) {
		if err := e.usable(); err != nil {
			return nil, err
		}
		return e.rotate(now)
	})
}

// Enable makes a disabled key usable. A key pending deletion gives
// keywrap.ErrPending: cancel the deletion first.
func (k *Keyring) Enable(name string) error { return k.setState(name, keywrap.Enabled) }

// Disable makes a key unusable until Enable. A key pending deletion gives
// keywrap.ErrPending.
func (k *Keyring) Disable(name string) error { return k.setState(name, keywrap.Disabled) }

func (k *Keyring) setState(name string, s keywrap.State) error {
	return k.change(name, func(e entry, _ time.Time) (*entry, error) {
		if e.state == keywrap.PendingDeletion {
			return nil, keywrap.ErrPending
		}
		e.state = s
		return &e, nil
	})
}

// ScheduleDeletion makes a key unusable at once and lets it go after days (7 to
// 30, as in AWS KMS): it then counts as not found, and its material leaves the
// file with the next change. Everything wrapped only by it is then lost.
func (k *Keyring) ScheduleDeletion(name string, days int) error {
	if days < 7 || days > 30 {
		return fmt.Errorf("%d days: %w", days, ErrWindow)
	}
	return k.change(name, func(e entry, now time.Time) (*entry, error) {
		if e.state == keywrap.PendingDeletion {
			return nil, keywrap.ErrPending
		}
		e.state, e.deletionAt = keywrap.PendingDeletion, now.AddDate(0, 0, days)
		return &e, nil
	})
}

// CancelDeletion takes ScheduleDeletion back. As in AWS KMS the key is disabled
// afterwards, whatever it was before: Enable makes it usable.
func (k *Keyring) CancelDeletion(name string) error {
	return k.change(name, func(e entry, _ time.Time) (*entry, error) {
		if e.state != keywrap.PendingDeletion {
			return nil, ErrNotPending
		}
		e.state, e.deletionAt = keywrap.Disabled, time.Time{}
		return &e, nil
	})
}

// ChangePassphrase seals the file under another passphrase, with fresh salt and
// today's work factors; nil takes the protection away. pass stays the caller's.
// Older copies of the file still open with the older passphrase.
func (k *Keyring) ChangePassphrase(pass []byte) error {
	if pass != nil && len(pass) == 0 {
		return ErrEmptyPassphrase
	}
	return k.update(func(c *contents, _ time.Time) (*keymem.Key, error) {
		if pass == nil {
			c.protection = nil
			return nil, nil
		}
		c.protection = newProtection()
		return c.protection.derive(pass), nil
	})
}
