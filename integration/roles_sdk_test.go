package integration

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
)

// contextOf is an encryption context of a file, name key or store.
func contextOf(store, class, purpose string) map[string]string {
	return map[string]string{"kmsfs:store": store, "kmsfs:class": class, "kmsfs:purpose": purpose, "kmsfs:id": strings.Repeat("0f", 16)}
}

// rights is what the policy of a role allows on a key: operation, then purposes.
type rights map[string][]string

var everyPurpose = []string{"data", "names", "store"}

// expected is the whole of what each role may do, on the key that makes data
// keys and on a further recipient.
var expected = map[string]struct{ first, further rights }{
	"reader": {rights{"Decrypt": everyPurpose}, rights{"Decrypt": everyPurpose}},
	"writer": {rights{"GenerateDataKey": {"data"}, "Decrypt": {"names", "store"}}, rights{"Encrypt": {"data"}, "Decrypt": {"names", "store"}}},
	"user":   {rights{"GenerateDataKey": {"data"}, "Decrypt": everyPurpose}, rights{"Encrypt": {"data"}, "Decrypt": everyPurpose}},
	"names":  {rights{"Decrypt": {"names", "store"}}, rights{"Decrypt": {"names", "store"}}},
	"rewrapper": {rights{"ReEncrypt": everyPurpose, "DescribeKey": nil},
		rights{"ReEncrypt": everyPurpose, "DescribeKey": nil}},
	"auditor": {rights{"DescribeKey": nil, "GetKeyRotationStatus": nil, "ListKeyRotations": nil},
		rights{"DescribeKey": nil, "GetKeyRotationStatus": nil, "ListKeyRotations": nil}},
}

// sample is an encryption context with what was encrypted under it.
type sample struct {
	key   string
	ec    map[string]string
	class string // of the key
	ours  bool   // exactly what kmsfs sends for this key
	blob  []byte
}

func (s *sample) String() string { return fmt.Sprintf("%v under %s", s.ec, s.key) }

// samples are all combinations of own and foreign store, class and purpose, and
// contexts with a pair too many or too few.
func (b *rolesBench) samples() []*sample {
	b.t.Helper()
	var out []*sample
	for _, key := range b.keys() {
		class := "phi"
		if key == b.general {
			class = "general"
		}
		add := func(ec map[string]string, ours bool) {
			s := &sample{key: key, ec: ec, class: class, ours: ours}
			answer, err := admin(b.kms).Encrypt(context.Background(), &kms.EncryptInput{KeyId: &key, Plaintext: make([]byte, 32), EncryptionContext: ec})
			if err != nil {
				b.t.Fatal(err)
			}
			s.blob = answer.CiphertextBlob
			out = append(out, s)
		}
		for _, store := range []string{b.id, strings.Repeat("ab", 16)} {
			for _, c := range []string{"general", "phi", "other"} {
				for _, purpose := range append(slices.Clone(everyPurpose), "backup") {
					add(contextOf(store, c, purpose), store == b.id && c == class && purpose != "backup")
				}
			}
		}
		add(nil, false)
		for _, purpose := range everyPurpose {
			more := contextOf(b.id, class, purpose)
			more["kmsfs:path"] = "/x"
			add(more, false)
			for _, missing := range slices.Sorted(maps.Keys(contextOf(b.id, class, purpose))) {
				less := contextOf(b.id, class, purpose)
				delete(less, missing)
				add(less, false)
			}
		}
	}
	return out
}

// cryptoAsks are the operations with an encryption context.
var cryptoAsks = map[string]func(c *kms.Client, s *sample) error{
	"GenerateDataKey": func(c *kms.Client, s *sample) error {
		_, err := c.GenerateDataKey(context.Background(), &kms.GenerateDataKeyInput{KeyId: &s.key, KeySpec: "AES_256", EncryptionContext: s.ec})
		return err
	},
	"GenerateDataKeyWithoutPlaintext": func(c *kms.Client, s *sample) error {
		_, err := c.GenerateDataKeyWithoutPlaintext(context.Background(), &kms.GenerateDataKeyWithoutPlaintextInput{KeyId: &s.key, KeySpec: "AES_256", EncryptionContext: s.ec})
		return err
	},
	"Encrypt": func(c *kms.Client, s *sample) error {
		_, err := c.Encrypt(context.Background(), &kms.EncryptInput{KeyId: &s.key, Plaintext: make([]byte, 32), EncryptionContext: s.ec})
		return err
	},
	"Decrypt": func(c *kms.Client, s *sample) error {
		_, err := c.Decrypt(context.Background(), &kms.DecryptInput{KeyId: &s.key, CiphertextBlob: s.blob, EncryptionContext: s.ec})
		return err
	},
	"ReEncrypt": func(c *kms.Client, s *sample) error {
		_, err := c.ReEncrypt(context.Background(), &kms.ReEncryptInput{SourceKeyId: &s.key, CiphertextBlob: s.blob, SourceEncryptionContext: s.ec,
			DestinationKeyId: &s.key, DestinationEncryptionContext: s.ec})
		return err
	},
}

