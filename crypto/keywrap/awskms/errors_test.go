package awskms_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/awskms"
)

// errorCodes are those of the KMS API Reference and its Common Errors, with the
// status that goes with them.
var errorCodes = []struct {
	code   string
	status int
	want   error
	retry  bool
}{
	{"AccessDeniedException", 400, keywrap.ErrDenied, false},
	{"InvalidGrantTokenException", 400, keywrap.ErrDenied, false},
	{"NotAuthorized", 400, keywrap.ErrDenied, false},
	{"OptInRequired", 403, keywrap.ErrDenied, false},
	{"ExpiredTokenException", 400, keywrap.ErrCredentials, false},
	{"ExpiredToken", 403, keywrap.ErrCredentials, false},
	{"UnrecognizedClientException", 400, keywrap.ErrCredentials, false},
	{"InvalidClientTokenId", 403, keywrap.ErrCredentials, false},
	{"IncompleteSignature", 400, keywrap.ErrCredentials, false},
	{"IncompleteSignatureException", 400, keywrap.ErrCredentials, false},
	{"InvalidSignatureException", 400, keywrap.ErrCredentials, false},
	{"SignatureDoesNotMatch", 403, keywrap.ErrCredentials, false},
	{"MissingAuthenticationTokenException", 400, keywrap.ErrCredentials, false},
	{"RequestExpired", 400, keywrap.ErrCredentials, false},
	{"NotFoundException", 400, keywrap.ErrNotFound, false},
	{"com.amazonaws.kms#NotFoundException", 400, keywrap.ErrNotFound, false},
	{"InvalidArnException", 400, keywrap.ErrBadURI, false},
	{"InvalidAliasNameException", 400, keywrap.ErrBadURI, false},
	{"DisabledException", 400, keywrap.ErrDisabled, false},
	{"InvalidCiphertextException", 400, keywrap.ErrCiphertext, false},
	{"IncorrectKeyException", 400, keywrap.ErrWrongKey, false},
	{"InvalidKeyUsageException", 400, keywrap.ErrUnsupported, false},
	{"UnsupportedOperationException", 400, keywrap.ErrUnsupported, false},
	{"ValidationException", 400, keywrap.ErrUnsupported, false},
	{"UnknownOperationException", 400, keywrap.ErrUnsupported, false},
	{"SomethingNewException", 400, keywrap.ErrUnsupported, false},
	{"ThrottlingException", 400, keywrap.ErrThrottled, true},
	{"Throttling", 400, keywrap.ErrThrottled, true},
	{"LimitExceededException", 400, keywrap.ErrThrottled, true},
	{"TooManyRequestsException", 429, keywrap.ErrThrottled, true},
	{"RequestLimitExceeded", 503, keywrap.ErrThrottled, true},
	{"KMSInternalException", 500, keywrap.ErrUnavailable, true},
	{"KMSInternal", 500, keywrap.ErrUnavailable, true},
	{"InternalFailure", 500, keywrap.ErrUnavailable, true},
	{"DependencyTimeoutException", 500, keywrap.ErrUnavailable, true},
	{"DependencyTimeout", 503, keywrap.ErrUnavailable, true},
	{"KeyUnavailableException", 500, keywrap.ErrUnavailable, true},
	{"ServiceUnavailable", 503, keywrap.ErrUnavailable, true},
	{"ServiceUnavailableException", 503, keywrap.ErrUnavailable, true},
	{"SomethingNewException", 500, keywrap.ErrUnavailable, true},
	{"CustomKeyStoreInvalidStateException", 400, keywrap.ErrUnavailable, false},
	{"CloudHsmClusterNotActiveException", 400, keywrap.ErrUnavailable, false},
	{"XksProxyUriUnreachableException", 400, keywrap.ErrUnavailable, false},
}

// TestErrorCodes: each code of the KMS API Reference gives one sentinel, and
// only throttling and unavailability are tried again.
func TestErrorCodes(t *testing.T) {
	for _, tt := range errorCodes {
		t.Run(fmt.Sprintf("%s %d", tt.code, tt.status), func(t *testing.T) {
			checkLive(t)
			s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, _ request) {
				answerError(w, tt.status, tt.code, "the service's own words\nin two lines")
			})
			t.Setenv("AWS_MAX_ATTEMPTS", "2")
			ce := wantCallError(t, decrypt(context.Background(), s.provider(t, awskms.Options{}), keyA), tt.want)
			attempts := len(s.seen())
			if want := map[bool]int{false: 1, true: 2}[tt.retry]; attempts != want {
				t.Errorf("%d attempts, want %d", attempts, want)
			}
			if want := fmt.Sprintf("request-%d", attempts); ce.RequestID != want {
				t.Errorf("request id = %q, want %q", ce.RequestID, want)
			}
			if ce.Op != "Decrypt" || ce.Key != keyA {
				t.Errorf("CallError is about %q %q", ce.Op, ce.Key)
			}
			if !strings.Contains(ce.Error(), "the service's own words in two lines") {
				t.Errorf("the service's words are lost: %v", ce)
			}
		})
	}
}

