package sigv4

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

const secret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"

// examples are two that AWS publishes: the walk-through of the General
// Reference and "get-vanilla" of the SigV4 test suite.
var examples = []struct {
	name, url, service, headers, signature string
}{
	{"ListUsers", "http://iam.amazonaws.com/?Version=2010-05-08&Action=ListUsers", "iam", "content-type;host;x-amz-date",
		"5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7"},
	{"get-vanilla", "http://example.amazonaws.com/", "service", "host;x-amz-date",
		"5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"},
}

var at = time.Date(2015, 8, 30, 12, 36, 0, 0, time.UTC)

func example(i int) *http.Request {
	e := examples[i]
	r := httptest.NewRequest("GET", e.url, nil)
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded;  charset=utf-8 ")
	r.Header.Set("X-Amz-Date", "20150830T123600Z")
	r.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/"+e.service+
		"/aws4_request, SignedHeaders="+e.headers+", Signature="+e.signature)
	return r
}

func verify(r *http.Request, body, secret string, now time.Time) error {
	a, err := Parse(r.Header.Get("Authorization"))
	if err != nil {
		return err
	}
	return a.Verify(r, []byte(body), secret, now)
}

func TestPublishedExamples(t *testing.T) {
	for i, e := range examples {
		if err := verify(example(i), "", secret, at.Add(time.Minute)); err != nil {
			t.Errorf("%s: %v", e.name, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	auth := example(0).Header.Get("Authorization")
	edit := func(old, new string) func(*http.Request) {
		if !strings.Contains(auth, old) {
			t.Fatalf("%q is not in the example", old)
		}
		return func(r *http.Request) { r.Header.Set("Authorization", strings.Replace(auth, old, new, 1)) }
	}
	for _, tc := range []struct {
		name string
		edit func(*http.Request)
		body string
		want error
	}{
		{"no header", func(r *http.Request) { r.Header.Del("Authorization") }, "", ErrMissing},
		{"another algorithm", edit("SHA256", "SHA1"), "", ErrIncomplete},
		{"short scope", edit("/us-east-1", ""), "", ErrIncomplete},
		{"no signature", edit("Signature=", "Sig="), "", ErrIncomplete},
		{"host not signed", edit(";host", ""), "", ErrIncomplete},
		{"date not signed", edit(";x-amz-date", ""), "", ErrIncomplete},
		{"headers out of order", edit("content-type;host", "host;content-type"), "", ErrIncomplete},
		{"no list", edit("Credential=", "Credential"), "", ErrIncomplete},
		{"too long", edit("Credential=", strings.Repeat("x", 5000)), "", ErrIncomplete},
		{"another date", func(r *http.Request) { r.Header.Set("X-Amz-Date", "20150831T123600Z") }, "", ErrIncomplete},
		{"no date", func(r *http.Request) { r.Header.Del("X-Amz-Date") }, "", ErrIncomplete},
		{"another Region", edit("us-east-1", "us-east-2"), "", ErrMismatch},
		{"another service", edit("/iam", "/kms"), "", ErrMismatch},
		{"last digit", edit("b5d7", "b5d8"), "", ErrMismatch},
		{"body", func(*http.Request) {}, "x", ErrMismatch},
		{"host", func(r *http.Request) { r.Host = "kms.amazonaws.com" }, "", ErrMismatch},
		{"method", func(r *http.Request) { r.Method = "PUT" }, "", ErrMismatch},
		{"path", func(r *http.Request) { r.URL.Path = "/x" }, "", ErrMismatch},
		{"query", func(r *http.Request) { r.URL.RawQuery = "Action=CreateUser" }, "", ErrMismatch},
		{"signed header", func(r *http.Request) { r.Header.Set("Content-Type", "text/plain") }, "", ErrMismatch},
	} {
		r := example(0)
		tc.edit(r)
		if err := verify(r, tc.body, secret, at); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
	if err := verify(example(0), "", secret+"x", at); !errors.Is(err, ErrMismatch) {
		t.Errorf("wrong secret: %v", err)
	}
	for _, d := range []time.Duration{MaxSkew + time.Second, -MaxSkew - time.Second} {
		if err := verify(example(0), "", secret, at.Add(d)); !errors.Is(err, ErrSkewed) {
			t.Errorf("clock off by %v: %v", d, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(example(0).Header.Get("Authorization"))
	f.Add("AWS4-HMAC-SHA256 Credential=////, SignedHeaders=, Signature=")
	f.Fuzz(func(t *testing.T, header string) {
		a, err := Parse(header)
		if err != nil {
			return
		}
		r := example(0)
		if a.Verify(r, nil, "never the secret", at) == nil {
			t.Error("verifies under a wrong secret")
		}
	})
}
