package metrics

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

const operations = "../../docs/operations"

// metricForm finds the names of metrics of kmsfs and its process in a query or a
// table.
var metricForm = regexp.MustCompile(`\b(kmsfs|process|go)_[a-z_0-9]+\b`)

// known are the names that a query may use: those of histograms have suffixes.
func known(t *testing.T) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	families, err := full().registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		out[f.GetName()] = true
		if f.GetType().String() == "HISTOGRAM" {
			delete(out, f.GetName())
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				out[f.GetName()+suffix] = true
			}
		}
	}
	return out
}

// wantKnown wants every metric in a query to exist, and one at least.
func wantKnown(t *testing.T, where, query string, known map[string]bool) {
	t.Helper()
	found := metricForm.FindAllString(query, -1)
	for _, name := range found {
		if !known[name] {
			t.Errorf("%s: no metric %s", where, name)
		}
	}
	if len(found) == 0 && !strings.Contains(query, "up{") {
		t.Errorf("%s: no metric in %q", where, query)
	}
	for _, pair := range []string{"()", "{}", "[]"} {
		if strings.Count(query, pair[:1]) != strings.Count(query, pair[1:]) {
			t.Errorf("%s: unbalanced: %s", where, query)
		}
	}
}

// TestAlerts reads the alert rules: each is whole, its metrics exist, and
// operations.md says what to do.
func TestAlerts(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(operations + "/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	dec := yaml.NewDecoder(strings.NewReader(string(text)))
	dec.KnownFields(true)
	if err := dec.Decode(&file); err != nil || len(file.Groups) != 1 || len(file.Groups[0].Rules) < 10 {
		t.Fatalf("%v, %+v", err, file)
	}
	page, err := os.ReadFile(operations + ".md")
	if err != nil {
		t.Fatal(err)
	}
	known, seen := known(t), map[string]bool{}
	for _, r := range file.Groups[0].Rules {
		if seen[r.Alert] || !strings.HasPrefix(r.Alert, "Kmsfs") || r.Labels["severity"] == "" || r.Annotations["summary"] == "" {
			t.Errorf("rule %+v", r)
		}
		seen[r.Alert] = true
		wantKnown(t, r.Alert, r.Expr, known)
		if !strings.Contains(string(page), "| `"+r.Alert+"` |") {
			t.Errorf("operations.md does not say what to do about %s", r.Alert)
		}
	}
}

func TestDashboard(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(operations + "/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		UID    string
		Panels []struct {
			ID      int
			Title   string
			GridPos struct{ X, Y, W, H int }
			Targets []struct{ Expr string }
		}
		Templating struct {
			List []struct {
				Name  string
				Query any
			}
		}
	}
	if err := json.Unmarshal(text, &board); err != nil || board.UID == "" || len(board.Panels) < 10 || len(board.Templating.List) != 2 {
		t.Fatalf("%v, %d panels", err, len(board.Panels))
	}
	known, places := known(t), map[[2]int]string{}
	for _, p := range board.Panels {
		place := [2]int{p.GridPos.X, p.GridPos.Y}
		if places[place] != "" || p.GridPos.X+p.GridPos.W > 24 || p.Title == "" || len(p.Targets) == 0 {
			t.Errorf("panel %+v, where %q is", p, places[place])
		}
		places[place] = p.Title
		for _, target := range p.Targets {
			wantKnown(t, p.Title, target.Expr, known)
		}
	}
}

// TestTable wants operations.md to list exactly the metrics of kmsfs's own.
func TestTable(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(operations + ".md")
	if err != nil {
		t.Fatal(err)
	}
	var listed, own []string
	for line := range strings.Lines(string(page)) {
		if rest, ok := strings.CutPrefix(line, "| `kmsfs_"); ok {
			name, _, _ := strings.Cut(rest, "`")
			listed = append(listed, "kmsfs_"+name)
		}
	}
	for _, name := range names(t, full()) {
		if strings.HasPrefix(name, "kmsfs_") {
			own = append(own, name)
		}
	}
	slices.Sort(listed)
	slices.Sort(own)
	if !slices.Equal(listed, own) {
		t.Errorf("operations.md lists\n%q\nand there are\n%q", listed, own)
	}
}
