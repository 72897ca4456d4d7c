package soak

import (
	"bytes"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// sample is what was seen of the serving process at one moment. Sizes are in
// bytes.
type sample struct {
	Time       float64 `json:"t_s"` // since the run began
	Life       int     `json:"life"`
	RSS        float64 `json:"rss"`
	Anonymous  float64 `json:"rss_anonymous"`
	FDs        float64 `json:"fds"`
	Goroutines float64 `json:"goroutines"`
	Heap       float64 `json:"heap_in_use"`
	OpenFiles  float64 `json:"open_files"`
	KnownNodes float64 `json:"known_nodes"`
	CacheKeys  float64 `json:"cache_entries"`
	CacheHits  float64 `json:"cache_hits"`
	PoolKeys   float64 `json:"pool_entries"`
	Calls      float64 `json:"kms_calls"` // under way and waiting
	Throttled  float64 `json:"kms_throttled"`
	Failures   float64 `json:"key_failures"`
	Integrity  float64 `json:"integrity_failures"`
	Internal   float64 `json:"kmsfs_dir"` // .kmsfs, without its quarantine
	Quarantine float64 `json:"quarantine_entries"`
	Fault      string  `json:"fault,omitempty"`
}

// sampler takes samples of the mount, each life's own.
type sampler struct {
	soak     *soak
	interval time.Duration
	samples  []sample
}

func newSampler(s *soak) *sampler {
	return &sampler{soak: s, interval: min(10*time.Second, max(200*time.Millisecond, s.length/360))}
}

// run samples until the life ends.
func (p *sampler) run(l *life) {
	for !l.stopping.Load() {
		next := time.Now().Add(p.interval)
		s, err := p.take(l)
		switch {
		case err == nil:
			p.samples = append(p.samples, s)
			if s.Integrity > 0 {
				p.soak.t.Errorf("%v integrity failures", s.Integrity)
			}
		case !l.killed.Load() && !l.stopping.Load():
			p.soak.t.Errorf("sample: %v", err)
		}
		for time.Now().Before(next) && !l.stopping.Load() {
			time.Sleep(20 * time.Millisecond)
		}
	}
}

func (p *sampler) take(l *life) (sample, error) {
	s := sample{Time: time.Since(p.soak.began).Seconds(), Life: l.Number}
	s.Fault, _ = p.soak.faults.now.Load().(string)
	proc := fmt.Sprintf("/proc/%d", p.soak.m.PID)
	status, err := os.ReadFile(proc + "/status")
	if err != nil {
		return s, err
	}
	for line := range strings.Lines(string(status)) {
		var kb float64
		if n, _ := fmt.Sscanf(line, "VmRSS: %f kB", &kb); n == 1 {
			s.RSS = kb * 1024
		} else if n, _ := fmt.Sscanf(line, "RssAnon: %f kB", &kb); n == 1 {
			s.Anonymous = kb * 1024
		}
	}
	fds, err := os.ReadDir(proc + "/fd")
	if err != nil {
		return s, err
	}
	s.FDs = float64(len(fds))
	if err := p.scrape(&s); err != nil {
		return s, err
	}
	return s, s.measure(filepath.Join(p.soak.store, ".kmsfs"))
}

// scrape asks the mount's metrics.
func (p *sampler) scrape(s *sample) error {
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + p.soak.addr + "/metrics")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var text bytes.Buffer
	if _, err := text.ReadFrom(resp.Body); err != nil {
		return err
	}
	fields := map[string]*float64{
		"go_goroutines": &s.Goroutines, "go_memstats_heap_inuse_bytes": &s.Heap,
		"kmsfs_open_files": &s.OpenFiles, "kmsfs_known_nodes": &s.KnownNodes,
		"kmsfs_key_cache_entries": &s.CacheKeys, "kmsfs_key_cache_hits_total": &s.CacheHits, "kmsfs_key_pool_entries": &s.PoolKeys,
		"kmsfs_kms_calls_in_flight": &s.Calls, "kmsfs_kms_calls_waiting": &s.Calls, "kmsfs_kms_throttled_requests_total": &s.Throttled, "kmsfs_key_failures_total": &s.Failures,
		"kmsfs_integrity_failures_total": &s.Integrity,
	}
	seen := map[string]bool{}
	for line := range strings.Lines(text.String()) {
		series, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		name, _, _ := strings.Cut(series, "{")
		if to := fields[name]; to != nil {
			v, err := strconv.ParseFloat(value[strings.LastIndexByte(value, ' ')+1:], 64)
			if err != nil {
				return fmt.Errorf("%q: %w", line, err)
			}
			*to += v
			seen[name] = true
		}
	}
	for _, must := range []string{"go_goroutines", "kmsfs_kms_calls_in_flight", "kmsfs_integrity_failures_total"} {
		if !seen[must] {
			return fmt.Errorf("the metrics do not have %s", must)
		}
	}
	return nil
}

