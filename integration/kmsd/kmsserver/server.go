package kmsserver

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/kmsfs/kmsfs/integration/kmsd/iampolicy"
)

// Server is a running server. Close it when done.
type Server struct {
	account, region string
	stateFile       string

	mu         sync.Mutex // guards the service's state
	keys       map[keyRef]*key
	sets       map[string]*materialSet // by key id: Regions of a multi-Region key share one
	aliases    map[aliasRef]*alias
	principals map[string]*Principal
	offset     time.Duration // clock ahead of the machine's
	dirty      bool          // state to be saved

	log    callLog
	faults faultBox
	net    network
	stop   func() bool // detaches the context given to Start
	done   sync.Once
	end    error
}

// Start runs a server until Close, or until ctx ends. The server accepts
// connections when Start returns.
func Start(ctx context.Context, o Options) (*Server, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	s, err := newServer(o)
	if err != nil {
		return nil, err
	}
	if err := s.log.open(o.LogFile); err != nil {
		return nil, err
	}
	if err := s.net.open(o.Listen, o.AdminListen, http.HandlerFunc(s.serve), s.adminHandler()); err != nil {
		return nil, s.closeWith(err)
	}
	if err := s.SetFaults(o.Faults); err != nil {
		return nil, s.closeWith(err)
	}
	s.mu.Lock()
	s.stop = context.AfterFunc(ctx, func() { s.Close() })
	s.mu.Unlock()
	return s, nil
}

// newServer makes a server that does not listen from completed options.
func newServer(o Options) (*Server, error) {
	s := &Server{
		account: o.Account, region: o.Region, stateFile: o.StateFile,
		keys:       map[keyRef]*key{},
		sets:       map[string]*materialSet{},
		aliases:    map[aliasRef]*alias{},
		principals: map[string]*Principal{},
	}
	if err := o.Faults.check(); err != nil {
		return nil, err
	}
	s.faults.replace(o.Faults)
	if err := s.load(); err != nil {
		return nil, err
	}
	for _, p := range o.Principals {
		if err := s.AddPrincipal(p); err != nil {
			return nil, err
		}
	}
	for _, k := range o.Keys {
		if err := s.createConfigured(k); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *Server) closeWith(err error) error {
	s.Close()
	return err
}

// TB is the part of testing.TB that StartT needs; the package itself does not
// link the testing package into the program.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Errorf(format string, args ...any)
	Cleanup(func())
}

// StartT is Start for a test: it fails the test on an error and closes the
// server when the test ends.
func StartT(t TB, o Options) *Server {
	t.Helper()
	s, err := Start(context.Background(), o)
	if err != nil {
		t.Fatalf("kmsserver: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("kmsserver: close: %v", err)
		}
	})
	return s
}

// Close stops the server: connections are cut, hanging calls end. It returns
// the first error of writing the log or the state, at every call.
func (s *Server) Close() error {
	s.done.Do(func() {
		s.mu.Lock()
		stop := s.stop
		s.mu.Unlock()
		if stop != nil {
			stop()
		}
		s.net.close()
		s.mu.Lock()
		s.end = s.save()
		s.mu.Unlock()
		if err := s.log.close(); s.end == nil {
			s.end = err
		}
	})
	return s.end
}

// URL returns the endpoint, "http://127.0.0.1:PORT". It stays the same for the
// server's life, outages included.
func (s *Server) URL() string { return s.net.url }

// AdminURL returns the base of the admin API ("…/admin/…") on a listener of
// its own, which answers during outages as well.
func (s *Server) AdminURL() string { return s.net.adminURL }

// Account returns the account that owns all keys.
func (s *Server) Account() string { return s.account }

// Region returns the Region of Env and of keys made without one.
func (s *Server) Region() string { return s.region }

