package classify

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// Parse reads a policy, YAML or JSON of at most MaxText bytes, and fills in
// defaults. Errors are a *ParseError. The text may come from anywhere.
func Parse(text []byte) (*Policy, error) {
	p, bad := parse(text)
	if bad != nil {
		return nil, bad
	}
	return p, nil
}

func parse(text []byte) (*Policy, *ParseError) {
	root, bad := document(text)
	if bad != nil {
		return nil, bad
	}
	d := decoder{
		policy: &Policy{Classes: map[string]Class{}, Directories: map[string]string{}},
		lines:  map[string]int{"": root.Line},
	}
	if bad := d.top(root); bad != nil {
		return nil, bad
	}
	if bad := d.policy.check(); bad != nil {
		bad.Line = d.line(bad.Field)
		return nil, bad
	}
	return d.policy, nil
}

// document returns the root of the only document in text.
func document(text []byte) (*yaml.Node, *ParseError) {
	if len(text) > MaxText {
		return nil, &ParseError{Problem: fmt.Sprintf("%d bytes", len(text)), Hint: "shorten it to 65536 bytes"}
	}
	if !utf8.Valid(text) { // yaml would take UTF-16 as well
		return nil, &ParseError{Problem: "not UTF-8", Hint: "save it as UTF-8"}
	}
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc, second yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, &ParseError{Problem: "empty", Hint: "write at least version, default and classes"}
	} else if err != nil {
		return nil, syntaxError(err)
	}
	if err := dec.Decode(&second); err == nil {
		return nil, &ParseError{Line: second.Line, Problem: "a second document", Hint: "write one, without ---"}
	} else if !errors.Is(err, io.EOF) {
		return nil, syntaxError(err)
	}
	if doc.Kind != yaml.DocumentNode || len(doc.Content) != 1 {
		return nil, &ParseError{Problem: "empty", Hint: "write at least version, default and classes"}
	}
	return doc.Content[0], noAlias(doc.Content[0])
}

// noAlias refuses anchors and aliases: a short text must not stand for a long
// one.
func noAlias(n *yaml.Node) *ParseError {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		return &ParseError{Line: n.Line, Problem: "anchors and aliases are not supported", Hint: "write the value itself"}
	}
	for _, child := range n.Content {
		if bad := noAlias(child); bad != nil {
			return bad
		}
	}
	return nil
}

var yamlLine = regexp.MustCompile(`^yaml: line ([0-9]+): `)

func syntaxError(err error) *ParseError {
	bad := &ParseError{Problem: strings.TrimPrefix(err.Error(), "yaml: "), Hint: "write YAML or JSON"}
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
		bad.Line, _ = strconv.Atoi(m[1])
		bad.Problem = err.Error()[len(m[0]):]
	}
	return bad
}

// decoder turns nodes into a policy. It checks shapes; values are left to
// Policy.check, whose fields it can tell the lines of.
type decoder struct {
	policy *Policy
	lines  map[string]int // field to line
}

// line returns the line of a field, or of the nearest one around it.
func (d *decoder) line(field string) int {
	for {
		if n, ok := d.lines[field]; ok {
			return n
		}
		field = field[:max(strings.LastIndexAny(field, ".["), 0)]
	}
}

func (d *decoder) top(n *yaml.Node) *ParseError {
	var version, def bool
	bad := d.mapping(n, "", func(key string, k, v *yaml.Node) (bad *ParseError) {
		switch key {
		case "version":
			version = true
			d.policy.Version, bad = integer(v, key, "write version: 1")
		case "default":
			def = true
			d.policy.Default, bad = text(v, key)
		case "classes":
			bad = d.mapping(v, key, d.class)
		case "directories":
			bad = d.mapping(v, key, d.rule)
		default:
			return unknown(k, key, "version, default, classes, directories")
		}
		return bad
	})
	switch {
	case bad != nil:
		return bad
	case !version:
		return &ParseError{Line: n.Line, Field: "version", Problem: "missing", Hint: "write version: 1"}
	case !def:
		return &ParseError{Line: n.Line, Field: "default", Problem: "missing", Hint: "write default: and the name of a class"}
	}
	return nil
}

func (d *decoder) class(name string, _, v *yaml.Node) *ParseError {
	c := Class{Cache: DefaultCache, Names: NamesEncrypted, ChunkSize: DefaultChunkSize}
	field := classField(name)
	bad := d.mapping(v, field, func(key string, k, v *yaml.Node) (bad *ParseError) {
		field := field + "." + key
		d.lines[field] = v.Line
		switch key {
		case "keys":
			c.Keys, bad = d.keys(v, field)
		case "retired":
			c.Retired, bad = d.keys(v, field)
		case "data_keys":
			c.Shared, bad = dataKeys(v, field)
		case "cache":
			c.Cache, bad = duration(v, field)
		case "names":
			var s string
			s, bad = text(v, field)
			c.Names = NameMode(s)
		case "chunk_size":
			c.ChunkSize, bad = size(v, field)
		default:
			return unknown(k, field, "keys, retired, data_keys, cache, names, chunk_size")
		}
		return bad
	})
	d.policy.Classes[name] = c
	return bad
}

