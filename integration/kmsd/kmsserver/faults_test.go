package kmsserver

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/kms"
)

// status returns the HTTP status that the SDK saw, 0 for none.
func status(err error) int {
	var resp *awshttp.ResponseError
	if errors.As(err, &resp) {
		return resp.HTTPStatusCode()
	}
	return 0
}

func set(t *testing.T, s *Server, f Faults) {
	t.Helper()
	if err := s.SetFaults(f); err != nil {
		t.Fatalf("SetFaults: %v", err)
	}
}

func TestOutages(t *testing.T) {
	s, c := start(t)
	arn := newKey(t, s, KeyOptions{})
	for range 3 { // each outage begins and ends more than once on the same port
		set(t, s, Faults{Outage: OutageRefuse})
		if _, err := generate(c, arn, nil); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("refuse: %v", err)
		}
		resp, err := http.Get(s.AdminURL() + "/admin/status")
		if must(t, resp, err); resp.StatusCode != 200 {
			t.Errorf("admin API during an outage: %s", resp.Status)
		}
		resp.Body.Close()
		set(t, s, Faults{Outage: OutageReset})
		if _, err := generate(c, arn, nil); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("reset: %v", err)
		}
		set(t, s, Faults{})
		_, err = generate(c, arn, nil)
		wantCode(t, "after the outage", err, "")
	}
	set(t, s, Faults{Outage: OutageInternal})
	_, err := generate(c, arn, nil)
	wantCode(t, "internal", err, "KMSInternalException")
	if got := status(err); got != 500 {
		t.Errorf("internal: HTTP %d", got)
	}
	set(t, s, Faults{Outage: OutageUnavailable})
	_, err = generate(c, arn, nil)
	wantCode(t, "unavailable", err, "ServiceUnavailableException")
	if got := status(err); got != 503 {
		t.Errorf("unavailable: HTTP %d", got)
	}
	set(t, s, Faults{Outage: OutageHang})
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_, err = c.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{KeyId: &arn, KeySpec: "AES_256"})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hang: %v", err)
	}
	calls := s.Calls()
	last := calls[len(calls)-1]
	if last.Injected != "hang" || last.ErrorCode != CodeNoAnswer || last.KeyID != arn {
		t.Errorf("hang logged as %+v", last)
	}
}

// TestKeepAlive: an outage also cuts connections that are open already.
func TestKeepAlive(t *testing.T) {
	s := StartT(t, Options{})
	arn := newKey(t, s, KeyOptions{})
	opts := client(s, DefaultPrincipal(), s.Region()).Options()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	opts.HTTPClient = &http.Client{Transport: transport}
	c := kms.New(opts)
	_, err := generate(c, arn, nil)
	wantCode(t, "before", err, "")
	set(t, s, Faults{Outage: OutageRefuse})
	if _, err := generate(c, arn, nil); err == nil {
		t.Error("an old connection still answers")
	}
}

func TestThrottling(t *testing.T) {
	s, c := start(t)
	arn := newKey(t, s, KeyOptions{})
	set(t, s, Faults{RateLimit: 0.001, Burst: 3})
	for i, want := range []string{"", "", "", "ThrottlingException", "ThrottlingException"} {
		_, err := generate(c, arn, nil)
		wantCode(t, "call "+string(rune('0'+i)), err, want)
		if want != "" && status(err) != 400 {
			t.Errorf("HTTP %d, want 400", status(err))
		}
	}
	set(t, s, Faults{RateLimit: 1000, Burst: 1})
	_, err := generate(c, arn, nil)
	wantCode(t, "first", err, "")
	time.Sleep(5 * time.Millisecond) // at least one token of 1 ms
	_, err = generate(c, arn, nil)
	wantCode(t, "refilled", err, "")
}