// An answer that is no KMS answer: a proxy's, a captive portal's.
func TestStatusWithoutCode(t *testing.T) {
	tests := []struct {
		status int
		body   string
		want   error
	}{
		{500, "<html>oops</html>", keywrap.ErrUnavailable},
		{502, "", keywrap.ErrUnavailable},
		{503, "{}", keywrap.ErrUnavailable},
		{429, "", keywrap.ErrThrottled},
		{403, "<html>no</html>", keywrap.ErrDenied},
		{407, "", keywrap.ErrDenied},
		{400, "", keywrap.ErrUnsupported},
		{200, "<html>please log in</html>", keywrap.ErrUnavailable},
		{200, "", keywrap.ErrWrongKey},
		{200, "{}", keywrap.ErrWrongKey},
		{302, "", keywrap.ErrUnavailable},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%d %q", tt.status, tt.body), func(t *testing.T) {
			s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, _ request) {
				w.WriteHeader(tt.status)
				_, _ = w.Write([]byte(tt.body))
			})
			t.Setenv("AWS_MAX_ATTEMPTS", "2")
			wantCallError(t, decrypt(context.Background(), s.provider(t, awskms.Options{}), keyA), tt.want)
		})
	}
}

func TestInvalidState(t *testing.T) {
	tests := []struct {
		message, state string // state is what DescribeKey says, "" if it is denied
		want           error
		calls          int
	}{
		{keyA + " is pending deletion.", "", keywrap.ErrPending, 1},
		{keyA + " is pending replica deletion.", "", keywrap.ErrPending, 1},
		{keyA + " is pending import.", "", keywrap.ErrExpired, 1},
		{"key state PendingImport", "", keywrap.ErrExpired, 1},
		{keyA + " is disabled.", "", keywrap.ErrDisabled, 1},
		{"", "PendingDeletion", keywrap.ErrPending, 2},
		{"", "PendingReplicaDeletion", keywrap.ErrPending, 2},
		{"", "PendingImport", keywrap.ErrExpired, 2},
		{"", "Disabled", keywrap.ErrDisabled, 2},
		{"", "Unavailable", keywrap.ErrUnavailable, 2},
		{"", "Updating", keywrap.ErrUnavailable, 2},
		{"", "", keywrap.ErrUnavailable, 2},
	}
	for _, tt := range tests {
		t.Run(tt.message+tt.state, func(t *testing.T) {
			s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, q request) {
				switch {
				case q.op == "Decrypt":
					answerError(w, 400, "KMSInvalidStateException", tt.message)
				case tt.state == "":
					answerError(w, 400, "AccessDeniedException", "")
				default:
					answerOK(w, map[string]any{"KeyMetadata": map[string]any{"Arn": keyA, "KeyId": "x", "KeyState": tt.state}})
				}
			})
			ce := wantCallError(t, decrypt(context.Background(), s.provider(t, awskms.Options{}), keyA), tt.want)
			if got := len(s.seen()); got != tt.calls {
				t.Errorf("%d calls, want %d", got, tt.calls)
			}
			if ce.RequestID != "request-1" {
				t.Errorf("request id = %q, want Decrypt's", ce.RequestID)
			}
		})
	}
}

// A data key must not come back in an error because KMS quotes parameters.
func TestEncryptDoesNotQuoteItsInput(t *testing.T) {
	const quoted = "Value 'MDEyMzQ1' at 'plaintext' failed to satisfy constraint"
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, _ request) {
		answerError(w, 400, "ValidationException", quoted)
	})
	plain := keymem.Copy(dataKey)
	defer plain.Wipe()
	_, err := s.provider(t, awskms.Options{}).Encrypt(context.Background(), keyA, sample, plain)
	wantCallError(t, err, keywrap.ErrUnsupported)
	if strings.Contains(err.Error(), "MDEy") {
		t.Errorf("the error quotes the data key: %v", err)
	}
}

func TestValidationOfTheBlobIsIntegrity(t *testing.T) {
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, _ request) {
		answerError(w, 400, "ValidationException", "1 validation error detected: Value at 'ciphertextBlob' failed to satisfy constraint")
	})
	wantCallError(t, decrypt(context.Background(), s.provider(t, awskms.Options{}), keyA), keywrap.ErrCiphertext)
}

