package kmsserver

import (
	"crypto/rand"
	"fmt"
)

// operations maps every operation that the server knows.
var operations = map[string]handler{
	"GenerateDataKey":                 op(generateDataKey(true)),
	"GenerateDataKeyWithoutPlaintext": op(generateDataKey(false)),
	"Encrypt":                         op((*Server).encrypt),
	"Decrypt":                         op((*Server).decrypt),
	"ReEncrypt":                       op((*Server).reEncrypt),
	"CreateKey":                       op((*Server).createKey),
	"DescribeKey":                     op((*Server).describeKey),
	"ListKeys":                        op((*Server).listKeys),
	"EnableKey":                       op((*Server).enableKey),
	"DisableKey":                      op((*Server).disableKey),
	"ScheduleKeyDeletion":             op((*Server).scheduleKeyDeletion),
	"CancelKeyDeletion":               op((*Server).cancelKeyDeletion),
	"ReplicateKey":                    op((*Server).replicateKey),
	"ListResourceTags":                op((*Server).listResourceTags),
	"CreateAlias":                     op((*Server).createAlias),
	"UpdateAlias":                     op((*Server).updateAlias),
	"DeleteAlias":                     op((*Server).deleteAlias),
	"ListAliases":                     op((*Server).listAliases),
	"EnableKeyRotation":               op((*Server).enableKeyRotation),
	"DisableKeyRotation":              op((*Server).disableKeyRotation),
	"GetKeyRotationStatus":            op((*Server).getKeyRotationStatus),
	"ListKeyRotations":                op((*Server).listKeyRotations),
	"RotateKeyOnDemand":               op((*Server).rotateKeyOnDemand),
	"PutKeyPolicy":                    op((*Server).putKeyPolicy),
	"GetKeyPolicy":                    op((*Server).getKeyPolicy),
}

type generateDataKeyIn struct {
	common
	KeyId             string
	EncryptionContext map[string]string
	NumberOfBytes     *int
	KeySpec           string
}

type cipherOut struct {
	KeyId               string
	CiphertextBlob      []byte
	Plaintext           []byte `json:",omitempty"`
	KeyMaterialId       string `json:",omitempty"`
	EncryptionAlgorithm string `json:",omitempty"`
}

func generateDataKey(withPlaintext bool) func(*Server, *request, *generateDataKeyIn) (any, error) {
	return func(s *Server, q *request, in *generateDataKeyIn) (any, error) {
		n, err := dataKeyLen(in.KeySpec, in.NumberOfBytes)
		if err != nil {
			return nil, err
		}
		k, err := s.encryptingKey(q, in.KeyId, in.EncryptionContext, &in.common)
		if err != nil {
			return nil, err
		}
		plain := make([]byte, n)
		rand.Read(plain)
		out := cipherOut{KeyId: s.arn(k)}
		out.CiphertextBlob, out.KeyMaterialId = k.seal(plain, in.EncryptionContext)
		q.rec.KeyMaterialID = out.KeyMaterialId
		if withPlaintext {
			out.Plaintext = plain
		}
		return out, nil
	}
}

