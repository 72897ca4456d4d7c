package kmsserver

import (
	"encoding/json"
	"fmt"
	"net"
	"regexp"

	"github.com/kmsfs/kmsfs/integration/kmsd/iampolicy"
)

// Defaults of Options.
const (
	DefaultAccount = "111122223333"
	DefaultRegion  = "us-east-1"
)

// Options configure a server. The zero value is a server on a free loopback
// port with DefaultPrincipal as its only principal.
type Options struct {
	Listen      string       `json:"-"`                    // host:port on loopback; "" is 127.0.0.1:0
	AdminListen string       `json:"-"`                    // the same for the admin listener
	Account     string       `json:"account,omitempty"`    // 12 digits; "" is DefaultAccount
	Region      string       `json:"region,omitempty"`     // for Env and CreateKey; "" is DefaultRegion
	Principals  []Principal  `json:"principals,omitempty"` // none: DefaultPrincipal
	Keys        []KeyOptions `json:"keys,omitempty"`       // made at start; one whose alias exists already is left alone
	Faults      Faults       `json:"faults"`
	LogFile     string       `json:"-"` // append the call log here as JSON lines
	StateFile   string       `json:"-"` // keep keys, aliases and principals here across restarts
}

// Principal is a caller with one access key.
type Principal struct {
	AccessKeyID     string          `json:"access_key_id"`
	SecretAccessKey string          `json:"secret_access_key"`
	SessionToken    string          `json:"session_token,omitempty"` // "": long-term credentials
	ARN             string          `json:"arn"`
	Policy          json.RawMessage `json:"policy,omitempty"`  // identity policy document
	Expired         bool            `json:"expired,omitempty"` // calls fail with ExpiredTokenException

	policy *iampolicy.Document
}

// DefaultPrincipal is the principal of a server that is given none: an
// administrator of DefaultAccount. Its secret is no secret.
func DefaultPrincipal() Principal {
	return Principal{
		AccessKeyID:     "AKIAKMSDADMIN0000000",
		SecretAccessKey: "kmsd-is-a-test-tool-and-this-is-no-secret",
		ARN:             "arn:aws:iam::" + DefaultAccount + ":user/admin",
	}
}

// KeyOptions describe a key to be made outside the wire protocol.
type KeyOptions struct {
	Region      string          `json:"region,omitempty"` // "": the server's
	Alias       string          `json:"alias,omitempty"`  // "alias/…", made with the key
	Description string          `json:"description,omitempty"`
	Policy      json.RawMessage `json:"policy,omitempty"` // "": the default policy
	MultiRegion bool            `json:"multi_region,omitempty"`
}

var (
	accountForm   = regexp.MustCompile(`^[0-9]{12}$`)
	regionForm    = regexp.MustCompile(`^([a-z]+-){2,3}[0-9]{1,2}$`)
	accessKeyForm = regexp.MustCompile(`^[A-Za-z0-9_-]{3,128}$`)
)

func (o *Options) complete() error {
	if o.Account == "" {
		o.Account = DefaultAccount
	}
	if o.Region == "" {
		o.Region = DefaultRegion
	}
	if !accountForm.MatchString(o.Account) {
		return fmt.Errorf("%w: account %q", ErrOptions, o.Account)
	}
	if !regionForm.MatchString(o.Region) {
		return fmt.Errorf("%w: region %q", ErrOptions, o.Region)
	}
	for _, addr := range []*string{&o.Listen, &o.AdminListen} {
		if *addr == "" {
			*addr = "127.0.0.1:0"
		}
		host, port, err := net.SplitHostPort(*addr)
		if err != nil {
			return fmt.Errorf("%w: address %q: %v", ErrOptions, *addr, err)
		}
		if host == "localhost" {
			host = "127.0.0.1"
		}
		if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
			return fmt.Errorf("%w: %q", ErrNotLoopback, *addr)
		}
		*addr = net.JoinHostPort(host, port)
	}
	if len(o.Principals) == 0 {
		p := DefaultPrincipal()
		p.ARN = "arn:aws:iam::" + o.Account + ":user/admin"
		o.Principals = []Principal{p}
	}
	return nil
}

func (p *Principal) complete() error {
	if !accessKeyForm.MatchString(p.AccessKeyID) || p.SecretAccessKey == "" {
		return fmt.Errorf("%w: principal %q needs an access key id and a secret", ErrOptions, p.AccessKeyID)
	}
	if !accountForm.MatchString(iampolicy.Account(p.ARN)) {
		return fmt.Errorf("%w: principal %q has no ARN of IAM or STS: %q", ErrOptions, p.AccessKeyID, p.ARN)
	}
	p.policy = nil
	if len(p.Policy) > 0 {
		doc, err := iampolicy.ParseIdentity(p.Policy)
		if err != nil {
			return fmt.Errorf("%w: principal %q: %w", ErrOptions, p.AccessKeyID, err)
		}
		p.policy = doc
	}
	return nil
}
