package kmsserver

import (
	"strings"

	"github.com/kmsfs/kmsfs/integration/kmsd/iampolicy"
)

// conditions collects the condition keys of a call.
func (s *Server) conditions(q *request, ref string, encryption map[string]string) map[string][]string {
	p := q.principal
	c := map[string][]string{
		"kms:calleraccount":    {iampolicy.Account(p.ARN)},
		"aws:principalarn":     {p.ARN},
		"aws:principalaccount": {iampolicy.Account(p.ARN)},
		"aws:requestedregion":  {q.region},
		"aws:securetransport":  {"false"},
	}
	if name := ref[strings.LastIndexByte(ref, ':')+1:]; strings.HasPrefix(name, "alias/") {
		c["kms:requestalias"] = []string{name}
	}
	for k, v := range encryption {
		// Condition keys are case-insensitive: two names that differ in case
		// only are two values of one key.
		name := "kms:encryptioncontext:" + strings.ToLower(k)
		c[name] = append(c[name], v)
		c["kms:encryptioncontextkeys"] = append(c["kms:encryptioncontextkeys"], k)
	}
	return c
}

// allowed answers nil if the caller may do action ("Decrypt") with k.
func (s *Server) allowed(q *request, action string, k *key, ref string, encryption map[string]string) error {
	r := iampolicy.Request{
		Action: "kms:" + action, Resource: s.arn(k), Principal: q.principal.ARN,
		Context: s.conditions(q, ref, encryption),
	}
	r.Context["kms:keyorigin"] = []string{"AWS_KMS"}
	r.Context["kms:multiregion"] = []string{"false"}
	if k.multiRegion() {
		r.Context["kms:multiregion"] = []string{"true"}
	}
	for ref, a := range s.aliases {
		if ref.Region == k.Region && a.KeyID == k.ID {
			r.Context["kms:resourcealiases"] = append(r.Context["kms:resourcealiases"], ref.Name)
		}
	}
	ofKey := k.policy.Evaluate(r)
	ofCaller := iampolicy.Result{Allow: true}
	if q.principal.policy != nil {
		ofCaller = q.principal.policy.Evaluate(r)
	}
	switch {
	case ofKey.Deny:
		return denied(r, "with an explicit deny in a resource-based policy")
	case ofCaller.Deny:
		return denied(r, "with an explicit deny in an identity-based policy")
	case ofKey.Allow || ofKey.Delegated && ofCaller.Allow:
		return nil
	case ofKey.Delegated:
		return denied(r, "because no identity-based policy allows the "+r.Action+" action")
	}
	return denied(r, "because no resource-based policy allows the "+r.Action+" action")
}

// allowedWithoutKey is allowed for operations that have no key as resource.
func (s *Server) allowedWithoutKey(q *request, action string) error {
	if q.principal.policy == nil {
		return nil
	}
	r := iampolicy.Request{
		Action: "kms:" + action, Resource: "*", Principal: q.principal.ARN,
		Context: s.conditions(q, "", nil),
	}
	switch res := q.principal.policy.Evaluate(r); {
	case res.Deny:
		return denied(r, "with an explicit deny in an identity-based policy")
	case !res.Allow:
		return denied(r, "because no identity-based policy allows the "+r.Action+" action")
	}
	return nil
}

func denied(r iampolicy.Request, why string) error {
	return fail("AccessDeniedException", "User: %s is not authorized to perform: %s on resource: %s %s",
		r.Principal, r.Action, r.Resource, why)
}

// target resolves the key of an operation and checks permission on it.
func (s *Server) target(q *request, action, ref string, encryption map[string]string) (*key, error) {
	k, err := s.find(q.region, ref)
	if err != nil {
		return nil, err
	}
	q.rec.KeyID = s.arn(k)
	return k, s.allowed(q, action, k, ref, encryption)
}
