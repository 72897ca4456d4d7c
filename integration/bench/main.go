package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// options of a run.
type options struct {
	rounds    int
	sizeMiB   int
	only      []string
	systems   []string
	base      string
	placement string
	kmsfs     []string // NAME=PATH of further builds

	jsonFile, pageFile, chartFile string

	peers     bool
	grow      bool
	growFiles int
	growMiB   int
	clients   int
	tree      string // what untar unpacks
	brief     bool
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) > 0 && args[0] == "client" {
		return runClient(args[1:])
	}
	if len(args) > 0 && args[0] == "render" {
		return runRender(args[1:])
	}
	o, err := parseFlags(args)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	b, err := newBench(ctx, o)
	if err != nil {
		return err
	}
	defer b.close()
	err = b.measure(ctx)
	if ctx.Err() != nil {
		return errors.New("interrupted; nothing was written")
	}
	if err != nil {
		return err
	}
	return b.results.deliver(o)
}

func parseFlags(args []string) (*options, error) {
	var o options
	var only, systems string
	f := flag.NewFlagSet("bench", flag.ExitOnError)
	f.IntVar(&o.rounds, "rounds", 5, "rounds; in each every system has its turn")
	f.IntVar(&o.sizeMiB, "size", 512, "size of the large file, in `MiB`")
	f.StringVar(&only, "only", "", "`workloads` to run, with commas: "+strings.Join(workNames(), ","))
	f.StringVar(&systems, "systems", "kmsfs,gocryptfs,securefs,floor,floor+wb", "`systems` to run, with commas; raw is the bare disk")
	f.StringVar(&o.base, "base", "/dev/shm", "`directory` under which stores and mounts are made")
	f.StringVar(&o.placement, "placement", "header", "where kmsfs keeps headers: header, xattr or sidecar")
	f.Func("kmsfs", "a further build of kmsfs to run, `NAME=PATH`; may be repeated", func(s string) error {
		o.kmsfs = append(o.kmsfs, s)
		return nil
	})
	f.StringVar(&o.jsonFile, "json", "", "write the results to this `file`")
	f.StringVar(&o.pageFile, "page", "", "put the tables into this page's marked `section`")
	f.StringVar(&o.chartFile, "chart", "", "draw the chart (SVG) into this `file`")
	f.BoolVar(&o.peers, "peers", true, "compare with the other systems")
	f.BoolVar(&o.grow, "grow", true, "measure how cost grows with files, sizes and clients")
	f.IntVar(&o.growFiles, "grow-files", 1_000_000, "most files in a directory")
	f.IntVar(&o.growMiB, "grow-size", 4096, "largest file, in `MiB`; the base directory must have room for it")
	f.IntVar(&o.clients, "grow-clients", 64, "most clients at a time, a power of two up to 64")
	f.BoolVar(&o.brief, "brief", false, "so few operations that the rates say nothing: to try the program")
	f.StringVar(&o.tree, "tree", "", "`directory` that untar unpacks and md5all, lsR and rm work on (default: the Go toolchain's src)")
	_ = f.Parse(args) // ExitOnError
	if f.NArg() > 0 {
		return nil, fmt.Errorf("%q: no arguments are expected", f.Arg(0))
	}
	o.only, o.systems = split(only), split(systems)
	for _, name := range o.only {
		if findWork(name) == nil {
			return nil, fmt.Errorf("%s: no such workload", name)
		}
	}
	if o.rounds < 1 || o.sizeMiB < 1 {
		return nil, errors.New("rounds and size are at least 1")
	}
	var err error
	o.base, err = filepath.Abs(o.base)
	return &o, err
}

func split(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
}

// bench is a run.
type bench struct {
	o       *options
	dir     string // everything that the run makes; goes away at the end
	systems []*system
	tar     string
	results *results
}

