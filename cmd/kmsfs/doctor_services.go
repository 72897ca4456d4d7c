package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/awskms"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/fs/doctor"
)

// skewLimit is beyond what AWS accepts of a signature's time; half of it is
// worth a word.
const skewLimit = 5 * time.Minute

// services looks at the ways to the key services, then at the keys of those that
// can be reached.
func (e *examination) services(ctx context.Context) {
	uses := schemes(e.trusted)
	var mux keywrap.Mux
	var askable []string
	add := func(scheme string) {
		for _, key := range e.trusted {
			if keywrap.Scheme(key) == scheme {
				askable = append(askable, key)
			}
		}
	}
	if e.options.store == "" || uses["keyring"] {
		if k := e.keyring(ctx, uses["keyring"]); k != nil {
			defer func() { _ = k.Close() }() // it reports nothing
			mux.Keyring = k
			add("keyring")
		}
	}
	if e.options.store == "" || uses["aws"] {
		if p := e.aws(ctx, uses["aws"]); p != nil {
			mux.AWS = p
			add("aws")
		}
	}
	if uses["pkcs11"] {
		if p := e.others(ctx, "pkcs11"); p != nil {
			defer p.Close()
			mux.PKCS11 = p
			add("pkcs11")
		}
	}
	if e.store != nil && len(askable) > 0 {
		e.check(ctx, e.store.KeyChecks(mux, askable, e.needs)...)
	}
}

// keyring opens the embedded keyring; nil if that fails. It never asks for a
// passphrase: kmsfs doctor runs unattended.
func (e *examination) keyring(ctx context.Context, used bool) *keyring.Keyring {
	path, err := e.app.global.keyringPath()
	if err != nil {
		e.findings = append(e.findings, doctor.Finding{Check: "keyring.file", Level: doctor.Warning, Text: err.Error(), Remedy: "give --keyring FILE"})
		return nil
	}
	asked := false
	pass := func() ([]byte, error) {
		if e.app.global.passphraseFile == "" && e.app.global.passphraseFD < 0 {
			asked = true
			return nil, errNeedPassphrase
		}
		return e.app.passphraseSource(ctx)()
	}
	k, err := keyring.Open(path, pass)
	if asked {
		e.findings = append(e.findings, doctor.Finding{Check: "keyring.file", Level: doctor.Warning, Subject: path,
			Text: "under a passphrase, which was not given: its keys were not looked at", Remedy: "give --passphrase-file FILE or --passphrase-fd N"})
		return nil
	}
	protected := false
	if err == nil {
		protected, err = k.Protected()
	}
	e.findings = append(e.findings, e.keyringFile(path, used, err, protected))
	if err != nil {
		return nil
	}
	return k
}

// others opens a service that has no checks of its own.
func (e *examination) others(ctx context.Context, scheme string) *providers {
	var keys []string
	for _, key := range e.trusted {
		if keywrap.Scheme(key) == scheme {
			keys = append(keys, key)
		}
	}
	cfg, err := e.app.global.providerConfig()
	var p *providers
	if err == nil {
		p, err = openProviders(ctx, cfg, keys, nil, e.app.log())
	}
	f := doctor.Finding{Check: scheme + ".module", Level: doctor.OK, Text: "the module is loaded"}
	if err != nil {
		f.Level = doctor.Error
		_, f.Text, f.Remedy = explain(err)
	}
	e.findings = append(e.findings, f)
	return p
}

// aws looks at credentials and endpoints. It returns nil if no call can succeed.
func (e *examination) aws(ctx context.Context, used bool) *awskms.Provider {
	g := &e.app.global
	p, err := awskms.New(ctx, awskms.Options{Region: g.region, Profile: g.profile, Endpoint: g.endpointURL, Budget: e.options.timeout * 4 / 5})
	if err != nil {
		_, text, remedy := explain(err)
		e.findings = append(e.findings, doctor.Finding{Check: "aws.config", Level: doctor.Error, Text: text, Remedy: remedy})
		return nil
	}
	var regions []string
	for _, key := range e.trusted {
		if r := awskms.RegionOf(key); r != "" && !slices.Contains(regions, r) {
			regions = append(regions, r)
		}
	}
	checks := []doctor.Check{
		{Name: "aws.credentials", Run: func(ctx context.Context) []doctor.Finding {
			return []doctor.Finding{credentialsFinding(ctx, p, used, time.Now())}
		}},
		{Name: "aws.region", Run: func(ctx context.Context) []doctor.Finding { return regionFinding(ctx, p) }},
	}
	for _, r := range regions {
		checks = append(checks, doctor.Check{Name: "aws.endpoint", Run: func(ctx context.Context) []doctor.Finding { return endpointFindings(ctx, p, r) }})
	}
	e.check(ctx, checks...)
	if !used || e.failed("aws.credentials") || !e.any("clock.service") || !e.accepted(ctx, p) {
		return nil
	}
	return p
}

// failed reports whether a check found an error.
func (e *examination) failed(check string) bool {
	return slices.ContainsFunc(e.findings, func(f doctor.Finding) bool { return f.Check == check && f.Level == doctor.Error })
}

// any reports whether a check found anything: a service that answers tells the
// time.
func (e *examination) any(check string) bool {
	return slices.ContainsFunc(e.findings, func(f doctor.Finding) bool { return f.Check == check })
}

