package keyring

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// request is one call, for its error and its attempt.
type request struct {
	op, key string
	id      string  // "" until the call counts as one that reached the service
	bad     *string // malformed URI
	dryRun  bool
	start   time.Time
	trace   *keywrap.Trace
}

// begin checks what needs no keyring; from then on the call has a request id.
func begin(ctx context.Context, op, key string, names ...string) (*request, error) {
	r := &request{op: op, key: key, start: time.Now(), trace: keywrap.TraceOf(ctx)}
	if err := ctx.Err(); errors.Is(err, context.DeadlineExceeded) {
		return r, fmt.Errorf("%w: %w", keywrap.ErrUnavailable, err)
	} else if err != nil {
		return r, err
	}
	for _, uri := range append(names, key) {
		if name, ok := strings.CutPrefix(uri, uriPrefix); !ok || !validName(name) {
			r.bad = &uri
			return r, keywrap.ErrBadURI
		}
	}
	r.id = keywrap.NewRequestID()
	return r, nil
}

// end notes the attempt and gives err, about blame, what a log line needs; nil
// stays nil.
func (r *request) end(blame string, err error) error {
	if r.bad != nil {
		blame = *r.bad
	}
	if r.id != "" {
		r.trace.Add(keywrap.Attempt{Op: r.op, Key: r.key, RequestID: r.id, DryRun: r.dryRun,
			At: r.start, Took: time.Since(r.start), Code: keywrap.CodeOf(err)})
	}
	return callError(r.op, blame, r.id, err)
}

// GenerateDataKey implements keywrap.Provider.
func (k *Keyring) GenerateDataKey(ctx context.Context, key string, ec keywrap.Context) (keywrap.DataKey, error) {
	r, err := begin(ctx, keywrap.OpGenerate, key)
	if err != nil {
		return keywrap.DataKey{}, r.end(key, err)
	}
	e, err := k.use(key)
	if err != nil {
		return keywrap.DataKey{}, r.end(key, err)
	}
	plain := keymem.Random(keywrap.DataKeyLen)
	w, err := e.wrap(ec, plain)
	if err != nil {
		plain.Wipe()
		return keywrap.DataKey{}, r.end(key, err)
	}
	return keywrap.DataKey{Plain: plain, Wrapped: w}, r.end(key, nil)
}

// Encrypt implements keywrap.Provider.
func (k *Keyring) Encrypt(ctx context.Context, key string, ec keywrap.Context, plain *keymem.Key) (keywrap.Wrapped, error) {
	r, err := begin(ctx, keywrap.OpEncrypt, key)
	if err != nil {
		return keywrap.Wrapped{}, r.end(key, err)
	}
	e, err := k.use(key)
	if err != nil {
		return keywrap.Wrapped{}, r.end(key, err)
	}
	w, err := e.wrap(ec, plain)
	return w, r.end(key, err)
}

// Decrypt implements keywrap.Provider.
func (k *Keyring) Decrypt(ctx context.Context, w keywrap.Wrapped, ec keywrap.Context) (*keymem.Key, error) {
	r, err := begin(ctx, keywrap.OpDecrypt, w.Key)
	if err != nil {
		return nil, r.end(w.Key, err)
	}
	plain, err := k.open(w, ec)
	return plain, r.end(w.Key, err)
}

func (k *Keyring) open(w keywrap.Wrapped, ec keywrap.Context) (*keymem.Key, error) {
	e, err := k.use(w.Key)
	if err != nil {
		return nil, err
	}
	return e.unwrap(ec, w.Blob)
}

// ReEncrypt implements keywrap.Provider. A failure of the destination key is
// reported about that key.
func (k *Keyring) ReEncrypt(ctx context.Context, w keywrap.Wrapped, from keywrap.Context, key string, to keywrap.Context) (keywrap.Wrapped, error) {
	r, err := begin(ctx, keywrap.OpReEncrypt, key, w.Key)
	if err != nil {
		return keywrap.Wrapped{}, r.end(w.Key, err)
	}
	target, blame, err := k.both(w.Key, key)
	if err != nil {
		return keywrap.Wrapped{}, r.end(blame, err)
	}
	plain, err := k.open(w, from)
	if err != nil {
		return keywrap.Wrapped{}, r.end(w.Key, err)
	}
	defer plain.Wipe()
	out, err := target.wrap(to, plain)
	return out, r.end(key, err)
}

