package main

import (
	"fmt"
	"math"
	"strings"
)

// markdown is the whole report.
func (r *results) markdown() string {
	var b strings.Builder
	m := &r.Machine
	fmt.Fprintf(&b, "%s, source %s. %d × %s, %d MiB, Linux %s; stores on %s; load when the run began: %.1f.\n",
		r.Date, r.Commit, m.Cores, m.CPU, m.MiB, m.Kernel, m.Disk, m.Load)
	for _, s := range r.Systems {
		if s.What != "" {
			fmt.Fprintf(&b, "%s: %s. ", s.Name, s.What)
		}
	}
	fmt.Fprintf(&b, "%.0f minutes.\n\n", r.Seconds/60)
	if len(r.Work) > 0 {
		r.peerTable(&b)
	}
	if r.Growth != nil {
		r.Growth.tables(&b)
	}
	for _, f := range r.Faults {
		fmt.Fprintf(&b, "- failed: %s\n", f)
	}
	return b.String()
}

// peerTable has a row for each workload: the rates, and the first system's
// ratios.
func (r *results) peerTable(b *strings.Builder) {
	mine := r.Systems[0].Name
	fmt.Fprintf(b, "%d rounds, file of %d MiB. Each rate is the median of the rounds; ratios are %s's, by medians / by best rounds.\n\n", r.Rounds, r.SizeMiB, mine)
	b.WriteString("| workload |")
	for _, s := range r.Systems {
		fmt.Fprintf(b, " %s |", s.Name)
	}
	fmt.Fprintf(b, " to the faster peer | wanted | to the faster floor (wanted %.1f) |\n|---|%s---|---|---|\n", floorTarget, strings.Repeat("---|", len(r.Systems)))
	for _, w := range works {
		if len(r.Work[w.name]) == 0 {
			continue
		}
		fmt.Fprintf(b, "| %s (%s) |", w.name, w.unit)
		for _, s := range r.Systems {
			if got, ok := r.rate(w.name, s.Name); ok {
				fmt.Fprintf(b, " %s |", short(got.median))
			} else {
				b.WriteString(" failed |")
			}
		}
		fmt.Fprintf(b, " %s | %.1f | %s |\n", r.verdict(w.name, mine, isPeer, w.target), w.target, r.verdict(w.name, mine, isFloor, floorTarget))
	}
	b.WriteByte('\n')
}

// verdict is a ratio, in bold where it falls short of target.
func (r *results) verdict(work, system string, is func(about) bool, target float64) string {
	got, ok := r.ratio(work, system, is)
	if !ok {
		return "–"
	}
	text := func(v float64) string {
		s := fmt.Sprintf("%.2f", v)
		// As it is shown: 1.296 is 1.30.
		if math.Round(v*100) < math.Round(target*100) {
			return "**" + s + "**"
		}
		return s
	}
	return text(got.median) + " / " + text(got.best)
}

// short writes a number with three digits that count, and no exponent.
func short(v float64) string {
	switch {
	case v >= 100:
		return thousands(int(math.Round(v)))
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

func (g *growth) tables(b *strings.Builder) {
	if len(g.Files) > 0 {
		b.WriteString("Empty files in one directory, microseconds for each; kmsfs beside the disk below; memory of the daemon in MiB.\n\n" +
			"| system | files | create | list names, cold | find one, cold | list and stat, cold | remove | memory, all known | at most |\n|---|---|---|---|---|---|---|---|---|\n")
		for _, p := range g.Files {
			memory := []string{"", ""}
			if p.Peak > 0 {
				memory = []string{short(p.Memory), short(p.Peak)}
			}
			fmt.Fprintf(b, "| %s | %s | %s | %s | %s | %s | %s | %s | %s |\n", p.System, thousands(p.Files),
				short(p.Create), short(p.List), short(p.Find), short(p.Stat), short(p.Remove), memory[0], memory[1])
		}
		b.WriteByte('\n')
	}
	if len(g.Sizes) > 0 {
		b.WriteString("One file, by size.\n\n| MiB | write, MiB/s | read, cold, MiB/s | read 4 KiB anywhere, cold, 1/s | memory at most, MiB |\n|---|---|---|---|---|\n")
		for _, p := range g.Sizes {
			fmt.Fprintf(b, "| %s | %s | %s | %s | %s |\n", thousands(p.MiB), short(p.Write), short(p.Read), short(p.RandRead), short(p.Peak))
		}
		b.WriteByte('\n')
	}
	if len(g.Clients) > 0 {
		b.WriteString("Processes at a time, all together per second.\n\n" +
			"| system | clients | files of 1 kB read, cold | files of 1 kB made | reads of 4 KiB in a file of 256 MiB, cold | memory at most, MiB |\n|---|---|---|---|---|---|\n")
		for _, p := range g.Clients {
			fmt.Fprintf(b, "| %s | %d | %s | %s | %s | %s |\n", p.System, p.Clients, short(p.Read), short(p.Create), short(p.RandRead), short(p.Peak))
		}
		b.WriteByte('\n')
	}
}