// accepted signs one call, so that credentials which the service refuses are one
// finding and not one for each key.
func (e *examination) accepted(ctx context.Context, p *awskms.Provider) bool {
	i := slices.IndexFunc(e.trusted, func(key string) bool { return keywrap.Scheme(key) == "aws" })
	ctx, cancel := context.WithTimeout(ctx, e.options.timeout)
	defer cancel()
	_, err := p.Describe(ctx, e.trusted[i])
	if !errors.Is(err, keywrap.ErrCredentials) {
		return true
	}
	e.findings = append(e.findings, doctor.Finding{Check: "aws.credentials", Level: doctor.Error,
		Text: "the service refuses them: " + causeOf(err), Remedy: hintOf(err, "")})
	return false
}

// soon is when credentials that run out are worth a word: the SDK renews those
// that it can.
const soon = 10 * time.Minute

func credentialsFinding(ctx context.Context, p *awskms.Provider, used bool, now time.Time) doctor.Finding {
	f := doctor.Finding{Check: "aws.credentials", Level: doctor.OK}
	c, err := p.Credentials(ctx)
	if err != nil {
		f.Level, f.Text, f.Remedy = doctor.Error, causeOf(err), hintOf(err, "aws sts get-caller-identity shows what the AWS CLI finds")
		if !used {
			f.Level, f.Text, f.Remedy = doctor.Info, "none were found", ""
		}
		return f
	}
	f.Subject = c.AccessKey
	f.Text = "from " + c.Source
	if c.Temporary {
		f.Text += ", temporary"
	}
	switch {
	case c.Expires.IsZero():
	case c.Expires.Before(now):
		f.Level, f.Text, f.Remedy = doctor.Error, f.Text+", expired "+c.Expires.UTC().Format(time.DateTime), "renew them: aws sso login, or the tool that wrote them"
	case c.Expires.Before(now.Add(soon)):
		f.Level, f.Text, f.Remedy = doctor.Warning, f.Text+", valid until "+c.Expires.UTC().Format(time.DateTime), "renew them, unless the source does that by itself"
	default:
		f.Text += ", valid until " + c.Expires.UTC().Format(time.DateTime)
	}
	return f
}

func regionFinding(ctx context.Context, p *awskms.Provider) []doctor.Finding {
	f := doctor.Finding{Check: "aws.region", Level: doctor.OK}
	r, err := p.Region(ctx)
	switch {
	case err != nil:
		f.Level, f.Text, f.Remedy = doctor.Warning, causeOf(err), "check ~/.aws/config"
	case r == "":
		f.Level, f.Text, f.Remedy = doctor.Info, "none is configured; key ARNs name their own, aliases need one", "set AWS_REGION, or region in the profile"
	default:
		f.Subject, f.Text = r, "is configured, for aliases; key ARNs name their own"
	}
	return []doctor.Finding{f}
}

// endpointFindings tells whether the service of a Region answers, and how the
// clocks compare.
func endpointFindings(ctx context.Context, p *awskms.Provider, region string) []doctor.Finding {
	r, err := p.Reach(ctx, region)
	f := doctor.Finding{Check: "aws.endpoint", Level: doctor.OK, Subject: r.Endpoint}
	if err != nil {
		if f.Subject == "" {
			f.Subject = region
		}
		f.Level, f.Text, f.Remedy = doctor.Error, causeOf(err), hintOf(err, "check the network, the proxy and the endpoint")
		return []doctor.Finding{f}
	}
	f.Text = fmt.Sprintf("%s answers in %d ms, over TLS", region, r.Took.Milliseconds())
	if u, err := url.Parse(r.Endpoint); err == nil && u.Scheme != "https" {
		f.Level, f.Text = doctor.Error, region+" answers without TLS: whoever is on the way reads every data key"
		f.Remedy = "use an https endpoint"
		if ip := net.ParseIP(u.Hostname()); u.Hostname() == "localhost" || ip != nil && ip.IsLoopback() {
			f.Level, f.Text, f.Remedy = doctor.Info, region+" answers on this machine, without TLS", ""
		}
	}
	return []doctor.Finding{f, skewFinding(r, region)}
}

func skewFinding(r awskms.Reach, region string) doctor.Finding {
	const remedy = "set the clock: timedatectl set-ntp true, chronyc makestep"
	f := doctor.Finding{Check: "clock.service", Level: doctor.OK, Subject: region}
	if !r.Dated {
		f.Level, f.Text = doctor.Info, "the service does not tell its time"
		return f
	}
	skew, side := r.Skew.Abs(), "behind"
	if r.Skew < 0 {
		side = "ahead of"
	}
	f.Text = fmt.Sprintf("this machine's clock is %v %s the service's", skew, side)
	switch {
	case skew > skewLimit:
		f.Level, f.Text, f.Remedy = doctor.Error, f.Text+": calls signed with it are refused", remedy
	case skew > skewLimit/2:
		f.Level, f.Remedy = doctor.Warning, remedy
	case skew <= 2*time.Second:
		f.Text = "the clocks agree"
	}
	return f
}

// causeOf is the service's or the system's own words.
func causeOf(err error) string {
	var call *keywrap.CallError
	if errors.As(err, &call) {
		err = call.Err
	}
	return strings.TrimPrefix(err.Error(), "keywrap: ")
}
