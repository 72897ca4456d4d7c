package iampolicy

import "strings"

// Request is one call to judge.
type Request struct {
	Action    string // "kms:Decrypt"
	Resource  string // ARN; "*" for operations that have none
	Principal string // ARN of the caller
	// Context holds the condition keys, in lower case, with their values. A
	// key that is not in the map is absent.
	Context map[string][]string
}

// Result is what a document says about a request. Deny wins over the others;
// with none of them set the document is silent, which is a denial too.
type Result struct {
	Deny      bool // a Deny statement matches
	Allow     bool // an Allow statement names the caller, or everybody
	Delegated bool // an Allow statement names the caller's account, which leaves it to the caller's own policies
}

// Evaluate judges a request.
func (d *Document) Evaluate(r Request) Result {
	var res Result
	for i := range d.statements {
		st := &d.statements[i]
		direct, delegated := st.matchPrincipal(r.Principal)
		if !direct && !delegated || !st.matchCall(r) {
			continue
		}
		switch {
		case !st.allow:
			res.Deny = true
		case direct:
			res.Allow = true
		default:
			res.Delegated = true
		}
	}
	return res
}

// Account returns the account of a principal's ARN, "" if it is none.
func Account(arn string) string {
	parts := strings.SplitN(arn, ":", 6)
	if len(parts) != 6 || parts[0] != "arn" {
		return ""
	}
	return parts[4]
}

func (st *statement) matchPrincipal(caller string) (direct, delegated bool) {
	switch {
	case st.principals != nil:
		return matchPrincipals(st.principals, caller)
	case st.notPrincipal != nil:
		a, b := matchPrincipals(st.notPrincipal, caller)
		return !a && !b, false
	}
	return true, false // a policy of the principal itself
}

func matchPrincipals(list []string, caller string) (direct, delegated bool) {
	account := Account(caller)
	for _, p := range list {
		switch {
		case p == "*" || p == caller || p == roleOf(caller):
			direct = true
		case account != "" && (p == account || p == "arn:aws:iam::"+account+":root"):
			delegated = true
		}
	}
	return direct, delegated
}

// roleOf returns the role behind an assumed-role session: a policy that names
// the role holds for its sessions.
func roleOf(caller string) string {
	account, ok := strings.CutPrefix(caller, "arn:aws:sts::")
	if !ok {
		return ""
	}
	account, rest, ok := strings.Cut(account, ":assumed-role/")
	if !ok {
		return ""
	}
	name, _, _ := strings.Cut(rest, "/")
	return "arn:aws:iam::" + account + ":role/" + name
}

func (st *statement) matchCall(r Request) bool {
	fold := strings.ToLower(r.Action)
	action := func(p string) bool { return glob(strings.ToLower(p), fold) }
	resource := func(p string) bool { return glob(p, r.Resource) }
	if st.actions != nil && !anyOf(st.actions, action) || st.notActions != nil && anyOf(st.notActions, action) {
		return false
	}
	if st.resources != nil && !anyOf(st.resources, resource) || st.notResources != nil && anyOf(st.notResources, resource) {
		return false
	}
	for i := range st.conditions {
		if !st.conditions[i].holds(r.Context) {
			return false
		}
	}
	return true
}

func anyOf(list []string, match func(string) bool) bool {
	for _, s := range list {
		if match(s) {
			return true
		}
	}
	return false
}

// glob matches '*' (any run of bytes) and '?' (any one byte), in time
// proportional to the product of the lengths.
func glob(pattern, s string) bool {
	p, i := 0, 0
	star, mark := -1, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}
