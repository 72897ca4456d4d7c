package awskms_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/awskms"
)

func provider(t *testing.T, o awskms.Options) *awskms.Provider {
	t.Helper()
	p, err := awskms.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestCredentials(t *testing.T) {
	isolate(t)
	p := provider(t, awskms.Options{})
	got, err := p.Credentials(t.Context())
	if err != nil || got.AccessKey != "AKIDTEST" || got.Source != "EnvConfigCredentials" || got.Temporary || !got.Expires.IsZero() {
		t.Errorf("from the environment: %+v, %v", got, err)
	}
	until := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	config := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(config, []byte("[profile p]\nregion = eu-west-1\ncredential_process = echo '{\"Version\": 1, \"AccessKeyId\": \"AKIDPROC\", \"SecretAccessKey\": \"s\", \"SessionToken\": \"t\", \"Expiration\": \""+
		until.Format(time.RFC3339)+"\"}'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_CONFIG_FILE", config)
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	named := provider(t, awskms.Options{Profile: "p"})
	if got, err = named.Credentials(t.Context()); err != nil || got.AccessKey != "AKIDPROC" || !got.Temporary || !got.Expires.Equal(until) {
		t.Errorf("from a profile: %+v, %v, want them valid until %v", got, err, until)
	}
	if r, err := named.Region(t.Context()); err != nil || r != "eu-west-1" {
		t.Errorf("Region %q, %v", r, err)
	}
	if got, err = p.Credentials(t.Context()); !errors.Is(err, keywrap.ErrCredentials) {
		t.Errorf("none: %+v, %v", got, err)
	}
	if r, err := p.Region(t.Context()); err != nil || r != "" {
		t.Errorf("no Region: %q, %v", r, err)
	}
	if _, err = provider(t, awskms.Options{Profile: "absent"}).Region(t.Context()); !errors.Is(err, keywrap.ErrCredentials) {
		t.Errorf("a profile that is not there: %v", err)
	}
}

func TestRegionOf(t *testing.T) {
	for key, want := range map[string]string{keyA: "us-east-1", keyB: "us-west-2", "alias/a": "", "keyring:a": "", "": ""} {
		if got := awskms.RegionOf(key); got != want {
			t.Errorf("RegionOf(%q) = %q, want %q", key, got, want)
		}
	}
}

func TestReach(t *testing.T) {
	isolate(t)
	ahead := time.Duration(0)
	date := func() string { return time.Now().Add(ahead).UTC().Format(http.TimeFormat) }
	calls := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		calls++
		if r.Header.Get("Authorization") != "" {
			t.Error("the request is signed")
		}
		w.Header()["Date"] = nil
		if d := date(); d != "" {
			w.Header().Set("Date", d)
		}
		w.WriteHeader(http.StatusNotFound)
	}))
	defer server.Close()
	p := provider(t, awskms.Options{Endpoint: server.URL, Budget: time.Second})
	for _, want := range []time.Duration{0, time.Hour, -10 * time.Minute} {
		ahead = want
		got, err := p.Reach(t.Context(), "us-east-1")
		if err != nil || !got.Dated || (got.Skew-want).Abs() > 2*time.Second || !strings.HasPrefix(got.Endpoint, server.URL) {
			t.Errorf("%v ahead: %+v, %v", want, got, err)
		}
	}
	date = func() string { return "yesterday" }
	if got, err := p.Reach(t.Context(), "us-east-1"); err != nil || got.Dated || got.Skew != 0 {
		t.Errorf("no time: %+v, %v", got, err)
	}
	if calls != 4 {
		t.Errorf("%d requests, want one each", calls)
	}
	server.Close()
	if got, err := p.Reach(t.Context(), "us-east-1"); !errors.Is(err, keywrap.ErrUnavailable) || got.Endpoint == "" {
		t.Errorf("nobody there: %+v, %v", got, err)
	}
}

// TestReachEndpoint: the endpoint is where calls go, by every setting of the
// SDK. Nothing is sent: the context has ended.
func TestReachEndpoint(t *testing.T) {
	isolate(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	endpoint := func(region string) string {
		t.Helper()
		got, err := provider(t, awskms.Options{}).Reach(ctx, region)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", region, err)
		}
		return got.Endpoint
	}
	for region, want := range map[string]string{"us-east-1": "https://kms.us-east-1.amazonaws.com/", "cn-north-1": "https://kms.cn-north-1.amazonaws.com.cn/"} {
		if got := endpoint(region); got != want {
			t.Errorf("%s: %s, want %s", region, got, want)
		}
	}
	t.Setenv("AWS_USE_FIPS_ENDPOINT", "true")
	if got := endpoint("us-east-1"); got != "https://kms-fips.us-east-1.amazonaws.com/" {
		t.Errorf("FIPS: %s", got)
	}
	t.Setenv("AWS_USE_FIPS_ENDPOINT", "")
	t.Setenv("AWS_USE_DUALSTACK_ENDPOINT", "true")
	if got := endpoint("us-east-1"); got != "https://kms.us-east-1.api.aws/" {
		t.Errorf("dual stack: %s", got)
	}
	t.Setenv("AWS_USE_DUALSTACK_ENDPOINT", "")
	t.Setenv("AWS_ENDPOINT_URL_KMS", "https://vpce-1.kms.us-east-1.vpce.amazonaws.com")
	if got := endpoint("us-east-1"); got != "https://vpce-1.kms.us-east-1.vpce.amazonaws.com/" {
		t.Errorf("from the environment: %s", got)
	}
}
