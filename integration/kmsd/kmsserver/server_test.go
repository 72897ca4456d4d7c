package kmsserver

import (
	"errors"
	"net/http"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/smithy-go"
)

// client is the real SDK as a principal, without retries: one call is one
// request.
func client(s *Server, p Principal, region string) *kms.Client {
	return kms.New(kms.Options{
		Region:       region,
		BaseEndpoint: aws.String(s.URL()),
		Credentials:  credentials.NewStaticCredentialsProvider(p.AccessKeyID, p.SecretAccessKey, p.SessionToken),
		Retryer:      aws.NopRetryer{},
		HTTPClient:   &http.Client{Transport: &http.Transport{DisableKeepAlives: true}},
	})
}

// start runs a server and a client of its administrator.
func start(t *testing.T) (*Server, *kms.Client) {
	t.Helper()
	s := StartT(t, Options{})
	return s, client(s, DefaultPrincipal(), s.Region())
}

func newKey(t *testing.T, s *Server, o KeyOptions) string {
	t.Helper()
	arn, err := s.CreateKey(o)
	if err != nil {
		t.Fatalf("CreateKey: %v", err)
	}
	return arn
}

// must fails the test unless the call succeeded.
func must[T any](t *testing.T, out T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatalf("call failed: %v", err)
	}
	return out
}

// code returns the error code as the SDK sees it, "" for success.
func code(err error) string {
	var api smithy.APIError
	if errors.As(err, &api) {
		return api.ErrorCode()
	}
	if err != nil {
		return "not an answer: " + err.Error()
	}
	return ""
}

func wantCode(t *testing.T, what string, err error, want string) {
	t.Helper()
	if got := code(err); got != want {
		t.Errorf("%s: code %q (%v), want %q", what, got, err, want)
	}
}
