package main

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/awskms"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/crypto/keywrap/limit"
	"github.com/kmsfs/kmsfs/fs/metrics"
)

// providerConfig says how to reach the key services.
type providerConfig struct {
	Keyring     string // path of the keyring file
	Region      string
	Profile     string
	EndpointURL string

	PKCS11Module  string // path of the vendor's library
	PKCS11PINFile string // file whose first line is the token's PIN
	PKCS11PIN     string // the PIN, where it came from the environment

	Rate       float64 // calls per second to each service, 0: no limit of ours
	Concurrent int     // calls at a time to each service, 0: the default

	Observe func(limit.Call) `json:"-"` // told of every call, if not nil
}

// providers are the key services that one command or mount uses.
type providers struct {
	keywrap.Mux
	sameKey func(a, b string) bool // nil if no AWS key is in use
	keyring *keyring.Keyring       // nil if no keyring key is in use

	closePKCS11 func() // nil if no PKCS#11 module is in use
	limits      map[string]*limit.Provider
}

// limited puts a service behind its limits: every call of the program goes
// through one place, that paces, remembers outages, and tells the observer.
func (p *providers) limited(name string, service keywrap.Provider, cfg providerConfig, log *slog.Logger) keywrap.Provider {
	l := limit.New(service, limit.Options{PerSecond: cfg.Rate, Concurrent: cfg.Concurrent, Log: log, Observe: cfg.Observe})
	if p.limits == nil {
		p.limits = map[string]*limit.Provider{}
	}
	p.limits[name] = l
	return l
}

// limiters tells about the services' limits.
func (p *providers) limiters() []metrics.Limiter {
	var out []metrics.Limiter
	for _, name := range slices.Sorted(maps.Keys(p.limits)) {
		s := p.limits[name].Stats()
		l := metrics.Limiter{Service: name, Rate: s.Rate, InFlight: s.InFlight, Waiting: s.Waiting}
		if s.PerSecond > 0 && (l.Rate == 0 || l.Rate > s.PerSecond) {
			l.Rate = s.PerSecond
		}
		for _, o := range s.Outages {
			l.Open = append(l.Open, o.Key)
		}
		out = append(out, l)
	}
	return out
}

// Close wipes the keys that the services hold.
func (p *providers) Close() {
	if p.keyring != nil {
		_ = p.keyring.Close() // it reports nothing: the file is not written
	}
	if p.closePKCS11 != nil {
		p.closePKCS11()
	}
}

func (g *globalOptions) providerConfig() (providerConfig, error) {
	path, err := g.keyringPath()
	cfg := providerConfig{Keyring: path, Region: g.region, Profile: g.profile, EndpointURL: g.endpointURL,
		Rate: g.kmsRate, Concurrent: g.kmsConcurrency}
	if g.pkcs11PINFile == "" {
		cfg.PKCS11PIN = os.Getenv(pkcs11PINVariable)
	}
	for _, file := range []struct {
		to   *string
		from string
	}{{&cfg.PKCS11Module, g.pkcs11Module}, {&cfg.PKCS11PINFile, g.pkcs11PINFile}} {
		if file.from != "" && err == nil { // a background mount has another working directory
			*file.to, err = filepath.Abs(file.from)
		}
	}
	return cfg, err
}

// pkcs11PINVariable holds a token's PIN, for service managers that hand out
// secrets in no other way. It is no flag: those show in ps(1).
const pkcs11PINVariable = envPrefix + "PKCS11_PIN"

// openProviders opens the services that the given keys need, and no other: a
// store under AWS KMS needs no keyring file. pass is asked for a passphrase if
// the keyring has one. Where only some of the keys are the keyring's and the
// file is missing, the classes under the other keys must still work: then the
// keyring's keys are unknown, which is what the warning says.
func openProviders(ctx context.Context, cfg providerConfig, keys []string, pass func() ([]byte, error), log *slog.Logger) (*providers, error) {
	p := &providers{}
	uses := schemes(keys)
	if uses["keyring"] {
		k, err := keyring.Open(cfg.Keyring, pass)
		if errors.Is(err, keyring.ErrNoFile) && len(uses) > 1 {
			log.Warn("no keyring file: the classes under its keys cannot be used", "keyring", cfg.Keyring)
			k, err = keyring.NewMemory(), nil
		}
		if err != nil {
			if errors.Is(err, keyring.ErrNoFile) {
				err = fail(err, "there is no keyring file at "+cfg.Keyring, "give the file that the store was made with: --keyring FILE")
			}
			return nil, passphraseFailure(err)
		}
		p.keyring, p.Mux.Keyring = k, p.limited("keyring", k, cfg, log)
	}
	if uses["aws"] {
		aws, err := awskms.New(ctx, awskms.Options{
			Region: cfg.Region, Profile: cfg.Profile, Endpoint: cfg.EndpointURL, ReturnThrottling: true})
		if err != nil {
			p.Close()
			return nil, err
		}
		p.Mux.AWS, p.sameKey = p.limited("aws-kms", aws, cfg, log), awskms.SameKey
	}
	if uses["pkcs11"] {
		if err := p.addPKCS11(cfg, len(uses) > 1, log); err != nil {
			p.Close()
			return nil, err
		}
	}
	return p, nil
}

// addPKCS11 opens the PKCS#11 module. With keys of other services in the store,
// a missing module costs only its own keys.
func (p *providers) addPKCS11(cfg providerConfig, others bool, log *slog.Logger) (err error) {
	p.Mux.PKCS11, p.closePKCS11, err = openPKCS11(cfg)
	if err == nil {
		p.Mux.PKCS11 = p.limited("pkcs11", p.Mux.PKCS11, cfg, log)
		return nil
	}
	if !others {
		return err
	}
	_, text, hint := explain(err)
	log.Warn("no PKCS#11 module: the classes under its keys cannot be used", "err", text, "hint", hint)
	p.Mux.PKCS11 = absent{hint}
	return nil
}

// schemes returns the services that keys name.
func schemes(keys []string) map[string]bool {
	out := map[string]bool{}
	for _, key := range keys {
		out[keywrap.Scheme(key)] = true
	}
	return out
}

// allKeys returns every key of a class → keys map once.
func allKeys(keys map[string][]string) []string {
	var out []string
	for _, class := range slices.Sorted(maps.Keys(keys)) {
		out = append(out, keys[class]...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}
