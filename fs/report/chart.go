package report

import (
	"fmt"
	"slices"
	"strconv"
	"time"
)

// chart is the drawing of key use over time, in units of its view box.
type chart struct {
	Width, Height          int
	Left, Right, Top, Base float64 // the plot's edges
	Unit                   string  // "hour", "day", "week" or "four weeks"
	Lines                  []gridLine
	Bars                   []bar
	Labels                 []label
	Rows                   []Hour // the same numbers for the table
}

type gridLine struct {
	Y    string
	Text string
}

// bar is one slot of time with up to three parts, from the base up.
type bar struct {
	Title string
	Parts []part
}

type part struct{ Kind, X, Y, W, H string }

type label struct {
	X    string
	Text string
}

const (
	chartWidth, chartHeight = 960, 280
	chartLeft, chartRight   = 56.0, 952.0
	chartTop, chartBase     = 12.0, 246.0
	maxBars                 = 96
)

// slot is one possible width of a bar.
type slot struct {
	size   time.Duration
	unit   string
	layout string // of the labels
	show   string // of titles and the table
}

var slots = []slot{
	{time.Hour, "hour", "2 Jan 15:04", "2006-01-02 15:04"},
	{24 * time.Hour, "day", "2 Jan", "2006-01-02"},
	{7 * 24 * time.Hour, "week", "2 Jan 2006", "2006-01-02"},
	{28 * 24 * time.Hour, "four weeks", "Jan 2006", "2006-01-02"},
	{364 * 24 * time.Hour, "52 weeks", "Jan 2006", "2006-01-02"},
}

// newChart draws hours, which are ascending. It returns nil for none.
func newChart(hours []Hour) *chart {
	if len(hours) == 0 {
		return nil
	}
	first, last := hours[0].Start, hours[len(hours)-1].Start
	s := slots[len(slots)-1]
	for _, c := range slots {
		if last.Sub(first.Truncate(c.size))/c.size < maxBars {
			s = c
			break
		}
	}
	rows := bin(hours, s.size)
	most := uint64(1)
	for _, r := range rows {
		most = max(most, r.Calls+r.Cached+r.Denied)
	}
	c := &chart{Width: chartWidth, Height: chartHeight, Left: chartLeft, Right: chartRight, Top: chartTop, Base: chartBase, Unit: s.unit, Rows: rows}
	step := niceStep(most)
	full := (most + step - 1) / step * step
	for v := uint64(0); v <= full; v += step {
		c.Lines = append(c.Lines, gridLine{num(height(v, full, chartBase)), group(v)})
	}
	c.draw(s, full)
	return c
}

// bin sums up hours into slots of the given size, without a hole between them,
// and at most maxBars of the newest.
func bin(hours []Hour, size time.Duration) []Hour {
	sums := map[int64]Hour{}
	first, last := hours[0].Start.Truncate(size), hours[len(hours)-1].Start.Truncate(size)
	for _, h := range hours {
		at := h.Start.Truncate(size)
		b := sums[at.Unix()]
		sums[at.Unix()] = Hour{at, b.Calls + h.Calls, b.Cached + h.Cached, b.Denied + h.Denied}
	}
	var out []Hour
	for at := last; !at.Before(first) && len(out) < maxBars; at = at.Add(-size) {
		b := sums[at.Unix()]
		b.Start = at
		out = append(out, b)
	}
	slices.Reverse(out)
	return out
}

func (c *chart) draw(s slot, full uint64) {
	pitch := (chartRight - chartLeft) / float64(max(len(c.Rows), 12)) // few bars stay slim
	width := max(pitch*0.78, pitch-6)
	every := max(1, (len(c.Rows)+7)/8)
	for i, r := range c.Rows {
		x := chartLeft + pitch*float64(i) + (pitch-width)/2
		b := bar{Title: fmt.Sprintf("%s: %s calls, %s without a call, %s refused", r.Start.Format(s.show), group(r.Calls), group(r.Cached), group(r.Denied))}
		base := chartBase
		for _, p := range []struct {
			kind string
			n    uint64
		}{{"calls", r.Calls}, {"cached", r.Cached}, {"denied", r.Denied}} {
			if p.n == 0 {
				continue
			}
			// A count of one must show beside one of a million.
			h := max(base-height(p.n, full, base), 1.5)
			b.Parts = append(b.Parts, part{p.kind, num(x), num(base - h), num(width), num(h)})
			base -= h
		}
		c.Bars = append(c.Bars, b)
		if i%every == 0 && x < chartRight-40 {
			c.Labels = append(c.Labels, label{num(x + width/2), r.Start.Format(s.layout)})
		}
	}
}

// height is where v stands above base.
func height(v, full uint64, base float64) float64 {
	return base - float64(v)/float64(full)*(chartBase-chartTop)
}

// niceStep returns 1, 2 or 5 times a power of ten, so that about five of it
// reach most.
func niceStep(most uint64) uint64 {
	for power := uint64(1); power <= 1e18; power *= 10 {
		for _, m := range []uint64{1, 2, 5} {
			if m*power*5 >= most {
				return m * power
			}
		}
	}
	return 1e18
}

func num(f float64) string { return strconv.FormatFloat(f, 'f', 1, 64) }

// group writes n with spaces between groups of three digits, as ISO 80000-1
// has them (narrow no-break spaces).
func group(n uint64) string {
	s := strconv.FormatUint(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "\u202f" + s[i:]
	}
	return s
}
