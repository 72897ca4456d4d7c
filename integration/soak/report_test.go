package soak

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// results is soak.json.
type results struct {
	Seconds   float64        `json:"seconds"`
	Killed    int            `json:"killed"`
	Unmounted int            `json:"unmounted"`
	Lives     []*life        `json:"lives"`
	Quarters  []quarters     `json:"quarters"`
	Workers   []workerResult `json:"workers"`
	Faults    map[string]int `json:"faults"`
	Samples   []sample       `json:"samples"`
}

type workerResult struct {
	Name   string `json:"name"`
	Steps  int    `json:"steps"`
	Away   int    `json:"away"`   // steps that failed because the key service was away
	Checks int    `json:"checks"` // comparisons with the model after a remount
}

// report writes the results to SOAK_OUT, or to a place that goes away, and
// the table to the test's log.
func (s *soak) report() {
	t := s.t
	last := s.lives[len(s.lives)-1]
	r := &results{Seconds: last.Began + last.Seconds, Lives: s.lives, Quarters: s.sampler.quarters(), Faults: s.faults.count, Samples: s.sampler.samples}
	for _, l := range s.lives {
		if l.End == "killed" {
			r.Killed++
		} else {
			r.Unmounted++
		}
	}
	for _, w := range s.runners {
		r.Workers = append(r.Workers, workerResult{w.name(), w.steps, w.away, w.checks})
	}
	dir := os.Getenv("SOAK_OUT")
	if dir == "" {
		dir = t.TempDir()
	}
	text, svg := r.table(), r.chart()
	js, err := json.MarshalIndent(r, "", " ")
	if err := errors.Join(err, os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "soak.json"), js, 0o644),
		os.WriteFile(filepath.Join(dir, "soak.svg"), []byte(svg), 0o644), os.WriteFile(filepath.Join(dir, "soak.txt"), []byte(text), 0o644)); err != nil {
		t.Error(err)
	}
	if err := wellFormed(svg); err != nil {
		t.Errorf("the chart: %v", err)
	}
	t.Logf("results in %s\n%s", dir, text)
}

func wellFormed(doc string) error {
	d := xml.NewDecoder(strings.NewReader(doc))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// table is what people read, in Markdown.
func (r *results) table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%.0f s, %d mounts: %d ended by SIGKILL, %d unmounted; %d samples\n\n", r.Seconds, len(r.Lives), r.Killed, r.Unmounted, len(r.Samples))
	fmt.Fprintf(&b, "| mount | of %d that lived long enough for a trend |", len(r.Quarters))
	for _, q := range quantities {
		fmt.Fprintf(&b, " %s, 2nd quarter → last |", q.name)
	}
	fmt.Fprintf(&b, "\n|---|---|%s\n", strings.Repeat("---|", len(quantities)))
	for _, q := range r.Quarters {
		l := r.Lives[q.Life]
		fmt.Fprintf(&b, "| %d | %.0f s, %s |", q.Life, l.Seconds, l.End)
		for i, of := range quantities {
			fmt.Fprintf(&b, " %.0f → %.0f |", q.Second[i]/of.unit, q.Last[i]/of.unit)
		}
		b.WriteByte('\n')
	}
	b.WriteString("\n| load | steps | of these, key service away | compared after a remount |\n|---|---|---|---|\n")
	for _, w := range r.Workers {
		fmt.Fprintf(&b, "| %s | %d | %d | %d |\n", w.Name, w.Steps, w.Away, w.Checks)
	}
	var internal, quarantine, throttled, failures float64
	var mount float64
	for _, s := range r.Samples {
		internal, quarantine = max(internal, s.Internal), max(quarantine, s.Quarantine)
		throttled, failures = max(throttled, s.Throttled), max(failures, s.Failures)
	}
	for _, l := range r.Lives {
		mount = max(mount, l.MountS)
	}
	fmt.Fprintf(&b, "\n.kmsfs: at most %.1f MiB; in quarantine: %.0f; slowest mount: %.1f s\n", internal/(1<<20), quarantine, mount)
	fmt.Fprintf(&b, "faults of the key service: %v; in one life at most %.0f throttled requests, %.0f failed calls\n", r.Faults, throttled, failures)
	return b.String()
}

