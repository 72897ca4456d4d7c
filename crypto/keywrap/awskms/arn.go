package awskms

import (
	"fmt"
	"strings"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// maxARN is the longest key URI, in bytes: KMS's own limit for KeyId.
const maxARN = 2048

// keyURI is a parsed key ARN, alias ARN, or "alias/NAME".
type keyURI struct {
	partition, region, account string // "" for "alias/NAME"
	id                         string // "mrk-…" or a UUID; "" for an alias
}

// parseURI takes "arn:PARTITION:kms:REGION:ACCOUNT:key/ID", the same with
// "alias/NAME" at the end, and "alias/NAME" alone. The Region becomes part of a
// host name, hence the strictness.
func parseURI(uri string) (keyURI, error) {
	bad := fmt.Errorf("%w: not an AWS KMS key ARN or alias/NAME", keywrap.ErrBadURI)
	if len(uri) > maxARN {
		return keyURI{}, bad
	}
	if alias, ok := strings.CutPrefix(uri, "alias/"); ok {
		if !only(alias, "/_-", 250) {
			return keyURI{}, bad
		}
		return keyURI{}, nil
	}
	f := strings.SplitN(uri, ":", 6)
	if len(f) != 6 || f[0] != "arn" || f[2] != "kms" || !only(f[1], "-", 32) || !only(f[3], "-", 32) ||
		len(f[4]) != 12 || strings.Trim(f[4], "0123456789") != "" {
		return keyURI{}, bad
	}
	u := keyURI{partition: f[1], region: f[3], account: f[4]}
	if alias, ok := strings.CutPrefix(f[5], "alias/"); ok && only(alias, "/_-", 250) {
		return u, nil
	}
	id, ok := strings.CutPrefix(f[5], "key/")
	if !ok || !only(id, "-", 128) {
		return keyURI{}, bad
	}
	u.id = id
	return u, nil
}

// only reports whether s is 1 to limit ASCII letters, digits, or bytes of extra.
func only(s, extra string, limit int) bool {
	if s == "" || len(s) > limit {
		return false
	}
	for _, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte(extra, c) >= 0) {
			return false
		}
	}
	return true
}

// parseKeyARN takes a key ARN only: what a wrapped key may name.
func parseKeyARN(uri string) (keyURI, error) {
	u, err := parseURI(uri)
	if err == nil && u.id == "" {
		return keyURI{}, fmt.Errorf("%w: a wrapped key names a key ARN, not an alias", keywrap.ErrBadURI)
	}
	return u, err
}

func (u keyURI) multiRegion() bool { return strings.HasPrefix(u.id, "mrk-") }

// SameKey reports whether two key ARNs name the same key material: equal ARNs,
// or related multi-Region keys (same partition, account and mrk- id). Related
// keys have independent policies and states, so a caller that allows one does
// not thereby allow the other. Aliases and malformed URIs are never the same as
// anything.
func SameKey(a, b string) bool {
	x, errX := parseKeyARN(a)
	y, errY := parseKeyARN(b)
	if errX != nil || errY != nil {
		return false
	}
	if x.multiRegion() {
		x.region, y.region = "", ""
	}
	return x == y
}

// Replica returns the ARN that a multi-Region key has in region; ok is false if
// key is not the ARN of a multi-Region key. Whether such a replica exists only
// KMS knows. A wrapped key opens under every replica: set Wrapped.Key to the
// replica's ARN, after checking that it is allowed, to have Decrypt ask there.
func Replica(key, region string) (arn string, ok bool) {
	u, err := parseKeyARN(key)
	if err != nil || !u.multiRegion() || !only(region, "-", 32) {
		return "", false
	}
	return strings.Join([]string{"arn", u.partition, "kms", region, u.account, "key/" + u.id}, ":"), true
}
