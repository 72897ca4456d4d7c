package envelope

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/tink-crypto/tink-go/v2/kwp/subtle"
)

const (
	// BranchFiles and BranchTime bound how much depends on one branch key: the
	// files created under it, and the time during which they are.
	BranchFiles = 4096
	BranchTime  = time.Hour

	branchInfo = "kmsfs v2 branch"
)

// sealer returns the key wrap (RFC 5649) for the data key of h's file, under a
// key that the branch's PRK derives for this store, file and class alone.
func sealer(prk *keymem.Key, class string, h *Header) (*subtle.KWP, error) {
	secret := prk.Bytes()
	if len(secret) == 0 {
		return nil, fmt.Errorf("file %v, branch %v: no branch key: %w", h.File, h.Branch, ErrSealed)
	}
	info := append([]byte(branchInfo), h.Store[:]...)
	info = append(append(info, h.File[:]...), class...) // only the last has no fixed length
	var kek [sha256.Size]byte
	defer clear(kek[:])
	hmacSHA256(&kek, secret, append(info, 1)) // HKDF-Expand of one block (RFC 5869, section 2.3)
	return subtle.NewKWP(kek[:])
}

// seal sets h.Sealed for a data key and returns the file's key. prk is the
// branch's and stays the caller's; dek is wiped.
func seal(prk *keymem.Key, class string, h *Header, dek *keymem.Key) (*FileKey, error) {
	defer dek.Wipe()
	kw, err := sealer(prk, class, h)
	if err != nil {
		return nil, err
	}
	sealed, err := kw.Wrap(dek.Bytes())
	if err != nil || len(sealed) != SealedLen {
		return nil, fmt.Errorf("wrapping a data key in %d bytes: %w", len(sealed), ErrDataKey)
	}
	copy(h.Sealed[:], sealed)
	return newFileKey(dek, h.Store, h.File)
}

// unseal is the inverse of seal. It wipes prk.
func unseal(prk *keymem.Key, class string, h *Header) (*FileKey, error) {
	defer prk.Wipe()
	kw, err := sealer(prk, class, h)
	if err != nil {
		return nil, err
	}
	plain, err := kw.Unwrap(h.Sealed[:])
	if err != nil || len(plain) != keywrap.DataKeyLen {
		clear(plain)
		return nil, fmt.Errorf("file %v, branch %v: %w", h.File, h.Branch, ErrSealed)
	}
	return newFileKey(keymem.Take(plain), h.Store, h.File)
}

// branch is the branch key under which a class's new files are made, or the
// calls that bring it. Manager.mu guards it.
type branch struct {
	making
	done chan struct{} // closed when the calls have returned; prk and err are set before
	prk  *keymem.Key
	err  error

	begun   time.Time
	files   int
	waiters int // callers that will still read prk
	dropped bool
	timer   *time.Timer // drops it
}

func (b *branch) ended() bool {
	select {
	case <-b.done:
		return true
	default:
		return false
	}
}

// serves reports whether a new file of c may join b.
func (b *branch) serves(c *Class, now time.Time) bool {
	return sameKeys(&b.class, c) && b.files < BranchFiles && now.Sub(b.begun) < BranchTime
}

// sameKeys reports whether keys made for a serve b too.
func sameKeys(a, b *Class) bool {
	return slices.Equal(a.Keys, b.Keys) && slices.Equal(a.Allowed, b.Allowed)
}

// createShared makes the data key of a file under its class's branch key.
func (m *Manager) createShared(ctx context.Context, c *Class, h *Header) (*FileKey, origin, error) {
	if h.File.IsZero() {
		h.File = NewID()
	}
	prk, from, err := m.joinBranch(ctx, c, h)
	if err != nil {
		return nil, from, err
	}
	defer prk.Wipe()
	k, err := seal(prk, c.Name, h, keymem.Random(keywrap.DataKeyLen))
	return k, from, err
}

// joinBranch sets h.Branch and h.Recipients and returns the branch's PRK, which
// is the caller's.
func (m *Manager) joinBranch(ctx context.Context, c *Class, h *Header) (*keymem.Key, origin, error) {
	from := origin{key: c.Keys[0], source: SourceBranch}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, from, ErrClosed
	}
	if p := m.pools[c.Name]; p != nil { // the class was not shared before
		p.kill()
		delete(m.pools, c.Name)
	}
	b := m.branches[c.Name]
	if b != nil && !b.serves(c, m.opts.Now()) {
		m.dropBranch(b)
		b = nil
	}
	switch {
	case b == nil:
		from.source = SourceCall
		b = m.startBranch(ctx, c, h)
	case !b.ended():
		from.source = SourceJoined
		m.stats.Shared++
	}
	b.files++
	b.waiters++
	m.mu.Unlock()
	p := patience{ctx: ctx, grace: m.opts.Grace}
	defer p.stop()
	err := p.wait(b.done)
	m.mu.Lock()
	b.waiters--
	defer b.release()
	if !b.ended() {
		return nil, from, err
	}
	from.requests = b.ids
	if b.err != nil {
		return nil, from, b.err
	}
	h.Branch, h.Recipients = b.h.Branch, slices.Clone(b.h.Recipients)
	for i := range h.Recipients { // each header is its owner's
		w := &h.Recipients[i].Wrapped
		w.Blob = bytes.Clone(w.Blob)
	}
	return b.prk.Clone(), from, nil
}

// startBranch starts the calls for a new branch. m.mu is held.
func (m *Manager) startBranch(ctx context.Context, c *Class, h *Header) *branch {
	b := &branch{done: make(chan struct{}), begun: m.opts.Now()}
	b.making = making{ctx: ctx, class: *c, purpose: keywrap.PurposeData, h: &Header{Fixed: h.Fixed, Branch: NewID()}}
	b.class.Keys, b.class.Allowed = slices.Clone(c.Keys), slices.Clone(c.Allowed)
	m.branches[c.Name] = b
	m.start(func() {
		k, err := m.makeKey(&b.making)
		m.mu.Lock()
		defer m.mu.Unlock()
		defer close(b.done)
		if err == nil && m.closed {
			k.Wipe()
			err = ErrClosed
		}
		if err != nil {
			b.err = err
			m.dropBranch(b)
			return
		}
		b.prk = k.prk
		m.keep(c, b.purpose, b.h, b.prk, b.ids)
		if b.dropped {
			b.release()
			return
		}
		b.timer = time.AfterFunc(BranchTime, func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.dropBranch(b)
		})
	})
	return b
}

// dropBranch lets no further file join b, and wipes its key when nobody will
// read it any more. Dropping twice does nothing. m.mu is held.
func (m *Manager) dropBranch(b *branch) {
	if m.branches[b.class.Name] == b {
		delete(m.branches, b.class.Name)
	}
	if b.timer != nil {
		b.timer.Stop()
	}
	b.dropped = true
	b.release()
}

func (b *branch) release() {
	if b.dropped && b.waiters == 0 {
		b.prk.Wipe()
	}
}