func TestRecovery(t *testing.T) {
	failures := map[string]func(w http.ResponseWriter, r *http.Request){
		"throttled": func(w http.ResponseWriter, _ *http.Request) { answerError(w, 400, "ThrottlingException", "") },
		"internal":  func(w http.ResponseWriter, _ *http.Request) { answerError(w, 500, "KMSInternalException", "") },
		"dropped":   func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"cut off": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			_, _ = w.Write([]byte(`{"KeyId":`))
			panic(http.ErrAbortHandler)
		},
	}
	for name, failure := range failures {
		t.Run(name, func(t *testing.T) {
			checkLive(t)
			s := newServer(t, func(w http.ResponseWriter, r *http.Request, n int, q request) {
				if n <= 3 {
					failure(w, r)
					return
				}
				answerGood(w, q)
			})
			if err := decrypt(context.Background(), s.provider(t, awskms.Options{}), keyA); err != nil {
				t.Fatal(err)
			}
			if got := len(s.seen()); got != 4 {
				t.Errorf("%d attempts, want 4", got)
			}
		})
	}
}

func TestAdaptiveRetryMode(t *testing.T) {
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, n int, q request) {
		if n <= 2 {
			answerError(w, 500, "KMSInternalException", "")
			return
		}
		answerGood(w, q)
	})
	t.Setenv("AWS_RETRY_MODE", "adaptive")
	if err := decrypt(context.Background(), s.provider(t, awskms.Options{}), keyA); err != nil {
		t.Error(err)
	}
	if got := len(s.seen()); got != 3 {
		t.Errorf("%d attempts, want 3", got)
	}
}

// A dead connection takes its share of the budget and leaves the rest.
func TestHungAttemptIsTriedAgain(t *testing.T) {
	s := newServer(t, func(w http.ResponseWriter, r *http.Request, n int, q request) {
		if n == 1 {
			<-r.Context().Done()
			return
		}
		answerGood(w, q)
	})
	if err := decrypt(context.Background(), s.provider(t, awskms.Options{Budget: 6 * time.Second}), keyA); err != nil {
		t.Fatal(err)
	}
	if got := len(s.seen()); got < 2 {
		t.Errorf("%d attempts, want 2 or more", got)
	}
}

func TestBudgetEnds(t *testing.T) {
	tests := map[string]struct {
		answer func(w http.ResponseWriter, r *http.Request, n int, q request)
		want   error
	}{
		"hung": {func(_ http.ResponseWriter, r *http.Request, _ int, _ request) { <-r.Context().Done() }, keywrap.ErrUnavailable},
		"throttled": {func(w http.ResponseWriter, _ *http.Request, _ int, _ request) {
			answerError(w, 400, "ThrottlingException", "Rate exceeded")
		}, keywrap.ErrThrottled},
		"internal": {func(w http.ResponseWriter, _ *http.Request, _ int, _ request) {
			answerError(w, 500, "KMSInternalException", "")
		}, keywrap.ErrUnavailable},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := newServer(t, tt.answer)
			err := decrypt(context.Background(), s.provider(t, awskms.Options{Budget: 500 * time.Millisecond}), keyA)
			wantCallError(t, err, tt.want)
			if errors.Is(err, context.Canceled) {
				t.Errorf("the end of the budget looks like the caller's cancellation: %v", err)
			}
		})
	}
}

func TestCallerCancels(t *testing.T) {
	checkLive(t)
	ctx, cancel := context.WithCancel(context.Background())
	s := newServer(t, func(_ http.ResponseWriter, r *http.Request, _ int, _ request) {
		cancel()
		<-r.Context().Done()
	})
	err := decrypt(ctx, s.provider(t, awskms.Options{}), keyA)
	wantCallError(t, err, context.Canceled)
	if got := len(s.seen()); got != 1 {
		t.Errorf("%d attempts, want 1", got)
	}

	// The same in the pause between two attempts.
	ctx, cancel = context.WithCancel(context.Background())
	s = newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, _ request) {
		answerError(w, 400, "ThrottlingException", "")
		cancel()
	})
	wantCallError(t, decrypt(ctx, s.provider(t, awskms.Options{}), keyA), context.Canceled)
}

func TestCallersDeadline(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	s := newServer(t, func(_ http.ResponseWriter, r *http.Request, _ int, _ request) { <-r.Context().Done() })
	err := decrypt(ctx, s.provider(t, awskms.Options{}), keyA)
	wantCallError(t, err, keywrap.ErrUnavailable)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error = %v, want %v as well", err, context.DeadlineExceeded)
	}
	wantCallError(t, decrypt(ctx, s.provider(t, awskms.Options{}), keyA), keywrap.ErrUnavailable)
}

