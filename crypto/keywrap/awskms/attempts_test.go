package awskms_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/awskms"
)

// summary is the attempts as one line each: operation, request id, code.
func summary(trace *keywrap.Trace) []string {
	var out []string
	for _, a := range trace.Attempts() {
		out = append(out, a.Op+" "+a.RequestID+" "+a.Code)
	}
	return out
}

// TestAttempts: every HTTP request of a call is in its trace, in order.
func TestAttempts(t *testing.T) {
	hang := func(w http.ResponseWriter, _ *http.Request) { panic(http.ErrAbortHandler) }
	tests := map[string]struct {
		answers []func(w http.ResponseWriter, r *http.Request) // for the first requests; then good
		want    []string
		err     error
		id      string // of the CallError
	}{
		"at once": {nil, []string{"Decrypt request-1 "}, nil, ""},
		"retried": {[]func(http.ResponseWriter, *http.Request){
			func(w http.ResponseWriter, _ *http.Request) { answerError(w, 400, "ThrottlingException", "") },
			func(w http.ResponseWriter, _ *http.Request) { answerError(w, 500, "KMSInternalException", "") },
			hang,
			func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(502) },
		}, []string{"Decrypt request-1 ThrottlingException", "Decrypt request-2 KMSInternalException", "Decrypt  NoAnswer",
			"Decrypt request-4 UnknownError", "Decrypt request-5 "}, nil, ""},
		"denied after a retry": {[]func(http.ResponseWriter, *http.Request){
			func(w http.ResponseWriter, _ *http.Request) { answerError(w, 500, "KMSInternalException", "") },
			func(w http.ResponseWriter, _ *http.Request) { answerError(w, 400, "AccessDeniedException", "") },
		}, []string{"Decrypt request-1 KMSInternalException", "Decrypt request-2 AccessDeniedException"}, keywrap.ErrDenied, "request-2"},
		"an answer that is refused": {[]func(http.ResponseWriter, *http.Request){
			func(w http.ResponseWriter, _ *http.Request) {
				answerOK(w, map[string]any{"KeyId": keyB, "Plaintext": dataKey})
			},
		}, []string{"Decrypt request-1 "}, keywrap.ErrWrongKey, "request-1"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			checkLive(t)
			s := newServer(t, func(w http.ResponseWriter, r *http.Request, n int, q request) {
				if n <= len(tt.answers) {
					tt.answers[n-1](w, r)
					return
				}
				answerGood(w, q)
			})
			var trace keywrap.Trace
			err := decrypt(keywrap.WithTrace(context.Background(), &trace), s.provider(t, awskms.Options{}), keyA)
			if !errors.Is(err, tt.err) {
				t.Errorf("Decrypt = %v, want %v", err, tt.err)
			}
			if got := summary(&trace); !slices.Equal(got, tt.want) {
				t.Errorf("attempts\n%q, want\n%q", got, tt.want)
			}
			if tt.err != nil {
				if ce := wantCallError(t, err, tt.err); ce.RequestID != tt.id {
					t.Errorf("RequestID = %q, want %q", ce.RequestID, tt.id)
				}
			}
		})
	}
}

// TestAttemptsOfOthers: the operations that explain a failure, and that
// describe a key, are attempts as well; what cannot be signed is none.
func TestAttemptsOfOthers(t *testing.T) {
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, q request) {
		switch q.op {
		case "Decrypt":
			answerError(w, 400, "KMSInvalidStateException", "")
		case "DescribeKey":
			answerOK(w, map[string]any{"KeyMetadata": map[string]any{"Arn": keyA, "KeyId": "x", "KeyState": "PendingDeletion"}})
		}
	})
	p := s.provider(t, awskms.Options{})
	var trace keywrap.Trace
	err := decrypt(keywrap.WithTrace(context.Background(), &trace), p, keyA)
	if ce := wantCallError(t, err, keywrap.ErrPending); ce.RequestID != "request-1" {
		t.Errorf("RequestID = %q, want that of Decrypt", ce.RequestID)
	}
	if got, want := summary(&trace), []string{"Decrypt request-1 KMSInvalidStateException", "DescribeKey request-2 "}; !slices.Equal(got, want) {
		t.Errorf("attempts %q, want %q", got, want)
	}
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	var none keywrap.Trace
	err = decrypt(keywrap.WithTrace(context.Background(), &none), s.provider(t, awskms.Options{}), keyA)
	wantCallError(t, err, keywrap.ErrCredentials)
	if got := summary(&none); len(got) != 0 {
		t.Errorf("attempts without credentials: %q", got)
	}
}

