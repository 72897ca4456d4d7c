package iampolicy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// MaxLen is the longest document accepted, in bytes (KMS API, PolicyType).
const MaxLen = 131072

// Document is a parsed policy. It is immutable and safe for concurrent use.
type Document struct {
	statements []statement
}

type statement struct {
	allow                    bool
	principals, notPrincipal []string // nil: the element is absent
	actions, notActions      []string
	resources, notResources  []string
	conditions               []condition
}

// stringList is a JSON string or an array of strings; booleans and numbers
// are taken as their text, as IAM does in condition values.
type stringList []string

func (l *stringList) UnmarshalJSON(b []byte) error {
	var many []any
	var one any
	if err := json.Unmarshal(b, &one); err != nil {
		return err
	}
	if list, ok := one.([]any); ok {
		many = list
	} else {
		many = []any{one}
	}
	*l = make(stringList, 0, len(many))
	for _, v := range many {
		switch v := v.(type) {
		case string:
			*l = append(*l, v)
		case bool, float64:
			*l = append(*l, fmt.Sprint(v))
		default:
			return fmt.Errorf("%w: a value is neither a string nor a list of strings", ErrMalformed)
		}
	}
	return nil
}

type jsonStatement struct {
	Sid          string
	Effect       string
	Principal    json.RawMessage
	NotPrincipal json.RawMessage
	Action       stringList
	NotAction    stringList
	Resource     stringList
	NotResource  stringList
	Condition    map[string]map[string]stringList
}

// Parse reads a resource policy: every statement must name a principal.
func Parse(text []byte) (*Document, error) { return parse(text, true) }

// ParseIdentity reads a policy attached to a principal: no statement may name
// one.
func ParseIdentity(text []byte) (*Document, error) { return parse(text, false) }

func parse(text []byte, resourcePolicy bool) (*Document, error) {
	if len(text) > MaxLen {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrMalformed, MaxLen)
	}
	var top struct {
		Version   string
		ID        string `json:"Id"`
		Statement json.RawMessage
	}
	if err := strict(text, &top); err != nil {
		return nil, err
	}
	if top.Version != "" && top.Version != "2012-10-17" && top.Version != "2008-10-17" {
		return nil, fmt.Errorf("%w: unknown version %q", ErrMalformed, top.Version)
	}
	raw := bytes.TrimSpace(top.Statement)
	var list []json.RawMessage
	switch {
	case len(raw) > 0 && raw[0] == '{':
		list = []json.RawMessage{raw}
	case len(raw) > 0 && raw[0] == '[':
		if err := json.Unmarshal(raw, &list); err != nil {
			return nil, fmt.Errorf("%w: %v", ErrMalformed, err)
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%w: no statement", ErrMalformed)
	}
	doc := &Document{}
	for i, raw := range list {
		var js jsonStatement
		if err := strict(raw, &js); err != nil {
			return nil, fmt.Errorf("statement %d: %w", i, err)
		}
		st, err := js.compile(resourcePolicy)
		if err != nil {
			return nil, fmt.Errorf("statement %d: %w", i, err)
		}
		doc.statements = append(doc.statements, st)
	}
	return doc, nil
}

// strict decodes exactly one JSON value and refuses elements that v lacks.
func strict(text []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return fmt.Errorf("%w: text after the document", ErrMalformed)
	}
	return nil
}

func (js *jsonStatement) compile(resourcePolicy bool) (statement, error) {
	st := statement{
		actions: js.Action, notActions: js.NotAction,
		resources: js.Resource, notResources: js.NotResource,
	}
	switch js.Effect {
	case "Allow":
		st.allow = true
	case "Deny":
	default:
		return st, fmt.Errorf("%w: Effect is neither Allow nor Deny", ErrMalformed)
	}
	var err error
	if st.principals, err = parsePrincipals(js.Principal); err != nil {
		return st, err
	}
	if st.notPrincipal, err = parsePrincipals(js.NotPrincipal); err != nil {
		return st, err
	}
	named := 0
	for _, p := range [][]string{st.principals, st.notPrincipal} {
		if p != nil {
			named++
		}
	}
	if resourcePolicy && named != 1 {
		return st, fmt.Errorf("%w: needs exactly one of Principal and NotPrincipal", ErrMalformed)
	}
	if !resourcePolicy && named != 0 {
		return st, fmt.Errorf("%w: a policy of a principal names none", ErrMalformed)
	}
	if (st.actions == nil) == (st.notActions == nil) {
		return st, fmt.Errorf("%w: needs exactly one of Action and NotAction", ErrMalformed)
	}
	if (st.resources == nil) == (st.notResources == nil) {
		return st, fmt.Errorf("%w: needs exactly one of Resource and NotResource", ErrMalformed)
	}
	for op, keys := range js.Condition {
		cs, err := parseConditions(op, keys)
		if err != nil {
			return st, err
		}
		st.conditions = append(st.conditions, cs...)
	}
	return st, nil
}

// parsePrincipals returns the AWS principals of the element; other kinds
// (Service, Federated) are valid and match no caller. Nil means absent.
func parsePrincipals(raw json.RawMessage) ([]string, error) {
	if len(raw) == 0 {
		return nil, nil
	}
	var s string
	if json.Unmarshal(raw, &s) == nil {
		if s != "*" {
			return nil, fmt.Errorf("%w: invalid principal %q", ErrMalformed, s)
		}
		return []string{"*"}, nil
	}
	var kinds map[string]stringList
	if err := json.Unmarshal(raw, &kinds); err != nil || len(kinds) == 0 {
		return nil, fmt.Errorf("%w: invalid principal", ErrMalformed)
	}
	out := []string{}
	for kind, list := range kinds {
		switch kind {
		case "AWS":
			out = append(out, list...)
		case "Service", "Federated", "CanonicalUser":
		default:
			return nil, fmt.Errorf("%w: unknown kind of principal %q", ErrMalformed, kind)
		}
	}
	for _, p := range out {
		if p != "*" && strings.ContainsAny(p, "*?") {
			return nil, fmt.Errorf("%w: a principal has no wildcards", ErrMalformed)
		}
	}
	return out, nil
}