func TestLatency(t *testing.T) {
	s, c := start(t)
	arn := newKey(t, s, KeyOptions{})
	set(t, s, Faults{LatencyMS: 30, JitterMS: 10, Rules: []Fault{{Operations: []string{"Decrypt"}, LatencyMS: 40}}})
	from := time.Now()
	blob, err := generate(c, arn, nil)
	wantCode(t, "slow", err, "")
	if took := time.Since(from); took < 30*time.Millisecond {
		t.Errorf("took %v, want at least 30ms", took)
	}
	from = time.Now()
	_, err = decrypt(c, arn, blob, nil)
	wantCode(t, "slower", err, "")
	if took := time.Since(from); took < 70*time.Millisecond {
		t.Errorf("took %v, want at least 70ms", took)
	}
	set(t, s, Faults{LatencyMS: 3600_000})
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err = c.ListKeys(ctx, &kms.ListKeysInput{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("caller that leaves: %v", err)
	}
}

// TestErrorCodes injects every code that a file system must tell apart.
func TestErrorCodes(t *testing.T) {
	s, c := start(t)
	arn := newKey(t, s, KeyOptions{})
	for code, http := range map[string]int{
		"ThrottlingException": 400, "KMSInvalidStateException": 400, "DisabledException": 400, "NotFoundException": 400,
		"KeyUnavailableException": 500, "KMSInternalException": 500, "DependencyTimeoutException": 503, "LimitExceededException": 400,
		"ExpiredTokenException": 400, "UnrecognizedClientException": 400, "InvalidCiphertextException": 400, "AccessDeniedException": 400,
	} {
		set(t, s, Faults{Rules: []Fault{{Error: code}}})
		_, err := generate(c, arn, nil)
		wantCode(t, "injected", err, code)
		if got := status(err); got != http {
			t.Errorf("%s: HTTP %d, want %d", code, got, http)
		}
	}
	set(t, s, Faults{Rules: []Fault{{Error: "KMSInvalidStateException"}}})
	if _, err := generate(c, arn, nil); err == nil || !strings.Contains(err.Error(), arn+" is pending import.") {
		t.Errorf("expired material: %v", err)
	}
	set(t, s, Faults{Rules: []Fault{{Error: "TeapotException", Message: "no tea in {key}", Status: 418}}})
	_, err := generate(c, arn, nil)
	if code(err) != "TeapotException" || status(err) != 418 || !strings.Contains(err.Error(), "no tea in "+arn) {
		t.Errorf("message and status of one's own: %v", err)
	}
	set(t, s, Faults{Rules: []Fault{{Error: CodeReset}}})
	if _, err := generate(c, arn, nil); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("reset: %v", err)
	}
}

func TestFilters(t *testing.T) {
	s, c := start(t)
	a, b := newKey(t, s, KeyOptions{Alias: "alias/a"}), newKey(t, s, KeyOptions{})
	other := client(s, user(t, s, "other", ""), s.Region())
	blob, err := generate(c, a, phi)
	wantCode(t, "GenerateDataKey", err, "")
	call := map[string]func() error{
		"generate a":      func() error { _, err := generate(c, a, phi); return err },
		"generate b":      func() error { _, err := generate(c, b, phi); return err },
		"generate pci":    func() error { _, err := generate(c, b, map[string]string{"kmsfs:class": "pci"}); return err },
		"decrypt a":       func() error { _, err := decrypt(c, "", blob, phi); return err },
		"other generates": func() error { _, err := generate(other, a, nil); return err },
		"re-encrypt a to b": func() error {
			_, err := c.ReEncrypt(context.Background(), &kms.ReEncryptInput{CiphertextBlob: blob, SourceEncryptionContext: phi, DestinationKeyId: &b})
			return err
		},
	}
	id := a[strings.LastIndex(a, "/")+1:]
	for _, tc := range []struct {
		name  string
		fault Fault
		hits  string
	}{
		{"operation", Fault{Operations: []string{"Decrypt", "ReEncrypt"}}, "decrypt a, re-encrypt a to b"},
		{"key ARN", Fault{Key: a}, "decrypt a, generate a, other generates, re-encrypt a to b"},
		{"key id", Fault{Key: id}, "decrypt a, generate a, other generates, re-encrypt a to b"},
		{"access key", Fault{Principal: "AKIAOTHER"}, "other generates"},
		{"principal", Fault{Principal: DefaultPrincipal().ARN, Key: b}, "generate b, generate pci, re-encrypt a to b"},
		{"class", Fault{Context: map[string]string{"kmsfs:class": "pci"}}, "generate pci"},
		{"class and operation", Fault{Context: map[string]string{"kmsfs:class": "phi"}, Operations: []string{"GenerateDataKey"}}, "generate a, generate b"},
		{"alias not used", Fault{Key: "alias/a"}, ""},
	} {
		tc.fault.Error = "ThrottlingException"
		set(t, s, Faults{Rules: []Fault{tc.fault}})
		for name, f := range call {
			want := ""
			if strings.Contains(", "+tc.hits+",", ", "+name+",") {
				want = "ThrottlingException"
			}
			wantCode(t, tc.name+": "+name, f(), want)
		}
	}
	set(t, s, Faults{Rules: []Fault{{Key: "alias/a", Error: "ThrottlingException"}}})
	_, err = generate(c, "alias/a", nil)
	wantCode(t, "alias used", err, "ThrottlingException")
}

