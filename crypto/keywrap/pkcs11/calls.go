package pkcs11

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// GenerateDataKey implements keywrap.Provider.
func (p *Provider) GenerateDataKey(ctx context.Context, key string, ec keywrap.Context) (keywrap.DataKey, error) {
	c := newCall(ctx, keywrap.OpGenerate, key)
	u, err := p.parse(key)
	if err != nil {
		return keywrap.DataKey{}, c.end(err)
	}
	dk, err := run(ctx, p, c, func() (keywrap.DataKey, error) { return p.generate(u, ec) },
		func(dk keywrap.DataKey) { dk.Plain.Wipe() })
	return dk, c.end(err)
}

// Encrypt implements keywrap.Provider.
func (p *Provider) Encrypt(ctx context.Context, key string, ec keywrap.Context, plain *keymem.Key) (keywrap.Wrapped, error) {
	c := newCall(ctx, keywrap.OpEncrypt, key)
	u, err := p.parse(key)
	if err == nil && plain.Len() != keywrap.DataKeyLen {
		err = keywrap.ErrKeyLength
	}
	if err != nil {
		return keywrap.Wrapped{}, c.end(err)
	}
	w, err := p.encryptClone(ctx, c, u, ec, plain)
	return w, c.end(err)
}

// encryptClone wraps a copy of plain: the call may outlive the caller's key.
func (p *Provider) encryptClone(ctx context.Context, c *call, u URI, ec keywrap.Context, plain *keymem.Key) (keywrap.Wrapped, error) {
	own := make(chan *keymem.Key, 1) // taken by whoever comes first: the call, or the end without one
	own <- plain.Clone()
	w, err := run(ctx, p, c, func() (keywrap.Wrapped, error) {
		k := <-own
		defer k.Wipe()
		return p.encrypt(u, ec, k)
	}, func(keywrap.Wrapped) {})
	if !c.sent {
		(<-own).Wipe()
	}
	return w, err
}

// Decrypt implements keywrap.Provider.
func (p *Provider) Decrypt(ctx context.Context, w keywrap.Wrapped, ec keywrap.Context) (*keymem.Key, error) {
	c := newCall(ctx, keywrap.OpDecrypt, w.Key)
	u, err := parseStored(w.Key)
	if err != nil {
		return nil, c.end(err)
	}
	w.Blob = slices.Clone(w.Blob)
	plain, err := run(ctx, p, c, func() (*keymem.Key, error) { return p.decrypt(u, w.Blob, ec) }, (*keymem.Key).Wipe)
	return plain, c.end(err)
}

// ReEncrypt implements keywrap.Provider. The data key passes through this
// process: no mechanism of PKCS#11 opens and seals in one step. A failure of
// the destination key is reported about that key.
func (p *Provider) ReEncrypt(ctx context.Context, w keywrap.Wrapped, from keywrap.Context, key string, to keywrap.Context) (keywrap.Wrapped, error) {
	c := newCall(ctx, keywrap.OpReEncrypt, w.Key)
	source, err := parseStored(w.Key)
	if err != nil {
		return keywrap.Wrapped{}, c.end(err)
	}
	target, err := p.parse(key)
	if err != nil {
		c.key = key
		return keywrap.Wrapped{}, c.end(err)
	}
	w.Blob = slices.Clone(w.Blob)
	plain, err := run(ctx, p, c, func() (*keymem.Key, error) { return p.decrypt(source, w.Blob, from) }, (*keymem.Key).Wipe)
	if err != nil {
		return keywrap.Wrapped{}, c.end(err)
	}
	defer plain.Wipe()
	second := &call{op: c.op, key: key, id: c.id, start: c.start, trace: c.trace}
	out, err := p.encryptClone(ctx, second, target, to, plain)
	second.sent = true // the first half was
	return out, second.end(err)
}

// Describe implements keywrap.Provider. It needs the login all the same: keys
// are private objects.
func (p *Provider) Describe(ctx context.Context, key string) (keywrap.Description, error) {
	c := newCall(ctx, keywrap.OpDescribe, key)
	u, err := p.parse(key)
	if err != nil {
		return keywrap.Description{}, c.end(err)
	}
	d, err := run(ctx, p, c, func() (keywrap.Description, error) { return p.describe(u) }, func(keywrap.Description) {})
	return d, c.end(err)
}

