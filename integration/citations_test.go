package integration

import (
	"fmt"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The pages that number their requirements, with the letter that each uses.
var numberedPages = map[string]string{"docs/format.md": "F", "docs/semantics.md": "S"}

var (
	definition = regexp.MustCompile(`\*\*([A-Z]-[0-9]+)\*\*`)
	citation   = regexp.MustCompile(`\b[FS]-[0-9]+\b`)
)

// citations is which requirements are defined, and cited, where.
type citations struct {
	defined map[string][]string // number -> pages, once for each definition
	cited   map[string][]string // number -> files
	tested  map[string]bool     // cited in a test
}

// wrong returns what does not fit together, sorted.
func (c *citations) wrong() (out []string) {
	for number, pages := range c.defined {
		if len(pages) > 1 {
			out = append(out, fmt.Sprintf("%s is defined %d times: %q", number, len(pages), pages))
		}
		if want := numberedPages[pages[0]]; !strings.HasPrefix(number, want+"-") {
			out = append(out, fmt.Sprintf("%s has the wrong letter for %s", number, pages[0]))
		}
		if !c.tested[number] {
			out = append(out, fmt.Sprintf("%s of %s is in no test", number, pages[0]))
		}
	}
	for number, files := range c.cited {
		if len(c.defined[number]) == 0 {
			out = append(out, fmt.Sprintf("%s, cited in %q, is on no page", number, files))
		}
	}
	slices.Sort(out)
	return out
}

// addPage notes the numbers that a page defines.
func (c *citations) addPage(rel string, page []byte) {
	for _, m := range definition.FindAllSubmatch(page, -1) {
		c.defined[string(m[1])] = append(c.defined[string(m[1])], rel)
	}
}

// addGo notes the numbers in a Go file's comments. Elsewhere such a text may
// be anything, base64 for example.
func (c *citations) addGo(rel string, source []byte) error {
	f, err := parser.ParseFile(token.NewFileSet(), rel, source, parser.ParseComments)
	if err != nil {
		return err
	}
	for _, group := range f.Comments {
		for _, number := range citation.FindAllString(group.Text(), -1) {
			c.cited[number] = append(c.cited[number], rel)
			if strings.HasSuffix(rel, "_test.go") {
				c.tested[number] = true
			}
		}
	}
	return nil
}

func newCitations() *citations {
	return &citations{defined: map[string][]string{}, cited: map[string][]string{}, tested: map[string]bool{}}
}

// TestCitations: every requirement is shown by a test, and no test cites one
// that does not exist.
func TestCitations(t *testing.T) {
	c := newCitations()
	for rel := range numberedPages {
		page, err := os.ReadFile(filepath.Join(repoRoot(t), rel))
		if err != nil {
			t.Fatal(err)
		}
		c.addPage(rel, page)
	}
	files := 0
	sourceFiles(t, func(rel string, data []byte) {
		// This file has numbers that mean nothing.
		if !strings.HasSuffix(rel, ".go") || rel == "integration/citations_test.go" {
			return
		}
		if files++; c.addGo(rel, data) != nil {
			t.Errorf("%s does not parse", rel)
		}
	})
	for _, w := range c.wrong() {
		t.Error(w)
	}
	if len(c.defined) < 60 || files < 100 {
		t.Errorf("%d requirements, %d files: the check does not look where it should", len(c.defined), files)
	}
	for letter, count := range numbersByLetter(c.defined) {
		for n := range count {
			if number := fmt.Sprintf("%s-%d", letter, n+1); len(c.defined[number]) == 0 {
				t.Errorf("%s is left out", number)
			}
		}
	}
}

// numbersByLetter counts the numbers of each letter.
func numbersByLetter(defined map[string][]string) map[string]int {
	out := map[string]int{}
	for number := range maps.Keys(defined) {
		out[number[:1]]++
	}
	return out
}

// TestCitationsSees plants one mistake of each kind.
func TestCitationsSees(t *testing.T) {
	page := "**F-1** good **F-2** twice **F-2** **F-3** untested, **F-4** cited outside of tests only. **S-5** wrong letter. F-9 in passing."
	c := newCitations()
	c.addPage("docs/format.md", []byte(page))
	for rel, source := range map[string]string{
		"a/a_test.go": "package a\n\n// F-1 F-2\nfunc f() { /* S-5 and F-77 */ }\n\nvar s = \"F-3\"\n",
		"a/a.go":      "package a\n\n// F-4 is why.\nvar x = 1\n",
	} {
		if err := c.addGo(rel, []byte(source)); err != nil {
			t.Fatal(err)
		}
	}
	got := strings.Join(c.wrong(), "\n")
	want := strings.Join([]string{
		`F-2 is defined 2 times: ["docs/format.md" "docs/format.md"]`,
		`F-3 of docs/format.md is in no test`,
		`F-4 of docs/format.md is in no test`,
		`F-77, cited in ["a/a_test.go"], is on no page`,
		`S-5 has the wrong letter for docs/format.md`,
	}, "\n")
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