// TestReturnThrottling: throttling fails at the first answer, outages are
// retried as ever.
func TestReturnThrottling(t *testing.T) {
	for _, mode := range []string{"standard", "adaptive"} {
		s := newServer(t, func(w http.ResponseWriter, _ *http.Request, n int, q request) {
			switch n {
			case 1, 2:
				answerError(w, 500, "KMSInternalException", "")
			case 3, 5:
				answerError(w, 400, "ThrottlingException", "slower")
			default:
				answerGood(w, q)
			}
		})
		t.Setenv("AWS_RETRY_MODE", mode)
		p := s.provider(t, awskms.Options{ReturnThrottling: true})
		for i, want := range []int{3, 4, 5, 6} {
			err := decrypt(context.Background(), p, keyA)
			if (i%2 == 0) != errors.Is(err, keywrap.ErrThrottled) || i%2 == 1 && err != nil {
				t.Errorf("%s: call %d: %v", mode, i, err)
			}
			if got := len(s.seen()); got != want {
				t.Errorf("%s: %d requests after call %d, want %d", mode, got, i, want)
			}
		}
	}
}

// TestCheckRequests: what a check asks KMS.
func TestCheckRequests(t *testing.T) {
	w := keywrap.Wrapped{Key: keyA, Blob: []byte("blob")}
	mine := keyA[:len(keyA)-1] + "0"
	tests := map[string]struct {
		check keywrap.Check
		want  []string // operation, Region, ciphertext or modifier
	}{
		"generate":                   {keywrap.Check{Op: "GenerateDataKey", Key: keyA, Context: sample}, []string{"GenerateDataKey us-east-1 <nil> <nil>"}},
		"encrypt":                    {keywrap.Check{Op: "Encrypt", Key: "alias/x", Context: sample}, []string{"Encrypt us-west-2 <nil> <nil>"}},
		"decrypt":                    {keywrap.Check{Op: "Decrypt", Wrapped: w, Context: sample}, []string{"Decrypt us-east-1 YmxvYg== <nil>"}},
		"decrypt without blob":       {keywrap.Check{Op: "Decrypt", Key: keyA, Context: sample}, []string{"Decrypt us-east-1 <nil> [IGNORE_CIPHERTEXT]"}},
		"re-encrypt":                 {keywrap.Check{Op: "ReEncrypt", Wrapped: w, Context: sample, ToKey: mine, ToContext: sample}, []string{"ReEncrypt us-east-1 YmxvYg== <nil>"}},
		"re-encrypt between Regions": {keywrap.Check{Op: "ReEncrypt", Wrapped: w, Context: sample, ToKey: keyB, ToContext: sample}, []string{"Decrypt us-east-1 YmxvYg== <nil>", "Encrypt us-west-2 <nil> <nil>"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			code := "DryRunOperationException"
			s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, q request) {
				if q.body["DryRun"] != true {
					t.Errorf("%s is no dry run", q.op)
				}
				answerError(w, 412, code, "")
			})
			p := s.provider(t, awskms.Options{Region: "us-west-2"})
			var trace keywrap.Trace
			if err := p.Check(keywrap.WithTrace(context.Background(), &trace), tt.check); err != nil {
				t.Error(err)
			}
			var got []string
			for _, q := range s.seen() {
				got = append(got, fmt.Sprint(q.op, " ", q.region, " ", q.body["CiphertextBlob"], " ", q.body["DryRunModifiers"]))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("requests %q, want %q", got, tt.want)
			}
			for _, a := range trace.Attempts() {
				if !a.DryRun || a.Code != "" {
					t.Errorf("attempt %+v, want a dry run that succeeded", a)
				}
			}
			code = "AccessDeniedException"
			if ce := wantCallError(t, p.Check(context.Background(), tt.check), keywrap.ErrDenied); ce.Op != tt.check.Op || ce.RequestID == "" {
				t.Errorf("CallError of %q, request %q", ce.Op, ce.RequestID)
			}
		})
	}
}