// Check implements keywrap.Checker. Decrypt is tried, and its result wiped, if
// there is a wrapped key; of the others, the key's existence, state and
// permissions are checked.
func (p *Provider) Check(ctx context.Context, k keywrap.Check) error {
	c := newCall(ctx, k.Op, k.KeyURI())
	c.dryRun = true
	f, err := p.checks(k, k.Op)
	if err != nil {
		return c.end(err)
	}
	about := k.KeyURI()
	_, err = run(ctx, p, c, func() (struct{}, error) { return struct{}{}, f() }, func(struct{}) {})
	var other *aboutTarget
	if errors.As(err, &other) {
		about, err = k.ToKey, other.err
	}
	c.key = about
	return c.end(err)
}

// aboutTarget is a failure of ReEncrypt's destination.
type aboutTarget struct{ err error }

func (e *aboutTarget) Error() string { return e.err.Error() }
func (e *aboutTarget) Unwrap() error { return e.err }

// checks returns what op's Check asks the token.
func (p *Provider) checks(k keywrap.Check, op string) (func() error, error) {
	switch op {
	case keywrap.OpGenerate, keywrap.OpEncrypt:
		u, err := p.parse(k.Key)
		return func() error { return p.checkWrap(u) }, err
	case keywrap.OpDescribe:
		u, err := p.parse(k.Key)
		return func() error { _, err := p.describe(u); return err }, err
	case keywrap.OpDecrypt:
		u, err := parseStored(k.KeyURI())
		blob := slices.Clone(k.Wrapped.Blob)
		return func() error { return p.checkUnwrap(u, blob, k.Context) }, err
	case keywrap.OpReEncrypt:
		from, err := p.checks(k, keywrap.OpDecrypt)
		if err != nil {
			return nil, err
		}
		target, err := p.parse(k.ToKey)
		return func() error {
			if err := from(); err != nil {
				return err
			}
			if err := p.checkWrap(target); err != nil {
				return &aboutTarget{err}
			}
			return nil
		}, err
	}
	return nil, fmt.Errorf("%w: no operation %q", keywrap.ErrUnsupported, op)
}

func (p *Provider) checkWrap(u URI) error {
	return p.with(u, func(s *use) error {
		list, err := s.lookup(u)
		if err != nil {
			return err
		}
		_, err = newest(list, p.now())
		return err
	})
}

func (p *Provider) checkUnwrap(u URI, blob []byte, ec keywrap.Context) error {
	if len(blob) > 0 {
		plain, err := p.decrypt(u, blob, ec)
		plain.Wipe()
		return err
	}
	return p.with(u, func(s *use) error {
		list, err := s.lookup(u)
		if err != nil {
			return err
		}
		return s.canOpen(list, p.now())
	})
}

// parse reads a key URI as a user may give it.
func (p *Provider) parse(key string) (URI, error) {
	u, err := Parse(key)
	if err != nil {
		return u, err
	}
	return u, u.agrees(p.module, p.pinFile)
}

// parseStored reads the key URI of a wrapped key.
func parseStored(key string) (URI, error) {
	u, err := Parse(key)
	if err == nil && !u.normalized(key) {
		err = bad("a stored key URI is normalized and has no slot and no query")
	}
	return u, err
}

func (p *Provider) generate(u URI, ec keywrap.Context) (keywrap.DataKey, error) {
	var dk keywrap.DataKey
	err := p.with(u, func(s *use) error {
		plain, err := s.generate()
		if err != nil {
			return err
		}
		w, err := p.wrapUnder(s, u, ec, plain)
		if err != nil {
			plain.Wipe()
			return err
		}
		dk = keywrap.DataKey{Plain: plain, Wrapped: w}
		return nil
	})
	return dk, err
}

func (p *Provider) encrypt(u URI, ec keywrap.Context, plain *keymem.Key) (keywrap.Wrapped, error) {
	var w keywrap.Wrapped
	err := p.with(u, func(s *use) error {
		var err error
		w, err = p.wrapUnder(s, u, ec, plain)
		return err
	})
	return w, err
}

