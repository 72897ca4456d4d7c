package keywraptest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// toyService is toy with traces and checks, and bugs in these.
type toyService struct{ *toy }

// traced runs call and notes it as one attempt about key.
func (p toyService) traced(ctx context.Context, op, key string, dryRun bool, call func() error) error {
	start := time.Now()
	err := call()
	reached := ctx.Err() == nil && strings.HasPrefix(key, "toy:")
	if !reached && p.bug != "traces what never left" || p.bug == "traces nothing" || err != nil && p.bug == "traces no failures" {
		return err
	}
	a := keywrap.Attempt{Op: op, Key: key, RequestID: keywrap.NewRequestID(), At: start, Took: time.Since(start), Code: keywrap.CodeOf(err), DryRun: dryRun}
	if p.bug == "one request id" {
		a.RequestID = "1"
	}
	if p.bug == "failures look like successes" {
		a.Code = ""
	}
	keywrap.TraceOf(ctx).Add(a)
	if p.bug == "traces twice" {
		keywrap.TraceOf(ctx).Add(a)
	}
	var ce *keywrap.CallError
	if errors.As(err, &ce) && p.bug != "failures without request id" {
		ce.RequestID = a.RequestID
	}
	return err
}

func (p toyService) GenerateDataKey(ctx context.Context, key string, ec keywrap.Context) (dk keywrap.DataKey, err error) {
	err = p.traced(ctx, keywrap.OpGenerate, key, false, func() error { dk, err = p.toy.GenerateDataKey(ctx, key, ec); return err })
	return dk, err
}

func (p toyService) Encrypt(ctx context.Context, key string, ec keywrap.Context, plain *keymem.Key) (w keywrap.Wrapped, err error) {
	err = p.traced(ctx, keywrap.OpEncrypt, key, false, func() error { w, err = p.toy.Encrypt(ctx, key, ec, plain); return err })
	return w, err
}

func (p toyService) Decrypt(ctx context.Context, w keywrap.Wrapped, ec keywrap.Context) (plain *keymem.Key, err error) {
	err = p.traced(ctx, keywrap.OpDecrypt, w.Key, false, func() error { plain, err = p.toy.Decrypt(ctx, w, ec); return err })
	return plain, err
}

func (p toyService) ReEncrypt(ctx context.Context, w keywrap.Wrapped, from keywrap.Context, key string, to keywrap.Context) (out keywrap.Wrapped, err error) {
	err = p.traced(ctx, keywrap.OpReEncrypt, key, false, func() error { out, err = p.toy.ReEncrypt(ctx, w, from, key, to); return err })
	return out, err
}

func (p toyService) Describe(ctx context.Context, key string) (d keywrap.Description, err error) {
	err = p.traced(ctx, keywrap.OpDescribe, key, false, func() error { d, err = p.toy.Describe(ctx, key); return err })
	return d, err
}

// Check implements keywrap.Checker.
func (p toyService) Check(ctx context.Context, c keywrap.Check) error {
	key, blame := c.KeyURI(), c.KeyURI()
	return p.traced(ctx, c.Op, key, p.bug != "checks for real", func() error {
		_, _, err := p.find(ctx, key, c.Op != keywrap.OpDescribe && p.bug != "check ignores the state")
		switch {
		case p.bug == "check allows everything":
			return nil
		case err != nil:
		case c.Op == keywrap.OpDescribe, c.Op == keywrap.OpGenerate, c.Op == keywrap.OpEncrypt:
		case c.Op == keywrap.OpDecrypt, c.Op == keywrap.OpReEncrypt:
			if c.Op == keywrap.OpReEncrypt && p.bug != "check forgets the destination" {
				if _, _, err = p.find(ctx, c.ToKey, true); err != nil {
					blame = c.ToKey
					break
				}
			}
			if len(c.Wrapped.Blob) == 0 && p.bug != "check needs a wrapped key" || p.bug == "check ignores the wrapped key" {
				break
			}
			var plain *keymem.Key
			plain, err = p.open(ctx, keywrap.Wrapped{Key: key, Blob: c.Wrapped.Blob}, c.Context)
			if p.bug != "check leaves a key" {
				plain.Wipe()
			}
		default:
			err = fmt.Errorf("%w: %q", keywrap.ErrUnsupported, c.Op)
		}
		return p.fail(c.Op, blame, err)
	})
}
