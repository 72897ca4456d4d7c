package kmsserver

import (
	"bytes"
	"context"
	"maps"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
)

var phi = map[string]string{"kmsfs:store": "00ff", "kmsfs:class": "phi", "kmsfs:purpose": "data", "kmsfs:id": "aa"}

// dataKey makes a data key and fails the test if that fails.
func dataKey(t *testing.T, c *kms.Client, keyID string, ec map[string]string) *kms.GenerateDataKeyOutput {
	t.Helper()
	out, err := c.GenerateDataKey(context.Background(), &kms.GenerateDataKeyInput{
		KeyId: &keyID, KeySpec: types.DataKeySpecAes256, EncryptionContext: ec,
	})
	return must(t, out, err)
}

func decrypt(c *kms.Client, keyID string, blob []byte, ec map[string]string) (*kms.DecryptOutput, error) {
	in := &kms.DecryptInput{CiphertextBlob: blob, EncryptionContext: ec}
	if keyID != "" {
		in.KeyId = &keyID
	}
	return c.Decrypt(context.Background(), in)
}

func TestDataKeys(t *testing.T) {
	ctx := context.Background()
	s, c := start(t)
	arn := newKey(t, s, KeyOptions{Alias: "alias/phi"})
	dk := dataKey(t, c, "alias/phi", phi)
	if got := *dk.KeyId; got != arn {
		t.Errorf("KeyId = %s, want the ARN %s", got, arn)
	}
	if got := len(dk.CiphertextBlob); got != 184 {
		t.Errorf("blob of a 32-byte key has %d bytes, want 184", got)
	}
	if len(dk.Plaintext) != 32 || len(aws.ToString(dk.KeyMaterialId)) != 64 {
		t.Errorf("plaintext %d bytes, material id %q", len(dk.Plaintext), aws.ToString(dk.KeyMaterialId))
	}
	for _, ref := range []string{"", arn, arn[strings.LastIndex(arn, "/")+1:], "alias/phi", strings.Replace(arn, arn[strings.LastIndex(arn, ":")+1:], "alias/phi", 1)} {
		out, err := decrypt(c, ref, dk.CiphertextBlob, maps.Clone(phi))
		if err != nil {
			t.Errorf("Decrypt with key %q: %v", ref, err)
			continue
		}
		if !bytes.Equal(out.Plaintext, dk.Plaintext) || *out.KeyId != arn || aws.ToString(out.KeyMaterialId) != *dk.KeyMaterialId {
			t.Errorf("Decrypt with key %q answers another key", ref)
		}
	}
	n := int32(64)
	without, err := c.GenerateDataKeyWithoutPlaintext(ctx, &kms.GenerateDataKeyWithoutPlaintextInput{KeyId: &arn, NumberOfBytes: &n})
	must(t, without, err)
	out, err := decrypt(c, arn, without.CiphertextBlob, nil)
	if must(t, out, err); len(out.Plaintext) != 64 || len(without.CiphertextBlob) != 64+152 {
		t.Errorf("64 bytes without plaintext: %d bytes, blob %d", len(out.Plaintext), len(without.CiphertextBlob))
	}
}

func TestEncryptAndReEncrypt(t *testing.T) {
	ctx := context.Background()
	s, c := start(t)
	a, b := newKey(t, s, KeyOptions{}), newKey(t, s, KeyOptions{})
	enc, err := c.Encrypt(ctx, &kms.EncryptInput{KeyId: &a, Plaintext: []byte("secret"), EncryptionContext: phi})
	must(t, enc, err)
	to := map[string]string{"kmsfs:class": "pci"}
	re, err := c.ReEncrypt(ctx, &kms.ReEncryptInput{
		CiphertextBlob: enc.CiphertextBlob, SourceKeyId: &a, SourceEncryptionContext: phi,
		DestinationKeyId: &b, DestinationEncryptionContext: to,
	})
	must(t, re, err)
	if *re.SourceKeyId != a || *re.KeyId != b || len(*re.SourceKeyMaterialId) != 64 || *re.SourceKeyMaterialId == *re.DestinationKeyMaterialId {
		t.Errorf("ReEncrypt = %+v", re)
	}
	out, err := decrypt(c, b, re.CiphertextBlob, to)
	if must(t, out, err); string(out.Plaintext) != "secret" {
		t.Errorf("plaintext = %q", out.Plaintext)
	}
	_, err = decrypt(c, b, re.CiphertextBlob, phi)
	wantCode(t, "old context", err, "InvalidCiphertextException")
	calls := s.Calls()
	rec := calls[1]
	if rec.KeyID != b || rec.SourceKeyID != a || rec.EncryptionContext["kmsfs:class"] != "pci" || rec.SourceEncryptionContext["kmsfs:class"] != "phi" {
		t.Errorf("ReEncrypt logged as %+v", rec)
	}
}