// encryptingKey does all checks of an operation that seals under one key.
func (s *Server) encryptingKey(q *request, ref string, context map[string]string, c *common) (*key, error) {
	if err := checkContext("encryptionContext", context); err != nil {
		return nil, err
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	k, err := s.target(q, q.op, ref, context)
	if err != nil {
		return nil, err
	}
	if err := s.usable(k); err != nil {
		return nil, err
	}
	return k, c.end()
}

type encryptIn struct {
	common
	KeyId               string
	Plaintext           []byte
	EncryptionContext   map[string]string
	EncryptionAlgorithm string
}

func (s *Server) encrypt(q *request, in *encryptIn) (any, error) {
	switch {
	case len(in.Plaintext) < 1:
		return nil, constraint("plaintext", "Member must have length greater than or equal to 1")
	case len(in.Plaintext) > maxPlain:
		return nil, constraint("plaintext", fmt.Sprintf("Member must have length less than or equal to %d", maxPlain))
	}
	if err := checkAlgorithm("encryptionAlgorithm", in.EncryptionAlgorithm); err != nil {
		return nil, err
	}
	k, err := s.encryptingKey(q, in.KeyId, in.EncryptionContext, &in.common)
	if err != nil {
		return nil, err
	}
	blob, material := k.seal(in.Plaintext, in.EncryptionContext)
	q.rec.KeyMaterialID = material
	return cipherOut{KeyId: s.arn(k), CiphertextBlob: blob, EncryptionAlgorithm: encryptionAlgorithm}, nil
}

// sealed names a blob to be opened.
type sealed struct {
	blob    []byte
	keyID   string // as the caller names it; "" is allowed
	context map[string]string
	action  string
	ignore  bool // dry run with IGNORE_CIPHERTEXT: key and permission only
}

// unseal finds the blob's key, checks permission and state, and opens it, in
// the order in which AWS reports what is wrong.
func (s *Server) unseal(q *request, b sealed) (k *key, plain []byte, material string, err error) {
	if !b.ignore {
		if err := checkBlob(b.blob); err != nil {
			return nil, nil, "", err
		}
	} else if b.keyID == "" {
		return nil, nil, "", invalid("A key must be named when the ciphertext is ignored")
	}
	id, _, readable := blobIDs(b.blob)
	if b.keyID != "" {
		if k, err = s.find(q.region, b.keyID); err != nil {
			return nil, nil, "", err
		}
	} else {
		if !readable {
			return nil, nil, "", fail("InvalidCiphertextException", "")
		}
		if k = s.keys[keyRef{q.region, id}]; k == nil {
			return nil, nil, "", fail("AccessDeniedException", "The ciphertext refers to a customer master key that does not exist, does not exist in this region, or you are not allowed to access.")
		}
	}
	if err := s.allowed(q, b.action, k, b.keyID, b.context); err != nil {
		return k, nil, "", err
	}
	if !b.ignore {
		switch {
		case !readable:
			return k, nil, "", fail("InvalidCiphertextException", "")
		case id != k.ID:
			return k, nil, "", fail("IncorrectKeyException", "The key ID in the request does not identify a CMK that can perform this operation.")
		}
	}
	if err := s.usable(k); err != nil || b.ignore {
		return k, nil, "", err
	}
	plain, material, ok := k.open(b.blob, b.context)
	if !ok {
		return k, nil, "", fail("InvalidCiphertextException", "")
	}
	return k, plain, material, nil
}

type decryptIn struct {
	common
	CiphertextBlob      []byte
	KeyId               string
	EncryptionContext   map[string]string
	EncryptionAlgorithm string
	DryRunModifiers     []string
}

func ignoreCiphertext(dryRun bool, modifiers []string) (bool, error) {
	for _, m := range modifiers {
		if m != "IGNORE_CIPHERTEXT" {
			return false, constraint("dryRunModifiers", fmt.Sprintf(enumRule, "IGNORE_CIPHERTEXT"))
		}
	}
	if len(modifiers) > 0 && !dryRun {
		return false, invalid("DryRunModifiers needs DryRun")
	}
	return len(modifiers) > 0, nil
}

type decryptOut struct {
	KeyId               string
	Plaintext           []byte
	EncryptionAlgorithm string
	KeyMaterialId       string
}

func (s *Server) decrypt(q *request, in *decryptIn) (any, error) {
	if err := checkContext("encryptionContext", in.EncryptionContext); err != nil {
		return nil, err
	}
	if err := checkAlgorithm("encryptionAlgorithm", in.EncryptionAlgorithm); err != nil {
		return nil, err
	}
	if err := in.check(); err != nil {
		return nil, err
	}
	ignore, err := ignoreCiphertext(in.DryRun, in.DryRunModifiers)
	if err != nil {
		return nil, err
	}
	k, plain, material, err := s.unseal(q, sealed{in.CiphertextBlob, in.KeyId, in.EncryptionContext, "Decrypt", ignore})
	if err != nil {
		return nil, err
	}
	if err := in.end(); err != nil {
		return nil, err
	}
	return decryptOut{s.arn(k), plain, encryptionAlgorithm, material}, nil
}

type reEncryptIn struct {
	common
	CiphertextBlob                 []byte
	SourceKeyId                    string
	SourceEncryptionContext        map[string]string
	SourceEncryptionAlgorithm      string
	DestinationKeyId               string
	DestinationEncryptionContext   map[string]string
	DestinationEncryptionAlgorithm string
	DryRunModifiers                []string
}

type reEncryptOut struct {
	CiphertextBlob                 []byte
	SourceKeyId                    string
	KeyId                          string
	SourceEncryptionAlgorithm      string
	DestinationEncryptionAlgorithm string
	SourceKeyMaterialId            string
	DestinationKeyMaterialId       string
}

func (in *reEncryptIn) validate() error {
	for _, err := range []error{
		checkContext("sourceEncryptionContext", in.SourceEncryptionContext),
		checkContext("destinationEncryptionContext", in.DestinationEncryptionContext),
		checkAlgorithm("sourceEncryptionAlgorithm", in.SourceEncryptionAlgorithm),
		checkAlgorithm("destinationEncryptionAlgorithm", in.DestinationEncryptionAlgorithm),
		in.check(),
	} {
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) reEncrypt(q *request, in *reEncryptIn) (any, error) {
	if err := in.validate(); err != nil {
		return nil, err
	}
	ignore, err := ignoreCiphertext(in.DryRun, in.DryRunModifiers)
	if err != nil {
		return nil, err
	}
	to, err := s.target(q, "ReEncryptTo", in.DestinationKeyId, in.DestinationEncryptionContext)
	if err != nil {
		return nil, err
	}
	from, plain, material, err := s.unseal(q, sealed{in.CiphertextBlob, in.SourceKeyId, in.SourceEncryptionContext, "ReEncryptFrom", ignore})
	if err != nil {
		return nil, err
	}
	if err := s.usable(to); err != nil {
		return nil, err
	}
	if err := in.end(); err != nil {
		return nil, err
	}
	out := reEncryptOut{
		SourceKeyId: s.arn(from), KeyId: s.arn(to), SourceKeyMaterialId: material,
		SourceEncryptionAlgorithm: encryptionAlgorithm, DestinationEncryptionAlgorithm: encryptionAlgorithm,
	}
	out.CiphertextBlob, out.DestinationKeyMaterialId = to.seal(plain, in.DestinationEncryptionContext)
	q.rec.KeyMaterialID = out.DestinationKeyMaterialId
	return out, nil
}
