package report

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/audit"
)

var update = flag.Bool("update", false, "write testdata/small.html")

func render(t *testing.T, d *Data) string {
	t.Helper()
	var b bytes.Buffer
	if err := Render(&b, d); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// small is a page with one of each.
func small() *Data {
	var c Collector
	for i, e := range []audit.Event{
		{Kind: audit.KindCall, Op: "Decrypt", Class: "phi", Key: "keyring:phi", Result: audit.OK},
		{Kind: audit.KindUse, Op: "open", Class: "phi", Key: "keyring:phi", Source: "call", Result: audit.OK, Caller: &audit.Caller{UID: 0, Program: "cat"}},
		{Kind: audit.KindUse, Op: "open", Class: "phi", Key: "keyring:phi", Source: "cache", Cached: true, Result: audit.OK, Caller: &audit.Caller{UID: 0, Program: "cat"}},
		{Kind: audit.KindUse, Op: "open", Class: "phi", Key: "keyring:phi", Result: "key-revoked", Request: "r-1", Detail: "keywrap: key pending deletion"},
		{Kind: audit.KindIntegrity, Op: "read", Class: "phi", File: "00aa", Detail: "dare: not authentic"},
	} {
		e.Time = madeAt.Add(time.Duration(i-5) * time.Hour)
		c.Add(&e)
	}
	return &Data{StoreID: "00ff", Store: "/srv/store", Made: madeAt, Counted: true, Activity: c.Activity(),
		Classes: []Class{{Name: "phi", Keys: []string{"keyring:phi"}, Names: "encrypted", DataKeys: "per-file"}},
		Keys: []Key{{URI: "keyring:phi", State: "pending-deletion", Created: madeAt.AddDate(0, 0, -10), DeletionAt: madeAt.AddDate(0, 0, 7), LastUsed: c.LastUsed("keyring:phi"),
			Uses: []Dependence{{"phi", 2, 3000, 2, 3000}}, Materials: []Material{{"1", 2, 3000}}, NameKeys: []string{"phi"}}},
		Log: &Log{Path: "/var/log/audit.log", Files: 1, Lines: 5, First: 1, Last: 5, Head: strings.Repeat("ab", 32), From: madeAt, To: madeAt}}
}

func TestGolden(t *testing.T) {
	text := render(t, small())
	got := text[strings.Index(text, "<main>"):]
	const file = "testdata/small.html"
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the page differs from %s; go test ./fs/report -update, then git diff", file)
	}
}

var tags = regexp.MustCompile(`<(/?)([a-z][a-z0-9]*)((?:\s+[a-zA-Z0-9:-]+(?:="[^"<>]*")?)*)\s*(/?)>`)

// checkHTML returns what is wrong with a page's structure.
func checkHTML(text string) (wrong []string) {
	var open []string
	void := []string{"meta", "br", "line", "rect"}
	at := 0
	for _, m := range tags.FindAllStringSubmatchIndex(text, -1) {
		if between := text[at:m[0]]; strings.ContainsAny(between, "<>") && !slices.Contains(open, "style") && at > 0 {
			wrong = append(wrong, fmt.Sprintf("stray angle bracket in %.60q", between))
		}
		at = m[1]
		name, closing, self := text[m[4]:m[5]], m[3] > m[2], m[9] > m[8]
		switch {
		case closing && (len(open) == 0 || open[len(open)-1] != name):
			wrong = append(wrong, "</"+name+"> closes nothing")
		case closing:
			open = open[:len(open)-1]
		case !self && !slices.Contains(void, name):
			open = append(open, name)
		}
		if attrs := text[m[6]:m[7]]; name == "th" && !closing && !strings.Contains(attrs, `scope="`) {
			wrong = append(wrong, "a table header without a scope")
		}
	}
	if len(open) > 0 {
		wrong = append(wrong, fmt.Sprintf("not closed: %v", open))
	}
	for _, bad := range []string{"<script", "<link", "<img", "<iframe", "<object", " src=", " href=", "url(", "@import", "http://", "https://", "javascript:", " on"} {
		if bad == " on" {
			if regexp.MustCompile(`<[^>]*\son[a-z]+=`).MatchString(text) {
				wrong = append(wrong, "an event handler")
			}
		} else if strings.Contains(text, bad) {
			wrong = append(wrong, "contains "+bad)
		}
	}
	return wrong
}

func TestStructure(t *testing.T) {
	empty := &Data{}
	noLog := demo()
	noLog.Log, noLog.Counted, noLog.Activity = nil, false, Activity{}
	broken := demo()
	broken.Log.Problems, broken.Uncounted = []string{"audit.log:7: line 7 is missing"}, 3
	whole := demo()
	whole.Keys, whole.Activity, whole.Log.Lost = whole.Keys[:3], Activity{}, 0
	for _, tc := range []struct {
		name      string
		d         *Data
		has, lack []string
	}{
		{"empty", empty, []string{"There is no audit log", "Files were not counted"}, []string{"<svg viewBox=\"0 0 960", "Needs attention", "Nothing needs attention"}},
		{"demo", demo(), []string{"keyring:old will be deleted on 2026-12-05 09:30 UTC. 111 files (44.0 MiB) can be opened by no other key", "3 integrity events", "chain is whole", "<desc id", "<title id", "AccessDeniedException", "(retired)", "lang=\"en\""}, []string{"Nothing needs"}},
		{"no log", noLog, []string{"Files were not counted", "will be deleted on"}, []string{"Key use over time"}},
		{"broken", broken, []string{"chain is broken", "line 7 is missing", "3 files could not be counted"}, []string{"chain is whole"}},
		{"whole", whole, []string{"Nothing needs attention", "tells of no use of a key", "Nobody."}, []string{"Needs attention"}},
	} {
		text := render(t, tc.d)
		for _, w := range checkHTML(text) {
			t.Errorf("%s: %s", tc.name, w)
		}
		for _, s := range tc.has {
			if !strings.Contains(text, s) {
				t.Errorf("%s: the page lacks %q", tc.name, s)
			}
		}
		for _, s := range tc.lack {
			if strings.Contains(text, s) {
				t.Errorf("%s: the page has %q", tc.name, s)
			}
		}
	}
}

