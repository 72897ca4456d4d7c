package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"time"
)

// growth is how cost grows: with the files of a directory, with the size of a
// file, with the number of clients. Memory is the daemon's, in MiB.
type growth struct {
	Files   []filesPoint   `json:"files"`
	Sizes   []sizePoint    `json:"sizes"`
	Clients []clientsPoint `json:"clients"`
}

// filesPoint is one directory of empty files, in microseconds a file.
type filesPoint struct {
	System string  `json:"system"`
	Files  int     `json:"files"`
	Create float64 `json:"create"`
	List   float64 `json:"list"` // names, cold
	Stat   float64 `json:"stat"` // listing and stat of each, cold
	Find   float64 `json:"find"` // stat of one by its name, cold
	Remove float64 `json:"remove"`
	Memory float64 `json:"memory"` // when all are known to the kernel
	Peak   float64 `json:"peak"`
}

// sizePoint is one file.
type sizePoint struct {
	System   string  `json:"system"`
	MiB      int     `json:"mib"`
	Write    float64 `json:"write"` // MiB/s
	Read     float64 `json:"read"`  // MiB/s, cold
	RandRead float64 `json:"randread"`
	Peak     float64 `json:"peak"`
}

// clientsPoint is a number of processes at a time, all together per second.
type clientsPoint struct {
	System   string  `json:"system"`
	Clients  int     `json:"clients"`
	Read     float64 `json:"read"` // small files, cold
	Create   float64 `json:"create"`
	RandRead float64 `json:"randread"`
	Peak     float64 `json:"peak"`
}

// measureGrowth measures kmsfs beside what is below it: the bare disk for
// directories, FUSE alone for clients.
func (b *bench) measureGrowth(ctx context.Context) error {
	b.results.Growth = &growth{}
	kmsfs := b.systems[0]
	raw := &system{name: "raw", what: "the disk below"}
	for _, files := range steps(10, 100, b.o.growFiles) {
		for _, s := range []*system{kmsfs, raw} {
			if err := b.growFiles(ctx, s, files); err != nil {
				return err
			}
		}
	}
	for _, mib := range steps(1, 16, b.o.growMiB) {
		if err := b.growSize(ctx, kmsfs, mib); err != nil {
			return err
		}
	}
	floor := slices.IndexFunc(b.systems, func(s *system) bool { return s.floor })
	for clients := 1; clients <= min(64, b.o.clients); clients *= 2 {
		systems := []*system{kmsfs}
		if floor >= 0 {
			systems = append(systems, b.systems[floor])
		}
		for _, s := range systems {
			if err := b.growClients(ctx, s, clients); err != nil {
				return err
			}
		}
	}
	return nil
}

// steps are first, first*factor and so on, and last.
func steps(first, factor, last int) (out []int) {
	for n := first; n < last; n *= factor {
		out = append(out, n)
	}
	return append(out, last)
}

// ask runs a part of the client and returns its values; false if it failed.
func (b *bench) ask(ctx context.Context, m *mount, what, part string, args ...string) (map[string]float64, bool) {
	values, ok := map[string]float64{}, true
	err := m.client(ctx, part, args, func(r reply) {
		if r.Error != "" {
			b.fault("%s, %s, %s: %s", m.sys.name, what, r.Name, r.Error)
			ok = false
		}
		values[r.Name] = r.Value
	})
	if err != nil {
		if ctx.Err() == nil {
			b.fault("%s, %s: %v", m.sys.name, what, err)
		}
		ok = false
	}
	return values, ok
}

func (b *bench) growFiles(ctx context.Context, s *system, files int) error {
	what := fmt.Sprintf("%s files in a directory", thousands(files))
	b.progress("%s: %s", s.name, what)
	return b.onMount(ctx, s, func(m *mount) error {
		p := filesPoint{System: s.name, Files: files}
		args := []string{"-files", fmt.Sprint(files)}
		v, ok := b.ask(ctx, m, what, "files", args...)
		if !ok {
			return nil
		}
		p.Create, p.List, p.Stat, p.Find = v["create"], v["list"], v["stat"], v["find"]
		p.Memory, p.Peak = m.memory()
		if v, ok = b.ask(ctx, m, what, "remove", args...); !ok {
			return nil
		}
		p.Remove = v["remove"]
		b.results.Growth.Files = append(b.results.Growth.Files, p)
		return nil
	})
}

func (b *bench) growSize(ctx context.Context, s *system, mib int) error {
	what := fmt.Sprintf("a file of %s MiB", thousands(mib))
	b.progress("%s: %s", s.name, what)
	return b.onMount(ctx, s, func(m *mount) error {
		v, ok := b.ask(ctx, m, what, "size", "-size", fmt.Sprint(mib))
		if !ok {
			return nil
		}
		_, peak := m.memory()
		b.results.Growth.Sizes = append(b.results.Growth.Sizes, sizePoint{s.name, mib, v["write"], v["read"], v["randread"], peak})
		return nil
	})
}

func (b *bench) growClients(ctx context.Context, s *system, clients int) error {
	what := fmt.Sprintf("%d clients", clients)
	b.progress("%s: %s", s.name, what)
	return b.onMount(ctx, s, func(m *mount) error {
		v, ok := b.ask(ctx, m, what, "clients", "-clients", fmt.Sprint(clients), "-size", "256")
		if !ok {
			return nil
		}
		_, peak := m.memory()
		b.results.Growth.Clients = append(b.results.Growth.Clients, clientsPoint{s.name, clients, v["read"], v["create"], v["randread"], peak})
		return nil
	})
}

// thousands writes 1000000 as 1,000,000.
func thousands(n int) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// perFile is the microseconds that each of n took.
func perFile(began time.Time, n int) float64 {
	return float64(time.Since(began).Microseconds()) / float64(n)
}

func (c *client) many() string { return filepath.Join(c.dir, "many") }
