package main

import (
	"fmt"
	"math"
	"strings"
)

const (
	chartWidth = 900
	rowHeight  = 24
	barLeft    = 120
	barRight   = 845
	lineHeight = 190 // of a line chart's plot
	lineWidth  = 350
)

// svg collects the elements of a drawing.
type svg struct{ strings.Builder }

func (s *svg) line(class string, x1, y1, x2, y2 float64) {
	fmt.Fprintf(s, `<line class="%s" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`+"\n", class, x1, y1, x2, y2)
}

func (s *svg) text(x, y float64, anchor, text string, more ...string) {
	fmt.Fprintf(s, `<text class="t" x="%.1f" y="%.1f" text-anchor="%s"%s>%s</text>`+"\n", x, y, anchor, strings.Join(more, ""), escape.Replace(text))
}

var escape = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;")

const bold = ` font-weight="bold"`

// chart draws the ratios of the workloads and, where it was measured, growth.
func (r *results) chart() string {
	var body svg
	y := 20.0
	if len(r.Work) > 0 {
		y = r.bars(&body, y)
	}
	if r.Growth != nil {
		y = r.Growth.lines(&body, y+30)
	}
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %.0f" font-family="sans-serif" font-size="12">
<style>
.bg{fill:#fff}.t{fill:#222}.axis{stroke:#888}.grid{stroke:#e2e2e2}.want{stroke:#222;stroke-width:2.5}.met{fill:#2e7d46}.short{fill:#d07a1f}.floor{fill:none;stroke:#0a5fb4;stroke-width:1.8}
.l{fill:none;stroke-width:1.8}.l0{stroke:#0a5fb4}.l1{stroke:#c2452d}.l2{stroke:#2e7d46}.l3{stroke:#7b4ea3}.beside{stroke-dasharray:4 3;opacity:.75}
@media (prefers-color-scheme:dark){.bg{fill:#161b22}.t{fill:#ddd}.grid{stroke:#333}.want{stroke:#eee}.met{fill:#56a86f}.floor,.l0{stroke:#6cb6ff}.l1{stroke:#ff8f78}.l2{stroke:#7ee787}.l3{stroke:#c8a2eb}}
</style>
<rect class="bg" width="%d" height="%.0f"/>
%s</svg>
`, chartWidth, y, chartWidth, y, body.String())
}

// bars has a row for each workload, on a logarithmic axis: left of 1 the faster
// peer is faster.
func (r *results) bars(s *svg, y float64) float64 {
	mine := r.Systems[0].Name
	s.text(16, y, "start", mine+" against the faster of its peers, by medians: how many times as fast", bold)
	low, high := 0.5, 2.0
	for _, w := range works {
		for _, v := range r.marks(w.name, mine) {
			low, high = min(low, v), max(high, v, w.target)
		}
	}
	low, high = low/1.15, high*1.25
	x := func(v float64) float64 {
		return barLeft + (barRight-barLeft)*math.Log(v/low)/math.Log(high/low)
	}
	top := y + 14
	rows := 0
	for _, w := range works {
		if len(r.Work[w.name]) > 0 {
			rows++
		}
	}
	bottom := top + float64(rows*rowHeight)
	for _, v := range []float64{0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100} {
		if v > low && v < high {
			class := "grid"
			if v == 1 {
				class = "axis"
			}
			s.line(class, x(v), top, x(v), bottom)
			s.text(x(v), bottom+15, "middle", fmt.Sprint(v))
		}
	}
	for _, w := range works {
		if len(r.Work[w.name]) == 0 {
			continue
		}
		s.text(barLeft-8, top+16, "end", w.name)
		r.bar(s, &w, mine, x, top)
		top += rowHeight
	}
	s.text(barLeft, bottom+34, "start", "green: as fast as wanted (the thick line); orange: short of it; circle: go-fuse doing nothing, the faster of the two")
	return bottom + 40
}

// marks are the ratios that a row shows.
func (r *results) marks(work, mine string) (out []float64) {
	if got, ok := r.ratio(work, mine, isPeer); ok {
		out = append(out, got.median)
	}
	floor, ok := r.fastest(work, isFloor)
	if peer, any := r.fastest(work, isPeer); ok && any {
		out = append(out, floor.median/peer.median)
	}
	return out
}

func (r *results) bar(s *svg, w *work, mine string, x func(float64) float64, top float64) {
	if got, ok := r.ratio(w.name, mine, isPeer); ok {
		class := "met"
		if got.median < w.target {
			class = "short"
		}
		from, to := min(x(1), x(got.median)), max(x(1), x(got.median))
		fmt.Fprintf(s, `<rect class="%s" x="%.1f" y="%.1f" width="%.1f" height="%d"/>`+"\n", class, from, top+5, max(1, to-from), rowHeight-10)
		s.text(chartWidth-8, top+16, "end", fmt.Sprintf("%.2f", got.median))
	}
	s.line("want", x(w.target), top+2, x(w.target), top+rowHeight-2)
	floor, ok := r.fastest(w.name, isFloor)
	if peer, any := r.fastest(w.name, isPeer); ok && any {
		fmt.Fprintf(s, `<circle class="floor" cx="%.1f" cy="%.1f" r="5"/>`+"\n", x(floor.median/peer.median), top+rowHeight/2)
	}
}

// series is one line of a chart.
type series struct {
	name   string
	color  int
	beside bool // not kmsfs, but what it is held against
	x, y   []float64
}

func (l *series) add(x, y float64) {
	l.x, l.y = append(l.x, x), append(l.y, y)
}

// plot is a line chart. Both axes are logarithmic, unless flat says that the
// upright one begins at 0.
type plot struct {
	title string
	flat  bool
	lines []*series
}

// lines draws the charts of growth, two in a row.
func (g *growth) lines(s *svg, y float64) float64 {
	plots := g.plots()
	for i, p := range plots {
		p.draw(s, 60+float64(i%2)*(lineWidth+90), y+float64(i/2)*(lineHeight+95))
	}
	return y + float64((len(plots)+1)/2)*(lineHeight+95)
}

// lineSet collects points by line.
type lineSet struct{ all []*series }

func (l *lineSet) add(system, what string, color int, x, y float64) {
	beside := system != "kmsfs"
	name := what
	if beside {
		name += ", " + system
	}
	for _, s := range l.all {
		if s.name == name {
			s.add(x, y)
			return
		}
	}
	s := &series{name: name, color: color, beside: beside}
	s.add(x, y)
	l.all = append(l.all, s)
}

func (g *growth) plots() (out []*plot) {
	var cost, memory, sizes, sizeMemory, clients lineSet
	for _, p := range g.Files {
		n := float64(p.Files)
		cost.add(p.System, "create", 0, n, p.Create)
		cost.add(p.System, "list", 1, n, p.List)
		cost.add(p.System, "list and stat", 2, n, p.Stat)
		cost.add(p.System, "find one", 3, n, p.Find)
		if p.Peak > 0 {
			memory.add(p.System, "at most", 0, n, p.Peak)
		}
	}
	for _, p := range g.Sizes {
		n := float64(p.MiB)
		sizes.add(p.System, "write", 0, n, p.Write)
		sizes.add(p.System, "read, cold", 1, n, p.Read)
		sizeMemory.add(p.System, "at most", 0, n, p.Peak)
	}
	for _, p := range g.Clients {
		n := float64(p.Clients)
		clients.add(p.System, "small files read", 0, n, p.Read)
		clients.add(p.System, "small files made", 1, n, p.Create)
		clients.add(p.System, "4 KiB read anywhere", 2, n, p.RandRead)
	}
	for _, p := range []*plot{
		{"microseconds for each file, by files in the directory", false, cost.all},
		{"the daemon's memory in MiB, by files known", true, memory.all},
		{"MiB/s, by size of the file in MiB", true, sizes.all},
		{"the daemon's memory in MiB, by size of the file in MiB", true, sizeMemory.all},
		{"operations per second, by clients at a time", false, clients.all},
	} {
		if len(p.lines) > 0 {
			out = append(out, p)
		}
	}
	return out
}

// span returns the least and the greatest value, of what a logarithm is made of.
func span(lines []*series, of func(*series) []float64) (low, high float64) {
	low, high = math.Inf(1), 0
	for _, l := range lines {
		for _, v := range of(l) {
			if v > 0 {
				low, high = min(low, v), max(high, v)
			}
		}
	}
	if high <= low {
		low, high = low/2, low*2
	}
	return low, high
}

func (p *plot) draw(s *svg, left, top float64) {
	s.text(left-40, top, "start", p.title, bold)
	top += 12
	xl, xh := span(p.lines, func(l *series) []float64 { return l.x })
	yl, yh := span(p.lines, func(l *series) []float64 { return l.y })
	yl, yh = yl/1.2, yh*1.2
	x := func(v float64) float64 { return left + lineWidth*math.Log(v/xl)/math.Log(xh/xl) }
	y := func(v float64) float64 {
		if p.flat {
			return top + lineHeight*(1-v/yh)
		}
		return top + lineHeight*(1-math.Log(max(v, yl)/yl)/math.Log(yh/yl))
	}
	p.grid(s, left, top, yl, yh, y)
	for i := range p.lines[0].x {
		v := p.lines[0].x[i]
		s.text(x(v), top+lineHeight+15, "middle", thousands(int(v)))
	}
	for i, l := range p.lines {
		class := fmt.Sprintf("l l%d", l.color)
		if l.beside {
			class += " beside"
		}
		fmt.Fprintf(s, `<polyline class="%s" points="`, class)
		for k := range l.x {
			fmt.Fprintf(s, "%.1f,%.1f ", x(l.x[k]), y(l.y[k]))
		}
		s.WriteString(`"/>` + "\n")
		at := left - 40 + float64(i%3)*142
		row := top + lineHeight + 32 + float64(i/3)*13
		s.line(class, at, row-4, at+14, row-4)
		s.text(at+17, row, "start", l.name, ` font-size="10"`)
	}
}

func (p *plot) grid(s *svg, left, top, yl, yh float64, y func(float64) float64) {
	var marks []float64
	if p.flat {
		step := math.Pow(10, math.Floor(math.Log10(yh)))
		for yh/step < 3 {
			step /= 2
		}
		for v := 0.0; v <= yh; v += step {
			marks = append(marks, v)
		}
	} else {
		steps := []float64{1, 2, 5}
		if yh/yl > 100 {
			steps = steps[:1]
		}
		for ten := math.Pow(10, math.Floor(math.Log10(yl))); ten <= yh; ten *= 10 {
			for _, step := range steps {
				if v := ten * step; v >= yl && v <= yh {
					marks = append(marks, v)
				}
			}
		}
	}
	for _, v := range marks {
		s.line("grid", left, y(v), left+lineWidth, y(v))
		s.text(left-6, y(v)+4, "end", label(v), ` font-size="10"`)
	}
	s.line("axis", left, top+lineHeight, left+lineWidth, top+lineHeight)
}

// label writes a mark of an axis.
func label(v float64) string {
	if v >= 1000 {
		return thousands(int(v))
	}
	return fmt.Sprintf("%.3g", v)
}