func newBench(ctx context.Context, o *options) (*bench, error) {
	dir, err := os.MkdirTemp(o.base, "kmsfs-bench-")
	if err != nil {
		return nil, err
	}
	b := &bench{o: o, dir: dir}
	if err := b.prepare(ctx); err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

// prepare builds the programs and packs the tree.
func (b *bench) prepare(ctx context.Context) error {
	programs := filepath.Join(b.dir, "bin")
	if err := os.Mkdir(programs, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"cmd/kmsfs", "integration/bench/floor"} {
		out, err := command(ctx, nil, "go", "build", "-trimpath", "-o", programs+"/", modulePath+"/"+name).CombinedOutput()
		if err != nil {
			return fmt.Errorf("go build %s: %w: %s", name, err, out)
		}
	}
	var err error
	if b.systems, err = findSystems(b.o, programs); err != nil {
		return err
	}
	b.results = newResults(ctx, b)
	if !b.o.peers || !needsTree(b.o.only) {
		return nil
	}
	b.tar = filepath.Join(b.dir, "tree.tar")
	return pack(ctx, b.o.tree, b.tar)
}

// pack makes the archive that untar unpacks.
func pack(ctx context.Context, tree, tar string) error {
	if tree == "" {
		root, err := command(ctx, nil, "go", "env", "GOROOT").Output()
		if err != nil {
			return fmt.Errorf("go env GOROOT: %w", err)
		}
		tree = filepath.Join(strings.TrimSpace(string(root)), "src")
	}
	out, err := command(ctx, nil, "tar", "-cf", tar, "-C", filepath.Dir(tree), filepath.Base(tree)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("tar: %w: %s", err, out)
	}
	return nil
}

// close removes what the run made. Its mounts are gone by then: every mount is
// unmounted by who made it.
func (b *bench) close() {
	if err := os.RemoveAll(b.dir); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
}

func (b *bench) measure(ctx context.Context) error {
	began := time.Now()
	if b.o.peers {
		for round := range b.o.rounds {
			for _, s := range b.systems {
				if err := b.turn(ctx, s, round); err != nil {
					return err
				}
			}
		}
		b.progress("")
	}
	b.results.PeerSeconds = time.Since(began).Seconds()
	if b.o.grow {
		if err := b.measureGrowth(ctx); err != nil {
			return err
		}
	}
	b.results.Seconds = time.Since(began).Seconds()
	return nil
}

// turn runs all workloads on one system, once. What fails is reported and left
// out, so that a peer's failure does not cost the run.
func (b *bench) turn(ctx context.Context, s *system, round int) error {
	b.progress("round %d of %d: %s", round+1, b.o.rounds, s.name)
	return b.onMount(ctx, s, func(m *mount) error {
		args := []string{"-size", fmt.Sprint(b.o.sizeMiB), "-tar", b.tar, "-only", strings.Join(b.o.only, ",")}
		return m.client(ctx, "peers", args, func(r reply) {
			if r.Error != "" {
				b.fault("%s, %s, round %d: %s", s.name, r.Name, round+1, r.Error)
				return
			}
			b.results.add(r.Name, s.name, r.Value)
		})
	})
}

// onMount calls f with a new store mounted.
func (b *bench) onMount(ctx context.Context, s *system, f func(*mount) error) error {
	m, err := s.mount(ctx, b.dir)
	if err != nil {
		if ctx.Err() == nil {
			b.fault("%s: %v", s.name, err)
		}
		return ctx.Err()
	}
	m.brief = b.o.brief
	err = f(m)
	if end := m.end(); end != nil {
		b.fault("%s: %v", s.name, end)
	}
	if err != nil && ctx.Err() == nil {
		b.fault("%s: %v", s.name, err)
	}
	return ctx.Err()
}

func (b *bench) fault(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	fmt.Fprintln(os.Stderr, "bench:", text)
	b.results.Faults = append(b.results.Faults, text)
}

// progress says on standard error what is being measured.
func (b *bench) progress(format string, args ...any) {
	if format != "" {
		fmt.Fprintf(os.Stderr, format+"\n", args...)
	}
}
