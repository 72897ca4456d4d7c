package awskms_test

import (
	"context"
	"encoding/base64"
	"io"
	"log"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/awskms"
)

func quiet() *log.Logger { return log.New(io.Discard, "", 0) }

func good(w http.ResponseWriter, _ *http.Request, _ int, q request) { answerGood(w, q) }

func TestOptions(t *testing.T) {
	isolate(t)
	for _, o := range []awskms.Options{{Budget: 1}, {Budget: -1}, {Region: "us east"}, {Region: "x/../y"},
		{Endpoint: "localhost:4566"}, {Endpoint: "file:///x"}, {Endpoint: "http://"}} {
		if _, err := awskms.New(context.Background(), o); fault.Of(err) != fault.Invalid {
			t.Errorf("New(%+v): %v, want %v", o, err, awskms.ErrOptions)
		}
	}
}

// Nothing is read before the first call: New works with a configuration that
// does not load.
func TestNewDoesNothing(t *testing.T) {
	isolate(t)
	t.Setenv("AWS_PROFILE", "missing")
	p := newProvider(t, awskms.Options{Endpoint: "http://127.0.0.1:1"})
	wantCallError(t, decrypt(context.Background(), p, keyA), keywrap.ErrCredentials)
}

func TestRequests(t *testing.T) {
	checkLive(t)
	s := newServer(t, good)
	p, ctx := s.provider(t, awskms.Options{Region: "eu-central-1"}), context.Background()
	ec := map[string]any{}
	for k, v := range sample.Map() {
		ec[k] = v
	}
	blob := base64.StdEncoding.EncodeToString([]byte("blob"))
	plain := keymem.Copy(dataKey)
	defer plain.Wipe()
	w := keywrap.Wrapped{Key: keyA, Blob: []byte("blob")}

	dk, err := p.GenerateDataKey(ctx, keyA, sample)
	if err != nil {
		t.Fatal(err)
	}
	defer dk.Plain.Wipe()
	if !dk.Plain.Equal(plain) || dk.Wrapped.Key != keyA || dk.Wrapped.Material != "m1" || string(dk.Wrapped.Blob) != "blob" {
		t.Errorf("GenerateDataKey = %+v", dk)
	}
	if _, err := p.Encrypt(ctx, keyA, sample, plain); err != nil {
		t.Error(err)
	}
	if err := decrypt(ctx, p, keyA); err != nil {
		t.Error(err)
	}
	if _, err := p.ReEncrypt(ctx, w, sample, keyA, sample); err != nil {
		t.Error(err)
	}
	want := []request{
		{op: "GenerateDataKey", body: map[string]any{"KeyId": keyA, "KeySpec": "AES_256", "EncryptionContext": ec}},
		{op: "Encrypt", body: map[string]any{"KeyId": keyA, "Plaintext": base64.StdEncoding.EncodeToString(dataKey), "EncryptionContext": ec}},
		{op: "Decrypt", body: map[string]any{"KeyId": keyA, "CiphertextBlob": blob, "EncryptionContext": ec}},
		{op: "ReEncrypt", body: map[string]any{"SourceKeyId": keyA, "CiphertextBlob": blob, "SourceEncryptionContext": ec, "DestinationKeyId": keyA, "DestinationEncryptionContext": ec}},
	}
	got := s.seen()
	if len(got) != len(want) {
		t.Fatalf("%d requests, want %d", len(got), len(want))
	}
	for i, q := range got {
		if q.op != want[i].op || !equalBodies(q.body, want[i].body) {
			t.Errorf("request %d = %s %v, want %s %v", i, q.op, q.body, want[i].op, want[i].body)
		}
		if q.region != "us-east-1" {
			t.Errorf("request %d signed for %q, want the key's own Region", i, q.region)
		}
	}
}

func equalBodies(a, b map[string]any) bool {
	return maps.EqualFunc(a, b, func(x, y any) bool {
		m, ok := x.(map[string]any)
		if !ok {
			return x == y
		}
		n, ok := y.(map[string]any)
		return ok && maps.Equal(m, n)
	})
}