// TestCheckHTMLSees plants what checkHTML is to find.
func TestCheckHTMLSees(t *testing.T) {
	for _, bad := range []string{`<p>a<script>x</script></p>`, `<p><b></p>`, `<p>`, `<th>x</th>`, `<p>a < b</p>`, `<p><a href="/x">y</a></p>`, `<p onclick="x">y</p>`, `<p style="background: url(x)">y</p>`} {
		if len(checkHTML("<div>"+bad+"</div>")) == 0 {
			t.Errorf("%s passes", bad)
		}
	}
}

// TestEverythingIsEscaped puts markup into every text of the page.
func TestEverythingIsEscaped(t *testing.T) {
	const evil = `</td><script>alert("1")</script><b x='`
	d := demo()
	d.StoreID, d.Store, d.Version = evil, evil, evil
	d.Classes[0] = Class{Name: evil, Keys: []string{evil}, Retired: []string{evil}, Names: evil, DataKeys: evil}
	d.Keys[0] = Key{URI: evil, State: evil, Error: evil, Uses: []Dependence{{Class: evil}}, Materials: []Material{{ID: evil}}, NameKeys: []string{evil}, StoreKeys: []string{evil}}
	d.Keys[3].URI = evil
	d.Activity.Denials[0] = Denial{Class: evil, Key: evil, Op: evil, Result: evil, Code: evil, Detail: evil, UID: evil, Program: evil, Request: evil, File: evil}
	d.Activity.Integrity[0] = Damage{Class: evil, File: evil, Op: evil, Detail: evil, UID: evil, Program: evil}
	d.Activity.Users[0] = User{UID: evil, Program: evil, Class: evil}
	d.Log.Path, d.Log.Head, d.Log.Problems, d.Log.Warnings = evil, evil, []string{evil}, []string{evil}
	text := render(t, d)
	for _, w := range checkHTML(text) {
		t.Error(w)
	}
	if n := strings.Count(text, "&lt;script&gt;"); n < 30 {
		t.Errorf("%d of the texts show", n)
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, os.ErrClosed }

func TestRenderTellsOfWriteErrors(t *testing.T) {
	if err := Render(full{}, demo()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("got %v", err)
	}
}

// TestContrast computes the contrast of text on its background in both modes,
// as WCAG 2.2, 1.4.3 and 1.4.11, ask for.
func TestContrast(t *testing.T) {
	roots := regexp.MustCompile(`(?s):root \{(.*?)\}`).FindAllStringSubmatch(pageText, -1)
	if len(roots) != 3 {
		t.Fatalf("%d sets of colours, want light, dark and print", len(roots))
	}
	for i, mode := range []string{"light", "dark", "print"} {
		colors := map[string]string{}
		for _, m := range regexp.MustCompile(`--([a-z-]+): #([0-9a-f]{3,6});`).FindAllStringSubmatch(roots[i][1], -1) {
			if len(m[2]) == 3 {
				m[2] = strings.Repeat(m[2][:1], 2) + strings.Repeat(m[2][1:2], 2) + strings.Repeat(m[2][2:], 2)
			}
			colors[m[1]] = m[2]
		}
		for _, pair := range [][2]string{{"ink", "paper"}, {"soft", "paper"}, {"ink", "panel"}, {"soft", "panel"}, {"good", "good-bg"}, {"warn", "warn-bg"}, {"bad", "bad-bg"},
			{"ink", "good-bg"}, {"ink", "warn-bg"}, {"ink", "bad-bg"}, {"link", "paper"}} {
			if mode == "print" && pair[0] == "link" {
				continue
			}
			if c := contrast(t, colors[pair[0]], colors[pair[1]]); c < 4.5 {
				t.Errorf("%s: %s on %s: %.2f, want 4.5", mode, pair[0], pair[1], c)
			}
		}
		for _, c := range []string{"calls", "denied"} {
			if got := contrast(t, colors[c], colors["paper"]); got < 3 {
				t.Errorf("%s: %s bars: %.2f, want 3", mode, c, got)
			}
		}
	}
}

func contrast(t *testing.T, a, b string) float64 {
	t.Helper()
	luminance := func(hex string) (l float64) {
		n, err := strconv.ParseUint(hex, 16, 32)
		if err != nil || len(hex) != 6 {
			t.Fatalf("colour %q", hex)
		}
		for i, weight := range []float64{0.2126, 0.7152, 0.0722} {
			c := float64(n>>(16-8*i)&0xff) / 255
			if c <= 0.04045 {
				c /= 12.92
			} else {
				c = math.Pow((c+0.055)/1.055, 2.4)
			}
			l += weight * c
		}
		return l
	}
	x, y := luminance(a), luminance(b)
	return (max(x, y) + 0.05) / (min(x, y) + 0.05)
}
