package classify_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/classify"
)

const sample = `
version: 1
default: general
classes:
  general: { keys: ["keyring:general"] }
  phi:
    keys: ["arn:aws:kms:us-east-1:111122223333:key/mrk-1", "alias/recovery"]
    cache: 0s
  pci: { keys: [alias/pci], names: plain, chunk_size: 4KiB }
directories:
  /patients: phi
  /patients/old/public: general
  /cards/raw/: pci
`

func mustParse(t testing.TB, text string) *classify.Policy {
	t.Helper()
	p, err := classify.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestParseFillsInDefaults(t *testing.T) {
	got := mustParse(t, sample)
	want := &classify.Policy{
		Version: 1,
		Default: "general",
		Classes: map[string]classify.Class{
			"general": {Keys: []string{"keyring:general"}, Cache: 5 * time.Minute, Names: classify.NamesEncrypted, ChunkSize: 16 << 10},
			"phi":     {Keys: []string{"arn:aws:kms:us-east-1:111122223333:key/mrk-1", "alias/recovery"}, Cache: 0, Names: classify.NamesEncrypted, ChunkSize: 16 << 10},
			"pci":     {Keys: []string{"alias/pci"}, Cache: 5 * time.Minute, Names: classify.NamesPlain, ChunkSize: 4 << 10},
		},
		Directories: map[string]string{"/patients": "phi", "/patients/old/public": "general", "/cards/raw": "pci"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if names := got.Names(); !slices.Equal(names, []string{"general", "pci", "phi"}) {
		t.Errorf("Names = %q", names)
	}
	if err := got.Check(); err != nil {
		t.Errorf("Check: %v", err)
	}
}

func TestClassOfAndFixed(t *testing.T) {
	p := mustParse(t, sample)
	for _, tc := range []struct {
		dir   string
		class string
		fixed bool
	}{
		{"/", "general", true},
		{"/patients", "phi", true},
		{"/patients/", "phi", true}, // not clean: ends at the component above
		{"/patients2", "general", false},
		{"/patient", "general", false},
		{"/patients.old", "general", false},
		{"/Patients", "general", false},
		{"/x/patients", "general", false},
		{"/patients/a", "phi", false},
		{"/patients/a/b/c/d", "phi", false},
		{"/patients/old", "phi", true},
		{"/patients/old/public", "general", true},
		{"/patients/old/publicity", "phi", false},
		{"/patients/old/public/x", "general", false},
		{"/cards", "general", true},
		{"/cards/raw", "pci", true},
		{"/cards/raw2", "general", false},
		{"/card", "general", false},
		{"/cards/raw/\xff\xfe", "pci", false},
		{"", "general", true}, // no directory: moving it is refused
		{"patients", "general", false},
	} {
		if got := p.ClassOf(tc.dir); got != tc.class {
			t.Errorf("ClassOf(%q) = %s, want %s", tc.dir, got, tc.class)
		}
		if got := p.Fixed(tc.dir); tc.dir != "/patients/" && got != tc.fixed {
			t.Errorf("Fixed(%q) = %v, want %v", tc.dir, got, tc.fixed)
		}
	}
	q := classify.Single("general", "keyring:general")
	if q.Fixed("/a") || !q.Fixed("/") || q.ClassOf("/a") != "general" {
		t.Error("a policy without rules has rules")
	}
}

func TestMarshalIsCanonical(t *testing.T) {
	p := mustParse(t, sample)
	want := `{"version":1,"default":"general","classes":{` +
		`"general":{"keys":["keyring:general"],"cache":"5m","names":"encrypted","chunk_size":16384},` +
		`"pci":{"keys":["alias/pci"],"cache":"5m","names":"plain","chunk_size":4096},` +
		`"phi":{"keys":["arn:aws:kms:us-east-1:111122223333:key/mrk-1","alias/recovery"],"cache":"0s","names":"encrypted","chunk_size":16384}},` +
		`"directories":{"/cards/raw":"pci","/patients":"phi","/patients/old/public":"general"}}`
	if got := string(p.Marshal()); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	roundTrip(t, p)
	roundTrip(t, classify.Single("true", "keyring:x"))
}

// roundTrip checks what holds for every policy that passes Check.
func roundTrip(t *testing.T, p *classify.Policy) {
	t.Helper()
	text := p.Marshal()
	if !json.Valid(text) {
		t.Errorf("Marshal makes no JSON: %s", text)
	}
	for form, text := range map[string][]byte{"JSON": text, "YAML": p.YAML()} {
		back, err := classify.Parse(text)
		if err != nil {
			t.Errorf("%s does not parse: %v\n%s", form, err, text)
		} else if !reflect.DeepEqual(back, p) {
			t.Errorf("%s: got %+v\nwant %+v", form, back, p)
		} else if !bytes.Equal(back.Marshal(), p.Marshal()) {
			t.Errorf("%s: marshals differently the second time", form)
		}
	}
	if clone := p.Clone(); !reflect.DeepEqual(clone, p) {
		t.Errorf("Clone = %+v, want %+v", clone, p)
	}
	if changes, err := classify.Compare(p, p.Clone()); len(changes) != 0 || err != nil {
		t.Errorf("Compare with itself: %q, %v", changes, err)
	}
}

func TestAwkwardRules(t *testing.T) {
	p := classify.Single("general", "keyring:general")
	for _, dir := range []string{
		"/a b", "/ ", "/\n", "/\t", "/a: b", "/#", "/'", `/"`, `/\`, "/é", "/\u0085", "/\u2028", "/\ufeff", "/\ufffd", "/\uffff", "/\x7f", "/\x01",
		"/😀", "/\U000e0001", "/{}", "/[a]", "/- x", "/!x", "/&x", "/*x", "/%", "/@", "/`", "/null", "/~", "/a/...", "/.kmsfs",
		"/" + strings.Repeat("n", 255) + "/" + strings.Repeat("m", 255),
	} {
		var err error
		if p, err = p.WithRule(dir, "general"); err != nil {
			t.Fatalf("%q: %v", dir, err)
		}
	}
	roundTrip(t, p)
}

func TestWithRule(t *testing.T) {
	p := mustParse(t, sample)
	before := p.Clone()
	q, err := p.WithRule("/patients//billing/", "pci")
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(p, before) {
		t.Error("WithRule changed its receiver")
	}
	if got := q.ClassOf("/patients/billing/2024"); got != "pci" {
		t.Errorf("ClassOf = %s, want pci", got)
	}
	if q, err = q.WithRule("/patients/billing", "phi"); err != nil || q.ClassOf("/patients/billing") != "phi" {
		t.Errorf("a rule cannot be replaced: %v", err)
	}
	for _, tc := range []struct{ dir, class string }{
		{"/x", "nope"}, {"/x", ""}, {"", "phi"}, {"/", "phi"}, {"//", "phi"}, {"x", "phi"}, {"/../x", "phi"}, {"/x/.", "phi"}, {"/x/..", "phi"},
		{"/a\x00", "phi"}, {"/\xff", "phi"}, {"/" + strings.Repeat("n", 256), "phi"}, {strings.Repeat("/abcdefg", 200), "phi"},
	} {
		if _, err := p.WithRule(tc.dir, tc.class); !errors.Is(err, classify.ErrPolicy) {
			t.Errorf("WithRule(%q, %q): %v, want %v", tc.dir, tc.class, err, classify.ErrPolicy)
		}
	}
}

func TestBounds(t *testing.T) {
	build := func(classes, keys, rules int) *classify.Policy {
		p := &classify.Policy{Version: 1, Default: "c0", Classes: map[string]classify.Class{}, Directories: map[string]string{}}
		for i := range classes {
			c := classify.Single("x").Classes["x"]
			for k := range keys {
				c.Keys = append(c.Keys, fmt.Sprintf("keyring:k%d", k))
			}
			p.Classes[fmt.Sprintf("c%d", i)] = c
		}
		for i := range rules {
			p.Directories[fmt.Sprintf("/d%d", i)] = "c0"
		}
		return p
	}
	full := build(classify.MaxClasses, classify.MaxKeys, classify.MaxRules)
	if err := full.Check(); err != nil {
		t.Fatalf("at the bounds: %v", err)
	}
	roundTrip(t, full)
	for what, p := range map[string]*classify.Policy{
		"no class": build(0, 1, 0), "classes": build(65, 1, 0), "no key": build(1, 0, 0), "keys": build(1, 9, 0), "rules": build(1, 1, 1001),
		"zero": {},
	} {
		if err := p.Check(); !errors.Is(err, classify.ErrPolicy) || fault.Of(err) != fault.Invalid {
			t.Errorf("%s: %v, want %v", what, err, classify.ErrPolicy)
		}
	}
	big := build(1, 1, 0)
	for i := range 100 {
		big.Directories[fmt.Sprintf("/%d/%s/%s/%s", i, strings.Repeat("x", 250), strings.Repeat("x", 250), strings.Repeat("x", 250))] = "c0"
	}
	if err := big.Check(); !errors.Is(err, classify.ErrPolicy) {
		t.Errorf("a policy that Parse could not read back: %v, want %v", err, classify.ErrPolicy)
	}
	if _, err := classify.Parse(append([]byte(sample), bytes.Repeat([]byte("#"), 64<<10)...)); !errors.Is(err, classify.ErrPolicy) {
		t.Errorf("65 KiB of text: %v, want %v", err, classify.ErrPolicy)
	}
	if _, err := classify.Parse(bytes.Repeat([]byte("["), 64<<10)); !errors.Is(err, classify.ErrPolicy) {
		t.Errorf("deep text: %v, want %v", err, classify.ErrPolicy)
	}
}

// TestCheckClass changes one field of a good policy at a time.
func TestCheckClass(t *testing.T) {
	for what, change := range map[string]func(p *classify.Policy, c *classify.Class){
		"version":          func(p *classify.Policy, _ *classify.Class) { p.Version = 2 },
		"default":          func(p *classify.Policy, _ *classify.Class) { p.Default = "nope" },
		"rule class":       func(p *classify.Policy, _ *classify.Class) { p.Directories["/x"] = "nope" },
		"rule not clean":   func(p *classify.Policy, _ *classify.Class) { p.Directories["/x/"] = "general" },
		"class name":       func(p *classify.Policy, c *classify.Class) { p.Classes["PHI"] = *c },
		"no key":           func(_ *classify.Policy, c *classify.Class) { c.Keys = nil },
		"bad key":          func(_ *classify.Policy, c *classify.Class) { c.Keys = []string{"vault:x"} },
		"key twice":        func(_ *classify.Policy, c *classify.Class) { c.Keys = []string{"alias/x", "alias/x"} },
		"retired twice":    func(_ *classify.Policy, c *classify.Class) { c.Retired = []string{"alias/x", "alias/x"} },
		"retired in use":   func(_ *classify.Policy, c *classify.Class) { c.Retired = []string{c.Keys[0]} },
		"bad retired":      func(_ *classify.Policy, c *classify.Class) { c.Retired = []string{"x"} },
		"many retired":     func(_ *classify.Policy, c *classify.Class) { c.Retired = make([]string, classify.MaxRetired+1) },
		"shared, no cache": func(_ *classify.Policy, c *classify.Class) { c.Shared, c.Cache = true, 0 },
		"cache":            func(_ *classify.Policy, c *classify.Class) { c.Cache = -1 },
		"long cache":       func(_ *classify.Policy, c *classify.Class) { c.Cache = classify.MaxCache + 1 },
		"names":            func(_ *classify.Policy, c *classify.Class) { c.Names = "" },
		"no chunk size":    func(_ *classify.Policy, c *classify.Class) { c.ChunkSize = 0 },
		"chunk size":       func(_ *classify.Policy, c *classify.Class) { c.ChunkSize = 12 << 10 },
		"big chunk size":   func(_ *classify.Policy, c *classify.Class) { c.ChunkSize = 128 << 10 },
	} {
		p := classify.Single("general", "keyring:general")
		if err := p.Check(); err != nil {
			t.Fatal(err)
		}
		c := p.Classes["general"]
		change(p, &c)
		p.Classes["general"] = c
		var bad *classify.ParseError
		if err := p.Check(); !errors.Is(err, classify.ErrPolicy) || !errors.As(err, &bad) || bad.Hint == "" {
			t.Errorf("%s: %v, want %v", what, err, classify.ErrPolicy)
		}
	}
}

func TestKeyURIs(t *testing.T) {
	for _, key := range []string{
		"arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab", "arn:aws:kms:us-east-1:111122223333:key/mrk-1f",
		"arn:aws-us-gov:kms:us-gov-west-1:111122223333:alias/a/b_c", "arn:aws-cn:kms:cn-north-1:111122223333:key/x", "alias/x", "alias/team/pci",
		"keyring:general", "keyring:team-1.a_b", "keyring:" + strings.Repeat("x", 63),
		"pkcs11:token=kmsfs%20test;object=phi;type=secret-key", "pkcs11:token=x;object=y?module-name=softhsm2&pin-source=file:/etc/pin",
	} {
		if err := classify.Single("c", key).Check(); err != nil {
			t.Errorf("%q: %v", key, err)
		}
	}
	for _, key := range []string{
		"", "arn:", "alias/", "keyring:", "keyring: x", "keyring:a/b", "keyring:.x", "general", "1234abcd-12ab-34cd-56ef-1234567890ab",
		"arn:aws:s3:us-east-1:111122223333:key/x", "arn:aws:kms::111122223333:key/x", "arn:aws:kms:us-east-1:1111:key/x", "arn:aws:kms:us-east-1:111122223333:key/",
		"arn:aws:kms:us-east-1:111122223333:role/x", "alias/a b", "alias/x\n", " alias/x", "keyring:x\x00", "Keyring:x", "keyring:X", "keyring:" + strings.Repeat("x", 64),
		"pkcs11:", "pkcs11:token=a b", "pkcs11:token=x;object=y?pin-value=1234", "pkcs11:" + strings.Repeat("x", 501),
		"https://example.com", "alias/" + strings.Repeat("x", 251),
	} {
		if err := classify.Single("c", key).Check(); !errors.Is(err, classify.ErrPolicy) {
			t.Errorf("%q: %v, want %v", key, err, classify.ErrPolicy)
		}
	}
}

func TestErrorMessage(t *testing.T) {
	_, err := classify.Parse([]byte("version: 1\ndefault: a\nclasses:\n  a:\n    keys: [\"keyring:a\"]\n    cache: 5 minutes\n"))
	want := `policy: line 6: classes.a.cache: "5 minutes" is no duration; write a duration such as 90s, 5m or 0s`
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestCompare(t *testing.T) {
	old := mustParse(t, sample)
	with := func(change func(p *classify.Policy)) *classify.Policy {
		p := old.Clone()
		change(p)
		return p
	}
	class := func(p *classify.Policy, name string, change func(c *classify.Class)) {
		c := p.Classes[name]
		change(&c)
		p.Classes[name] = c
	}
	for _, tc := range []struct {
		what    string
		new     *classify.Policy
		want    []string
		refused string
	}{
		{"default", with(func(p *classify.Policy) { p.Default = "phi" }), []string{"default: general -> phi"}, ""},
		{"class added", with(func(p *classify.Policy) { p.Classes["new"] = p.Classes["pci"] }),
			[]string{"class new: added: keys alias/pci; cache 5m; names plain; chunk_size 4KiB"}, ""},
		{"class removed", with(func(p *classify.Policy) { delete(p.Classes, "phi") }), nil, "class phi: removed"},
		{"keys", with(func(p *classify.Policy) {
			class(p, "phi", func(c *classify.Class) { c.Keys = []string{"alias/new", "alias/recovery"} })
		}), []string{
			"class phi: key added: alias/new",
			"class phi: key removed: arn:aws:kms:us-east-1:111122223333:key/mrk-1",
			"class phi: first key: arn:aws:kms:us-east-1:111122223333:key/mrk-1 -> alias/new",
		}, ""},
		{"key order", with(func(p *classify.Policy) { class(p, "phi", func(c *classify.Class) { slices.Reverse(c.Keys) }) }),
			[]string{"class phi: first key: arn:aws:kms:us-east-1:111122223333:key/mrk-1 -> alias/recovery"}, ""},
		{"key retired", with(func(p *classify.Policy) {
			class(p, "phi", func(c *classify.Class) { c.Keys, c.Retired = []string{"alias/new"}, c.Keys })
		}), []string{
			"class phi: key added: alias/new",
			"class phi: key retired: arn:aws:kms:us-east-1:111122223333:key/mrk-1",
			"class phi: key retired: alias/recovery",
			"class phi: first key: arn:aws:kms:us-east-1:111122223333:key/mrk-1 -> alias/new",
		}, ""},
		{"retired key added", with(func(p *classify.Policy) {
			class(p, "pci", func(c *classify.Class) { c.Retired = []string{"alias/older"} })
		}), []string{"class pci: retired key added: alias/older"}, ""},
		{"shared", with(func(p *classify.Policy) { class(p, "pci", func(c *classify.Class) { c.Shared = true }) }),
			[]string{"class pci: data_keys: per-file -> shared"}, ""},
		{"class added with all options", with(func(p *classify.Policy) {
			p.Classes["new"] = p.Classes["pci"]
			class(p, "new", func(c *classify.Class) { c.Shared, c.Retired = true, []string{"alias/older"} })
		}), []string{"class new: added: keys alias/pci; cache 5m; names plain; chunk_size 4KiB", "class new: added: retired alias/older", "class new: added: data_keys shared"}, ""},
		{"cache", with(func(p *classify.Policy) { class(p, "phi", func(c *classify.Class) { c.Cache = time.Hour }) }),
			[]string{"class phi: cache: 0s -> 1h"}, ""},
		{"chunk size", with(func(p *classify.Policy) { class(p, "pci", func(c *classify.Class) { c.ChunkSize = 8 << 10 }) }), nil, "class pci: chunk_size: 4KiB -> 8KiB"},
		{"names", with(func(p *classify.Policy) {
			class(p, "pci", func(c *classify.Class) { c.Names = classify.NamesEncrypted })
		}), nil, "class pci: names: plain -> encrypted"},
		{"rules", with(func(p *classify.Policy) {
			p.Directories = map[string]string{"/patients": "pci", "/cards/raw": "pci", "/cards/raw/x": "phi"}
		}), []string{"rule /patients: phi -> pci", "rule /patients/old/public: removed: general -> pci", "rule /cards/raw/x: added: pci -> phi"}, ""},
	} {
		got, err := classify.Compare(old, tc.new)
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: got  %q\nwant %q", tc.what, got, tc.want)
		}
		switch {
		case tc.refused == "" && err != nil:
			t.Errorf("%s: %v", tc.what, err)
		case tc.refused != "" && (!errors.Is(err, classify.ErrChange) || fault.Of(err) != fault.Forbidden || !strings.Contains(err.Error(), tc.refused)):
			t.Errorf("%s: %v, want %v: %s", tc.what, err, classify.ErrChange, tc.refused)
		}
	}
}

func TestCompareKeyOrder(t *testing.T) {
	old := classify.Single("a", "alias/1", "alias/2", "alias/3")
	got, err := classify.Compare(old, classify.Single("a", "alias/1", "alias/3", "alias/2"))
	if want := []string{"class a: keys in another order"}; !slices.Equal(got, want) || err != nil {
		t.Errorf("Compare = %q, %v, want %q", got, err, want)
	}
}

func TestCompareRetired(t *testing.T) {
	with := func(keys, retired []string) *classify.Policy {
		p := classify.Single("a", keys...)
		c := p.Classes["a"]
		c.Retired = retired
		p.Classes["a"] = c
		return p
	}
	old := with([]string{"alias/1"}, []string{"alias/2", "alias/3"})
	got, err := classify.Compare(old, with([]string{"alias/1", "alias/2"}, nil))
	if want := []string{"class a: key in use again: alias/2", "class a: key removed: alias/3"}; !slices.Equal(got, want) || err != nil {
		t.Errorf("Compare = %q, %v, want %q", got, err, want)
	}
	roundTrip(t, old)
}