// An outage: nothing listens, then the service is back at the same address.
func TestConnectionRefused(t *testing.T) {
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, q request) { answerGood(w, q) })
	p := s.provider(t, awskms.Options{Budget: 300 * time.Millisecond})
	if err := decrypt(context.Background(), p, keyA); err != nil {
		t.Fatal(err)
	}
	addr := s.Listener.Addr().String()
	s.Close()
	ce := wantCallError(t, decrypt(context.Background(), p, keyA), keywrap.ErrUnavailable)
	if !strings.Contains(ce.Error(), "refused") {
		t.Errorf("the cause is lost: %v", ce)
	}

	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	back := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(s.handle)}}
	back.Start()
	defer back.Close()
	for try := 1; ; try++ { // the budget is short, the machine may be loaded
		if err = decrypt(context.Background(), p, keyA); err == nil || try == 50 {
			break
		}
	}
	if err != nil {
		t.Errorf("no recovery: %v", err)
	}
}

func TestUntrustedCertificate(t *testing.T) {
	isolate(t)
	calls := 0
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { calls++ }))
	s.Config.ErrorLog = quiet()
	s.StartTLS()
	defer s.Close()
	p := newProvider(t, awskms.Options{Endpoint: s.URL})
	ce := wantCallError(t, decrypt(context.Background(), p, keyA), keywrap.ErrUnavailable)
	if !strings.Contains(ce.Error(), "certificate") || calls != 0 {
		t.Errorf("%d calls: %v", calls, ce)
	}
}

func TestNoCredentials(t *testing.T) {
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, q request) { answerGood(w, q) })
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	wantCallError(t, decrypt(context.Background(), s.provider(t, awskms.Options{}), keyA), keywrap.ErrCredentials)
	wantCallError(t, decrypt(context.Background(), s.provider(t, awskms.Options{Profile: "none"}), keyA), keywrap.ErrCredentials)
	if got := len(s.seen()); got != 0 {
		t.Errorf("%d requests without credentials", got)
	}
}

// What a credential process prints is a secret, also when it cannot be parsed.
func TestCredentialProcessIsNotQuoted(t *testing.T) {
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, q request) { answerGood(w, q) })
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	conf := "[default]\ncredential_process = echo TOPSECRET\n"
	if err := os.WriteFile(os.Getenv("AWS_CONFIG_FILE"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	ce := wantCallError(t, decrypt(context.Background(), s.provider(t, awskms.Options{}), keyA), keywrap.ErrCredentials)
	if strings.Contains(ce.Error(), "TOPSECRET") || !strings.Contains(ce.Error(), "credential_process") {
		t.Errorf("error = %v", ce)
	}
}

// Credentials in the shared file carry no expiry: after a refusal the file is
// read again, so that a mount lives on when a tool renews them.
func TestCredentialsAreReadAgain(t *testing.T) {
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, q request) {
		if q.akid != "NEW" {
			answerError(w, 400, "ExpiredTokenException", "The security token included in the request is expired")
			return
		}
		answerGood(w, q)
	})
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	write := func(akid string) {
		text := "[default]\naws_access_key_id = " + akid + "\naws_secret_access_key = x\naws_session_token = y\n"
		if err := os.WriteFile(os.Getenv("AWS_SHARED_CREDENTIALS_FILE"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("OLD")
	p := s.provider(t, awskms.Options{})
	for range 2 {
		wantCallError(t, decrypt(context.Background(), p, keyA), keywrap.ErrCredentials)
	}
	write("NEW")
	if err := decrypt(context.Background(), p, keyA); err != nil {
		t.Error(err)
	}
}

// STS that cannot be reached is an outage; STS that refuses is bad credentials.
func TestAssumeRole(t *testing.T) {
	stsAnswer := http.StatusServiceUnavailable
	sts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(stsAnswer)
		if stsAnswer == http.StatusForbidden {
			_, _ = w.Write([]byte(`<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>no</Message></Error></ErrorResponse>`))
		}
	}))
	defer sts.Close()
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, q request) { answerGood(w, q) })
	t.Setenv("AWS_ENDPOINT_URL_STS", sts.URL)
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	conf := "[default]\nregion = us-east-1\nrole_arn = arn:aws:iam::111122223333:role/x\nsource_profile = base\n" +
		"[profile base]\naws_access_key_id = A\naws_secret_access_key = B\n"
	if err := os.WriteFile(os.Getenv("AWS_CONFIG_FILE"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_MAX_ATTEMPTS", "1")
	wantCallError(t, decrypt(context.Background(), s.provider(t, awskms.Options{}), keyA), keywrap.ErrUnavailable)
	stsAnswer = http.StatusForbidden
	wantCallError(t, decrypt(context.Background(), s.provider(t, awskms.Options{}), keyA), keywrap.ErrCredentials)
	if got := len(s.seen()); got != 0 {
		t.Errorf("%d requests to KMS without credentials", got)
	}
}
