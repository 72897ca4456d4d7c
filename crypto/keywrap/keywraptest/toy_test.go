package keywraptest

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// toy is a key service of a few lines that keeps the contract, except for the
// one bug it is given: what TestSuiteSeesBugs shows the suite.
type toy struct {
	bug string

	mu      sync.Mutex
	keys    map[string]*toyKey
	aliases map[string]string
	shared  *keymem.Key // bug "shared result"
}

type toyKey struct {
	state    keywrap.State
	deletion time.Time
	versions [][]byte
}

func newToy(bug string) *toy {
	return &toy{bug: bug, keys: map[string]*toyKey{}, aliases: map[string]string{}}
}

func (p *toy) setup() Setup {
	change := func(f func(k *toyKey)) func(testing.TB, string) {
		return func(_ testing.TB, key string) { p.mu.Lock(); defer p.mu.Unlock(); f(p.keys[key]) }
	}
	version := func() []byte { k := keymem.Random(32); defer k.Wipe(); return bytes.Clone(k.Bytes()) }
	return Setup{
		Provider: toyService{p},
		NewKey: func(testing.TB) string {
			p.mu.Lock()
			defer p.mu.Unlock()
			uri := fmt.Sprintf("toy:%d", len(p.keys))
			p.keys[uri] = &toyKey{state: keywrap.Enabled, versions: [][]byte{version()}}
			return uri
		},
		NewAlias: func(_ testing.TB, key string) string {
			p.mu.Lock()
			defer p.mu.Unlock()
			uri := "toy:alias/" + strings.TrimPrefix(key, "toy:")
			p.aliases[uri] = key
			return uri
		},
		Disable: change(func(k *toyKey) { k.state = keywrap.Disabled }),
		Enable:  change(func(k *toyKey) { k.state = keywrap.Enabled }),
		ScheduleDeletion: change(func(k *toyKey) {
			k.state, k.deletion = keywrap.PendingDeletion, time.Now()
		}),
		CancelDeletion: change(func(k *toyKey) {
			k.state, k.deletion = keywrap.Disabled, time.Time{}
			if p.bug == "cancelled deletion enables" {
				k.state = keywrap.Enabled
			}
		}),
		Rotate: change(func(k *toyKey) {
			k.versions = append(k.versions, version())
			if p.bug == "rotation forgets" {
				k.versions[0] = version()
			}
		}),
		Unknown: "toy:none",
	}
}

func (p *toy) fail(op, key string, err error) error {
	switch {
	case err == nil:
		return nil
	case p.bug == "bare errors":
		return err
	}
	return &keywrap.CallError{Op: op, Key: key, Err: err}
}

// find resolves key for use; its second result is the key's own URI.
func (p *toy) find(ctx context.Context, key string, use bool) (*toyKey, string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := ctx.Err(); err != nil && p.bug != "ignores cancellation" {
		return nil, "", err
	}
	if !strings.HasPrefix(key, "toy:") {
		return nil, "", keywrap.ErrBadURI
	}
	if target, ok := p.aliases[key]; ok {
		key = target
	}
	k := p.keys[key]
	switch {
	case k == nil:
		return nil, "", keywrap.ErrNotFound
	case use && k.state == keywrap.Disabled && p.bug != "disabled works":
		return nil, "", keywrap.ErrDisabled
	case use && k.state == keywrap.PendingDeletion && p.bug != "pending works":
		return nil, "", keywrap.ErrPending
	}
	c := *k
	return &c, key, nil
}

func toyAEAD(version []byte) cipher.AEAD {
	block, err := aes.NewCipher(version)
	if err != nil {
		panic(err)
	}
	gcm, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	return gcm
}

func (p *toy) data(key string, ec keywrap.Context) []byte {
	if name, ok := strings.CutPrefix(p.bug, "forgets context "); ok {
		switch name {
		case "store":
			ec.Store = ""
		case "class":
			ec.Class = ""
		case "purpose":
			ec.Purpose = ""
		case "id":
			ec.ID = ""
		case "order":
			s := []string{ec.Store, ec.Class, string(ec.Purpose), ec.ID}
			slices.Sort(s)
			return fmt.Append(nil, key, s)
		}
	}
	return fmt.Appendf(nil, "%q %q", key, ec)
}

func (p *toy) wrap(k *toyKey, key string, ec keywrap.Context, plain *keymem.Key) keywrap.Wrapped {
	n := len(k.versions) - 1
	blob := binary.BigEndian.AppendUint32(nil, uint32(n))
	blob = append(blob, toyAEAD(k.versions[n]).Seal(nil, nil, plain.Bytes(), p.data(key, ec))...)
	w := keywrap.Wrapped{Key: key, Blob: blob, Material: fmt.Sprint(n)}
	if p.bug == "one material id" {
		w.Material = "0"
	}
	return w
}