func TestRegions(t *testing.T) {
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, q request) {
		answerOK(w, map[string]any{"KeyMetadata": map[string]any{"Arn": keyB, "KeyId": "x", "KeyState": "Disabled", "Description": "d"}})
	})
	ctx := context.Background()
	describe := func(p *awskms.Provider, key string) string {
		t.Helper()
		if d, err := p.Describe(ctx, key); err == nil && (d.Key != keyB || d.State != keywrap.Disabled) {
			t.Errorf("Describe = %+v", d)
		}
		q := s.seen()
		return q[len(q)-1].region
	}
	p := s.provider(t, awskms.Options{Region: "eu-central-1"})
	for key, want := range map[string]string{
		"alias/x": "eu-central-1", keyA: "us-east-1", keyB: "us-west-2", "arn:aws:kms:ap-south-1:111122223333:alias/x": "ap-south-1",
	} {
		if got := describe(p, key); got != want {
			t.Errorf("%s: asked in %q, want %q", key, got, want)
		}
	}
	t.Setenv("AWS_REGION", "sa-east-1")
	if got := describe(s.provider(t, awskms.Options{}), "alias/x"); got != "sa-east-1" {
		t.Errorf("AWS_REGION: asked in %q", got)
	}
	t.Setenv("AWS_REGION", "")
	conf := "[profile blue]\nregion = us-gov-west-1\naws_access_key_id = A\naws_secret_access_key = B\n"
	if err := os.WriteFile(os.Getenv("AWS_CONFIG_FILE"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := describe(s.provider(t, awskms.Options{Profile: "blue"}), "alias/x"); got != "us-gov-west-1" {
		t.Errorf("profile: asked in %q", got)
	}
	n := len(s.seen())
	_, err := s.provider(t, awskms.Options{}).Describe(ctx, "alias/x")
	ce := wantCallError(t, err, keywrap.ErrCredentials)
	if !strings.Contains(ce.Hint, "AWS_REGION") || len(s.seen()) != n {
		t.Errorf("no Region: hint %q, %d calls", ce.Hint, len(s.seen())-n)
	}
	_, err = s.provider(t, awskms.Options{}).ReEncrypt(ctx, keywrap.Wrapped{Key: keyA, Blob: []byte("b")}, sample, "alias/x", sample)
	wantCallError(t, err, keywrap.ErrCredentials)
}

// Options.Endpoint, then AWS_ENDPOINT_URL_KMS, then AWS_ENDPOINT_URL.
func TestEndpoints(t *testing.T) {
	s := newServer(t, good)
	const nowhere = "http://127.0.0.1:1"
	for name, tt := range map[string]struct{ option, service, global string }{
		"option":  {s.URL, nowhere, nowhere},
		"service": {"", s.URL, nowhere},
		"global":  {"", "", s.URL},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("AWS_MAX_ATTEMPTS", "1")
			for k, v := range map[string]string{"AWS_ENDPOINT_URL_KMS": tt.service, "AWS_ENDPOINT_URL": tt.global} {
				if v != "" {
					t.Setenv(k, v)
				}
			}
			if err := decrypt(context.Background(), newProvider(t, awskms.Options{Endpoint: tt.option}), keyA); err != nil {
				t.Error(err)
			}
		})
	}
}