// AddPrincipal adds a principal, or replaces the one with its access key id.
func (s *Server) AddPrincipal(p Principal) error {
	if err := p.complete(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.principals[p.AccessKeyID] = &p
	s.dirty = true
	return s.save()
}

// SetExpired makes a principal's calls fail with ExpiredTokenException, or
// work again.
func (s *Server) SetExpired(accessKeyID string, expired bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.principals[accessKeyID]
	if p == nil {
		return fmt.Errorf("%w: %s", ErrNoPrincipal, accessKeyID)
	}
	q := *p // calls under way hold p
	q.Expired = expired
	s.principals[accessKeyID] = &q
	s.dirty = true
	return s.save()
}

// Principals returns all principals, secrets included.
func (s *Server) Principals() []Principal {
	s.mu.Lock()
	defer s.mu.Unlock()
	return sortedPrincipals(s.principals)
}

// Env returns the environment with which an AWS SDK or the aws command line
// calls this server's KMS as p: append it to os.Environ. It hides
// configuration files of the user and leaves other services' endpoints alone.
func (s *Server) Env(p Principal) []string { return Env(s.URL(), s.region, p) }

// Env is Server.Env for a server in another process.
func Env(url, region string, p Principal) []string {
	return []string{
		"AWS_ENDPOINT_URL_KMS=" + url,
		"AWS_ACCESS_KEY_ID=" + p.AccessKeyID,
		"AWS_SECRET_ACCESS_KEY=" + p.SecretAccessKey,
		"AWS_SESSION_TOKEN=" + p.SessionToken,
		"AWS_REGION=" + region,
		"AWS_DEFAULT_REGION=" + region,
		"AWS_EC2_METADATA_DISABLED=true",
		"AWS_CONFIG_FILE=/dev/null",
		"AWS_SHARED_CREDENTIALS_FILE=/dev/null",
	}
}

// Advance moves the server's clock forward: keys whose waiting period has
// passed are deleted, rotations that are due happen. Signatures are checked
// against the machine's clock all the same.
func (s *Server) Advance(d time.Duration) error {
	if d < 0 {
		return fmt.Errorf("%w: the clock moves forward only", ErrOptions)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.offset += d
	s.tick()
	s.dirty = true
	return s.save()
}

func (s *Server) now() time.Time { return time.Now().Add(s.offset).UTC() }

// CreateKey makes a key without a call on the wire, with its alias if one is
// given, and returns its ARN.
func (s *Server) CreateKey(o KeyOptions) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o.Region == "" {
		o.Region = s.region
	}
	if !regionForm.MatchString(o.Region) {
		return "", fmt.Errorf("%w: region %q", ErrOptions, o.Region)
	}
	if o.Alias != "" {
		if err := checkAliasName(o.Alias); err != nil {
			return "", fmt.Errorf("%w: %w", ErrOptions, err)
		}
		if s.aliases[aliasRef{o.Region, o.Alias}] != nil {
			return "", fmt.Errorf("%w: %s exists", ErrOptions, o.Alias)
		}
	}
	k, err := s.newKey(o.Region, o.Description, string(o.Policy), o.MultiRegion)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrOptions, err)
	}
	if o.Alias != "" {
		now := s.now()
		s.aliases[aliasRef{o.Region, o.Alias}] = &alias{KeyID: k.ID, Created: now, Updated: now}
	}
	return s.arn(k), s.save()
}

func (s *Server) createConfigured(o KeyOptions) error {
	region := o.Region
	if region == "" {
		region = s.region
	}
	s.mu.Lock()
	exists := o.Alias != "" && s.aliases[aliasRef{region, o.Alias}] != nil
	s.mu.Unlock()
	if exists {
		return nil
	}
	_, err := s.CreateKey(o)
	return err
}

// SetPolicy replaces a key's policy without a call on the wire. keyID is an
// ARN, or an id or alias in the server's Region.
func (s *Server) SetPolicy(keyID, policy string) error {
	return s.change(keyID, func(k *key) error {
		doc, err := iampolicy.Parse([]byte(policy))
		if err != nil {
			return err
		}
		k.Policy, k.policy = policy, doc
		return nil
	})
}

// SetMaterialExpired puts a key into the state of one whose imported material
// has expired (PendingImport), or back.
func (s *Server) SetMaterialExpired(keyID string, expired bool) error {
	return s.change(keyID, func(k *key) error {
		k.MaterialExpired = expired
		return nil
	})
}

func (s *Server) change(keyID string, f func(*key) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	region := s.region
	if r := arnRegion(keyID); r != "" {
		region = r
	}
	k, err := s.find(region, keyID)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoKey, err)
	}
	if err := f(k); err != nil {
		return err
	}
	s.dirty = true
	return s.save()
}
