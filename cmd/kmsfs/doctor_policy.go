package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keypolicy"
	"github.com/kmsfs/kmsfs/fs/doctor"
)

// keyPolicy is the policy of one key as --json prints it.
type keyPolicy struct {
	Key     string              `json:"key"`
	Classes []string            `json:"classes"`
	Policy  *keypolicy.Document `json:"policy"`
}

// runDoctorPolicy prints the key policies of a role. Standard output has nothing
// but the policies; what they are for goes to standard error.
func (a *app) runDoctorPolicy(ctx context.Context, o doctorOptions) error {
	role, err := parseRole("--policy", o.policy)
	if err != nil {
		return err
	}
	if o.store == "" {
		return usage("kmsfs doctor --policy: STORE is missing", "the policy names the store's id, classes and keys")
	}
	for _, p := range o.principals {
		if keypolicy.CheckPrincipal(p) != nil {
			return usage(fmt.Sprintf("--principal %q is not the ARN of an IAM role, user, session or account", p), "for example arn:aws:iam::111122223333:role/ingest")
		}
	}
	s, root, err := a.policyStore(ctx, o)
	if err != nil {
		return err
	}
	policies, err := a.keyPolicies(s, role, o)
	if err != nil {
		return err
	}
	a.notePolicies(s, policies, role, o, root)
	if o.json {
		return a.printJSON(map[string]any{"role": role, "store": s.ID, "policies": policies})
	}
	for _, p := range policies {
		text, err := p.Policy.JSON()
		if err != nil {
			return err
		}
		a.note("for key %s (%s):", p.Key, strings.Join(p.Classes, ", "))
		a.printf("%s", text)
	}
	return nil
}

// policyStore reads the store, whose keys must be those that this machine
// trusts, reduced to the classes asked for. root is the class of the root.
func (a *app) policyStore(ctx context.Context, o doctorOptions) (s keypolicy.Store, root string, err error) {
	facts, err := a.trustedStore(ctx, o.store, o.trust)
	if err != nil {
		return s, "", err
	}
	d, findings := doctor.ReadStore(facts.path)
	if d == nil {
		return s, "", fail(errNoStore, facts.path+": "+findings[0].Text, findings[0].Remedy)
	}
	s.ID = d.ID.String()
	for _, name := range o.classes {
		if !slices.ContainsFunc(d.Classes, func(c doctor.Class) bool { return c.Name == name }) {
			return s, "", usage(fmt.Sprintf("the store has no class %q", name), "kmsfs policy show "+shellQuote(o.store)+" prints the classes")
		}
	}
	for _, c := range d.Classes {
		if len(o.classes) == 0 || slices.Contains(o.classes, c.Name) {
			s.Classes = append(s.Classes, keypolicy.Class{Name: c.Name, Keys: c.Keys, Retired: c.Retired})
		}
	}
	return s, d.Default, nil
}

// keyPolicies returns a policy for every AWS key that the role needs.
func (a *app) keyPolicies(s keypolicy.Store, role keypolicy.Role, o doctorOptions) ([]keyPolicy, error) {
	var out []keyPolicy
	keys := s.Keys()
	if o.forKey != "" {
		if !slices.Contains(keys, o.forKey) {
			return nil, usage(fmt.Sprintf("--for %q is no key of these classes", o.forKey), "the keys are "+strings.Join(keys, ", "))
		}
		keys = []string{o.forKey}
	}
	for _, key := range keys {
		if keywrap.Scheme(key) != "aws" {
			a.note("%s has no key policy: whoever has the key can use it", key)
			continue
		}
		principals := o.principals
		if len(principals) == 0 {
			principals = []string{keypolicy.DefaultPrincipal(key, role)}
		}
		d, err := keypolicy.For(s, key, role, principals...)
		if err != nil {
			return nil, err
		}
		if d != nil {
			out = append(out, keyPolicy{Key: key, Classes: classesOf(s, key), Policy: d})
		}
	}
	if len(out) == 0 {
		return nil, fail(errNoPolicy, "there is no policy to print: none of the keys is an AWS KMS key", "kmsfs keyring keeps keys from nobody who can read its file")
	}
	return out, nil
}

func classesOf(s keypolicy.Store, key string) []string {
	var out []string
	for _, c := range s.Classes {
		if slices.Contains(c.Keys, key) || slices.Contains(c.Retired, key) {
			out = append(out, c.Name)
		}
	}
	return out
}

// notePolicies says what a person has to know to use the policies.
func (a *app) notePolicies(s keypolicy.Store, policies []keyPolicy, role keypolicy.Role, o doctorOptions, root string) {
	if len(o.principals) == 0 {
		a.note("the principal is %s: give yours with --principal", policies[0].Policy.Statement[0].Principal.AWS[0])
	}
	a.note("add the statements to those of the key's policy that let its administrators in; they need no IAM policy beside them in the key's own account")
	reads := role == keypolicy.Reader || role == keypolicy.Writer || role == keypolicy.User
	if reads && len(o.classes) > 0 && !slices.Contains(o.classes, root) {
		a.note("whoever is to reach these classes passes through the root, which has class %s: --policy names --class %s", root, root)
	}
	regions := map[string]bool{}
	for _, p := range policies {
		regions[strings.Split(p.Key, ":")[3]] = true
		if reads && s.Further(p.Key) {
			a.note("%s makes no data keys, it is a further recipient: leave kms:Decrypt out if it is kept for recovery", p.Key)
		}
	}
	if role == keypolicy.Rewrapper && len(regions) > 1 {
		a.note("ReEncrypt works within one Region: from one to another kmsfs rewrap needs kms:Decrypt and kms:Encrypt, which this role does not give")
	}
}
