package keyring

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// GenerateDataKey implements keywrap.Provider.
func (k *Keyring) GenerateDataKey(ctx context.Context, key string, ec keywrap.Context) (keywrap.DataKey, error) {
	const op = "GenerateDataKey"
	e, err := k.use(ctx, key)
	if err != nil {
		return keywrap.DataKey{}, callError(op, key, err)
	}
	plain := keymem.Random(keywrap.DataKeyLen)
	w, err := e.wrap(ec, plain)
	if err != nil {
		plain.Wipe()
		return keywrap.DataKey{}, callError(op, key, err)
	}
	return keywrap.DataKey{Plain: plain, Wrapped: w}, nil
}

// Encrypt implements keywrap.Provider.
func (k *Keyring) Encrypt(ctx context.Context, key string, ec keywrap.Context, plain *keymem.Key) (keywrap.Wrapped, error) {
	const op = "Encrypt"
	e, err := k.use(ctx, key)
	if err != nil {
		return keywrap.Wrapped{}, callError(op, key, err)
	}
	w, err := e.wrap(ec, plain)
	return w, callError(op, key, err)
}

// Decrypt implements keywrap.Provider.
func (k *Keyring) Decrypt(ctx context.Context, w keywrap.Wrapped, ec keywrap.Context) (*keymem.Key, error) {
	const op = "Decrypt"
	e, err := k.use(ctx, w.Key)
	if err != nil {
		return nil, callError(op, w.Key, err)
	}
	plain, err := e.unwrap(ec, w.Blob)
	return plain, callError(op, w.Key, err)
}

// ReEncrypt implements keywrap.Provider. A failure of the destination key is
// reported about that key.
func (k *Keyring) ReEncrypt(ctx context.Context, w keywrap.Wrapped, from keywrap.Context, key string, to keywrap.Context) (keywrap.Wrapped, error) {
	const op = "ReEncrypt"
	source, err := k.use(ctx, w.Key)
	if err != nil {
		return keywrap.Wrapped{}, callError(op, w.Key, err)
	}
	target, err := k.use(ctx, key)
	if err != nil {
		return keywrap.Wrapped{}, callError(op, key, err)
	}
	plain, err := source.unwrap(from, w.Blob)
	if err != nil {
		return keywrap.Wrapped{}, callError(op, w.Key, err)
	}
	defer plain.Wipe()
	out, err := target.wrap(to, plain)
	return out, callError(op, key, err)
}

// Describe implements keywrap.Provider.
func (k *Keyring) Describe(ctx context.Context, key string) (keywrap.Description, error) {
	e, err := k.lookup(ctx, key)
	if err != nil {
		return keywrap.Description{}, callError("Describe", key, err)
	}
	d := keywrap.Description{Key: uriPrefix + e.name, State: e.state, Created: e.created, DeletionAt: e.deletionAt,
		Rotated: e.rotated, Material: materialID(e.primary),
		Description: fmt.Sprintf("embedded keyring, %d versions", len(e.ids))}
	if d.Rotated.IsZero() {
		d.Rotated = e.created
	}
	return d, nil
}

// lookup finds the key that a URI names, whatever its state.
func (k *Keyring) lookup(ctx context.Context, key string) (*entry, error) {
	if err := ctx.Err(); errors.Is(err, context.DeadlineExceeded) {
		return nil, fmt.Errorf("%w: %w", keywrap.ErrUnavailable, err)
	} else if err != nil {
		return nil, err
	}
	name, ok := strings.CutPrefix(key, uriPrefix)
	if !ok || !validName(name) {
		return nil, keywrap.ErrBadURI
	}
	c, err := k.read()
	if err != nil {
		return nil, err
	}
	return c.find(name, k.now())
}

// use is lookup for the operations that need an enabled key.
func (k *Keyring) use(ctx context.Context, key string) (*entry, error) {
	e, err := k.lookup(ctx, key)
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

// callError gives err what a log line needs; nil stays nil.
func callError(op, key string, err error) error {
	if err == nil {
		return nil
	}
	ce := &keywrap.CallError{Op: op, Key: key, Err: err}
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
