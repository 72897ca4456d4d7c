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

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

const (
	opGenerate  = keywrap.OpGenerate
	opEncrypt   = keywrap.OpEncrypt
	opDecrypt   = keywrap.OpDecrypt
	opReEncrypt = keywrap.OpReEncrypt
	opDescribe  = keywrap.OpDescribe

	// maxBlob is KMS's own limit for CiphertextBlob, in bytes.
	maxBlob = 6144
)

var errBadAnswer = errors.New("the service's answer is not what KMS answers")

// GenerateDataKey implements keywrap.Provider.
func (p *Provider) GenerateDataKey(ctx context.Context, key string, ec keywrap.Context) (keywrap.DataKey, error) {
	u, err := parseURI(key)
	if err != nil {
		return keywrap.DataKey{}, callError(opGenerate, key, "", err)
	}
	var dk keywrap.DataKey
	err = p.do(ctx, call{op: opGenerate, key: key, uri: u}, func(ctx context.Context, c *regional, opt func(*kms.Options)) error {
		out, err := c.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{
			KeyId: aws.String(key), KeySpec: types.DataKeySpecAes256, EncryptionContext: ec.Map(),
		}, opt)
		if err != nil {
			return err
		}
		defer clear(out.Plaintext)
		if len(out.Plaintext) != keywrap.DataKeyLen {
			return errBadAnswer
		}
		if dk.Wrapped, err = wrapped(out.KeyId, out.CiphertextBlob, out.KeyMaterialId, key, u); err != nil {
			return err
		}
		dk.Plain = keymem.Take(out.Plaintext)
		return nil
	})
	return dk, err
}

// wrapped checks what KMS says about a key that it wrapped. asked is the key
// that it was told to use.
func wrapped(keyID *string, blob []byte, material *string, asked string, u keyURI) (keywrap.Wrapped, error) {
	w := keywrap.Wrapped{Key: aws.ToString(keyID), Blob: blob, Material: aws.ToString(material)}
	if _, err := parseKeyARN(w.Key); err != nil || len(blob) == 0 || len(blob) > maxBlob {
		return keywrap.Wrapped{}, errBadAnswer
	}
	if u.id != "" && w.Key != asked {
		return keywrap.Wrapped{}, keywrap.ErrWrongKey
	}
	return w, nil
}

// Encrypt implements keywrap.Provider. KMS gives no material id here.
func (p *Provider) Encrypt(ctx context.Context, key string, ec keywrap.Context, plain *keymem.Key) (keywrap.Wrapped, error) {
	return p.encrypt(ctx, opEncrypt, key, ec, plain)
}

func (p *Provider) encrypt(ctx context.Context, op, key string, ec keywrap.Context, plain *keymem.Key) (keywrap.Wrapped, error) {
	u, err := parseURI(key)
	if err == nil && plain.Len() != keywrap.DataKeyLen {
		err = keywrap.ErrKeyLength
	}
	if err != nil {
		return keywrap.Wrapped{}, callError(op, key, "", err)
	}
	var w keywrap.Wrapped
	err = p.do(ctx, call{op: op, key: key, uri: u}, func(ctx context.Context, c *regional, opt func(*kms.Options)) error {
		out, err := c.Encrypt(ctx, &kms.EncryptInput{
			KeyId: aws.String(key), Plaintext: plain.Bytes(), EncryptionContext: ec.Map(),
		}, opt)
		if err != nil {
			return err
		}
		w, err = wrapped(out.KeyId, out.CiphertextBlob, nil, key, u)
		return err
	})
	return w, err
}

// Decrypt implements keywrap.Provider. It asks in the Region that w.Key names;
// for another replica of a multi-Region key, see Replica.
func (p *Provider) Decrypt(ctx context.Context, w keywrap.Wrapped, ec keywrap.Context) (*keymem.Key, error) {
	return p.decrypt(ctx, opDecrypt, w, ec)
}