// Decrypt believes no answer about another key, and no data key of another size.
func TestAnswersAreChecked(t *testing.T) {
	b64 := base64.StdEncoding.EncodeToString
	plain, blob := b64(dataKey), b64([]byte("blob"))
	tests := map[string]struct {
		op     string
		answer map[string]any
		want   error
	}{
		"decrypt: another key":         {"Decrypt", map[string]any{"KeyId": keyB, "Plaintext": plain}, keywrap.ErrWrongKey},
		"decrypt: no key":              {"Decrypt", map[string]any{"Plaintext": plain}, keywrap.ErrWrongKey},
		"decrypt: bare key id":         {"Decrypt", map[string]any{"KeyId": "1234abcd-12ab-34cd-56ef-1234567890ab", "Plaintext": plain}, keywrap.ErrWrongKey},
		"decrypt: short":               {"Decrypt", map[string]any{"KeyId": keyA, "Plaintext": b64(dataKey[:16])}, keywrap.ErrCiphertext},
		"decrypt: long":                {"Decrypt", map[string]any{"KeyId": keyA, "Plaintext": b64(make([]byte, 4096))}, keywrap.ErrCiphertext},
		"decrypt: empty":               {"Decrypt", map[string]any{"KeyId": keyA}, keywrap.ErrCiphertext},
		"generate: another key":        {"GenerateDataKey", map[string]any{"KeyId": keyB, "Plaintext": plain, "CiphertextBlob": blob}, keywrap.ErrWrongKey},
		"generate: alias":              {"GenerateDataKey", map[string]any{"KeyId": "alias/x", "Plaintext": plain, "CiphertextBlob": blob}, keywrap.ErrUnavailable},
		"generate: short":              {"GenerateDataKey", map[string]any{"KeyId": keyA, "Plaintext": b64(dataKey[:31]), "CiphertextBlob": blob}, keywrap.ErrUnavailable},
		"generate: no blob":            {"GenerateDataKey", map[string]any{"KeyId": keyA, "Plaintext": plain}, keywrap.ErrUnavailable},
		"generate: huge blob":          {"GenerateDataKey", map[string]any{"KeyId": keyA, "Plaintext": plain, "CiphertextBlob": b64(make([]byte, 7000))}, keywrap.ErrUnavailable},
		"encrypt: another key":         {"Encrypt", map[string]any{"KeyId": keyB, "CiphertextBlob": blob}, keywrap.ErrWrongKey},
		"re-encrypt: another source":   {"ReEncrypt", map[string]any{"SourceKeyId": keyB, "KeyId": keyA, "CiphertextBlob": blob}, keywrap.ErrWrongKey},
		"re-encrypt: another target":   {"ReEncrypt", map[string]any{"SourceKeyId": keyA, "KeyId": keyB, "CiphertextBlob": blob}, keywrap.ErrWrongKey},
		"describe: another key":        {"DescribeKey", map[string]any{"KeyMetadata": map[string]any{"Arn": keyB, "KeyId": "x"}}, keywrap.ErrWrongKey},
		"describe: no metadata at all": {"DescribeKey", map[string]any{}, keywrap.ErrUnavailable},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			checkLive(t)
			s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, q request) {
				if q.op != tt.op {
					t.Errorf("request %q, want %q", q.op, tt.op)
				}
				answerOK(w, tt.answer)
			})
			wantCallError(t, callOp(s.provider(t, awskms.Options{}), tt.op), tt.want)
			if got := len(s.seen()); got != 1 {
				t.Errorf("%d requests, want 1", got)
			}
		})
	}
}

func callOp(p *awskms.Provider, op string) error {
	ctx := context.Background()
	w := keywrap.Wrapped{Key: keyA, Blob: []byte("blob")}
	plain := keymem.Copy(dataKey)
	defer plain.Wipe()
	var err error
	switch op {
	case "GenerateDataKey":
		var dk keywrap.DataKey
		dk, err = p.GenerateDataKey(ctx, keyA, sample)
		dk.Plain.Wipe()
	case "Encrypt":
		_, err = p.Encrypt(ctx, keyA, sample, plain)
	case "Decrypt":
		err = decrypt(ctx, p, keyA)
	case "ReEncrypt":
		_, err = p.ReEncrypt(ctx, w, sample, keyA, sample)
	case "DescribeKey":
		_, err = p.Describe(ctx, keyA)
	}
	return err
}

// KMS re-encrypts within a Region only.
func TestReEncryptBetweenRegions(t *testing.T) {
	checkLive(t)
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, n int, q request) {
		if n == 3 {
			answerError(w, 400, "AccessDeniedException", "")
			return
		}
		answerGood(w, q)
	})
	p := s.provider(t, awskms.Options{Region: "us-west-2"})
	to := sample
	to.Class = "general"
	w, err := p.ReEncrypt(context.Background(), keywrap.Wrapped{Key: keyA, Blob: []byte("blob")}, sample, keyB, to)
	if err != nil {
		t.Fatal(err)
	}
	if w.Key != keyB {
		t.Errorf("Wrapped.Key = %q, want %q", w.Key, keyB)
	}
	var got []string
	for _, q := range s.seen() {
		got = append(got, q.op+" "+q.region+" "+q.body["EncryptionContext"].(map[string]any)["kmsfs:class"].(string))
	}
	if want := []string{"Decrypt us-east-1 phi", "Encrypt us-west-2 general"}; !slices.Equal(got, want) {
		t.Errorf("requests = %q, want %q", got, want)
	}
	_, err = p.ReEncrypt(context.Background(), keywrap.Wrapped{Key: keyA, Blob: []byte("blob")}, sample, "alias/west", to)
	if ce := wantCallError(t, err, keywrap.ErrDenied); ce.Op != "ReEncrypt" {
		t.Errorf("Op = %q, want ReEncrypt", ce.Op)
	}
}

func TestReEncryptBlamesTheRightKey(t *testing.T) {
	other := strings.Replace(keyA, "1234abcd", "9999abcd", 1)
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, _ request) {
		answerError(w, 400, "DisabledException", other+" is disabled.")
	})
	_, err := s.provider(t, awskms.Options{}).ReEncrypt(context.Background(), keywrap.Wrapped{Key: keyA, Blob: []byte("blob")}, sample, other, sample)
	if ce := wantCallError(t, err, keywrap.ErrDisabled); ce.Key != other {
		t.Errorf("Key = %q, want %q", ce.Key, other)
	}
}

