package awskms_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/kms"

	"github.com/kmsfs/kmsfs/crypto/keywrap/awskms"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keywraptest"
)

// What moto does not show, and why. A KMS emulator that enforces these runs the
// same suite in full, from package integration.
var motoNotCovered = map[string]string{
	keywraptest.CaseDamagedKind:  "moto answers a blob whose key id is damaged with AccessDenied",
	keywraptest.CaseWrongKeyKind: "moto answers Decrypt under another KeyId with AccessDenied",
	keywraptest.CaseDisabled:     "moto does not enforce key states",
	keywraptest.CasePending:      "moto does not enforce key states",
	keywraptest.CaseCancelled:    "moto does not enforce key states",
	keywraptest.CaseMaterial:     "moto has no key-material ids",
	keywraptest.CaseCheckState:   "moto does not enforce key states",
	keywraptest.CaseCheckBare:    "moto does not know DryRun (it makes the call) nor IGNORE_CIPHERTEXT",
}

// startMoto runs moto_server until the test ends and returns its URL.
func startMoto(t *testing.T) string {
	t.Helper()
	bin, err := exec.LookPath("moto_server")
	if err != nil {
		if os.Getenv("CI") == "true" || os.Getenv("REQUIRE_KMS") == "1" {
			t.Fatal("moto_server is missing, and is required here")
		}
		t.Skip("missing: moto_server (pip install 'moto[server,kms]')")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "-H", "127.0.0.1", "-p", port)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
	})
	for range 600 { // a loaded machine takes many seconds to import moto
		select {
		case err := <-exited:
			exited <- err
			t.Fatalf("moto_server ended: %v", err)
		case <-time.After(100 * time.Millisecond):
		}
		if c, err := net.Dial("tcp", "127.0.0.1:"+port); err == nil {
			_ = c.Close()
			return "http://127.0.0.1:" + port
		}
	}
	t.Fatal("moto_server does not listen")
	return ""
}

func TestContractMoto(t *testing.T) {
	endpoint := startMoto(t)
	isolate(t)
	t.Setenv("AWS_ENDPOINT_URL_KMS", endpoint) // as a user would, rather than through Options
	p, err := awskms.New(context.Background(), awskms.Options{Region: "us-east-1", Budget: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	cfg, err := config.LoadDefaultConfig(context.Background(), config.WithRegion("us-east-1"))
	if err != nil {
		t.Fatal(err)
	}
	s := adminSetup(kms.NewFromConfig(cfg))
	s.Provider = p
	s.Unknown = "arn:aws:kms:us-east-1:123456789012:key/00000000-0000-0000-0000-000000000000"
	s.NotCovered = motoNotCovered
	keywraptest.Run(t, s)
}

// adminSetup changes keys through the KMS API.
func adminSetup(c *kms.Client) keywraptest.Setup {
	ctx := context.Background()
	check := func(t testing.TB, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	aliases := 0
	return keywraptest.Setup{
		NewKey: func(t testing.TB) string {
			out, err := c.CreateKey(ctx, &kms.CreateKeyInput{})
			check(t, err)
			return aws.ToString(out.KeyMetadata.Arn)
		},
		NewAlias: func(t testing.TB, key string) string {
			aliases++
			name := fmt.Sprintf("alias/kmsfs-test-%d", aliases)
			_, err := c.CreateAlias(ctx, &kms.CreateAliasInput{AliasName: &name, TargetKeyId: &key})
			check(t, err)
			return name
		},
		Disable: func(t testing.TB, key string) {
			_, err := c.DisableKey(ctx, &kms.DisableKeyInput{KeyId: &key})
			check(t, err)
		},
		Enable: func(t testing.TB, key string) {
			_, err := c.EnableKey(ctx, &kms.EnableKeyInput{KeyId: &key})
			check(t, err)
		},
		ScheduleDeletion: func(t testing.TB, key string) {
			_, err := c.ScheduleKeyDeletion(ctx, &kms.ScheduleKeyDeletionInput{KeyId: &key, PendingWindowInDays: aws.Int32(7)})
			check(t, err)
		},
		CancelDeletion: func(t testing.TB, key string) {
			_, err := c.CancelKeyDeletion(ctx, &kms.CancelKeyDeletionInput{KeyId: &key})
			check(t, err)
		},
		Rotate: func(t testing.TB, key string) {
			_, err := c.RotateKeyOnDemand(ctx, &kms.RotateKeyOnDemandInput{KeyId: &key})
			check(t, err)
		},
	}
}
