package classify

import (
	"maps"
	"slices"
	"strings"
	"time"
)

// NameMode says whether a class encrypts the names in its directories.
type NameMode string

// The name modes.
const (
	NamesEncrypted NameMode = "encrypted"
	NamesPlain     NameMode = "plain"
)

// Defaults of a class's options, and bounds of a policy.
const (
	Version          = 1
	DefaultCache     = 5 * time.Minute
	DefaultChunkSize = 16 << 10
	MaxKeys          = 8
	MaxRetired       = 16 // keys of one class that may still unwrap
	MaxClasses       = 64
	MaxRules         = 1000
	MaxText          = 64 << 10           // bytes of a policy, as written and as Marshal makes it
	MaxCache         = 7 * 24 * time.Hour // longest cache time
	maxKeyURI        = 512                // bytes
	maxRuleQuoted    = 1000               // bytes of a rule's path as JSON: YAML takes no longer key
	minChunk         = 4 << 10            // bounds of Class.ChunkSize, see crypto/dare
	maxChunk         = 64 << 10
)

// Class is a data classification. Every file of a class is encrypted under data
// keys wrapped by all of its keys.
type Class struct {
	Keys      []string      // key URIs as the user wrote them, 1 to MaxKeys; the first makes data keys
	Retired   []string      // key URIs, at most MaxRetired: may unwrap, wrap nothing new; nil if there are none
	Shared    bool          // data_keys: shared: one call to the key service makes the keys of many files
	Cache     time.Duration // how long an unwrapped key may be kept after the last close; 0: not at all
	Names     NameMode
	ChunkSize int // plaintext bytes, a power of two from 4 KiB to 64 KiB
}

// Policy is the classes of a store and the rules that assign directories to
// them. Rules are absolute clean paths.
type Policy struct {
	Version     int
	Default     string // class of the root and of what no rule covers
	Classes     map[string]Class
	Directories map[string]string // rule: directory to class
}

// Single returns a policy of one class, with default options and no rules.
func Single(class string, keys ...string) *Policy {
	return &Policy{
		Version: Version,
		Default: class,
		Classes: map[string]Class{class: {
			Keys: slices.Clone(keys), Cache: DefaultCache, Names: NamesEncrypted, ChunkSize: DefaultChunkSize,
		}},
		Directories: map[string]string{},
	}
}

// Clone returns a deep copy.
func (p *Policy) Clone() *Policy {
	out := *p
	out.Classes = make(map[string]Class, len(p.Classes))
	for name, c := range p.Classes {
		c.Keys, c.Retired = slices.Clone(c.Keys), slices.Clone(c.Retired)
		out.Classes[name] = c
	}
	out.Directories = make(map[string]string, len(p.Directories))
	maps.Copy(out.Directories, p.Directories)
	return &out
}

// Names returns the class names, sorted.
func (p *Policy) Names() []string { return slices.Sorted(maps.Keys(p.Classes)) }

// WithRule returns a copy of p with one more rule, or with another class in an
// existing one. It answers ErrPolicy where Check would.
func (p *Policy) WithRule(dir, class string) (*Policy, error) {
	clean, bad := cleanRule(dir)
	if bad != nil {
		bad.Field = ruleField(dir)
		return nil, bad
	}
	out := p.Clone()
	out.Directories[clean] = class
	if err := out.Check(); err != nil {
		return nil, err
	}
	return out, nil
}

// ClassOf returns the class of a directory: that of the longest rule which is
// dir or lies above it, component by component, else the default. dir is an
// absolute clean path of the plaintext tree; "/" is the root.
func (p *Policy) ClassOf(dir string) string {
	for dir != "" {
		if class, ok := p.Directories[dir]; ok {
			return class
		}
		dir = dir[:max(strings.LastIndexByte(dir, '/'), 0)]
	}
	return p.Default
}

// Fixed reports whether dir is the root, or a rule names it or something below
// it: such a directory can be neither renamed nor removed. dir is as for ClassOf.
func (p *Policy) Fixed(dir string) bool {
	if dir == "/" {
		return true
	}
	for rule := range p.Directories {
		if rest, ok := strings.CutPrefix(rule, dir); ok && (rest == "" || rest[0] == '/') {
			return true
		}
	}
	return false
}
