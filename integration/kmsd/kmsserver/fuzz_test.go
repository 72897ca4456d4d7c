package kmsserver

import (
	"bytes"
	"errors"
	"net/http/httptest"
	"testing"
)

// FuzzRequest sends a body to each operation as an authenticated caller: what
// comes back is a result or an error of the service, never a panic and never
// an internal error.
func FuzzRequest(f *testing.F) {
	var o Options
	if err := o.complete(); err != nil {
		f.Fatal(err)
	}
	s, err := newServer(o)
	if err != nil {
		f.Fatal(err)
	}
	arn, err := s.CreateKey(KeyOptions{Alias: "alias/a"})
	if err != nil {
		f.Fatal(err)
	}
	for op := range operations {
		for _, body := range []string{
			``, `{}`, `null`, `[]`, `{"KeyId":"` + arn + `"}`, `{"KeyId":"alias/a","KeySpec":"AES_256","DryRun":true}`,
			`{"KeyId":1}`, `{"KeyId":"arn:aws:kms::::"}`, `{"CiphertextBlob":"AQICAHg="}`, `{"Limit":1,"Marker":"AA"}`,
			`{"KeyId":"alias/a","Policy":"{}"}`, `{"AliasName":"alias/x","TargetKeyId":"alias/a"}`, `{"EncryptionContext":{"a":1}}`,
		} {
			f.Add(op, "AWS4-HMAC-SHA256 Credential=AKIA/20260101/us-east-1/kms/aws4_request, SignedHeaders=host, Signature=x", []byte(body))
		}
	}
	admin := DefaultPrincipal()
	f.Fuzz(func(t *testing.T, op, authorization string, body []byte) {
		r := httptest.NewRequest("POST", "/", bytes.NewReader(body))
		r.Header["X-Amz-Target"] = []string{targetPrefix + op}
		r.Header["Content-Type"] = []string{contentType}
		r.Header["Authorization"] = []string{authorization}
		q, err := parseRequest(r, body)
		if s.authenticate(q, r) == nil {
			t.Fatal("a request with a made-up signature is authenticated")
		}
		s.mu.Lock()
		s.resolveForLog(q)
		s.mu.Unlock()
		s.faults.decide(q)
		if err != nil {
			return
		}
		q.region, q.principal = s.region, &admin
		_, err = s.dispatch(q)
		var api *apiError
		if err != nil && (!errors.As(err, &api) || api.httpStatus() >= 500) {
			t.Errorf("%s %q: %v", op, body, err)
		}
	})
}

// FuzzBlob opens what is not a blob of the key.
func FuzzBlob(f *testing.F) {
	var o Options
	if err := o.complete(); err != nil {
		f.Fatal(err)
	}
	s, err := newServer(o)
	if err != nil {
		f.Fatal(err)
	}
	k, err := s.newKey(s.region, "", "", false)
	if err != nil {
		f.Fatal(err)
	}
	blob, _ := k.seal([]byte("plaintext"), nil)
	f.Add(blob)
	f.Add([]byte(blobPrefix))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, _, ok := k.open(b, nil); ok != bytes.Equal(b, blob) {
			t.Errorf("open = %v", ok)
		}
	})
}
