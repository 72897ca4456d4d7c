package awskms

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// call is what the report of a failure needs.
type call struct {
	op    string
	key   string // key URI, as given
	other string // ReEncrypt: the destination
	uri   keyURI // key, parsed
}

// do runs fn with the client of the key's Region, within the budget. fn passes
// opt to each of its operations.
func (p *Provider) do(ctx context.Context, c call, fn func(ctx context.Context, client *regional, opt func(*kms.Options)) error) error {
	if err := ctx.Err(); err != nil {
		return p.fail(ctx, c, err)
	}
	start := time.Now()
	bounded, cancel := context.WithTimeout(ctx, p.opts.Budget)
	defer cancel()
	s, client, err := p.client(bounded, c.uri)
	if err != nil {
		return p.fail(ctx, c, err)
	}
	rec := &recorder{RetryerV2: client.retryer}
	bounded = context.WithValue(bounded, recorderKey{}, rec)
	opt := func(o *kms.Options) { o.Retryer = rec }
	err = fn(bounded, client, opt)
	if err == nil {
		return nil
	}
	if bounded.Err() != nil && !errors.Is(ctx.Err(), context.Canceled) && isCancelled(err) && rec.last != nil {
		err = &budgetError{time.Since(start).Round(time.Millisecond).String(), rec.last}
	}
	id := rec.requestID
	if isInvalidState(err) {
		err = explainState(bounded, c, client, opt, err)
	}
	err = p.failed(ctx, c, id, err)
	if errors.Is(err, keywrap.ErrCredentials) {
		p.forget(s)
	}
	return err
}

// budgetError is the last attempt's failure, after which there was no time.
type budgetError struct {
	budget string
	last   error
}

func (e *budgetError) Error() string { return "gave up after " + e.budget + ": " + e.last.Error() }
func (e *budgetError) Unwrap() error { return e.last }

// fail is failed for a call without an answer.
func (p *Provider) fail(ctx context.Context, c call, err error) error {
	return p.failed(ctx, c, "", err)
}

// failed turns an SDK error, or one of this package's checks, into a CallError.
// ctx is the caller's: its cancellation stays context.Canceled, without a kind,
// because nothing is wrong with the key. answered is the request id of the last
// answer, for an error that does not carry it.
func (p *Provider) failed(ctx context.Context, c call, answered string, err error) error {
	id := requestID(err)
	if id == "" {
		id = answered
	}
	if errors.Is(ctx.Err(), context.Canceled) && isCancelled(err) {
		return callError(c.op, c.key, id, context.Canceled)
	}
	var own *fault.Error
	if errors.As(err, &own) { // found by our checks, perhaps with KMS's words
		return callError(c.op, c.key, id, fmt.Errorf("%w%s", own, suffix(c.op, err, own)))
	}
	v, text := classify(err), words(c.op, err)
	var spent *budgetError
	if errors.As(err, &spent) {
		text = "gave up after " + spent.budget + ": " + words(c.op, spent.last)
	}
	out := fmt.Errorf("%w: %s", v.err, text)
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		out = fmt.Errorf("%w: %w", out, context.DeadlineExceeded)
	case errors.Is(err, errNoRegion):
		out = fmt.Errorf("%w: %w", v.err, errNoRegion)
	}
	key := c.key
	if c.other != "" && strings.Contains(text, c.other) && !strings.Contains(text, c.key) {
		key = c.other
	}
	return callError(c.op, key, id, out)
}

func suffix(op string, err, own error) string {
	var api smithy.APIError
	if errors.As(err, &api) {
		return ": " + words(op, api)
	}
	return strings.TrimPrefix(err.Error(), own.Error())
}

func callError(op, key, id string, err error) error {
	return &keywrap.CallError{Op: op, Key: key, RequestID: id, Hint: hint(op, err), Err: err}
}

// isInvalidState reports whether KMS complained about a key's state without
// saying which it is.
func isInvalidState(err error) bool {
	var api smithy.APIError
	return errors.As(err, &api) && strings.TrimSuffix(api.ErrorCode(), "Exception") == "KMSInvalidState" &&
		stateInMessage(api.ErrorMessage()) == ""
}

// explainState asks KMS for the state, so that a user reads "pending deletion"
// and not "unavailable". Without the right to ask, the answer stays as it was.
func explainState(ctx context.Context, c call, client *regional, opt func(*kms.Options), err error) error {
	for _, key := range []string{c.key, c.other} {
		if key == "" || c.op == opDescribe {
			continue
		}
		out, derr := client.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: aws.String(key)}, opt)
		if derr != nil || out.KeyMetadata == nil {
			continue
		}
		if serr := stateError(out.KeyMetadata.KeyState); !errors.Is(serr, keywrap.ErrUnavailable) {
			return fmt.Errorf("%w: %w", serr, err)
		}
	}
	return err
}

// Describe implements keywrap.Provider. It needs kms:DescribeKey. What
// kms:GetKeyRotationStatus and kms:ListKeyRotations would add (Rotation,
// Rotated) is left out where they are not allowed.
func (p *Provider) Describe(ctx context.Context, key string) (keywrap.Description, error) {
	u, err := parseURI(key)
	if err != nil {
		return keywrap.Description{}, callError(opDescribe, key, "", err)
	}
	var d keywrap.Description
	err = p.do(ctx, call{op: opDescribe, key: key, uri: u}, func(ctx context.Context, c *regional, opt func(*kms.Options)) error {
		out, err := c.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: aws.String(key)}, opt)
		if err != nil {
			return err
		}
		m := out.KeyMetadata
		if m == nil {
			return errBadAnswer
		}
		if _, err := wrapped(m.Arn, []byte{0}, nil, key, u); err != nil {
			return err
		}
		d = keywrap.Description{Key: *m.Arn, State: state(m.KeyState), Created: aws.ToTime(m.CreationDate),
			DeletionAt: aws.ToTime(m.DeletionDate), Material: aws.ToString(m.CurrentKeyMaterialId),
			Description: aws.ToString(m.Description)}
		if m.KeyManager == types.KeyManagerTypeCustomer && m.KeyState == types.KeyStateEnabled {
			rotation(ctx, c, opt, &d)
		}
		return nil
	})
	return d, err
}

func rotation(ctx context.Context, c *regional, opt func(*kms.Options), d *keywrap.Description) {
	if out, err := c.GetKeyRotationStatus(ctx, &kms.GetKeyRotationStatusInput{KeyId: &d.Key}, opt); err == nil {
		d.Rotation = out.KeyRotationEnabled
	}
	if out, err := c.ListKeyRotations(ctx, &kms.ListKeyRotationsInput{KeyId: &d.Key, Limit: aws.Int32(1000)}, opt); err == nil {
		for _, r := range out.Rotations {
			if t := aws.ToTime(r.RotationDate); t.After(d.Rotated) {
				d.Rotated = t
			}
		}
	}
}

func state(s types.KeyState) keywrap.State {
	switch s {
	case types.KeyStateEnabled:
		return keywrap.Enabled
	case types.KeyStateDisabled:
		return keywrap.Disabled
	case types.KeyStatePendingDeletion, types.KeyStatePendingReplicaDeletion:
		return keywrap.PendingDeletion
	}
	return keywrap.Unavailable
}