func (d *decoder) keys(v *yaml.Node, field string) ([]string, *ParseError) {
	if v.Kind != yaml.SequenceNode {
		return nil, &ParseError{v.Line, field, "not a list", `write it as ["keyring:general"]`}
	}
	var out []string
	for i, item := range v.Content {
		at := field + "[" + strconv.Itoa(i) + "]"
		d.lines[at] = item.Line
		key, bad := text(item, at)
		if bad != nil {
			return nil, bad
		}
		out = append(out, key)
	}
	return out, nil
}

func (d *decoder) rule(dir string, k, v *yaml.Node) *ParseError {
	field := ruleField(dir)
	clean, bad := cleanRule(dir)
	if bad != nil {
		bad.Line, bad.Field = k.Line, field
		return bad
	}
	if _, ok := d.policy.Directories[clean]; ok {
		return &ParseError{k.Line, field, "a second rule for " + quote(clean), "remove one of the two"}
	}
	d.lines[ruleField(clean)] = k.Line
	d.policy.Directories[clean], bad = text(v, field)
	return bad
}

// mapping calls each for the fields of n, in order. A null is an empty mapping.
func (d *decoder) mapping(n *yaml.Node, field string, each func(key string, k, v *yaml.Node) *ParseError) *ParseError {
	d.lines[field] = n.Line
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" {
		return nil
	}
	if n.Kind != yaml.MappingNode {
		return &ParseError{n.Line, field, "not a mapping", "write fields as name: value"}
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		key, bad := text(k, field)
		if bad != nil {
			return bad
		}
		if seen[key] {
			return &ParseError{k.Line, strings.TrimPrefix(field+"."+label(key), "."), "written twice", "remove one of the two"}
		}
		seen[key] = true
		if field == "" {
			d.lines[key] = v.Line
		}
		if bad := each(key, k, v); bad != nil {
			return bad
		}
	}
	return nil
}

func unknown(k *yaml.Node, field, known string) *ParseError {
	return &ParseError{k.Line, label(field), "unknown field", "the fields are: " + known}
}

// scalar returns the text of a scalar with one of the given tags.
func scalar(n *yaml.Node, field, what, hint string, tags ...string) (string, *ParseError) {
	if n.Kind == yaml.ScalarNode {
		for _, tag := range tags {
			if n.ShortTag() == tag {
				return n.Value, nil
			}
		}
	}
	return "", &ParseError{n.Line, field, "not " + what, hint}
}

func text(n *yaml.Node, field string) (string, *ParseError) {
	return scalar(n, field, "a string", "write a string, in quotes if it looks like something else", "!!str")
}

func integer(n *yaml.Node, field, hint string) (int, *ParseError) {
	s, bad := scalar(n, field, "a number", hint, "!!int")
	if bad != nil {
		return 0, bad
	}
	v, err := strconv.Atoi(s)
	if err != nil {
		return 0, &ParseError{n.Line, field, show(s) + " is not a decimal number", hint}
	}
	return v, nil
}

func dataKeys(n *yaml.Node, field string) (shared bool, bad *ParseError) {
	s, bad := text(n, field)
	if bad == nil && s != dataKeysPerFile && s != dataKeysShared {
		bad = &ParseError{n.Line, field, "unknown mode " + show(s), dataHint}
	}
	return s == dataKeysShared, bad
}

func duration(n *yaml.Node, field string) (time.Duration, *ParseError) {
	s, bad := scalar(n, field, "a duration", cacheHint, "!!str", "!!int")
	if bad != nil {
		return 0, bad
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		return 0, &ParseError{n.Line, field, show(s) + " is no duration", cacheHint}
	}
	return v, nil
}

var sizePattern = regexp.MustCompile(`^[0-9]{1,9}(KiB)?$`)

func size(n *yaml.Node, field string) (int, *ParseError) {
	s, bad := scalar(n, field, "a size", chunkHint, "!!str", "!!int")
	if bad != nil {
		return 0, bad
	}
	if !sizePattern.MatchString(s) {
		return 0, &ParseError{n.Line, field, show(s) + " is no size", chunkHint}
	}
	digits, kib := strings.CutSuffix(s, "KiB")
	v, err := strconv.Atoi(digits)
	if err != nil {
		return 0, &ParseError{n.Line, field, show(s) + " is no size", chunkHint}
	}
	if kib {
		v <<= 10
	}
	return v, nil
}
