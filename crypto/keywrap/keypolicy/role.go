package keypolicy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// Role is what somebody does with a store.
type Role string

// The roles.
const (
	Reader    Role = "reader"    // opens files
	Writer    Role = "writer"    // makes files and lists them, opens none
	User      Role = "user"      // reader and writer
	Names     Role = "names"     // lists: for the classes that lie above one's own
	Rewrapper Role = "rewrapper" // gives data keys other recipients without seeing one
	Auditor   Role = "auditor"   // looks at keys, uses none
)

// Roles returns all roles, in the order of the documentation.
func Roles() []Role { return []Role{Reader, Writer, User, Names, Rewrapper, Auditor} }

// ParseRole returns the role of that name, or ErrRole.
func ParseRole(s string) (Role, error) {
	if !slices.Contains(Roles(), Role(s)) {
		return "", fmt.Errorf("%.40q: %w", s, ErrRole)
	}
	return Role(s), nil
}

// Store is what a policy depends on.
type Store struct {
	ID      string // lower-case hexadecimal
	Classes []Class
}

// Class names the keys of a class.
type Class struct {
	Name    string
	Keys    []string // the first makes data keys, the others wrap them too
	Retired []string // only open what is there; none of Keys
}

// Keys returns every key of the store once, in order of appearance.
func (s *Store) Keys() []string {
	var out []string
	for _, c := range s.Classes {
		for _, key := range append(slices.Clone(c.Keys), c.Retired...) {
			if !slices.Contains(out, key) {
				out = append(out, key)
			}
		}
	}
	return out
}

// Further reports whether key makes no data keys, and wraps those of some class
// as a further recipient.
func (s *Store) Further(key string) bool {
	u := s.uses(key)
	return len(u.makes) == 0 && len(u.further) > 0
}

// uses are the classes that need a key for something.
type uses struct {
	makes   []string // it makes their data keys
	further []string // it wraps their data keys as a further recipient
	wraps   []string // either
	opens   []string // it may have wrapped some of their files
}

func (s *Store) uses(key string) uses {
	var u uses
	for _, c := range s.Classes {
		at := slices.Index(c.Keys, key)
		if at == 0 {
			u.makes = append(u.makes, c.Name)
		} else if at > 0 {
			u.further = append(u.further, c.Name)
		}
		if at >= 0 {
			u.wraps = append(u.wraps, c.Name)
		}
		if at >= 0 || slices.Contains(c.Retired, key) {
			u.opens = append(u.opens, c.Name)
		}
	}
	for _, list := range [][]string{u.makes, u.further, u.wraps, u.opens} {
		slices.Sort(list)
	}
	return u
}

var (
	contents  = []keywrap.Purpose{keywrap.PurposeData}
	listing   = []keywrap.Purpose{keywrap.PurposeNames, keywrap.PurposeStore}
	anyOfOurs = []keywrap.Purpose{keywrap.PurposeData, keywrap.PurposeNames, keywrap.PurposeStore}
)

// For returns the policy that gives principals the role r on key, nil if the
// role needs nothing of it. Errors: ErrRole, ErrPrincipal.
func For(s Store, key string, r Role, principals ...string) (*Document, error) {
	for _, p := range principals {
		if err := CheckPrincipal(p); err != nil {
			return nil, err
		}
	}
	if len(principals) == 0 {
		return nil, fmt.Errorf("none is given: %w", ErrPrincipal)
	}
	w := writer{store: s.ID, role: r, principals: principals}
	u := s.uses(key)
	switch r {
	case Reader:
		w.allow("Opens", u.opens, anyOfOurs, "Decrypt")
	case Writer:
		w.makesFiles(u)
		w.allow("MountsAndLists", u.opens, listing, "Decrypt")
	case User:
		w.makesFiles(u)
		w.allow("Opens", u.opens, anyOfOurs, "Decrypt")
	case Names:
		w.allow("MountsAndLists", u.opens, listing, "Decrypt")
	case Rewrapper:
		w.allow("From", u.opens, anyOfOurs, "ReEncryptFrom")
		w.allow("To", u.wraps, anyOfOurs, "ReEncryptTo")
		w.look(u, "DescribeKey")
	case Auditor:
		w.look(u, "DescribeKey", "GetKeyRotationStatus", "ListKeyRotations")
	default:
		return nil, fmt.Errorf("%.40q: %w", r, ErrRole)
	}
	if len(w.out) == 0 {
		return nil, nil
	}
	return &Document{Version: "2012-10-17", Statement: w.out}, nil
}

// writer collects statements.
type writer struct {
	store      string
	role       Role
	principals []string
	out        []Statement
}

func (w *writer) makesFiles(u uses) {
	w.allow("MakesFiles", u.makes, contents, "GenerateDataKey")
	w.allow("AddsRecipients", u.further, contents, "Encrypt")
}

// allow adds a statement about data keys of the given classes and purposes;
// without classes none.
func (w *writer) allow(what string, classes []string, purposes []keywrap.Purpose, actions ...string) {
	if len(classes) == 0 {
		return
	}
	var values Values
	for _, p := range purposes {
		values = append(values, string(p))
	}
	const prefix = "kms:EncryptionContext:kmsfs:"
	w.add(what, actions, map[string]map[string]Values{
		"StringEquals": {prefix + "store": {w.store}, prefix + "class": classes, prefix + "purpose": values},
		// ForAllValues alone holds for fewer keys as well: the pairs above must be
		// there, and Null demands the id, so that the log always tells which file.
		"ForAllValues:StringEquals": {"kms:EncryptionContextKeys": {"kmsfs:class", "kmsfs:id", "kmsfs:purpose", "kmsfs:store"}},
		"Null":                      {prefix + "id": {"false"}},
	})
}

// look adds a statement about the key itself: these calls have no encryption
// context.
func (w *writer) look(u uses, actions ...string) {
	if len(u.opens) > 0 {
		w.add("Looks", actions, nil)
	}
}

func (w *writer) add(what string, actions []string, condition map[string]map[string]Values) {
	s := Statement{Effect: "Allow", Principal: Principal{w.principals}, Resource: "*", Condition: condition}
	for _, a := range actions {
		s.Action = append(s.Action, "kms:"+a)
	}
	// Statements of several stores and roles may meet in one key's policy.
	s.Sid = "Kmsfs" + strings.ToUpper(string(w.role[:1])) + string(w.role[1:]) + what + w.store[:min(8, len(w.store))]
	w.out = append(w.out, s)
}
