package sigv4

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"sort"
	"strconv"
	"strings"
	"time"
)

const (
	algorithm = "AWS4-HMAC-SHA256"
	maxHeader = 4096
	timeForm  = "20060102T150405Z"

	// MaxSkew is how far the client's clock may be from the server's.
	MaxSkew = 5 * time.Minute
)

// Authorization is a parsed Authorization header.
type Authorization struct {
	AccessKeyID string
	Date        string // YYYYMMDD
	Region      string
	Service     string

	signedHeaders []string
	signature     string
}

// Parse reads the Authorization header's value. It answers ErrMissing for an
// empty one and ErrIncomplete for one that it cannot read.
func Parse(header string) (Authorization, error) {
	var a Authorization
	if header == "" {
		return a, ErrMissing
	}
	rest, ok := strings.CutPrefix(header, algorithm+" ")
	if !ok || len(header) > maxHeader {
		return a, fmt.Errorf("%w: unknown algorithm", ErrIncomplete)
	}
	fields := map[string]string{}
	for _, part := range strings.Split(rest, ",") {
		k, v, ok := strings.Cut(strings.TrimSpace(part), "=")
		if !ok {
			return a, fmt.Errorf("%w: not a list of name=value", ErrIncomplete)
		}
		fields[k] = v
	}
	scope := strings.Split(fields["Credential"], "/")
	if len(scope) != 5 || scope[4] != "aws4_request" {
		return a, fmt.Errorf("%w: credential scope", ErrIncomplete)
	}
	for _, s := range scope {
		if s == "" || len(s) > 128 || strings.ContainsAny(s, " \t\"\\") {
			return a, fmt.Errorf("%w: credential scope", ErrIncomplete)
		}
	}
	a.AccessKeyID, a.Date, a.Region, a.Service = scope[0], scope[1], scope[2], scope[3]
	a.signature = fields["Signature"]
	a.signedHeaders = strings.Split(fields["SignedHeaders"], ";")
	if a.signature == "" || !sort.StringsAreSorted(a.signedHeaders) || !contains(a.signedHeaders, "host") {
		return a, fmt.Errorf("%w: signature or signed headers", ErrIncomplete)
	}
	return a, nil
}

func contains(list []string, s string) bool {
	i := sort.SearchStrings(list, s)
	return i < len(list) && list[i] == s
}

// Verify checks the signature of r, whose body is given, under secret.
func (a Authorization) Verify(r *http.Request, body []byte, secret string, now time.Time) error {
	stamp := r.Header.Get("X-Amz-Date")
	at, err := time.Parse(timeForm, stamp)
	if err != nil || !strings.HasPrefix(stamp, a.Date) || !contains(a.signedHeaders, "x-amz-date") {
		return fmt.Errorf("%w: X-Amz-Date", ErrIncomplete)
	}
	if d := now.Sub(at); d > MaxSkew || d < -MaxSkew {
		return fmt.Errorf("%w: %s", ErrSkewed, stamp)
	}
	sum := sha256.Sum256([]byte(a.canonicalRequest(r, body)))
	toSign := strings.Join([]string{
		algorithm, stamp,
		a.Date + "/" + a.Region + "/" + a.Service + "/aws4_request",
		hex.EncodeToString(sum[:]),
	}, "\n")
	key := []byte("AWS4" + secret)
	for _, part := range []string{a.Date, a.Region, a.Service, "aws4_request", toSign} {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(part))
		key = mac.Sum(nil)
	}
	if !hmac.Equal([]byte(hex.EncodeToString(key)), []byte(a.signature)) {
		return ErrMismatch
	}
	return nil
}

func (a Authorization) canonicalRequest(r *http.Request, body []byte) string {
	var b strings.Builder
	path := r.URL.EscapedPath()
	if path == "" {
		path = "/"
	}
	query := strings.Split(r.URL.RawQuery, "&")
	sort.Strings(query)
	b.WriteString(r.Method + "\n" + path + "\n" + strings.Join(query, "&") + "\n")
	for _, name := range a.signedHeaders {
		b.WriteString(name + ":" + headerValue(r, name) + "\n")
	}
	sum := sha256.Sum256(body)
	b.WriteString("\n" + strings.Join(a.signedHeaders, ";") + "\n" + hex.EncodeToString(sum[:]))
	return b.String()
}

// headerValue gives what the client signed: net/http moves Host and
// Content-Length out of the header.
func headerValue(r *http.Request, name string) string {
	switch name {
	case "host":
		return r.Host
	case "content-length":
		return strconv.FormatInt(r.ContentLength, 10)
	}
	values := r.Header.Values(name)
	trimmed := make([]string, len(values))
	for i, v := range values {
		trimmed[i] = strings.Join(strings.Fields(v), " ")
	}
	return strings.Join(trimmed, ",")
}
