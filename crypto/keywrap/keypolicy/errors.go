package keypolicy

import "github.com/kmsfs/kmsfs/crypto/fault"

var (
	// ErrRole means a word that is no role.
	ErrRole = fault.New(fault.Invalid, "keypolicy: no such role")
	// ErrPrincipal means text that cannot be the principal of a key policy.
	ErrPrincipal = fault.New(fault.Invalid, "keypolicy: not the ARN of a role, user, session or account")
)