func (p *toy) GenerateDataKey(ctx context.Context, key string, ec keywrap.Context) (keywrap.DataKey, error) {
	k, own, err := p.find(ctx, key, true)
	if err != nil {
		return keywrap.DataKey{}, p.fail("GenerateDataKey", key, err)
	}
	plain := keymem.Random(keywrap.DataKeyLen)
	if p.bug == "same data key" {
		plain.Wipe()
		plain = keymem.Copy(make([]byte, keywrap.DataKeyLen))
	}
	w := p.wrap(k, own, ec, plain)
	if p.bug == "keeps the alias" {
		w.Key = key
	}
	if p.bug == "leaks" {
		keymem.Random(32)
	}
	return keywrap.DataKey{Plain: plain, Wrapped: w}, nil
}

func (p *toy) Encrypt(ctx context.Context, key string, ec keywrap.Context, plain *keymem.Key) (keywrap.Wrapped, error) {
	k, own, err := p.find(ctx, key, true)
	if err == nil && plain.Len() != keywrap.DataKeyLen && p.bug != "wraps anything" {
		err = keywrap.ErrKeyLength
	}
	if err != nil {
		return keywrap.Wrapped{}, p.fail("Encrypt", key, err)
	}
	w := p.wrap(k, own, ec, plain)
	if p.bug == "takes the key" {
		plain.Wipe()
	}
	return w, nil
}

func (p *toy) open(ctx context.Context, w keywrap.Wrapped, ec keywrap.Context) (*keymem.Key, error) {
	k, own, err := p.find(ctx, w.Key, true)
	if err != nil {
		return nil, err
	}
	if own != w.Key && p.bug != "opens under an alias" {
		return nil, keywrap.ErrBadURI
	}
	if p.bug != "panics on short blobs" && len(w.Blob) < 4 {
		return nil, keywrap.ErrCiphertext
	}
	n := binary.BigEndian.Uint32(w.Blob)
	if n >= uint32(len(k.versions)) {
		return nil, keywrap.ErrCiphertext
	}
	if p.bug == "tries every key" {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, name := range slices.Sorted(maps.Keys(p.keys)) {
			if b, err := toyAEAD(p.keys[name].versions[0]).Open(nil, nil, w.Blob[4:], p.data(name, ec)); err == nil {
				return keymem.Take(b), nil
			}
		}
	}
	b, err := toyAEAD(k.versions[n]).Open(nil, nil, w.Blob[4:], p.data(w.Key, ec))
	if err != nil {
		if p.bug == "damage looks like an outage" {
			return nil, keywrap.ErrUnavailable
		}
		return nil, keywrap.ErrCiphertext
	}
	return keymem.Take(b), nil
}

func (p *toy) Decrypt(ctx context.Context, w keywrap.Wrapped, ec keywrap.Context) (*keymem.Key, error) {
	plain, err := p.open(ctx, w, ec)
	if err == nil && p.bug == "shared result" {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.shared != nil && p.shared.Equal(plain) {
			plain.Wipe()
			return p.shared, nil
		}
		p.shared = plain
	}
	return plain, p.fail("Decrypt", w.Key, err)
}

func (p *toy) ReEncrypt(ctx context.Context, w keywrap.Wrapped, from keywrap.Context, key string, to keywrap.Context) (keywrap.Wrapped, error) {
	plain, err := p.open(ctx, w, from)
	if err != nil {
		return keywrap.Wrapped{}, p.fail("ReEncrypt", w.Key, err)
	}
	defer plain.Wipe()
	k, own, err := p.find(ctx, key, true)
	if err != nil {
		return keywrap.Wrapped{}, p.fail("ReEncrypt", key, err)
	}
	if p.bug == "re-encrypt keeps the context" {
		to = from
	}
	if p.bug == "re-encrypt makes another key" {
		other := keymem.Random(keywrap.DataKeyLen)
		defer other.Wipe()
		plain = other
	}
	return p.wrap(k, own, to, plain), nil
}

func (p *toy) Describe(ctx context.Context, key string) (keywrap.Description, error) {
	k, own, err := p.find(ctx, key, false)
	if err != nil {
		return keywrap.Description{}, p.fail("Describe", key, err)
	}
	d := keywrap.Description{Key: own, State: k.state, Created: time.Unix(1, 0), DeletionAt: k.deletion, Material: fmt.Sprint(len(k.versions) - 1)}
	if p.bug == "describes everything as enabled" {
		d.State = keywrap.Enabled
	}
	return d, nil
}
