package awskms_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/awskms"
)

const (
	keyA = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	keyB = "arn:aws:kms:us-west-2:111122223333:key/0987dcba-09fe-87dc-65ba-ab0987654321"
)

var (
	sample  = keywrap.Context{Store: "00ff", Class: "phi", Purpose: keywrap.PurposeData, ID: "0a0b"}
	dataKey = []byte("0123456789abcdef0123456789abcdef")
)

// isolate gives the test AWS settings of its own, whoever runs it.
func isolate(t *testing.T) {
	t.Helper()
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); strings.HasPrefix(name, "AWS_") {
			t.Setenv(name, "") // so that it comes back
			if err := os.Unsetenv(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	dir := t.TempDir()
	t.Setenv("AWS_CONFIG_FILE", filepath.Join(dir, "config"))
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", filepath.Join(dir, "credentials"))
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIDTEST")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
}

// request is one call as the server saw it.
type request struct {
	op     string // "Decrypt"
	region string // that the signature is for
	akid   string
	body   map[string]any
}

// server is a KMS that answers by script.
type server struct {
	*httptest.Server
	mu       sync.Mutex
	requests []request
	// answer is called for each request, the first one with n = 1.
	answer func(w http.ResponseWriter, r *http.Request, n int, q request)
}

func newServer(t *testing.T, answer func(w http.ResponseWriter, r *http.Request, n int, q request)) *server {
	t.Helper()
	isolate(t)
	s := &server{answer: answer}
	s.Server = httptest.NewServer(http.HandlerFunc(s.handle))
	t.Cleanup(s.Close)
	return s
}

func (s *server) handle(w http.ResponseWriter, r *http.Request) {
	q := request{op: strings.TrimPrefix(r.Header.Get("X-Amz-Target"), "TrentService.")}
	if _, cred, ok := strings.Cut(r.Header.Get("Authorization"), "Credential="); ok {
		if f := strings.Split(cred, "/"); len(f) > 2 {
			q.akid, q.region = f[0], f[2]
		}
	}
	_ = json.NewDecoder(r.Body).Decode(&q.body)
	s.mu.Lock()
	s.requests = append(s.requests, q)
	n := len(s.requests)
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	w.Header().Set("x-amzn-RequestId", fmt.Sprintf("request-%d", n))
	s.answer(w, r, n, q)
}

func (s *server) seen() []request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]request(nil), s.requests...)
}

func answerError(w http.ResponseWriter, status int, code, message string) {
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"__type": code, "message": message})
}

func answerOK(w http.ResponseWriter, fields map[string]any) {
	_ = json.NewEncoder(w).Encode(fields)
}

// answerGood answers as KMS does when all is well.
func answerGood(w http.ResponseWriter, q request) {
	b64 := base64.StdEncoding.EncodeToString
	switch q.op {
	case "GenerateDataKey":
		answerOK(w, map[string]any{"KeyId": q.body["KeyId"], "Plaintext": b64(dataKey), "CiphertextBlob": b64([]byte("blob")), "KeyMaterialId": "m1"})
	case "Decrypt":
		answerOK(w, map[string]any{"KeyId": q.body["KeyId"], "Plaintext": b64(dataKey)})
	case "Encrypt":
		answerOK(w, map[string]any{"KeyId": q.body["KeyId"], "CiphertextBlob": b64([]byte("blob"))})
	case "ReEncrypt":
		answerOK(w, map[string]any{"SourceKeyId": q.body["SourceKeyId"], "KeyId": q.body["DestinationKeyId"], "CiphertextBlob": b64([]byte("again"))})
	case "DescribeKey":
		answerOK(w, map[string]any{"KeyMetadata": map[string]any{"Arn": q.body["KeyId"], "KeyId": "x", "KeyState": "Enabled"}})
	default:
		answerError(w, 400, "UnknownOperationException", "")
	}
}

func (s *server) provider(t *testing.T, o awskms.Options) *awskms.Provider {
	t.Helper()
	if o.Endpoint == "" {
		o.Endpoint = s.URL
	}
	return newProvider(t, o)
}

func newProvider(t *testing.T, o awskms.Options) *awskms.Provider {
	t.Helper()
	if o.Budget == 0 {
		o.Budget = time.Minute // a loaded machine must not turn into an outage
	}
	p, err := awskms.New(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

func decrypt(ctx context.Context, p *awskms.Provider, key string) error {
	got, err := p.Decrypt(ctx, keywrap.Wrapped{Key: key, Blob: []byte("blob")}, sample)
	got.Wipe()
	return err
}

// wantCallError checks what every failure carries and returns it.
func wantCallError(t *testing.T, err, sentinel error) *keywrap.CallError {
	t.Helper()
	var ce *keywrap.CallError
	if !errors.As(err, &ce) {
		t.Fatalf("error is %T, want *keywrap.CallError: %v", err, err)
	}
	if !errors.Is(err, sentinel) {
		t.Errorf("error = %v, want %v", err, sentinel)
	}
	if want := fault.Of(sentinel); fault.Of(err) != want {
		t.Errorf("kind = %v, want %v", fault.Of(err), want)
	}
	if ce.Hint == "" && !errors.Is(err, context.Canceled) {
		t.Errorf("no hint: %v", err)
	}
	return ce
}

// checkLive fails the test if it leaves keys in memory.
func checkLive(t *testing.T) {
	t.Helper()
	live := keymem.Live()
	t.Cleanup(func() {
		if got := keymem.Live(); got != live {
			t.Errorf("%d keys live, want %d", got, live)
		}
	})
}
