package awskms

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

const (
	single  = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	mrkEast = "arn:aws:kms:us-east-1:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab"
	mrkWest = "arn:aws:kms:us-west-2:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab"
)

func TestParseURI(t *testing.T) {
	for uri, region := range map[string]string{
		single: "us-east-1", mrkWest: "us-west-2", "alias/pci": "", "alias/a/b_c-D": "", "alias/aws/ebs": "",
		"arn:aws-us-gov:kms:us-gov-west-1:000000000000:key/x":    "us-gov-west-1",
		"arn:aws-cn:kms:cn-north-1:111122223333:alias/team/key1": "cn-north-1",
	} {
		u, err := parseURI(uri)
		if err != nil || u.region != region {
			t.Errorf("parseURI(%q) = %+v, %v, want region %q", uri, u, err, region)
		}
	}
	for _, uri := range []string{
		"", "alias/", "alias/a b", "alias/" + strings.Repeat("x", 251), "key/x", "keyring:general",
		"arn:", "arn:aws:kms", "arn:aws:kms:us-east-1:111122223333:", "arn:aws:kms:us-east-1:111122223333:key/",
		"arn:aws:s3:us-east-1:111122223333:key/x", "arn:aws:kms::111122223333:key/x", "arn:aws:kms:us-east-1::key/x",
		"arn:aws:kms:us-east-1:11112222333:key/x", "arn:aws:kms:us-east-1:11112222333a:key/x",
		"arn:aws:kms:evil.example/x:111122223333:key/x", "arn:aws:kms:us-east-1:111122223333:key/x:y",
		"arn:aws:kms:us-east-1:111122223333:key/x\n", "arn:aws:kms:us-east-1:111122223333:grant/x", "ARN:aws:kms:us-east-1:111122223333:key/x",
		strings.Repeat("a", maxARN+1),
	} {
		if u, err := parseURI(uri); !errors.Is(err, keywrap.ErrBadURI) {
			t.Errorf("parseURI(%.60q) = %+v, %v, want %v", uri, u, err, keywrap.ErrBadURI)
		}
	}
}

func TestSameKey(t *testing.T) {
	tests := []struct {
		a, b string
		want bool
	}{
		{single, single, true},
		{mrkEast, mrkEast, true},
		{mrkEast, mrkWest, true},
		{single, strings.Replace(single, "us-east-1", "us-west-2", 1), false},
		{single, strings.Replace(single, "1234abcd", "1234abce", 1), false},
		{mrkEast, strings.Replace(mrkWest, "111122223333", "444455556666", 1), false},
		{mrkEast, strings.Replace(mrkWest, "arn:aws:", "arn:aws-cn:", 1), false},
		{mrkEast, strings.Replace(mrkWest, "mrk-1", "mrk-2", 1), false},
		{mrkEast, strings.Replace(mrkWest, "mrk-", "", 1), false},
		{mrkEast, single, false},
		{"alias/x", "alias/x", false},
		{"arn:aws:kms:us-east-1:111122223333:alias/x", "arn:aws:kms:us-east-1:111122223333:alias/x", false},
		{"arn:aws:kms:us-east-1:111122223333:alias/mrk-1", "arn:aws:kms:us-west-2:111122223333:alias/mrk-1", false},
		{"", "", false},
	}
	for _, tt := range tests {
		if SameKey(tt.a, tt.b) != tt.want || SameKey(tt.b, tt.a) != tt.want {
			t.Errorf("SameKey(%q, %q) = %v, want %v", tt.a, tt.b, !tt.want, tt.want)
		}
	}
}

func TestReplica(t *testing.T) {
	if got, ok := Replica(mrkEast, "us-west-2"); !ok || got != mrkWest {
		t.Errorf("Replica = %q, %v, want %q", got, ok, mrkWest)
	}
	for _, tt := range [][2]string{{single, "us-west-2"}, {"alias/mrk-1", "us-west-2"}, {mrkEast, ""}, {mrkEast, "evil.example"}} {
		if got, ok := Replica(tt[0], tt[1]); ok {
			t.Errorf("Replica(%q, %q) = %q, want none", tt[0], tt[1], got)
		}
	}
}

// A name that does not resolve needs a resolver to test for real.
func TestClassifyDNS(t *testing.T) {
	for _, tt := range []struct {
		err   *net.DNSError
		retry bool
	}{
		{&net.DNSError{Err: "no such host", Name: "kms.example", IsNotFound: true}, false},
		{&net.DNSError{Err: "server misbehaving", Name: "kms.example", IsTemporary: true}, true},
		{&net.DNSError{Err: "i/o timeout", Name: "kms.example", IsTimeout: true}, true},
	} {
		v := classify(fmt.Errorf("send: %w", &net.OpError{Op: "dial", Err: tt.err}))
		if v.err != keywrap.ErrUnavailable || v.retry != tt.retry {
			t.Errorf("classify(%v) = %+v, want unavailable, retry %v", tt.err, v, tt.retry)
		}
	}
}

func TestEveryCodeHasAHint(t *testing.T) {
	for code, v := range codes {
		if hint(opDecrypt, v.err) == "" {
			t.Errorf("%s: no hint", code)
		}
		if strings.HasSuffix(code, "Exception") {
			t.Errorf("%s never matches: codes are looked up without the suffix", code)
		}
		if retry := fault.Of(v.err) == fault.KeyUnavailable; v.retry != retry {
			t.Errorf("%s: retry = %v, want %v", code, v.retry, retry)
		}
	}
}

// Pauses are random, grow, and stay far below the budget.
func TestPause(t *testing.T) {
	seen := map[time.Duration]bool{}
	for attempt := range 70 {
		for range 20 {
			d, err := pause(attempt, context.Canceled)
			if bound := min(firstPause<<min(attempt, 10), longestPause); err != nil || d < 0 || d > bound {
				t.Fatalf("pause(%d) = %v, %v, want at most %v", attempt, d, err, bound)
			}
			seen[d] = true
		}
	}
	if len(seen) < 100 {
		t.Errorf("%d different pauses of 1400: no jitter", len(seen))
	}
}

func TestClean(t *testing.T) {
	if got := clean("a\nb\x00c\x7f\xffd: ", 100); got != "a b c ?d" {
		t.Errorf("clean = %q", got)
	}
	if got := clean(strings.Repeat("ä", 100), 51); len(got) > 55 || !strings.HasSuffix(got, "ä…") {
		t.Errorf("clean = %q", got)
	}
}
