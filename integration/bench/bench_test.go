package main

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// TestMain lets the benchmark start the test program as its client.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "client" {
		if err := run(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// sample has two workloads, of which one falls short, and growth.
func sample() *results {
	r := &results{
		Rounds: 3, SizeMiB: 512,
		Systems: []about{{"kmsfs", "", false, false}, {"slow", "", true, false}, {"fast", "", true, false}, {"floor", "", false, true}},
		Work: map[string]map[string][]float64{
			"seqwrite": {"kmsfs": {300, 290, 310}, "slow": {100, 100, 100}, "fast": {200, 190, 260}, "floor": {400, 400, 400}},
			"untar":    {"kmsfs": {1.2, 1.1, 1.3}, "fast": {1, 1, 1}, "floor": {2, 2, 2}},
		},
		Growth: &growth{
			Sizes:   []sizePoint{{"kmsfs", 1, 300, 400, 9000, 30}, {"kmsfs", 4096, 500, 900, 9000, 60}},
			Clients: []clientsPoint{{"kmsfs", 1, 3000, 2000, 9000, 30}, {"kmsfs", 64, 7000, 5000, 12000, 50}, {"floor", 1, 4000, 3000, 9000, 20}, {"floor", 64, 9000, 7000, 12000, 40}},
		},
	}
	for n := 10; n <= 100_000; n *= 100 {
		r.Growth.Files = append(r.Growth.Files, filesPoint{"kmsfs", n, 80, 3, 12, 60, 60, 30, 30 + float64(n)/4000},
			filesPoint{"raw", n, 3, 0.3, 1, 1, 2, 0, 0})
	}
	return r
}

func TestRatios(t *testing.T) {
	r := sample()
	for _, tt := range []struct {
		work string
		is   func(about) bool
		want rate
	}{
		{"seqwrite", isPeer, rate{1.5, 310. / 260}},
		{"seqwrite", isFloor, rate{0.75, 0.775}},
		{"untar", isPeer, rate{1.2, 1.3}}, // slow did not finish it
	} {
		if got, ok := r.ratio(tt.work, "kmsfs", tt.is); !ok || got != tt.want {
			t.Errorf("%s: got %v, %v, want %v", tt.work, got, ok, tt.want)
		}
	}
	if got, ok := r.ratio("rm", "kmsfs", isPeer); ok {
		t.Errorf("a workload that was not run has the ratio %v", got)
	}
	text := r.markdown()
	for _, want := range []string{
		"| seqwrite (MiB/s) | 300 | 100 | 200 | 400 | 1.50 / **1.19** | 1.4 | 0.75 / 0.78 |",
		"| untar (trees/s) | 1.20 | failed | 1.00 | 2.00 | **1.20** / 1.30 | 1.3 | **0.60** / **0.65** |",
		"| kmsfs | 100,000 |",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no line %q in\n%s", want, text)
		}
	}
}

func TestChartIsWellFormed(t *testing.T) {
	d := xml.NewDecoder(strings.NewReader(sample().chart()))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

func TestRewriteKeepsTheRest(t *testing.T) {
	page := filepath.Join(t.TempDir(), "page.md")
	for _, tt := range []struct{ have, want string }{
		{"head\n" + pageBegin + "old\n" + pageEnd + "tail\n", "head\n" + pageBegin + "\nnew\n\n" + pageEnd + "tail\n"},
		{"no marks\n", ""},
		{pageBegin + "no end\n", ""},
	} {
		if err := os.WriteFile(page, []byte(tt.have), 0o600); err != nil {
			t.Fatal(err)
		}
		err := rewrite(page, "new\n")
		got, _ := os.ReadFile(page)
		if tt.want == "" && (err == nil || string(got) != tt.have) {
			t.Errorf("%q: became %q, %v", tt.have, got, err)
		}
		if tt.want != "" && (err != nil || string(got) != tt.want) {
			t.Errorf("got %q, %v, want %q", got, err, tt.want)
		}
	}
}

// TestRun runs everything, small, and wants a figure for each workload and
// nothing left over.
func TestRun(t *testing.T) {
	rig.Need(t, "root", "fuse", "fusermount3", "tar")
	base, out := t.TempDir(), t.TempDir()
	tree := filepath.Join(out, "tree", "d")
	if err := errors.Join(os.MkdirAll(tree, 0o755), os.WriteFile(filepath.Join(tree, "f"), []byte("text"), 0o644)); err != nil {
		t.Fatal(err)
	}
	js := filepath.Join(out, "bench.json")
	err := run([]string{"-brief", "-rounds", "1", "-size", "2", "-systems", "kmsfs,floor+wb", "-base", base, "-json", js,
		"-chart", filepath.Join(out, "bench.svg"), "-grow-files", "10", "-grow-size", "2", "-grow-clients", "2", "-tree", filepath.Dir(tree)})
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(js)
	if err != nil {
		t.Fatal(err)
	}
	var r results
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Faults) > 0 {
		t.Errorf("failed: %q", r.Faults)
	}
	for _, w := range works {
		for _, s := range []string{"kmsfs", "floor+wb"} {
			if got, ok := r.rate(w.name, s); !ok || got.median <= 0 {
				t.Errorf("%s, %s: %v, %v", w.name, s, got, ok)
			}
		}
	}
	if g := r.Growth; g == nil || len(g.Files) != 2 || len(g.Sizes) != 2 || len(g.Clients) != 4 {
		t.Errorf("growth: %+v", g)
	}
	wantNothingLeft(t, base)
}

// TestInterrupted: a run that is told to end leaves no mount, no daemon and no
// file.
func TestInterrupted(t *testing.T) {
	rig.Need(t, "root", "fuse", "fusermount3")
	base := t.TempDir()
	cmd := exec.Command("go", "run", ".", "-rounds", "100", "-size", "64", "-systems", "kmsfs", "-only", "seqwrite,seqread", "-base", base)
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { _ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL) })
	for !anyMounted(t, base) {
		select {
		case err := <-ended:
			t.Fatalf("it ended before it mounted anything: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
	if err := unix.Kill(-cmd.Process.Pid, unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil {
		t.Error("an interrupted run succeeded")
	}
	wantNothingLeft(t, base)
}

// anyMounted reports whether something is mounted below dir.
func anyMounted(t *testing.T, dir string) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(b), " "+dir+"/")
}

func wantNothingLeft(t *testing.T, base string) {
	t.Helper()
	if anyMounted(t, base) {
		t.Error("a mount is left")
	}
	left, err := os.ReadDir(base)
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestFailedMount: a system that does not mount is a fault of the report, and
// leaves nothing.
func TestFailedMount(t *testing.T) {
	dir := t.TempDir()
	for what, s := range map[string]*system{
		"a daemon that ends":    {name: "x", serve: []string{"false"}},
		"a store that fails":    {name: "x", prepare: []string{"false"}, serve: []string{"true"}},
		"a program that is not": {name: "x", serve: []string{"/nonexistent"}},
	} {
		if m, err := s.mount(context.Background(), dir); err == nil {
			t.Errorf("%s: mounted: %+v", what, m)
		}
	}
	wantNothingLeft(t, dir)
}