// wrapUnder wraps plain under the newest version of a key.
func (p *Provider) wrapUnder(s *use, u URI, ec keywrap.Context, plain *keymem.Key) (keywrap.Wrapped, error) {
	list, err := s.lookup(u)
	if err != nil {
		return keywrap.Wrapped{}, err
	}
	v, err := newest(list, p.now())
	if err != nil {
		return keywrap.Wrapped{}, err
	}
	blob, err := s.wrap(v, ec, plain.Bytes())
	if err != nil {
		return keywrap.Wrapped{}, err
	}
	return keywrap.Wrapped{Key: u.normalize(s.token.info).String(), Blob: blob, Material: material(v.ID)}, nil
}

func (p *Provider) decrypt(u URI, raw []byte, ec keywrap.Context) (*keymem.Key, error) {
	blob, err := parseWrapped(raw)
	if err != nil {
		blob = nil // the key's own failures come first, as at other services
	}
	var plain *keymem.Key
	err = p.with(u, func(s *use) error {
		list, err := s.lookup(u)
		if err != nil {
			return err
		}
		if blob == nil {
			return cmp.Or(s.canOpen(list, p.now()), error(keywrap.ErrCiphertext))
		}
		if !slices.Contains(s.token.forms, blob.form) {
			return fmt.Errorf("%w: the token does not have mechanism 0x%X", keywrap.ErrWrongKey, blob.form.mechanism())
		}
		v, err := opener(list, blob, p.now())
		if err != nil {
			return err
		}
		plain, err = s.unwrap(v, ec, blob)
		return err
	})
	return plain, err
}

// canOpen returns nil if any version may unwrap anything.
func (s *use) canOpen(list []*version, now time.Time) error {
	err := error(keywrap.ErrDisabled)
	for _, v := range list {
		switch {
		case v.expired(now):
			err = keywrap.ErrExpired
		case slices.ContainsFunc(s.token.forms, v.opens):
			return nil
		}
	}
	return err
}

func (p *Provider) describe(u URI) (keywrap.Description, error) {
	var d keywrap.Description
	err := p.with(u, func(s *use) error {
		list, err := s.lookup(u)
		if err != nil {
			return err
		}
		d = p.description(s, u, list)
		return nil
	})
	return d, err
}

func (p *Provider) description(s *use, u URI, list []*version) keywrap.Description {
	now := p.now()
	d := keywrap.Description{Key: u.normalize(s.token.info).String(), State: keywrap.Enabled, Created: list[0].Start}
	v, err := newest(list, now)
	switch {
	case err == nil:
		d.Rotated, d.Material = v.Start, material(v.ID)
	case errors.Is(err, keywrap.ErrDisabled):
		d.State = keywrap.Disabled
	default:
		d.State = keywrap.Unavailable
	}
	shown := list[len(list)-1]
	if err == nil {
		shown = v
	}
	d.Description = fmt.Sprintf("PKCS#11 token %q (%s %s), %d versions, %s", s.token.info.Label, s.token.info.Manufacturer,
		s.token.info.Model, len(list), shown.describe())
	return d
}

// describe is for people: what a version is, and what is odd about it.
func (v *version) describe() string {
	out := "AES"
	if v.Bytes > 0 {
		out = fmt.Sprintf("AES-%d", 8*v.Bytes)
	}
	switch v.form {
	case formGCM:
		out += ", wraps with AES-GCM"
	case formKW, formKWP, formPad:
		out += ", wraps with AES key wrap"
	}
	if v.Extractable {
		out += ", EXTRACTABLE: the token would give it away"
	}
	return out
}

// call is one call for the log and the trace.
type call struct {
	op, key, id string
	dryRun      bool
	sent        bool // the module was asked
	start       time.Time
	trace       *keywrap.Trace
}

func newCall(ctx context.Context, op, key string) *call {
	if i := strings.Index(key, "pin-value"); i >= 0 {
		key = key[:i] + "…" // what is refused goes to the log
	}
	return &call{op: op, key: key, id: keywrap.NewRequestID(), start: time.Now(), trace: keywrap.TraceOf(ctx)}
}

// end adds the call to the trace, if the module was asked, and gives err what a
// log line needs.
func (c *call) end(err error) error {
	if c.sent {
		c.trace.Add(keywrap.Attempt{Op: c.op, Key: c.key, RequestID: c.id, At: c.start, Took: time.Since(c.start),
			Code: code(err), DryRun: c.dryRun})
	}
	if err == nil {
		return nil
	}
	err = classify(err)
	out := &keywrap.CallError{Op: c.op, Key: c.key, Hint: hint(err), Err: err}
	if c.sent {
		out.RequestID = c.id
	}
	return out
}
