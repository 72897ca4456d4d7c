package keywrap

import (
	"context"
	"fmt"
	"strings"

	"github.com/kmsfs/kmsfs/crypto/keymem"
)

// Mux sends each call to the provider whose URIs the key matches. It is made
// once, before use; a nil Provider in it means "not configured here".
type Mux struct {
	AWS     Provider // "arn:…" and "alias/…"
	Keyring Provider // "keyring:NAME"
	PKCS11  Provider // "pkcs11:…" (RFC 7512)
}

var (
	_ Provider = Mux{}
	_ Checker  = Mux{}
)

// Scheme returns the service that a key URI names: "aws", "keyring", "pkcs11",
// or "".
func Scheme(key string) string {
	switch {
	case strings.HasPrefix(key, "arn:"), strings.HasPrefix(key, "alias/"):
		return "aws"
	case strings.HasPrefix(key, "keyring:") && len(key) > len("keyring:"):
		return "keyring"
	case strings.HasPrefix(key, "pkcs11:") && len(key) > len("pkcs11:"):
		return "pkcs11"
	}
	return ""
}

func (m Mux) pick(op, key string) (Provider, error) {
	var p Provider
	switch Scheme(key) {
	case "aws":
		p = m.AWS
	case "keyring":
		p = m.Keyring
	case "pkcs11":
		p = m.PKCS11
	}
	if p == nil {
		hint := "use an AWS KMS key ARN, alias/NAME, keyring:NAME, or pkcs11:…"
		if Scheme(key) == "pkcs11" {
			hint = "this program has no PKCS#11, or no module is configured"
		}
		return nil, &CallError{Op: op, Key: key, Err: fmt.Errorf("%w: %q", ErrBadURI, key), Hint: hint}
	}
	return p, nil
}

// GenerateDataKey implements Provider.
func (m Mux) GenerateDataKey(ctx context.Context, key string, ec Context) (DataKey, error) {
	p, err := m.pick("GenerateDataKey", key)
	if err != nil {
		return DataKey{}, err
	}
	return p.GenerateDataKey(ctx, key, ec)
}

// Encrypt implements Provider.
func (m Mux) Encrypt(ctx context.Context, key string, ec Context, plain *keymem.Key) (Wrapped, error) {
	p, err := m.pick("Encrypt", key)
	if err != nil {
		return Wrapped{}, err
	}
	return p.Encrypt(ctx, key, ec, plain)
}

// Decrypt implements Provider.
func (m Mux) Decrypt(ctx context.Context, w Wrapped, ec Context) (*keymem.Key, error) {
	p, err := m.pick("Decrypt", w.Key)
	if err != nil {
		return nil, err
	}
	return p.Decrypt(ctx, w, ec)
}

// ReEncrypt implements Provider. Between two services the data key passes
// through this process: it is decrypted by one and encrypted by the other.
func (m Mux) ReEncrypt(ctx context.Context, w Wrapped, from Context, key string, to Context) (Wrapped, error) {
	p, err := m.pick("ReEncrypt", w.Key)
	if err != nil {
		return Wrapped{}, err
	}
	if Scheme(w.Key) == Scheme(key) {
		return p.ReEncrypt(ctx, w, from, key, to)
	}
	plain, err := p.Decrypt(ctx, w, from)
	if err != nil {
		return Wrapped{}, err
	}
	defer plain.Wipe()
	return m.Encrypt(ctx, key, to, plain)
}

// Describe implements Provider.
func (m Mux) Describe(ctx context.Context, key string) (Description, error) {
	p, err := m.pick("Describe", key)
	if err != nil {
		return Description{}, err
	}
	return p.Describe(ctx, key)
}

// Check implements Checker. A ReEncrypt between two services is a Decrypt with
// one and an Encrypt with the other, and checked as these.
func (m Mux) Check(ctx context.Context, c Check) error {
	p, err := m.pick(c.Op, c.KeyURI())
	if err != nil {
		return err
	}
	if c.Op != OpReEncrypt || Scheme(c.KeyURI()) == Scheme(c.ToKey) {
		return CheckWith(ctx, p, c)
	}
	to, err := m.pick(c.Op, c.ToKey)
	if err != nil {
		return err
	}
	if err := CheckWith(ctx, p, Check{Op: OpDecrypt, Key: c.Key, Wrapped: c.Wrapped, Context: c.Context}); err != nil {
		return err
	}
	return CheckWith(ctx, to, Check{Op: OpEncrypt, Key: c.ToKey, Context: c.ToContext})
}
