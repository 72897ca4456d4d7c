package awskms

import (
	"errors"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// FuzzParseURI: key URIs come from file headers. What is taken holds nothing
// that could turn a Region into another host.
func FuzzParseURI(f *testing.F) {
	for _, s := range []string{single, mrkWest, "alias/x", "arn:aws:kms:us-east-1:111122223333:alias/x", "arn:aws:kms:a.b/:111122223333:key/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, uri string) {
		u, err := parseURI(uri)
		if err != nil {
			if !errors.Is(err, keywrap.ErrBadURI) {
				t.Fatalf("error = %v, want %v", err, keywrap.ErrBadURI)
			}
			return
		}
		if len(uri) > maxARN || u.region != "" && !only(u.region, "-", 32) {
			t.Fatalf("parseURI(%q) = %+v", uri, u)
		}
		if u.id != "" && !SameKey(uri, uri) {
			t.Fatalf("%q is not the same key as itself", uri)
		}
		if r, ok := Replica(uri, "eu-west-1"); ok && !SameKey(r, uri) {
			t.Fatalf("%q is no replica of %q", r, uri)
		}
	})
}
