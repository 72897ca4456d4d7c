package classify

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

var (
	classPattern = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,31}$`)
	keyPattern   = regexp.MustCompile(`^(arn:[a-z][a-z0-9-]*:kms:[a-z0-9-]+:[0-9]{12}:(key/[A-Za-z0-9-]{1,128}|alias/[A-Za-z0-9/_-]{1,250})` +
		`|alias/[A-Za-z0-9/_-]{1,250}|keyring:[a-z0-9][a-z0-9._-]{0,62}|pkcs11:[A-Za-z0-9%;=?&/|+,:@!$'()*\[\]._~-]{1,500})$`)
)

const (
	dataKeysPerFile = "per-file"
	dataKeysShared  = "shared"
)

const (
	classHint = "a class name is a lower-case letter and up to 31 of a-z, 0-9, _ and -"
	keyHint   = "write an AWS KMS key ARN, alias/NAME or keyring:NAME"
	dataHint  = "write per-file or shared"
	cacheHint = "write a duration such as 90s, 5m or 0s"
	chunkHint = "write 4KiB, 8KiB, 16KiB, 32KiB or 64KiB"
	ruleHint  = "write a directory of the mount, such as /patients"
)

// Check answers ErrPolicy, as a *ParseError, unless p is a policy that Parse
// could have returned.
func (p *Policy) Check() error {
	if bad := p.check(); bad != nil {
		return bad
	}
	return nil
}

func (p *Policy) check() *ParseError {
	if p.Version != Version {
		return &ParseError{Field: "version", Problem: fmt.Sprintf("%d is not supported", p.Version), Hint: "write version: 1"}
	}
	if n := len(p.Classes); n < 1 || n > MaxClasses {
		return &ParseError{Field: "classes", Problem: fmt.Sprintf("%d classes", n), Hint: "write 1 to 64 of them"}
	}
	for _, name := range p.Names() {
		if bad := checkClass(name, p.Classes[name]); bad != nil {
			return bad
		}
	}
	if bad := p.checkRef(p.Default); bad != nil {
		bad.Field = "default"
		return bad
	}
	if n := len(p.Directories); n > MaxRules {
		return &ParseError{Field: "directories", Problem: fmt.Sprintf("%d rules", n), Hint: "write at most 1000 of them"}
	}
	for _, dir := range p.rules() {
		clean, bad := cleanRule(dir)
		if bad == nil && clean != dir {
			bad = &ParseError{Problem: "the path is not clean", Hint: "write " + quote(clean)}
		}
		if bad == nil {
			bad = p.checkRef(p.Directories[dir])
		}
		if bad != nil {
			bad.Field = ruleField(dir)
			return bad
		}
	}
	if n := len(p.Marshal()); n > MaxText {
		return &ParseError{Problem: fmt.Sprintf("%d bytes in canonical form", n), Hint: "shorten it to 65536 bytes"}
	}
	return nil
}

func (p *Policy) checkRef(class string) *ParseError {
	if _, ok := p.Classes[class]; !ok {
		return &ParseError{Problem: "there is no class " + show(class), Hint: "the classes are: " + strings.Join(p.Names(), ", ")}
	}
	return nil
}

func checkClass(name string, c Class) *ParseError {
	field := classField(name)
	if !classPattern.MatchString(name) {
		return &ParseError{Field: field, Problem: "bad class name", Hint: classHint}
	}
	if n := len(c.Keys); n < 1 || n > MaxKeys {
		return &ParseError{Field: field + ".keys", Problem: fmt.Sprintf("%d keys", n), Hint: "write 1 to 8 of them, such as [\"keyring:general\"]"}
	}
	if bad := checkKeys(field+".keys", c.Keys); bad != nil {
		return bad
	}
	if bad := checkRetired(field+".retired", c); bad != nil {
		return bad
	}
	if c.Shared && c.Cache == 0 {
		return &ParseError{Field: field + ".data_keys", Problem: "shared, but cache: 0s asks for a call at every open, and shared keys save calls",
			Hint: "write a cache time, or data_keys: per-file"}
	}
	if c.Cache < 0 || c.Cache > MaxCache {
		return &ParseError{Field: field + ".cache", Problem: formatDuration(c.Cache) + " is out of range", Hint: "write 0s to 168h"}
	}
	if c.Names != NamesEncrypted && c.Names != NamesPlain {
		return &ParseError{Field: field + ".names", Problem: "unknown mode " + show(string(c.Names)), Hint: "write encrypted or plain"}
	}
	if n := c.ChunkSize; n < minChunk || n > maxChunk || n&(n-1) != 0 {
		return &ParseError{Field: field + ".chunk_size", Problem: fmt.Sprintf("%d bytes is not a chunk size", n), Hint: chunkHint}
	}
	return nil
}

func checkKeys(field string, keys []string) *ParseError {
	for i, key := range keys {
		at := field + "[" + strconv.Itoa(i) + "]"
		if len(key) > maxKeyURI || !keyPattern.MatchString(key) {
			return &ParseError{Field: at, Problem: show(key) + " is no key URI", Hint: keyHint}
		}
		if strings.HasPrefix(key, "pkcs11:") && strings.Contains(key, "pin-value") {
			return &ParseError{Field: at, Problem: "a PIN in a key URI, which stands in every header", Hint: "give the PIN in a file (pin-source) or the environment"}
		}
		if slices.Contains(keys[:i], key) {
			return &ParseError{Field: at, Problem: "the same key twice", Hint: "remove one of the two"}
		}
	}
	return nil
}

func checkRetired(field string, c Class) *ParseError {
	if n := len(c.Retired); n > MaxRetired {
		return &ParseError{Field: field, Problem: fmt.Sprintf("%d keys", n), Hint: "write at most 16; kmsfs keys tells which of them nothing depends on"}
	}
	if bad := checkKeys(field, c.Retired); bad != nil {
		return bad
	}
	for i, key := range c.Retired {
		if slices.Contains(c.Keys, key) {
			return &ParseError{Field: field + "[" + strconv.Itoa(i) + "]", Problem: "the key is among keys as well", Hint: "remove one of the two"}
		}
	}
	return nil
}

// cleanRule returns the one spelling of a rule's path.
func cleanRule(dir string) (string, *ParseError) {
	switch {
	case !strings.HasPrefix(dir, "/"):
		return "", &ParseError{Problem: "the path is not absolute", Hint: ruleHint}
	case !utf8.ValidString(dir) || strings.IndexByte(dir, 0) >= 0:
		return "", &ParseError{Problem: "the path is not UTF-8 without NUL", Hint: ruleHint}
	case len(quote(dir)) > maxRuleQuoted:
		return "", &ParseError{Problem: "the path is too long", Hint: "write at most 998 bytes"}
	}
	for part := range strings.SplitSeq(dir, "/") {
		if part == "." || part == ".." {
			return "", &ParseError{Problem: "the path has a component " + quote(part), Hint: ruleHint}
		}
		if len(part) > 255 {
			return "", &ParseError{Problem: "a component is longer than 255 bytes", Hint: ruleHint}
		}
	}
	clean := path.Clean(dir)
	if clean == "/" {
		return "", &ParseError{Problem: "the root has the default class", Hint: "set default: instead"}
	}
	return clean, nil
}

func classField(name string) string { return "classes." + label(name) }

func ruleField(dir string) string { return "directories." + label(dir) }

// show quotes what an error message repeats, shortened.
func show(s string) string {
	const limit = 100
	if len(s) > limit {
		return quote(s[:limit]) + "…"
	}
	return quote(s)
}

// label is show without the quotes where s needs none.
func label(s string) string {
	if q := show(s); s == "" || q != `"`+s+`"` {
		return q
	}
	return s
}

// formatDuration is time.Duration.String without trailing zero units: "5m".
func formatDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	if strings.HasSuffix(s, "h0m") {
		s = s[:len(s)-2]
	}
	return s
}
