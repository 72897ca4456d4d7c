package awskms

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/smithy-go/logging"
	"github.com/aws/smithy-go/middleware"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// DefaultBudget bounds a call, retries included.
const DefaultBudget = 10 * time.Second

const (
	minBudget     = 10 * time.Millisecond
	maxAttempts   = 20 // the budget runs out first
	firstPause    = 100 * time.Millisecond
	longestPause  = 2 * time.Second
	attemptsShare = 3 // one attempt gets a third of the budget
)

// Options are settings beyond the SDK's own configuration. The zero value of
// each leaves the matter to that.
type Options struct {
	Region   string        // for aliases; key ARNs name their own
	Profile  string        // of the shared configuration files
	Endpoint string        // URL of the service, in every Region
	Budget   time.Duration // for one call, retries included; 0 is DefaultBudget
	// ReturnThrottling makes a call fail at the first answer that says
	// "throttled", for a caller that paces and retries such calls itself, as
	// package limit does. Everything else is retried as before.
	ReturnThrottling bool
}

// Provider is a keywrap.Provider for key ARNs, alias ARNs and "alias/NAME".
type Provider struct {
	opts Options

	mu     sync.Mutex
	loaded *session // nil until the first call, and after bad credentials
}

var _ keywrap.Provider = (*Provider)(nil)

// session is one reading of the configuration, with a client for each Region.
type session struct {
	cfg     aws.Config
	clients map[string]*regional
}

type regional struct {
	*kms.Client
	retryer aws.RetryerV2 // shared, so that the SDK's retry quota spans calls
}

// New returns a provider. It does no I/O and does not keep ctx: configuration
// and credentials are looked up at the first call.
func New(_ context.Context, opts Options) (*Provider, error) {
	if opts.Budget == 0 {
		opts.Budget = DefaultBudget
	}
	if opts.Budget < minBudget {
		return nil, fmt.Errorf("budget %v: %w", opts.Budget, ErrOptions)
	}
	if opts.Region != "" && !only(opts.Region, "-", 32) {
		return nil, fmt.Errorf("region %.40q: %w", opts.Region, ErrOptions)
	}
	if opts.Endpoint != "" {
		u, err := url.Parse(opts.Endpoint)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return nil, fmt.Errorf("endpoint %.200q: %w", opts.Endpoint, ErrOptions)
		}
	}
	return &Provider{opts: opts}, nil
}

// Close closes idle connections. Calls that run are not disturbed; later calls
// connect again.
func (p *Provider) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drop()
	return nil
}

func (p *Provider) drop() {
	if p.loaded == nil {
		return
	}
	if c, ok := p.loaded.cfg.HTTPClient.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
	p.loaded = nil
}

// forget makes the next call read the configuration anew, unless another call
// has done so already. Credentials that a tool rewrites in the shared files
// carry no expiry: the SDK alone would use the old ones for ever.
func (p *Provider) forget(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.loaded == s {
		p.drop()
	}
}

// client returns the client for u's Region, or for the configured one.
func (p *Provider) client(ctx context.Context, u keyURI) (*session, *regional, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.loaded == nil {
		cfg, err := p.load(ctx)
		if err != nil {
			return nil, nil, &credentialError{err}
		}
		p.loaded = &session{cfg: cfg, clients: map[string]*regional{}}
	}
	s, region := p.loaded, u.region
	if region == "" {
		region = s.cfg.Region
	}
	if region == "" {
		return nil, nil, &credentialError{errNoRegion}
	}
	c := s.clients[region]
	if c == nil {
		c = &regional{retryer: newRetryer(s.cfg, p.opts.ReturnThrottling)}
		c.Client = kms.NewFromConfig(s.cfg, func(o *kms.Options) {
			o.Region = region
			o.RetryMaxAttempts = 0 // newRetryer has it
			o.APIOptions = append(o.APIOptions, recordAttempts)
			if p.opts.Endpoint != "" {
				o.BaseEndpoint = aws.String(p.opts.Endpoint)
			}
		})
		s.clients[region] = c
	}
	return s, c, nil
}

