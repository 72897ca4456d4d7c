package cryptfs

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/classify"
)

// class is one data classification at work.
type class struct {
	name  string
	geo   dare.Geometry
	plain bool // names are not encrypted

	sample atomic.Pointer[envelope.Header] // a file's, for Health; nil until one was opened or made

	mu      sync.Mutex
	conf    classify.Class
	ec      envelope.Class
	header  *envelope.Header // of the name key
	spare   *envelope.Header // its second copy; header itself or nil if there is none
	cipher  *nameenc.Cipher  // nil until the name key was unwrapped
	failure string           // why it could not be, the last time
}

// newClass returns the class as the policy and the store's keys have it: active
// are those that wrap new data keys, allowed those that may unwrap.
func newClass(name string, conf classify.Class, active, allowed []string, p envelope.Placement, headerSize int) *class {
	return &class{
		name: name, conf: conf, plain: conf.Names == classify.NamesPlain,
		ec:  envelope.Class{Name: name, Keys: active, Allowed: allowed, Cache: conf.Cache, Shared: conf.Shared},
		geo: dare.Geometry{ChunkSize: conf.ChunkSize, Base: dare.CipherOff(p.Base(headerSize))},
	}
}

// names returns the class's name cipher, unwrapping the name key at first. It
// is kept for the volume's life, so that listing needs no key service.
func (v *Volume) names(ctx context.Context, c *class) (*nameenc.Cipher, error) {
	c.mu.Lock()
	cipher, header, spare, ec := c.cipher, c.header, c.spare, c.ec
	c.mu.Unlock()
	if cipher != nil {
		return cipher, nil
	}
	key, err := v.keys.Open(ctx, ec, keywrap.PurposeNames, header)
	if err != nil && spare != nil && spare != header && fault.Of(err) != fault.KeyUnavailable {
		if k, serr := v.keys.Open(ctx, ec, keywrap.PurposeNames, spare); serr == nil {
			v.log.Warn("wrapped name key read from its second copy: run kmsfs fsck --repair", "class", c.name, "error", err)
			key, err = k, nil
		}
	}
	if err != nil {
		c.mu.Lock()
		c.failure = err.Error()
		c.mu.Unlock()
		return nil, v.keyError("name key", c, envelope.ID{}, err)
	}
	defer key.Wipe()
	cipher, err = nameenc.New(key.PRK())
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cipher != nil { // somebody was faster
		cipher.Wipe()
	} else {
		c.cipher, c.failure = cipher, ""
	}
	return c.cipher, nil
}

// keepSample remembers a header whose key was had, for Health, unless there is one.
func (c *class) keepSample(h *envelope.Header) {
	if c.sample.Load() == nil {
		own := *h
		c.sample.Store(&own)
	}
}

// keys returns the keys as the policy has them now.
func (c *class) keys() envelope.Class {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ec
}

func (c *class) wipe() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cipher != nil {
		c.cipher.Wipe()
		c.cipher = nil
	}
}

// sameKeys reports whether two sets of keys by class are equal.
func sameKeys(a, b map[string][]string) bool {
	if len(a) != len(b) {
		return false
	}
	for class, keys := range a {
		if !slices.Equal(slices.Sorted(slices.Values(keys)), slices.Sorted(slices.Values(b[class]))) {
			return false
		}
	}
	return true
}