// both finds the destination of a ReEncrypt if source and destination can be
// used; blame is the key that cannot.
func (k *Keyring) both(source, key string) (target *entry, blame string, err error) {
	if _, err = k.use(source); err != nil {
		return nil, source, err
	}
	target, err = k.use(key)
	return target, key, err
}

// Describe implements keywrap.Provider.
func (k *Keyring) Describe(ctx context.Context, key string) (keywrap.Description, error) {
	r, err := begin(ctx, keywrap.OpDescribe, key)
	if err != nil {
		return keywrap.Description{}, r.end(key, err)
	}
	e, err := k.lookup(key)
	if err != nil {
		return keywrap.Description{}, r.end(key, err)
	}
	d := keywrap.Description{Key: uriPrefix + e.name, State: e.state, Created: e.created, DeletionAt: e.deletionAt,
		Rotated: e.rotated, Material: materialID(e.primary),
		Description: fmt.Sprintf("embedded keyring, %d versions", len(e.ids))}
	if d.Rotated.IsZero() {
		d.Rotated = e.created
	}
	return d, r.end(key, nil)
}

// Check implements keywrap.Checker: it looks at the key's state and, if there
// is a wrapped key, opens it for a moment.
func (k *Keyring) Check(ctx context.Context, c keywrap.Check) error {
	key, subject, names := c.KeyURI(), c.KeyURI(), []string(nil)
	if c.Op == keywrap.OpReEncrypt {
		subject, names = c.ToKey, []string{key}
	}
	r, err := begin(ctx, c.Op, subject, names...)
	if err != nil {
		return r.end(key, err)
	}
	r.dryRun = true
	return r.end(k.check(c, key))
}

func (k *Keyring) check(c keywrap.Check, key string) (blame string, err error) {
	switch c.Op {
	case keywrap.OpDescribe:
		_, err = k.lookup(key)
		return key, err
	case keywrap.OpGenerate, keywrap.OpEncrypt:
		_, err = k.use(key)
		return key, err
	case keywrap.OpReEncrypt:
		if _, blame, err = k.both(key, c.ToKey); err != nil {
			return blame, err
		}
	case keywrap.OpDecrypt:
		if _, err = k.use(key); err != nil {
			return key, err
		}
	default:
		return key, fmt.Errorf("%w: %q is no operation", keywrap.ErrUnsupported, c.Op)
	}
	if len(c.Wrapped.Blob) == 0 {
		return key, nil
	}
	plain, err := k.open(keywrap.Wrapped{Key: key, Blob: c.Wrapped.Blob}, c.Context)
	plain.Wipe()
	return key, err
}

// lookup finds the key that a well-formed URI names, whatever its state.
func (k *Keyring) lookup(key string) (*entry, error) {
	c, err := k.read()
	if err != nil {
		return nil, err
	}
	return c.find(strings.TrimPrefix(key, uriPrefix), k.now())
}

// use is lookup for the operations that need an enabled key.
func (k *Keyring) use(key string) (*entry, error) {
	e, err := k.lookup(key)
	if err != nil {
		return nil, err
	}
	return e, e.usable()
}

var hints = []struct {
	err  error
	text string
}{
	{keywrap.ErrBadURI, "use keyring:NAME"},
	{keywrap.ErrNotFound, "is this the right keyring file? kmsfs keyring list shows its keys"},
	{keywrap.ErrDisabled, "kmsfs keyring enable NAME makes the key usable again"},
	{keywrap.ErrPending, "kmsfs keyring cancel-deletion NAME, then kmsfs keyring enable NAME, keeps the key"},
	{keywrap.ErrCiphertext, "the file's header was damaged or moved, or belongs to another keyring's key of this name"},
	{ErrNoFile, "give the keyring file with --keyring or KMSFS_KEYRING"},
	{ErrPermissions, "chmod 600 the keyring file"},
	{ErrPassphrase, "the passphrase was changed elsewhere: unlock the keyring again"},
	{ErrNeedPassphrase, "unlock the keyring again"},
	{ErrFormat, "restore the keyring file from a backup"},
}

func callError(op, key, id string, err error) error {
	if err == nil {
		return nil
	}
	ce := &keywrap.CallError{Op: op, Key: key, RequestID: id, Err: err}
	for _, h := range hints {
		if errors.Is(err, h.err) {
			ce.Hint = h.text
			return ce
		}
	}
	if fault.Of(err) == fault.KeyUnavailable {
		ce.Hint = "check that the keyring file can be read"
	}
	return ce
}