func TestCounts(t *testing.T) {
	s, c := start(t)
	arn := newKey(t, s, KeyOptions{})
	blob, err := generate(c, arn, nil)
	wantCode(t, "GenerateDataKey", err, "")
	id, err := s.AddFault(Fault{Operations: []string{"Decrypt"}, Skip: 2, Times: 1, Error: "KMSInternalException"})
	must(t, id, err)
	for i, want := range []string{"", "", "KMSInternalException", "", ""} {
		_, err := generate(c, arn, nil) // does not count
		wantCode(t, "GenerateDataKey", err, "")
		_, err = decrypt(c, arn, blob, nil)
		wantCode(t, "Decrypt "+string(rune('1'+i)), err, want)
	}
	forever, err := s.AddFault(Fault{Error: "KMSInternalException"})
	must(t, forever, err)
	_, err = decrypt(c, arn, blob, nil)
	wantCode(t, "forever", err, "KMSInternalException")
	if !s.RemoveFault(forever) || s.RemoveFault(forever) || len(s.Faults().Rules) != 1 || s.Faults().Rules[0].ID != id {
		t.Errorf("faults left: %+v", s.Faults())
	}
	_, err = decrypt(c, arn, blob, nil)
	wantCode(t, "removed", err, "")
	for _, f := range []Fault{{}, {Error: "no spaces"}, {Error: "X", Status: 200}, {Error: "X", Times: -1}, {Error: "X", Operations: []string{"Nothing"}}} {
		if _, err := s.AddFault(f); !errors.Is(err, ErrOptions) {
			t.Errorf("AddFault(%+v) = %v", f, err)
		}
	}
	for _, f := range []Faults{{Outage: "sometimes"}, {LatencyMS: -1}, {Rules: []Fault{{}}}} {
		if err := s.SetFaults(f); !errors.Is(err, ErrOptions) {
			t.Errorf("SetFaults(%+v) = %v", f, err)
		}
	}
}

// TestConcurrentUse has callers, fault changes and readers of the log at once;
// the race detector is the judge, and no call may be lost.
func TestConcurrentUse(t *testing.T) {
	s, c := start(t)
	arn := newKey(t, s, KeyOptions{})
	var wg sync.WaitGroup
	const callers, each = 8, 10
	for range callers {
		wg.Go(func() {
			for range each {
				blob, err := generate(c, arn, phi)
				if err == nil {
					_, err = decrypt(c, arn, blob, phi)
				}
				if err != nil && code(err) != "KMSInternalException" {
					t.Errorf("call: %v", err)
				}
			}
		})
	}
	wg.Go(func() {
		for range 20 {
			if err := s.SetFaults(Faults{Rules: []Fault{{Skip: 3, Times: 2, Error: "KMSInternalException"}}}); err != nil {
				t.Errorf("SetFaults: %v", err)
			}
			_, _ = s.Calls(), s.Faults()
		}
	})
	wg.Wait()
	if got := s.Count("GenerateDataKey"); got != callers*each {
		t.Errorf("%d calls logged, want %d", got, callers*each)
	}
}