// keyOps are the operations about a key itself.
var keyOps = map[string]keyAsk{
	"DescribeKey":  keyAsks["DescribeKey"],
	"GetKeyPolicy": keyAsks["GetKeyPolicy"],
	"GetKeyRotationStatus": func(c *kms.Client, key *string) error {
		_, err := c.GetKeyRotationStatus(context.Background(), &kms.GetKeyRotationStatusInput{KeyId: key})
		return err
	},
	"ListKeyRotations": func(c *kms.Client, key *string) error {
		_, err := c.ListKeyRotations(context.Background(), &kms.ListKeyRotationsInput{KeyId: key})
		return err
	},
	"EnableKeyRotation": func(c *kms.Client, key *string) error {
		_, err := c.EnableKeyRotation(context.Background(), &kms.EnableKeyRotationInput{KeyId: key})
		return err
	},
	"RotateKeyOnDemand":   keyAsks["RotateKeyOnDemand"],
	"DisableKey":          keyAsks["disable and enable"],
	"ScheduleKeyDeletion": keyAsks["deletion and back"],
	"PutKeyPolicy": func(c *kms.Client, key *string) error {
		_, err := c.PutKeyPolicy(context.Background(), &kms.PutKeyPolicyInput{KeyId: key, Policy: aws.String("{}")})
		return err
	},
}

// TestRolesBySDK holds the policies against the table, call by call: what a role
// does not need is denied.
func TestRolesBySDK(t *testing.T) {
	t.Parallel()
	b := newRolesBench(t)
	samples := b.samples()
	for role, want := range expected {
		b.load(role)
		c := b.client(role)
		of := func(key string) rights {
			if key == b.recovery {
				return want.further
			}
			return want.first
		}
		allowed := 0
		for _, s := range samples {
			for op, ask := range cryptoAsks {
				may := s.ours && slices.Contains(of(s.key)[op], s.ec["kmsfs:purpose"])
				wantDenied(t, fmt.Sprintf("%s: %s with %s", role, op, s), ask(c, s), !may)
				if may {
					allowed++
				}
			}
		}
		for _, key := range b.keys() {
			for op, ask := range keyOps {
				_, may := of(key)[op]
				wantDenied(t, fmt.Sprintf("%s: %s of %s", role, op, key), ask(c, &key), !may)
				if may {
					allowed++
				}
			}
		}
		if allowed == 0 {
			t.Errorf("%s: nothing was allowed: the table is not tested", role)
		}
	}
}

// TestRoleRewrapperMovesContexts: KMS judges the two ends of a ReEncrypt apart,
// so that a rewrapper can give a data key another purpose, and together with
// somebody who opens names reads files. docs/kms.md says so.
func TestRoleRewrapperMovesContexts(t *testing.T) {
	t.Parallel()
	b := newRolesBench(t)
	data, names := contextOf(b.id, "phi", "data"), contextOf(b.id, "phi", "names")
	key, err := admin(b.kms).GenerateDataKey(context.Background(), &kms.GenerateDataKeyInput{KeyId: &b.phi, KeySpec: "AES_256", EncryptionContext: data})
	if err != nil {
		t.Fatal(err)
	}
	b.load("rewrapper")
	move := func(blob []byte, to string, ec map[string]string) ([]byte, error) {
		out, err := b.client("rewrapper").ReEncrypt(context.Background(), &kms.ReEncryptInput{SourceKeyId: &b.phi, CiphertextBlob: blob,
			SourceEncryptionContext: data, DestinationKeyId: &to, DestinationEncryptionContext: ec})
		if err != nil {
			return nil, err
		}
		return out.CiphertextBlob, nil
	}
	moved, err := move(key.CiphertextBlob, b.recovery, names)
	wantDenied(t, "to another purpose", err, false)
	_, err = move(key.CiphertextBlob, b.general, data)
	wantDenied(t, "to the key of another class", err, true)
	_, err = move(key.CiphertextBlob, b.phi, nil)
	wantDenied(t, "to no context", err, true)
	b.load("names")
	_, err = b.client("names").Decrypt(context.Background(), &kms.DecryptInput{KeyId: &b.recovery, CiphertextBlob: moved, EncryptionContext: names})
	wantDenied(t, "whoever opens names opens what was moved there", err, false)
	_, err = b.client("names").Decrypt(context.Background(), &kms.DecryptInput{KeyId: &b.phi, CiphertextBlob: key.CiphertextBlob, EncryptionContext: data})
	wantDenied(t, "and not what was not", err, true)
}
