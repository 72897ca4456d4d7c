package kmsserver

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
)

// TestRequestIDs: what the client sees of a request id, and of an error code,
// the log has in the same order, whoever refused the call.
func TestRequestIDs(t *testing.T) {
	s, c := start(t)
	ctx := context.Background()
	arn := newKey(t, s, KeyOptions{})
	stranger := client(s, Principal{AccessKeyID: "AKIANOBODY", SecretAccessKey: "x"}, s.Region())
	var want []string
	see := func(meta func() (string, bool), err error) {
		t.Helper()
		id, _ := "", false
		if err == nil {
			id, _ = meta()
		}
		var resp *awshttp.ResponseError
		if errors.As(err, &resp) {
			id = resp.ServiceRequestID()
		}
		if id == "" {
			t.Errorf("no request id: %v", err)
		}
		want = append(want, id+" "+code(err))
	}
	call := func(c *kms.Client, key string, dryRun bool) {
		t.Helper()
		out, err := c.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{KeyId: &key, KeySpec: "AES_256", DryRun: aws.Bool(dryRun)})
		see(func() (string, bool) { return awsmiddleware.GetRequestIDMetadata(out.ResultMetadata) }, err)
	}
	call(c, arn, false)
	call(c, arn, true)
	call(c, "alias/none", false)
	call(stranger, arn, false)
	for _, f := range []Faults{{Rules: []Fault{{Error: "ThrottlingException"}}}, {Outage: OutageUnavailable}, {RateLimit: 0.001, Burst: 1}} {
		set(t, s, f)
		call(c, arn, false)
	}
	set(t, s, Faults{})
	must(t, 0, s.SetExpired(DefaultPrincipal().AccessKeyID, true))
	call(c, arn, false)
	must(t, 0, s.SetExpired(DefaultPrincipal().AccessKeyID, false))
	call(c, arn, false)
	resp, err := http.Post(s.URL(), contentType, strings.NewReader(strings.Repeat("x", maxBody+1)))
	must(t, resp, err)
	resp.Body.Close()
	want = append(want, resp.Header.Get("x-amzn-RequestId")+" RequestEntityTooLargeException")

	var got []string
	for _, c := range s.Calls() {
		got = append(got, c.RequestID+" "+c.ErrorCode)
	}
	if !slices.Equal(got, want) {
		t.Errorf("log\n%s\nclient\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if got[len(got)-3] == got[len(got)-2] || !strings.HasSuffix(got[len(got)-3], " ExpiredTokenException") {
		t.Errorf("expired credentials: %q", got)
	}
}

func TestCallCounts(t *testing.T) {
	s, c := start(t)
	ctx := context.Background()
	arn := newKey(t, s, KeyOptions{})
	blob, err := generate(c, arn, nil)
	wantCode(t, "GenerateDataKey", err, "")
	for range 3 {
		_, err = decrypt(c, arn, blob, nil)
		wantCode(t, "Decrypt", err, "")
	}
	_, err = c.Decrypt(ctx, &kms.DecryptInput{KeyId: &arn, CiphertextBlob: blob, DryRun: aws.Bool(true)})
	wantCode(t, "dry run", err, "DryRunOperationException")
	set(t, s, Faults{Rules: []Fault{{Error: "ThrottlingException", Times: 2}, {Error: CodeReset, Times: 1}}})
	for range 4 {
		_, _ = decrypt(c, arn, blob, nil)
	}
	got := s.Counts()
	if len(got) != 2 || got["GenerateDataKey"] != (OpCount{Calls: 1, OK: 1}) ||
		got["Decrypt"] != (OpCount{Calls: 8, OK: 4, DryRun: 1, Throttled: 2, NoAnswer: 1}) {
		t.Errorf("counts: %+v", got)
	}
	if status, text := admin(t, s.AdminURL(), "GET", "calls/count", ""); status != 200 || !strings.Contains(text, `"Decrypt":{"calls":8,"ok":4,"dry_run":1,"throttled":2,"no_answer":1}`) {
		t.Errorf("GET calls/count: %d %s", status, text)
	}
}