// TestEveryBitOfABlobCounts flips each bit of a blob in turn.
func TestEveryBitOfABlobCounts(t *testing.T) {
	s := StartT(t, Options{})
	arn := newKey(t, s, KeyOptions{})
	s.mu.Lock()
	defer s.mu.Unlock()
	k, err := s.find(s.region, arn)
	must(t, k, err)
	blob, _ := k.seal([]byte("0123456789abcdef"), phi)
	if _, _, ok := k.open(blob, phi); !ok {
		t.Fatal("the untouched blob does not open")
	}
	for i := range len(blob) * 8 {
		bad := bytes.Clone(blob)
		bad[i/8] ^= 1 << (i % 8)
		if _, _, ok := k.open(bad, phi); ok {
			t.Fatalf("blob opens with bit %d flipped", i)
		}
	}
	for n := range blob {
		if _, _, ok := k.open(blob[:n], phi); ok {
			t.Fatalf("blob opens when cut to %d bytes", n)
		}
	}
}

// TestContextIsCanonical: pairs that run together to the same bytes differ.
func TestContextIsCanonical(t *testing.T) {
	a := associated(nil, map[string]string{"ab": "c"})
	for _, other := range []map[string]string{{"a": "bc"}, {"abc": ""}, {"ab": "c", "": ""}, nil} {
		if bytes.Equal(a, associated(nil, other)) {
			t.Errorf("%v has the associated data of ab=c", other)
		}
	}
}

func TestWrongKeyOrBlob(t *testing.T) {
	s, c := start(t)
	a, b := newKey(t, s, KeyOptions{}), newKey(t, s, KeyOptions{})
	blob := dataKey(t, c, a, phi).CiphertextBlob
	other := StartT(t, Options{})
	foreign := dataKey(t, client(other, DefaultPrincipal(), "us-east-1"), newKey(t, other, KeyOptions{}), nil).CiphertextBlob
	bad := bytes.Clone(blob)
	bad[len(bad)-1] ^= 1
	unknown := "12345678-1234-1234-1234-123456789012"
	for _, tc := range []struct {
		name, key string
		blob      []byte
		ec        map[string]string
		want      string
	}{
		{"another key", b, blob, phi, "IncorrectKeyException"},
		{"no context", a, blob, nil, "InvalidCiphertextException"},
		{"changed context", a, blob, map[string]string{"kmsfs:class": "pci"}, "InvalidCiphertextException"},
		{"tampered", a, bad, phi, "InvalidCiphertextException"},
		{"tampered, key not named", "", bad, phi, "InvalidCiphertextException"},
		{"garbage", a, []byte("garbage"), phi, "InvalidCiphertextException"},
		{"garbage, key not named", "", []byte("garbage"), phi, "InvalidCiphertextException"},
		{"blob of a key unknown here", "", foreign, nil, "AccessDeniedException"},
		{"unknown key", unknown, blob, phi, "NotFoundException"},
		{"not a key id", "nonsense", blob, phi, "NotFoundException"},
		{"unknown alias", "alias/none", blob, phi, "NotFoundException"},
		{"another Region", strings.Replace(a, "us-east-1", "eu-west-1", 1), blob, phi, "NotFoundException"},
		{"another account", strings.Replace(a, DefaultAccount, "444455556666", 1), blob, phi, "NotFoundException"},
		{"an ARN of something else", "arn:aws:s3:us-east-1:111122223333:key/x", blob, phi, "InvalidArnException"},
		{"empty blob", a, []byte{}, phi, "ValidationException"},
		{"blob too long", a, make([]byte, 6145), phi, "ValidationException"},
	} {
		_, err := decrypt(c, tc.key, tc.blob, tc.ec)
		wantCode(t, tc.name, err, tc.want)
	}
}

