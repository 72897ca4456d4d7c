package keypolicy

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
)

// Document is a key policy. Marshalled as JSON it is the same text for the
// same input.
type Document struct {
	Version   string
	Statement []Statement
}

// Statement is one statement of a Document. It always allows, and its Resource
// is "*": in a key policy that is the key itself.
type Statement struct {
	Sid       string
	Effect    string
	Principal Principal
	Action    Values
	Resource  string
	Condition map[string]map[string]Values `json:",omitempty"` // operator, then key
}

// Principal is who a statement is for.
type Principal struct {
	AWS Values
}

// Values are one or more strings; one alone is written without brackets.
type Values []string

// MarshalJSON implements json.Marshaler.
func (v Values) MarshalJSON() ([]byte, error) {
	if len(v) == 1 {
		return json.Marshal(v[0])
	}
	return json.Marshal([]string(v))
}

// JSON returns the document indented, with a newline at the end.
func (d *Document) JSON() ([]byte, error) {
	b, err := json.MarshalIndent(d, "", "  ")
	return append(b, '\n'), err
}

// principalForm takes no wildcard: a policy for everybody is nobody's role.
var principalForm = regexp.MustCompile(`^arn:[a-z][a-z0-9-]*:(iam::[0-9]{12}:(root|(role|user)/[A-Za-z0-9/+=,.@_-]{1,512})|sts::[0-9]{12}:(assumed-role|federated-user)/[A-Za-z0-9/+=,.@_-]{1,512})$`)

// CheckPrincipal answers ErrPrincipal unless arn may be a principal of a key
// policy. The ARN of an account's root hands the decision to that account's own
// IAM policies.
func CheckPrincipal(arn string) error {
	if !principalForm.MatchString(arn) {
		return fmt.Errorf("%.200q: %w", arn, ErrPrincipal)
	}
	return nil
}

// DefaultPrincipal returns the ARN that docs/kms.md uses for a role, in the
// account of key: "arn:aws:iam::111122223333:role/kmsfs-reader". It is "" unless
// key is a key ARN.
func DefaultPrincipal(key string, r Role) string {
	f := strings.SplitN(key, ":", 6)
	if len(f) != 6 {
		return ""
	}
	return fmt.Sprintf("arn:%s:iam::%s:role/kmsfs-%s", f[1], f[4], r)
}
