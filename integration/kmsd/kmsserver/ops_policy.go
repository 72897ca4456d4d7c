package kmsserver

type policyIn struct {
	KeyId                          string
	PolicyName                     string
	Policy                         string
	BypassPolicyLockoutSafetyCheck bool
}

func (in *policyIn) validate() error {
	if in.PolicyName != "" && in.PolicyName != defaultPolicyName {
		return fail("NotFoundException", "No such policy exists")
	}
	return nil
}

func (s *Server) putKeyPolicy(q *request, in *policyIn) (any, error) {
	if err := in.validate(); err != nil {
		return nil, err
	}
	if in.Policy == "" {
		return nil, constraint("policy", "Member must not be null")
	}
	k, err := s.target(q, q.op, in.KeyId, nil)
	if err != nil {
		return nil, err
	}
	if err := s.alive(k); err != nil {
		return nil, err
	}
	before := *k
	if err := s.setPolicy(k, in.Policy); err != nil {
		return nil, err
	}
	if err := s.lockout(q, k, in.BypassPolicyLockoutSafetyCheck); err != nil {
		*k = before
		return nil, err
	}
	s.dirty = true
	return nil, nil
}

func (s *Server) getKeyPolicy(q *request, in *policyIn) (any, error) {
	if err := in.validate(); err != nil {
		return nil, err
	}
	k, err := s.target(q, q.op, in.KeyId, nil)
	if err != nil {
		return nil, err
	}
	return struct{ Policy, PolicyName string }{k.Policy, defaultPolicyName}, nil
}