// TestOutageThatEnds: an outage with a time ends by itself, and leaves the other
// faults; one that was replaced ends nothing later.
func TestOutageThatEnds(t *testing.T) {
	s, c := start(t)
	arn := newKey(t, s, KeyOptions{})
	for _, kind := range []Outage{OutageRefuse, OutageReset, OutageUnavailable} {
		set(t, s, Faults{Outage: kind, OutageMS: 300, LatencyMS: 1})
		if _, err := generate(c, arn, nil); err == nil {
			t.Errorf("%s: no outage", kind)
		}
		for s.Faults().Outage != OutageNone {
			time.Sleep(10 * time.Millisecond)
		}
		for i := 0; ; i++ { // a listener takes a moment after the faults are gone
			_, err := generate(c, arn, nil)
			if err == nil {
				break
			}
			if i > 500 {
				t.Fatalf("%s: still down: %v", kind, err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		if s.Faults().LatencyMS != 1 {
			t.Errorf("%s: the end of the outage ended the latency", kind)
		}
	}
	set(t, s, Faults{Outage: OutageReset, OutageMS: 1})
	set(t, s, Faults{Outage: OutageReset})
	time.Sleep(50 * time.Millisecond)
	if s.Faults().Outage != OutageReset {
		t.Error("the time of a replaced outage ended the next one")
	}
	for _, f := range []Faults{{OutageMS: 1}, {Outage: OutageReset, OutageMS: -1}} {
		if err := s.SetFaults(f); !errors.Is(err, ErrOptions) {
			t.Errorf("SetFaults(%+v) = %v", f, err)
		}
	}
	// From the start: Options take the same.
	late := StartT(t, Options{Faults: Faults{Outage: OutageRefuse, OutageMS: 200}})
	for i := 0; ; i++ {
		if _, err := client(late, DefaultPrincipal(), late.Region()).ListKeys(context.Background(), &kms.ListKeysInput{}); err == nil {
			break
		} else if i > 500 {
			t.Fatalf("still down: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestDryRunIsAnsweredLikeTheCall: permission, state and ciphertext are judged
// as for the call itself, and nothing is given out.
func TestDryRunIsAnsweredLikeTheCall(t *testing.T) {
	ctx := context.Background()
	s, c := start(t)
	arn, other := newKey(t, s, KeyOptions{}), newKey(t, s, KeyOptions{})
	blob := dataKey(t, c, arn, phi).CiphertextBlob
	yes := aws.Bool(true)
	bare := []types.DryRunModifierType{types.DryRunModifierTypeIgnoreCiphertext}
	ops := map[string]func(*kms.Client) error{
		"GenerateDataKey": func(c *kms.Client) error {
			_, err := c.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{KeyId: &arn, KeySpec: "AES_256", EncryptionContext: phi, DryRun: yes})
			return err
		},
		"GenerateDataKeyWithoutPlaintext": func(c *kms.Client) error {
			_, err := c.GenerateDataKeyWithoutPlaintext(ctx, &kms.GenerateDataKeyWithoutPlaintextInput{KeyId: &arn, KeySpec: "AES_256", EncryptionContext: phi, DryRun: yes})
			return err
		},
		"Encrypt": func(c *kms.Client) error {
			_, err := c.Encrypt(ctx, &kms.EncryptInput{KeyId: &arn, Plaintext: []byte{1}, EncryptionContext: phi, DryRun: yes})
			return err
		},
		"Decrypt": func(c *kms.Client) error {
			_, err := c.Decrypt(ctx, &kms.DecryptInput{KeyId: &arn, CiphertextBlob: blob, EncryptionContext: phi, DryRun: yes})
			return err
		},
		"Decrypt, no ciphertext": func(c *kms.Client) error {
			_, err := c.Decrypt(ctx, &kms.DecryptInput{KeyId: &arn, EncryptionContext: phi, DryRun: yes, DryRunModifiers: bare})
			return err
		},
		"ReEncrypt": func(c *kms.Client) error {
			_, err := c.ReEncrypt(ctx, &kms.ReEncryptInput{CiphertextBlob: blob, SourceKeyId: &arn, SourceEncryptionContext: phi, DestinationKeyId: &other, DryRun: yes})
			return err
		},
		"ReEncrypt, no ciphertext": func(c *kms.Client) error {
			_, err := c.ReEncrypt(ctx, &kms.ReEncryptInput{SourceKeyId: &arn, SourceEncryptionContext: phi, DestinationKeyId: &other, DryRun: yes, DryRunModifiers: bare})
			return err
		},
	}
	all := func(what string, c *kms.Client, want string) {
		t.Helper()
		for op, ask := range ops {
			wantCode(t, what+": "+op, ask(c), want)
		}
	}
	all("allowed", c, "DryRunOperationException")
	all("denied", client(s, user(t, s, "nobody", `{"Version":"2012-10-17","Statement":{"Effect":"Allow","Action":"kms:ListKeys","Resource":"*"}}`), s.Region()), "AccessDeniedException")
	_, err := c.Decrypt(ctx, &kms.DecryptInput{KeyId: &arn, CiphertextBlob: blob, DryRun: yes})
	wantCode(t, "Decrypt under another context", err, "InvalidCiphertextException")
	_, err = c.DisableKey(ctx, &kms.DisableKeyInput{KeyId: &arn})
	wantCode(t, "DisableKey", err, "")
	all("disabled", c, "DisabledException")
	set(t, s, Faults{Rules: []Fault{{Error: "ThrottlingException"}}})
	all("throttled", c, "ThrottlingException")
}
