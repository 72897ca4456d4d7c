package classify

import (
	"strconv"
	"strings"

	"github.com/kmsfs/kmsfs/crypto/fault"
)

// What this package answers.
var (
	ErrPolicy = fault.New(fault.Invalid, "classify: invalid policy")
	ErrChange = fault.New(fault.Forbidden, "classify: an existing store cannot take this change")
)

// ParseError says what is wrong with a policy, and where. errors.Is finds
// ErrPolicy in it.
type ParseError struct {
	Line    int    // of the text, from 1; 0 if there is no text or no one line
	Field   string // for example `classes.phi.keys[1]`; "" for the whole policy
	Problem string
	Hint    string // what to write instead
}

// Error returns "policy: line 5: classes.phi.cache: problem; hint".
func (e *ParseError) Error() string {
	var b strings.Builder
	b.WriteString("policy: ")
	if e.Line > 0 {
		b.WriteString("line " + strconv.Itoa(e.Line) + ": ")
	}
	if e.Field != "" {
		b.WriteString(e.Field + ": ")
	}
	b.WriteString(e.Problem + "; " + e.Hint)
	return b.String()
}

// Unwrap returns ErrPolicy.
func (e *ParseError) Unwrap() error { return ErrPolicy }
