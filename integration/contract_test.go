package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	awscreds "github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/awskms"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keywraptest"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
)

// admin is the real SDK's client as the account's administrator.
func admin(s *kmsserver.Server) *kms.Client {
	p := kmsserver.DefaultPrincipal()
	return kms.New(kms.Options{
		Region: s.Region(), BaseEndpoint: aws.String(s.URL()),
		Credentials: awscreds.NewStaticCredentialsProvider(p.AccessKeyID, p.SecretAccessKey, ""),
	})
}

// setEnv gives the test process the environment of a principal. awskms reads
// it as any program on the SDK does.
func setEnv(t *testing.T, env []string) {
	t.Helper()
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		t.Setenv(name, value)
	}
}

func newAWS(t *testing.T, s *kmsserver.Server) *awskms.Provider {
	t.Helper()
	setEnv(t, s.Env(kmsserver.DefaultPrincipal()))
	p, err := awskms.New(context.Background(), awskms.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// TestContractAWS runs the contract of key services over the real SDK, with
// nothing left out: the server enforces every key state. It is not parallel, as
// the suite counts the keys in memory.
func TestContractAWS(t *testing.T) {
	s := kmsserver.StartT(t, kmsserver.Options{})
	setup := awsSetup(admin(s))
	setup.Provider = newAWS(t, s)
	setup.Unknown = "arn:aws:kms:us-east-1:" + s.Account() + ":key/00000000-0000-0000-0000-000000000000"
	keywraptest.Run(t, setup)
}

// awsSetup changes keys through the KMS API, as an administrator does.
func awsSetup(c *kms.Client) keywraptest.Setup {
	ctx := context.Background()
	var aliases atomic.Int64
	do := func(t testing.TB, _ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	return keywraptest.Setup{
		NewKey: func(t testing.TB) string {
			out, err := c.CreateKey(ctx, &kms.CreateKeyInput{})
			do(t, out, err)
			return aws.ToString(out.KeyMetadata.Arn)
		},
		NewAlias: func(t testing.TB, key string) string {
			name := fmt.Sprintf("alias/contract-%d", aliases.Add(1))
			out, err := c.CreateAlias(ctx, &kms.CreateAliasInput{AliasName: &name, TargetKeyId: &key})
			do(t, out, err)
			return name
		},
		Disable: func(t testing.TB, key string) {
			out, err := c.DisableKey(ctx, &kms.DisableKeyInput{KeyId: &key})
			do(t, out, err)
		},
		Enable: func(t testing.TB, key string) {
			out, err := c.EnableKey(ctx, &kms.EnableKeyInput{KeyId: &key})
			do(t, out, err)
		},
		ScheduleDeletion: func(t testing.TB, key string) {
			out, err := c.ScheduleKeyDeletion(ctx, &kms.ScheduleKeyDeletionInput{KeyId: &key, PendingWindowInDays: aws.Int32(7)})
			do(t, out, err)
		},
		CancelDeletion: func(t testing.TB, key string) {
			out, err := c.CancelKeyDeletion(ctx, &kms.CancelKeyDeletionInput{KeyId: &key})
			do(t, out, err)
		},
		Rotate: func(t testing.TB, key string) {
			out, err := c.RotateKeyOnDemand(ctx, &kms.RotateKeyOnDemandInput{KeyId: &key})
			do(t, out, err)
		},
	}
}

// TestContractAWSRefusals shows what the suite cannot ask of every service:
// expired material, credentials, and denial by the encryption context.
func TestContractAWSRefusals(t *testing.T) {
	s := kmsserver.StartT(t, kmsserver.Options{})
	key, err := s.CreateKey(kmsserver.KeyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, p := context.Background(), newAWS(t, s)
	ec := keywrap.Context{Store: strings.Repeat("0", 32), Class: "phi", Purpose: keywrap.PurposeData, ID: strings.Repeat("1", 32)}
	dk, err := p.GenerateDataKey(ctx, key, ec)
	if err != nil {
		t.Fatal(err)
	}
	defer dk.Plain.Wipe()
	onlyGeneral, err := json.Marshal(map[string]any{"Version": "2012-10-17", "Statement": map[string]any{
		"Effect": "Allow", "Principal": "*", "Action": "kms:*", "Resource": "*",
		"Condition": map[string]any{"StringEquals": map[string]string{"kms:EncryptionContext:kmsfs:class": "general"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	id := kmsserver.DefaultPrincipal().AccessKeyID
	for _, tc := range []struct {
		name string
		do   func()
		want fault.Kind
	}{
		{"expired material", func() { must(s.SetMaterialExpired(key, true)) }, fault.KeyExpired},
		{"material imported again", func() { must(s.SetMaterialExpired(key, false)) }, fault.None},
		{"expired credentials", func() { must(s.SetExpired(id, true)) }, fault.KeyDenied},
		{"credentials renewed", func() { must(s.SetExpired(id, false)) }, fault.None},
		{"a policy for another class", func() { must(s.SetPolicy(key, string(onlyGeneral))) }, fault.KeyDenied},
	} {
		tc.do()
		plain, err := p.Decrypt(ctx, dk.Wrapped, ec)
		if got := fault.Of(err); got != tc.want || (err == nil) != (tc.want == fault.None) {
			t.Errorf("%s: %v (%v), want %v", tc.name, got, err, tc.want)
		}
		if err == nil {
			plain.Wipe()
		}
	}
}