func (p *Provider) decrypt(ctx context.Context, op string, w keywrap.Wrapped, ec keywrap.Context) (*keymem.Key, error) {
	u, err := source(w)
	if err != nil {
		return nil, callError(op, w.Key, "", err)
	}
	var plain *keymem.Key
	err = p.do(ctx, call{op: op, key: w.Key, uri: u}, func(ctx context.Context, c *regional, opt func(*kms.Options)) error {
		out, err := c.Decrypt(ctx, &kms.DecryptInput{
			KeyId: aws.String(w.Key), CiphertextBlob: w.Blob, EncryptionContext: ec.Map(),
		}, opt)
		if err != nil {
			return blobError(err)
		}
		defer clear(out.Plaintext)
		if aws.ToString(out.KeyId) != w.Key {
			return keywrap.ErrWrongKey
		}
		if len(out.Plaintext) != keywrap.DataKeyLen { // authentic, but no data key of ours
			return keywrap.ErrCiphertext
		}
		plain = keymem.Take(out.Plaintext)
		return nil
	})
	return plain, err
}

// source checks a wrapped key before it costs a call.
func source(w keywrap.Wrapped) (keyURI, error) {
	u, err := parseKeyARN(w.Key)
	if err == nil && (len(w.Blob) == 0 || len(w.Blob) > maxBlob) {
		err = fmt.Errorf("%w: %d bytes", keywrap.ErrCiphertext, len(w.Blob))
	}
	return u, err
}

// blobError gives a complaint about the form of the blob the meaning that it
// has here: the key and the context are well-formed, the blob comes from disk.
func blobError(err error) error {
	var api smithy.APIError
	if errors.As(err, &api) && strings.HasPrefix(api.ErrorCode(), "Validation") &&
		strings.Contains(strings.ToLower(api.ErrorMessage()), "ciphertextblob") {
		return fmt.Errorf("%w: %w", keywrap.ErrCiphertext, err)
	}
	return err
}

// ReEncrypt implements keywrap.Provider. KMS re-encrypts within one Region
// only: between two the data key passes through this process, decrypted in the
// one and encrypted in the other, each with a budget of its own.
func (p *Provider) ReEncrypt(ctx context.Context, w keywrap.Wrapped, from keywrap.Context, key string, to keywrap.Context) (keywrap.Wrapped, error) {
	u, err := source(w)
	if err != nil {
		return keywrap.Wrapped{}, callError(opReEncrypt, w.Key, "", err)
	}
	target, err := parseURI(key)
	if err != nil {
		return keywrap.Wrapped{}, callError(opReEncrypt, key, "", err)
	}
	if same, err := p.sameRegion(ctx, u, target); err != nil {
		return keywrap.Wrapped{}, p.fail(ctx, call{op: opReEncrypt, key: key}, err)
	} else if !same {
		plain, err := p.decrypt(ctx, opReEncrypt, w, from)
		if err != nil {
			return keywrap.Wrapped{}, err
		}
		defer plain.Wipe()
		return p.encrypt(ctx, opReEncrypt, key, to, plain)
	}
	var out keywrap.Wrapped
	err = p.do(ctx, call{op: opReEncrypt, key: w.Key, other: key, uri: u}, func(ctx context.Context, c *regional, opt func(*kms.Options)) error {
		r, err := c.ReEncrypt(ctx, &kms.ReEncryptInput{
			SourceKeyId: aws.String(w.Key), CiphertextBlob: w.Blob, SourceEncryptionContext: from.Map(),
			DestinationKeyId: aws.String(key), DestinationEncryptionContext: to.Map(),
		}, opt)
		if err != nil {
			return blobError(err)
		}
		if aws.ToString(r.SourceKeyId) != w.Key {
			return keywrap.ErrWrongKey
		}
		out, err = wrapped(r.KeyId, r.CiphertextBlob, r.DestinationKeyMaterialId, key, target)
		return err
	})
	return out, err
}

// sameRegion compares Regions; an alias without one is in the configured Region.
func (p *Provider) sameRegion(ctx context.Context, a, b keyURI) (bool, error) {
	if b.region != "" {
		return a.region == b.region, nil
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	s, _, err := p.client(ctx, b)
	if err != nil {
		return false, err
	}
	return a.region == s.cfg.Region, nil
}
