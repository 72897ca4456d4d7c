package awskms

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

var _ keywrap.Checker = (*Provider)(nil)

// Check implements keywrap.Checker by KMS's DryRun, which needs the same
// permissions as the call, and shows in CloudTrail. A Decrypt or ReEncrypt
// without a wrapped key is asked about with the modifier IGNORE_CIPHERTEXT.
// Describe has no DryRun: it is called. Between two Regions ReEncrypt is
// checked as the Decrypt and the Encrypt that it consists of there.
func (p *Provider) Check(ctx context.Context, c keywrap.Check) error {
	key := c.KeyURI()
	switch c.Op {
	case opGenerate, opEncrypt:
		u, err := parseURI(key)
		if err != nil {
			return callError(c.Op, key, "", err)
		}
		return p.checkSeal(ctx, call{op: c.Op, key: key, uri: u}, c)
	case opDecrypt:
		return p.checkDecrypt(ctx, c.Op, key, c)
	case opReEncrypt:
		return p.checkReEncrypt(ctx, key, c)
	case opDescribe:
		_, err := p.Describe(ctx, key)
		return err
	}
	return callError(c.Op, key, "", fmt.Errorf("%w: %q is no operation", keywrap.ErrUnsupported, c.Op))
}

// checkSeal asks about the operation that would put a key under c.key.
func (p *Provider) checkSeal(ctx context.Context, cl call, c keywrap.Check) error {
	ec := c.Context.Map()
	return p.do(ctx, cl, func(ctx context.Context, r *regional, opt func(*kms.Options)) error {
		if c.Op == opGenerate {
			out, err := r.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{KeyId: aws.String(cl.key),
				KeySpec: types.DataKeySpecAes256, EncryptionContext: ec, DryRun: aws.Bool(true)}, opt)
			if err == nil { // a server that does not know DryRun
				clear(out.Plaintext)
			}
			return dry(err)
		}
		_, err := r.Encrypt(ctx, &kms.EncryptInput{KeyId: aws.String(cl.key),
			Plaintext: make([]byte, keywrap.DataKeyLen), EncryptionContext: ec, DryRun: aws.Bool(true)}, opt)
		return dry(err)
	})
}

// checkable checks the wrapped key of a Check before it costs a request.
func checkable(key string, w keywrap.Wrapped) (keyURI, error) {
	if len(w.Blob) == 0 {
		return parseKeyARN(key)
	}
	return source(w)
}

func modifiers(w keywrap.Wrapped) []types.DryRunModifierType {
	if len(w.Blob) == 0 {
		return []types.DryRunModifierType{types.DryRunModifierTypeIgnoreCiphertext}
	}
	return nil
}

func (p *Provider) checkDecrypt(ctx context.Context, op, key string, c keywrap.Check) error {
	c.Wrapped.Key = key
	u, err := checkable(key, c.Wrapped)
	if err != nil {
		return callError(op, key, "", err)
	}
	return p.do(ctx, call{op: op, key: key, uri: u}, func(ctx context.Context, r *regional, opt func(*kms.Options)) error {
		out, err := r.Decrypt(ctx, &kms.DecryptInput{KeyId: aws.String(key), CiphertextBlob: c.Wrapped.Blob,
			EncryptionContext: c.Context.Map(), DryRun: aws.Bool(true), DryRunModifiers: modifiers(c.Wrapped)}, opt)
		if err == nil {
			clear(out.Plaintext)
		}
		return dry(err)
	})
}

func (p *Provider) checkReEncrypt(ctx context.Context, key string, c keywrap.Check) error {
	c.Wrapped.Key = key
	u, err := checkable(key, c.Wrapped)
	if err != nil {
		return callError(opReEncrypt, key, "", err)
	}
	target, err := parseURI(c.ToKey)
	if err != nil {
		return callError(opReEncrypt, c.ToKey, "", err)
	}
	same, err := p.sameRegion(ctx, u, target)
	if err != nil {
		return p.fail(ctx, call{op: opReEncrypt, key: c.ToKey}, err)
	}
	if !same {
		if err := p.checkDecrypt(ctx, opReEncrypt, key, c); err != nil {
			return err
		}
		return p.checkSeal(ctx, call{op: opReEncrypt, key: c.ToKey, uri: target}, keywrap.Check{Op: opEncrypt, Context: c.ToContext})
	}
	return p.do(ctx, call{op: opReEncrypt, key: key, other: c.ToKey, uri: u}, func(ctx context.Context, r *regional, opt func(*kms.Options)) error {
		_, err := r.ReEncrypt(ctx, &kms.ReEncryptInput{SourceKeyId: aws.String(key), CiphertextBlob: c.Wrapped.Blob,
			SourceEncryptionContext: c.Context.Map(), DestinationKeyId: aws.String(c.ToKey),
			DestinationEncryptionContext: c.ToContext.Map(), DryRun: aws.Bool(true), DryRunModifiers: modifiers(c.Wrapped)}, opt)
		return dry(err)
	})
}

// dry turns the answer to a DryRun into what the call would have answered.
func dry(err error) error {
	var api smithy.APIError
	if errors.As(err, &api) && strings.TrimSuffix(api.ErrorCode(), "Exception") == dryRunCode {
		return nil
	}
	return blobError(err)
}
