package awskms

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
)

// Credentials tells about the credentials that calls are signed with. It holds
// no secret.
type Credentials struct {
	Source    string    // where the SDK found them: "EnvConfigCredentials", "SSOProvider", …
	AccessKey string    // the access key id, which CloudTrail shows as well
	Temporary bool      // with a session token
	Expires   time.Time // zero if that is not known
}

// Credentials looks the credentials up, anew: it does not disturb calls. A failure is a *keywrap.CallError, of
// ErrCredentials where there are none.
func (p *Provider) Credentials(ctx context.Context) (Credentials, error) {
	c := call{op: opDescribe, key: "alias/any"}
	cfg, err := p.load(ctx)
	if err != nil {
		return Credentials{}, p.fail(ctx, c, &credentialError{err})
	}
	v, err := cfg.Credentials.Retrieve(ctx)
	if err != nil {
		return Credentials{}, p.fail(ctx, c, err)
	}
	out := Credentials{Source: v.Source, AccessKey: v.AccessKeyID, Temporary: v.SessionToken != ""}
	if v.CanExpire {
		out.Expires = v.Expires
	}
	return out, nil
}

// Region returns the configured Region, "" if there is none. Only aliases need
// it: a key ARN names its own.
func (p *Provider) Region(ctx context.Context) (string, error) {
	cfg, err := p.load(ctx)
	if err != nil {
		return "", p.fail(ctx, call{op: opDescribe, key: "alias/any"}, &credentialError{err})
	}
	return cfg.Region, nil
}

// RegionOf returns the Region that a key ARN names, "" for anything else.
func RegionOf(key string) string {
	u, err := parseURI(key)
	if err != nil {
		return ""
	}
	return u.region
}

// Reach is what an unsigned request to the service showed.
type Reach struct {
	Endpoint string        // URL
	Skew     time.Duration // how far the service's clock is ahead of this machine's, to the second
	Dated    bool          // the service told its time, so that Skew counts
	Took     time.Duration
}

// Reach sends one request without a signature to the service of a Region and
// returns what it shows, Endpoint even with an error. Any HTTP answer counts as
// reached. Errors: ErrUnavailable as *keywrap.CallError.
func (p *Provider) Reach(ctx context.Context, region string) (Reach, error) {
	c := call{op: opDescribe, key: "alias/any"}
	s, client, err := p.client(ctx, keyURI{region: region})
	if err != nil {
		return Reach{}, p.fail(ctx, c, err)
	}
	u, err := endpoint(ctx, client.Options())
	if err != nil {
		return Reach{}, p.fail(ctx, c, err)
	}
	out := Reach{Endpoint: u.String()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, out.Endpoint, nil)
	if err != nil {
		return out, p.fail(ctx, c, err)
	}
	start := time.Now()
	answer, err := s.cfg.HTTPClient.Do(req)
	out.Took = time.Since(start)
	if err != nil {
		return out, p.fail(ctx, c, fmt.Errorf("%s: %w", out.Endpoint, err))
	}
	defer answer.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(answer.Body, 64<<10)) // so that the connection serves again
	if date, err := http.ParseTime(answer.Header.Get("Date")); err == nil {
		// The header has whole seconds, cut off: on average half a second is
		// missing. It was written about in the middle of the exchange.
		out.Skew = date.Add(time.Second / 2).Sub(start.Add(out.Took / 2)).Round(time.Second)
		out.Dated = true
	}
	return out, nil
}

// endpoint returns where a client with these options sends its calls.
func endpoint(ctx context.Context, o kms.Options) (*url.URL, error) {
	e, err := kms.NewDefaultEndpointResolverV2().ResolveEndpoint(ctx, kms.EndpointParameters{
		Region: aws.String(o.Region), Endpoint: o.BaseEndpoint,
		UseFIPS:      aws.Bool(o.EndpointOptions.UseFIPSEndpoint == aws.FIPSEndpointStateEnabled),
		UseDualStack: aws.Bool(o.EndpointOptions.UseDualStackEndpoint == aws.DualStackEndpointStateEnabled),
	})
	if err != nil {
		return nil, err
	}
	u := e.URI
	if u.Path == "" {
		u.Path = "/"
	}
	return &u, nil
}