const (
	chartWidth  = 860
	panelHeight = 110
	panelLeft   = 70
	panelRight  = 850
)

// panel is one curve of the chart.
type panel struct {
	title string
	of    func(*sample) float64
}

var panels = []panel{
	{"resident memory, MiB", func(s *sample) float64 { return s.RSS / (1 << 20) }},
	{"open descriptors", func(s *sample) float64 { return s.FDs }},
	{"goroutines", func(s *sample) float64 { return s.Goroutines }},
	{".kmsfs, MiB", func(s *sample) float64 { return s.Internal / (1 << 20) }},
}

// chart draws the samples over time; a line in each panel for the end of each
// mount.
func (r *results) chart() string {
	var b strings.Builder
	height := 40 + len(panels)*(panelHeight+34)
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="11">
<style>
.bg{fill:#fff}.t{fill:#222}.axis{stroke:#999}.grid{stroke:#ddd}.c{fill:none;stroke:#0a5fb4;stroke-width:1.4}.killed{stroke:#c62828;stroke-dasharray:3 3}.unmounted{stroke:#2e7d32;stroke-dasharray:1 3}
@media (prefers-color-scheme:dark){.bg{fill:#161b22}.t{fill:#ddd}.grid{stroke:#333}.c{stroke:#6cb6ff}.killed{stroke:#ff7b72}.unmounted{stroke:#7ee787}}
</style>
<rect class="bg" width="%d" height="%d"/>
`, chartWidth, height, chartWidth, height)
	total := max(1, r.Seconds)
	x := func(t float64) float64 { return panelLeft + t/total*(panelRight-panelLeft) }
	for i, p := range panels {
		r.panel(&b, p, 24+float64(i)*(panelHeight+34), x)
	}
	bottom := height - 12
	for k := 0; k <= 6; k++ {
		t := total * float64(k) / 6
		label := fmt.Sprintf("%.0f min", t/60)
		if total < 600 {
			label = fmt.Sprintf("%.0f s", t)
		}
		fmt.Fprintf(&b, `<text class="t" x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n", x(t), bottom-14, label)
	}
	fmt.Fprintf(&b, `<text class="t" x="%d" y="%d">dashed: SIGKILL and remount; dotted: unmount and remount</text>`+"\n</svg>\n", panelLeft, bottom)
	return b.String()
}

// panel draws one curve below the height y.
func (r *results) panel(b *strings.Builder, p panel, y float64, x func(float64) float64) {
	most := 1.0
	for i := range r.Samples {
		most = max(most, p.of(&r.Samples[i]))
	}
	most *= 1.1
	up := func(v float64) float64 { return y + panelHeight*(1-v/most) }
	fmt.Fprintf(b, `<text class="t" x="%d" y="%.1f" font-weight="bold">%s</text>`+"\n", panelLeft, y-5, p.title)
	for _, share := range []float64{0, 0.5, 1} {
		class := "grid"
		if share == 0 {
			class = "axis"
		}
		fmt.Fprintf(b, `<line class="%s" x1="%d" x2="%d" y1="%.1f" y2="%.1f"/><text class="t" x="%d" y="%.1f" text-anchor="end">%.3g</text>`+"\n",
			class, panelLeft, panelRight, up(share*most), up(share*most), panelLeft-6, up(share*most)+4, share*most)
	}
	for _, l := range r.Lives {
		at := x(l.Began + l.Seconds)
		fmt.Fprintf(b, `<line class="%s" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/>`+"\n", l.End, at, at, y, y+panelHeight)
	}
	life := -1
	for i := range r.Samples {
		s := &r.Samples[i]
		if s.Life != life {
			if life >= 0 {
				b.WriteString(`"/>` + "\n")
			}
			b.WriteString(`<polyline class="c" points="`)
			life = s.Life
		}
		fmt.Fprintf(b, "%.1f,%.1f ", x(s.Time), up(p.of(s)))
	}
	if life >= 0 {
		b.WriteString(`"/>` + "\n")
	}
}