func TestDescribeRotation(t *testing.T) {
	denied := false
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, q request) {
		switch {
		case q.op == "DescribeKey":
			answerOK(w, map[string]any{"KeyMetadata": map[string]any{"Arn": keyA, "KeyId": "x", "KeyState": "Enabled", "KeyManager": "CUSTOMER",
				"CreationDate": 1700000000, "CurrentKeyMaterialId": "m2"}})
		case denied:
			answerError(w, 400, "AccessDeniedException", "")
		case q.op == "GetKeyRotationStatus":
			answerOK(w, map[string]any{"KeyRotationEnabled": true})
		case q.op == "ListKeyRotations":
			answerOK(w, map[string]any{"Rotations": []map[string]any{{"RotationDate": 1720000000}, {"RotationDate": 1710000000}}})
		}
	})
	p := s.provider(t, awskms.Options{})
	d, err := p.Describe(context.Background(), keyA)
	if err != nil {
		t.Fatal(err)
	}
	if !d.Rotation || d.Rotated.Unix() != 1720000000 || d.Created.Unix() != 1700000000 || d.Material != "m2" || d.State != keywrap.Enabled {
		t.Errorf("Describe = %+v", d)
	}
	denied = true
	if d, err = p.Describe(context.Background(), keyA); err != nil || d.Rotation || !d.Rotated.IsZero() || d.Key != keyA {
		t.Errorf("Describe without the right to ask for rotation = %+v, %v", d, err)
	}
}

func TestDescribeStates(t *testing.T) {
	answer := ""
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, _ int, _ request) {
		answerOK(w, map[string]any{"KeyMetadata": map[string]any{"Arn": keyA, "KeyId": "x", "KeyState": answer}})
	})
	p := s.provider(t, awskms.Options{})
	for kmsState, want := range map[string]keywrap.State{
		"Enabled": keywrap.Enabled, "Disabled": keywrap.Disabled, "PendingDeletion": keywrap.PendingDeletion,
		"PendingReplicaDeletion": keywrap.PendingDeletion, "PendingImport": keywrap.Unavailable, "Unavailable": keywrap.Unavailable,
		"Creating": keywrap.Unavailable, "Updating": keywrap.Unavailable, "SomethingNew": keywrap.Unavailable,
	} {
		answer = kmsState
		if d, err := p.Describe(context.Background(), keyA); err != nil || d.State != want {
			t.Errorf("%s: state %q, %v, want %q", kmsState, d.State, err, want)
		}
	}
}

// Bad input costs no request.
func TestRefusedWithoutARequest(t *testing.T) {
	checkLive(t)
	s := newServer(t, good)
	p, ctx := s.provider(t, awskms.Options{Region: "us-east-1"}), context.Background()
	for _, w := range []keywrap.Wrapped{
		{Key: "alias/x", Blob: []byte("b")},
		{Key: "arn:aws:kms:us-east-1:111122223333:alias/x", Blob: []byte("b")},
		{Key: "1234abcd-12ab-34cd-56ef-1234567890ab", Blob: []byte("b")},
	} {
		_, err := p.Decrypt(ctx, w, sample)
		wantCallError(t, err, keywrap.ErrBadURI)
		_, err = p.ReEncrypt(ctx, w, sample, keyA, sample)
		wantCallError(t, err, keywrap.ErrBadURI)
	}
	for _, blob := range [][]byte{nil, {}, make([]byte, 6145)} {
		_, err := p.Decrypt(ctx, keywrap.Wrapped{Key: keyA, Blob: blob}, sample)
		wantCallError(t, err, keywrap.ErrCiphertext)
	}
	if got := len(s.seen()); got != 0 {
		t.Errorf("%d requests, want none", got)
	}
}

// Calls of many goroutines and Regions share clients, also while credentials go
// bad and come back.
func TestConcurrentCalls(t *testing.T) {
	checkLive(t)
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request, n int, q request) {
		if n%7 == 0 {
			answerError(w, 400, "ExpiredTokenException", "")
			return
		}
		answerGood(w, q)
	})
	p := s.provider(t, awskms.Options{})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 10 {
				if err := decrypt(context.Background(), p, []string{keyA, keyB}[i%2]); err != nil && fault.Of(err) != fault.KeyDenied {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}
