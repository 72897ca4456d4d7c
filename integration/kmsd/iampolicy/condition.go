package iampolicy

import (
	"fmt"
	"strings"
)

type setOperator uint8

const (
	single setOperator = iota
	forAllValues
	forAnyValue
)

type condition struct {
	set      setOperator
	ifExists bool
	null     bool // the Null operator: values are "true" or "false"
	negated  bool
	match    func(pattern, value string) bool
	key      string // lower case: condition keys are case-insensitive
	values   []string
}

func equal(a, b string) bool { return a == b }

var operators = map[string]struct {
	match   func(pattern, value string) bool
	negated bool
}{
	"StringEquals":              {equal, false},
	"StringNotEquals":           {equal, true},
	"StringEqualsIgnoreCase":    {strings.EqualFold, false},
	"StringNotEqualsIgnoreCase": {strings.EqualFold, true},
	"StringLike":                {glob, false},
	"StringNotLike":             {glob, true},
	"ArnEquals":                 {glob, false},
	"ArnLike":                   {glob, false},
	"ArnNotEquals":              {glob, true},
	"ArnNotLike":                {glob, true},
	"Bool":                      {strings.EqualFold, false},
}

func parseConditions(operator string, keys map[string]stringList) ([]condition, error) {
	var c condition
	name := operator
	if rest, ok := strings.CutPrefix(name, "ForAllValues:"); ok {
		c.set, name = forAllValues, rest
	} else if rest, ok := strings.CutPrefix(name, "ForAnyValue:"); ok {
		c.set, name = forAnyValue, rest
	}
	if name == "Null" && c.set == single {
		c.null = true
	} else {
		name, c.ifExists = strings.CutSuffix(name, "IfExists")
		op, ok := operators[name]
		if !ok {
			return nil, fmt.Errorf("%w: unknown condition operator %q", ErrMalformed, operator)
		}
		c.match, c.negated = op.match, op.negated
	}
	out := make([]condition, 0, len(keys))
	for key, values := range keys {
		if !strings.Contains(key, ":") || len(values) == 0 {
			return nil, fmt.Errorf("%w: condition key %q", ErrMalformed, key)
		}
		for _, v := range values {
			if strings.Contains(v, "${") {
				return nil, fmt.Errorf("%w: policy variables are not known here", ErrMalformed)
			}
			if (c.null || name == "Bool") && !strings.EqualFold(v, "true") && !strings.EqualFold(v, "false") {
				return nil, fmt.Errorf("%w: %s takes true or false", ErrMalformed, operator)
			}
		}
		c.key, c.values = strings.ToLower(key), values
		out = append(out, c)
	}
	return out, nil
}

// holds follows the IAM User Guide, "Condition operators" and "Multivalued
// context keys": a negated operator holds where the key is absent, ForAllValues
// holds for an absent key, ForAnyValue does not.
func (c *condition) holds(context map[string][]string) bool {
	got, present := context[c.key]
	present = present && len(got) > 0
	if c.null {
		want := "true"
		if present {
			want = "false"
		}
		return anyOf(c.values, func(v string) bool { return strings.EqualFold(v, want) })
	}
	if !present {
		switch {
		case c.ifExists || c.set == forAllValues:
			return true
		case c.set == forAnyValue:
			return false
		}
		return c.negated
	}
	all := c.set == forAllValues || c.set == single && c.negated
	for _, value := range got {
		ok := anyOf(c.values, func(p string) bool { return c.match(p, value) }) != c.negated
		if ok != all {
			return ok
		}
	}
	return all
}
