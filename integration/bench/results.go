package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// results is what a run came to, and what the JSON file holds.
type results struct {
	Date        string   `json:"date"`
	Commit      string   `json:"commit"` // of the source, with -dirty where it was changed
	Machine     machine  `json:"machine"`
	Rounds      int      `json:"rounds"`
	SizeMiB     int      `json:"size_mib"`
	PeerSeconds float64  `json:"peer_seconds"`
	Seconds     float64  `json:"seconds"`
	Systems     []about  `json:"systems"`
	Faults      []string `json:"faults,omitempty"`

	// Rates by workload and system, one for each round.
	Work map[string]map[string][]float64 `json:"work"`

	Growth *growth `json:"growth,omitempty"`
}

type about struct {
	Name  string `json:"name"`
	What  string `json:"what"`
	Peer  bool   `json:"peer,omitempty"`
	Floor bool   `json:"floor,omitempty"`
}

type machine struct {
	CPU    string  `json:"cpu"`
	Cores  int     `json:"cores"`
	MiB    uint64  `json:"mib"`
	Kernel string  `json:"kernel"`
	Disk   string  `json:"disk"` // file system of the base directory
	Load   float64 `json:"load"` // processes that ran or waited when the run began
}

func newResults(ctx context.Context, b *bench) *results {
	r := &results{
		Date: time.Now().Format(time.DateOnly), Rounds: b.o.rounds, SizeMiB: b.o.sizeMiB,
		Machine: thisMachine(b.o.base), Work: map[string]map[string][]float64{},
	}
	if out, err := command(ctx, nil, "git", "describe", "--always", "--dirty", "--abbrev=12").Output(); err == nil {
		r.Commit = strings.TrimSpace(string(out))
	}
	for _, s := range b.systems {
		r.Systems = append(r.Systems, about{s.name, s.what, s.peer, s.floor})
	}
	return r
}

func thisMachine(base string) machine {
	m := machine{Cores: runtime.NumCPU()}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				m.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		m.MiB = uint64(info.Totalram) * uint64(info.Unit) >> 20
		m.Load = float64(info.Loads[0]) / (1 << 16)
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		release, _, _ := bytes.Cut(u.Release[:], []byte{0})
		m.Kernel = string(release)
	}
	var st unix.Statfs_t
	if unix.Statfs(base, &st) == nil {
		names := map[int64]string{unix.TMPFS_MAGIC: "tmpfs", unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs"}
		if m.Disk = names[st.Type]; m.Disk == "" {
			m.Disk = fmt.Sprintf("file system %#x", st.Type)
		}
	}
	return m
}

func (r *results) add(work, system string, value float64) {
	if r.Work[work] == nil {
		r.Work[work] = map[string][]float64{}
	}
	r.Work[work][system] = append(r.Work[work][system], value)
}

// rate is a system's in a workload, over the rounds.
type rate struct{ median, best float64 }

func (r *results) rate(work, system string) (rate, bool) {
	v := slices.Sorted(slices.Values(r.Work[work][system]))
	if len(v) == 0 {
		return rate{}, false
	}
	mid := v[len(v)/2]
	if len(v)%2 == 0 {
		mid = (mid + v[len(v)/2-1]) / 2
	}
	return rate{mid, v[len(v)-1]}, true
}

// fastest returns the highest median and the highest best round of those
// systems that is accepts.
func (r *results) fastest(work string, is func(about) bool) (of rate, ok bool) {
	for _, s := range r.Systems {
		if !is(s) {
			continue
		}
		if got, any := r.rate(work, s.Name); any {
			of.median, of.best, ok = max(of.median, got.median), max(of.best, got.best), true
		}
	}
	return of, ok
}

func isPeer(s about) bool  { return s.Peer }
func isFloor(s about) bool { return s.Floor }

// ratio is a system's rate divided by that of others.
func (r *results) ratio(work, system string, is func(about) bool) (rate, bool) {
	mine, ok := r.rate(work, system)
	others, any := r.fastest(work, is)
	if !ok || !any || others.median == 0 || others.best == 0 {
		return rate{}, false
	}
	return rate{mine.median / others.median, mine.best / others.best}, true
}

// deliver prints the results, and writes what the options ask for.
func (r *results) deliver(o *options) error {
	fmt.Print(r.markdown())
	var failed error
	if o.jsonFile != "" {
		js, err := json.MarshalIndent(r, "", " ")
		if err == nil {
			err = os.WriteFile(o.jsonFile, append(js, '\n'), 0o644)
		}
		failed = errors.Join(failed, err)
	}
	return errors.Join(failed, r.publish(o.pageFile, o.chartFile))
}

// publish writes the page's section and the chart.
func (r *results) publish(page, chart string) error {
	var failed error
	if page != "" {
		failed = errors.Join(failed, rewrite(page, r.markdown()))
	}
	if chart != "" {
		failed = errors.Join(failed, os.WriteFile(chart, []byte(r.chart()), 0o644))
	}
	return failed
}

// runRender writes page and chart again from a run's JSON.
func runRender(args []string) error {
	f := flag.NewFlagSet("bench render", flag.ExitOnError)
	from := f.String("json", "", "results of a run")
	page := f.String("page", "", "page to write them into")
	chart := f.String("chart", "", "chart to draw")
	_ = f.Parse(args) // ExitOnError
	js, err := os.ReadFile(*from)
	if err != nil {
		return err
	}
	var r results
	if err := json.Unmarshal(js, &r); err != nil {
		return fmt.Errorf("%s: %w", *from, err)
	}
	fmt.Print(r.markdown())
	return r.publish(*page, *chart)
}

// The lines between which a page's results stand.
const (
	pageBegin = "<!-- make bench writes from here -->\n"
	pageEnd   = "<!-- to here -->\n"
)

// rewrite puts text between the page's marks.
func rewrite(page, text string) error {
	b, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	head, rest, ok := strings.Cut(string(b), pageBegin)
	_, tail, found := strings.Cut(rest, pageEnd)
	if !ok || !found {
		return fmt.Errorf("%s: no marks %q and %q", page, strings.TrimSpace(pageBegin), strings.TrimSpace(pageEnd))
	}
	return os.WriteFile(page, []byte(head+pageBegin+"\n"+text+"\n"+pageEnd+tail), 0o644)
}