func TestLimits(t *testing.T) {
	ctx := context.Background()
	s, c := start(t)
	arn := newKey(t, s, KeyOptions{})
	n := func(i int32) *int32 { return &i }
	for name, in := range map[string]*kms.GenerateDataKeyInput{
		"neither":          {KeyId: &arn},
		"both":             {KeyId: &arn, KeySpec: "AES_256", NumberOfBytes: n(32)},
		"0 bytes":          {KeyId: &arn, NumberOfBytes: n(0)},
		"1025 bytes":       {KeyId: &arn, NumberOfBytes: n(1025)},
		"unknown spec":     {KeyId: &arn, KeySpec: "AES_512"},
		"empty name":       {KeyId: &arn, KeySpec: "AES_256", EncryptionContext: map[string]string{"": "x"}},
		"context too long": {KeyId: &arn, KeySpec: "AES_256", EncryptionContext: map[string]string{"k": strings.Repeat("x", 8192)}},
		"key id too long":  {KeyId: aws.String(strings.Repeat("k", 2049)), KeySpec: "AES_256"},
		"11 grant tokens":  {KeyId: &arn, KeySpec: "AES_256", GrantTokens: make([]string, 11)},
	} {
		_, err := c.GenerateDataKey(ctx, in)
		wantCode(t, name, err, "ValidationException")
	}
	_, err := c.Encrypt(ctx, &kms.EncryptInput{KeyId: &arn, Plaintext: make([]byte, 4096)})
	wantCode(t, "4096 bytes", err, "")
	_, err = c.Encrypt(ctx, &kms.EncryptInput{KeyId: &arn, Plaintext: make([]byte, 4097)})
	wantCode(t, "4097 bytes", err, "ValidationException")
	_, err = c.Encrypt(ctx, &kms.EncryptInput{KeyId: &arn, Plaintext: []byte{}})
	wantCode(t, "nothing to encrypt", err, "ValidationException")
	_, err = c.Encrypt(ctx, &kms.EncryptInput{KeyId: &arn, Plaintext: []byte{1}, EncryptionAlgorithm: types.EncryptionAlgorithmSpecRsaesOaepSha256})
	wantCode(t, "an asymmetric algorithm", err, "InvalidKeyUsageException")
	_, err = c.GenerateRandom(ctx, &kms.GenerateRandomInput{NumberOfBytes: n(8)})
	wantCode(t, "an operation that kmsd lacks", err, "UnsupportedOperationException")
}

func TestDryRun(t *testing.T) {
	ctx := context.Background()
	s, c := start(t)
	a, b := newKey(t, s, KeyOptions{}), newKey(t, s, KeyOptions{})
	blob := dataKey(t, c, a, phi).CiphertextBlob
	yes := aws.Bool(true)
	gen := func() error {
		_, err := c.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{KeyId: &a, KeySpec: "AES_256", DryRun: yes})
		return err
	}
	wantCode(t, "GenerateDataKey", gen(), "DryRunOperationException")
	_, err := c.Encrypt(ctx, &kms.EncryptInput{KeyId: &a, Plaintext: []byte{1}, DryRun: yes})
	wantCode(t, "Encrypt", err, "DryRunOperationException")
	_, err = c.Decrypt(ctx, &kms.DecryptInput{KeyId: &a, CiphertextBlob: blob, EncryptionContext: phi, DryRun: yes})
	wantCode(t, "Decrypt", err, "DryRunOperationException")
	_, err = c.Decrypt(ctx, &kms.DecryptInput{KeyId: &b, CiphertextBlob: blob, EncryptionContext: phi, DryRun: yes})
	wantCode(t, "Decrypt with the wrong key", err, "IncorrectKeyException")
	_, err = c.Decrypt(ctx, &kms.DecryptInput{KeyId: &b, DryRun: yes, DryRunModifiers: []types.DryRunModifierType{types.DryRunModifierTypeIgnoreCiphertext}})
	wantCode(t, "Decrypt without ciphertext", err, "DryRunOperationException")
	_, err = c.ReEncrypt(ctx, &kms.ReEncryptInput{CiphertextBlob: blob, SourceEncryptionContext: phi, DestinationKeyId: &b, DryRun: yes})
	wantCode(t, "ReEncrypt", err, "DryRunOperationException")
	_, err = c.DisableKey(ctx, &kms.DisableKeyInput{KeyId: &a})
	wantCode(t, "DisableKey", err, "")
	wantCode(t, "disabled key", gen(), "DisabledException")
	if calls := s.Calls(); !calls[1].DryRun || calls[0].DryRun {
		t.Errorf("dryRun logged as %v and %v", calls[0].DryRun, calls[1].DryRun)
	}
}