// measure looks at what the store keeps beside its files.
func (s *sample) measure(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if os.IsNotExist(err) {
				return nil // it is at work
			}
			return err
		}
		if strings.Contains(path[len(dir):], "/quarantine/") {
			s.Quarantine++
			return nil
		}
		if fi, err := d.Info(); err == nil && fi.Mode().IsRegular() {
			s.Internal += float64(fi.Size())
		}
		return nil
	})
}

// quantity is something that must not grow.
type quantity struct {
	name  string
	of    func(*sample) float64
	unit  float64 // for people
	slack float64 // what it may grow by in any case
}

// A trend is flat if the median of a life's last quarter is at most
// 1 + growth times that of its second one, and the slack: a leak of so much in
// half a life, a factor of some hundred below what an hour's load would leak if
// it leaked anything at each request. The first quarter is for caches to fill.
const growth = 0.2

var quantities = []quantity{
	{"resident memory (MiB)", func(s *sample) float64 { return s.RSS }, 1 << 20, 12 << 20},
	{"descriptors", func(s *sample) float64 { return s.FDs }, 1, 24},
	{"goroutines", func(s *sample) float64 { return s.Goroutines }, 1, 24},
}

// internalMost bounds what .kmsfs may hold beside its quarantine.
const internalMost = 192 << 20

// quarters are the medians of a life's second and last quarter.
type quarters struct {
	Life   int       `json:"life"`
	Second []float64 `json:"second"` // by quantity
	Last   []float64 `json:"last"`
}

// leastSamples make a trend.
const leastSamples = 12

func (p *sampler) quarters() (all []quarters) {
	lives := map[int][]sample{}
	for _, s := range p.samples {
		lives[s.Life] = append(lives[s.Life], s)
	}
	for n := range p.soak.lives {
		l := lives[n]
		if len(l) < leastSamples {
			continue
		}
		q := quarters{Life: n}
		for _, of := range quantities {
			k := len(l) / 4
			q.Second = append(q.Second, median(l[k:2*k], of.of))
			q.Last = append(q.Last, median(l[len(l)-k:], of.of))
		}
		all = append(all, q)
	}
	return all
}

// calm is how many calls to the key service do not matter. Each has goroutines
// and perhaps a socket, and while the service is away they pile up to the
// client's limit: that is no trend.
const calm = 4

// median is that of the samples that were taken in calm, if there are enough.
func median(samples []sample, of func(*sample) float64) float64 {
	var v, all []float64
	for i := range samples {
		all = append(all, of(&samples[i]))
		if samples[i].Calls <= calm {
			v = append(v, of(&samples[i]))
		}
	}
	if len(v) < 3 {
		v = all
	}
	slices.Sort(v)
	return v[len(v)/2]
}

// trend returns what grew: within the lives that were long enough, and from the
// first of them to the last.
func (p *sampler) trend(lives []*life, length time.Duration) (complaints []string) {
	all := p.quarters()
	if len(all) == 0 {
		return []string{fmt.Sprintf("of %d lives none has %d samples", len(lives), leastSamples)}
	}
	check := func(what string, from, to []float64) {
		for i, q := range quantities {
			slack := q.slack
			if length < 10*time.Minute { // the heap has not settled
				slack *= 6
			}
			if bound := from[i]*(1+growth) + slack; to[i] > bound {
				complaints = append(complaints, fmt.Sprintf("%s: %s grew from %.1f to %.1f, beyond %.1f",
					what, q.name, from[i]/q.unit, to[i]/q.unit, bound/q.unit))
			}
		}
	}
	for _, q := range all {
		check(fmt.Sprintf("life %d", q.Life), q.Second, q.Last)
	}
	check("first long life to the last", all[0].Last, all[len(all)-1].Last)
	for _, s := range p.samples {
		if s.Internal > internalMost {
			return append(complaints, fmt.Sprintf(".kmsfs has %.0f MiB after %.0f s", s.Internal/(1<<20), s.Time))
		}
	}
	return complaints
}

// TestTrendSeesLeaks plants a leak in each quantity.
func TestTrendSeesLeaks(t *testing.T) {
	for planted := -1; planted <= len(quantities); planted++ {
		s := &soak{length: time.Hour, lives: []*life{{Number: 0}, {Number: 1}}}
		p := newSampler(s)
		for i := range 140 {
			x := sample{Time: float64(10 * i), Life: i / 70, RSS: 60 << 20, FDs: 80, Goroutines: 40, Internal: 20 << 20}
			leak := float64(i%70) * 2
			switch planted {
			case 0:
				x.RSS += leak * (1 << 20)
			case 1:
				x.FDs += leak
			case 2:
				x.Goroutines += leak
			case 3:
				x.Internal *= float64(i)
			}
			x.RSS += float64(i%7) * (1 << 20) // noise
			p.samples = append(p.samples, x)
		}
		got := p.trend(s.lives, s.length)
		if (len(got) > 0) != (planted >= 0) {
			t.Errorf("leak %d: got %q", planted, got)
		}
	}
}