func (p *Provider) load(ctx context.Context) (aws.Config, error) {
	attempt := p.opts.Budget / attemptsShare
	client := awshttp.NewBuildableClient().WithTimeout(attempt).
		WithDialerOptions(func(d *net.Dialer) { d.Timeout = attempt / 2 }).
		WithTransportOptions(func(t *http.Transport) {
			t.TLSHandshakeTimeout = attempt / 2
			// A connection that a NAT forgot must not swallow one attempt after
			// another.
			t.HTTP2 = &http.HTTP2Config{SendPingTimeout: attempt / 2, PingTimeout: attempt / 2}
		})
	load := []func(*config.LoadOptions) error{
		config.WithHTTPClient(client),
		config.WithLogger(logging.Nop{}), // a library does not write to standard error
		config.WithAPIOptions([]func(*middleware.Stack) error{awsmiddleware.AddUserAgentKey("kmsfs")}),
	}
	if p.opts.Region != "" {
		load = append(load, config.WithRegion(p.opts.Region))
	}
	if p.opts.Profile != "" {
		load = append(load, config.WithSharedConfigProfile(p.opts.Profile))
	}
	cfg, err := config.LoadDefaultConfig(ctx, load...)
	if err != nil {
		return aws.Config{}, err
	}
	cfg.Credentials = credentials{cfg.Credentials}
	if b, ok := cfg.HTTPClient.(*awshttp.BuildableClient); ok { // possibly with AWS_CA_BUNDLE by now
		cfg.HTTPClient = b.Freeze()
	}
	return cfg, nil
}

// newRetryer is the SDK's retryer with this package's idea of what to try
// again, and pauses that fit a file system: the SDK's first is a second. With
// returnThrottling, throttling is the caller's: neither retried nor, by the
// SDK's adaptive mode, slowed down a second time.
func newRetryer(cfg aws.Config, returnThrottling bool) aws.RetryerV2 {
	standard := func(o *retry.StandardOptions) {
		o.MaxAttempts = maxAttempts
		if cfg.RetryMaxAttempts != 0 {
			o.MaxAttempts = cfg.RetryMaxAttempts
		}
		o.Backoff = retry.BackoffDelayerFunc(pause)
		o.Retryables = []retry.IsErrorRetryable{retry.IsErrorRetryableFunc(func(err error) aws.Ternary {
			v := classify(err)
			return aws.BoolTernary(v.retry && !(returnThrottling && errors.Is(v.err, keywrap.ErrThrottled)))
		})}
	}
	if cfg.RetryMode == aws.RetryModeAdaptive && !returnThrottling {
		return retry.NewAdaptiveMode(func(o *retry.AdaptiveModeOptions) {
			o.StandardOptions = append(o.StandardOptions, standard)
		})
	}
	return retry.NewStandard(standard)
}

// pause is full jitter: uniform up to a bound that doubles, so that clients
// which were throttled together do not come back together.
func pause(attempt int, _ error) (time.Duration, error) {
	bound := min(firstPause<<min(attempt, 10), longestPause)
	return rand.N(bound), nil
}

// recorder remembers why an attempt failed, for the report when the budget ends
// in the pause after it, and the request id of the last attempt. One goroutine
// uses it, that of the call.
type recorder struct {
	aws.RetryerV2
	last      error
	requestID string // "" if the last attempt got no answer
}

type recorderKey struct{}

func (r *recorder) IsErrorRetryable(err error) bool {
	if !isCancelled(err) {
		r.last = err
	}
	return r.RetryerV2.IsErrorRetryable(err)
}

// credentials marks the failures of the credential chain, which the SDK returns
// untyped.
type credentials struct{ next aws.CredentialsProvider }

func (c credentials) Retrieve(ctx context.Context) (aws.Credentials, error) {
	v, err := c.next.Retrieve(ctx)
	if err != nil {
		err = &credentialError{err}
	}
	return v, err
}

type credentialError struct{ err error }

func (e *credentialError) Error() string { return e.err.Error() }
func (e *credentialError) Unwrap() error { return e.err }
