package powercut

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// author writes sequences that make sense to an oracle.
type author struct {
	o    *oracle
	rnd  *rand.Rand
	n    uint64 // seed of the last step
	held []string
	as   []*object // what was held under these names
}

var (
	someFiles = []string{
		"foo", "bar", "nothing", "new", longName, "A/foo", "A/bar", "A/new", "A/" + longName, "B/foo", "B/new", "B/" + longName,
		"D/x", "D/foo", "B/D/x", "D/E/x", "empty/x",
	}
	someDirs  = []string{"A", "B", "empty", "D", "B/D", "D/E", "A/dir-" + longName[:240], "."}
	someSizes = []int64{0, 1, 100, 4064, 4095, 4096, 4097, 5000, 8192, 12_288, 20_000}
)

func pick[T any](r *rand.Rand, s []T) T { return s[r.IntN(len(s))] }

// number is an offset or size that may make a difference for a file of this size.
func (a *author) number(size int64) int64 {
	switch a.rnd.IntN(4) {
	case 0:
		return size
	case 1:
		return max(0, size+pick(a.rnd, []int64{-1, 1, -100, 100, -4096, 4096}))
	case 2:
		return size / 2
	}
	return pick(a.rnd, someSizes)
}

// weights are the operations, as often as they should come.
var weights = strings.Fields(`create create tmpfile write write write write write rewrite truncate truncate truncate
	rename rename rename rename exchange link link unlink unlink mkdir mkdir rmdir symlink setxattr rmxattr chmod allocate punch zero
	mmap hold hold hold poke poke poke poke let settle checkpoint fsync fsync fdatasync fsyncdir fsyncdir fsyncdir remount`)

// steps returns a sequence of about n steps.
func (a *author) steps(n int) (out []step) {
	add := func(s step) {
		a.o.begin(0)
		a.o.do(s)
		a.o.end(0)
		out = append(out, s)
	}
	for tries := 0; len(out) < n && tries < 100*n; tries++ {
		s := a.candidate()
		if !a.possible(s) {
			continue
		}
		add(s)
		if a.rnd.IntN(4) > 0 {
			continue
		}
		for _, d := range s.parents() {
			add(step{Op: "fsyncdir", Path: d})
		}
	}
	for _, path := range a.held {
		add(step{Op: "let", Path: path})
	}
	return out
}

func (a *author) candidate() step {
	a.n++
	s := step{Op: pick(a.rnd, weights), Seed: a.n, Path: pick(a.rnd, someFiles)}
	size := int64(0)
	if x := a.o.at2(s.Path); x != nil && x.data != nil {
		size = int64(len(last(x.data)))
	}
	s.Sync = s.opens() && a.rnd.IntN(4) == 0
	switch s.Op {
	case "create", "tmpfile", "rewrite":
		s.Len = a.length()
	case "poke":
		if s.Path = ""; len(a.held) > 0 {
			s.Path = pick(a.rnd, a.held)
		}
		if x := a.o.at2(s.Path); x != nil && x.data != nil {
			size = int64(len(last(x.data)))
		}
		s.Off, s.Len = a.number(size), max(1, a.length())
	case "write", "zero", "punch", "allocate":
		s.Off, s.Len = a.number(size), max(1, a.length())
	case "truncate":
		if s.Off = a.number(size); a.rnd.IntN(10) == 0 {
			s.Off = 200_000
		}
	case "mmap":
		s.Off = a.rnd.Int64N(size + 1)
		s.Len = min(size-s.Off, 1+a.rnd.Int64N(5000))
	case "rename", "exchange":
		if a.rnd.IntN(4) == 0 {
			s.Path, s.To = pick(a.rnd, someDirs), pick(a.rnd, someDirs)
		} else {
			s.To = pick(a.rnd, someFiles)
		}
	case "link":
		s.To = pick(a.rnd, someFiles)
	case "symlink":
		s.To = strings.Repeat("target/", pick(a.rnd, []int{1, 40, 400}))
	case "mkdir", "rmdir", "fsyncdir":
		s.Path = pick(a.rnd, someDirs)
	case "setxattr":
		s.Len = pick(a.rnd, []int64{10, 30, 1000})
	case "chmod":
		s.Off = pick(a.rnd, []int64{0o600, 0o644, 0o400})
	case "let":
		if s.Path = ""; len(a.held) > 0 {
			s.Path = pick(a.rnd, a.held)
		}
	case "settle", "checkpoint", "remount":
		s.Path = ""
	}
	return s
}

// length is more than what may grow through the journal, now and then.
func (a *author) length() int64 {
	if a.rnd.IntN(30) == 0 {
		return 600_000
	}
	return pick(a.rnd, someSizes)
}

// possible tells whether the step can be done, and notes what it holds.
func (a *author) possible(s step) bool {
	switch s.Op {
	case "hold":
		if slices.Contains(a.held, s.Path) || !a.o.valid(s) {
			return false
		}
		a.held, a.as = append(a.held, s.Path), append(a.as, a.o.at2(s.Path))
		return true
	case "poke":
		i := slices.Index(a.held, s.Path)
		return i >= 0 && a.as[i] == a.o.at2(s.Path)
	case "let":
		i := slices.Index(a.held, s.Path)
		if i >= 0 {
			a.held, a.as = slices.Delete(a.held, i, i+1), slices.Delete(a.as, i, i+1)
		}
		return i >= 0
	case "remount":
		return len(a.held) == 0
	case "mmap":
		return s.Len > 0 && a.o.valid(s)
	}
	return a.o.valid(s) && (s.Path != "." || s.Op == "fsyncdir") && s.To != "."
}

// at2 returns what is at a path, nil if nothing is.
func (o *oracle) at2(p string) *object {
	d := o.root
	for part := range strings.SplitSeq(p, "/") {
		if d == nil || d.entries == nil {
			return nil
		}
		d = last(d.entries)[part]
	}
	return d
}

// TestRandom cuts the power in longer sequences, also in the recovery from a cut,
// and goes on after one. CRASH_SEED repeats one sequence. S-60
func TestRandom(t *testing.T) {
	first, one := seed(t)
	for _, p := range placements {
		for _, plain := range []bool{false, true} {
			l := layout{p, plain}
			t.Run(l.String(), func(t *testing.T) {
				t.Parallel()
				r := newRig(t, l, prepared)
				stories, states, at := uint64(stories), 0, newProgress(t)
				if one {
					stories = 1
				} else if full {
					stories = fullStories
				}
				n := uint64(0)
				for ; n < stories && !at.over(limit(t)/2); n++ { // two of these run side by side, six in all
					p := newProver(r, first+n, 7)
					err := p.story()
					states += p.states
					if err != nil {
						t.Fatalf("CRASH_SEED=%d: %v", first+n, err)
					}
					at.tell(int(n), int(stories), states)
				}
				t.Logf("CRASH_SEED=%d to %d, %d states", first, first+n-1, states)
			})
		}
	}
}

// stories are how many sequences are tried on each layout.
const (
	stories     = 10
	fullStories = 2000
)

// story is a sequence, cuts in it, and perhaps another after one of the cuts.
func (p *prover) story() error {
	a := &author{o: p.r.model.clone(), rnd: p.rnd, n: 100} // other bytes than what is prepared
	steps := a.steps(3 + p.rnd.IntN(10))
	h, o := p.r.record(steps, nil)
	if err := p.cutSome(h, o); err != nil {
		return fmt.Errorf("%v\n%w", steps, err)
	}
	if p.rnd.IntN(2) == 0 {
		return nil
	}
	c := h.anywhere(p.rnd)
	var next []step
	h2, o2, err := p.r.recordOn(h.state(c), nil, func(o *oracle) []step {
		a := &author{o: o, rnd: p.rnd, n: 1000}
		next = a.steps(2 + p.rnd.IntN(6))
		return next
	}, nil)
	if err != nil {
		return fmt.Errorf("%v\n%w", steps, h.failure(c, err))
	}
	if err := p.cutSome(h2, o2); err != nil {
		return fmt.Errorf("%v\n%w", steps, h.failure(c, fmt.Errorf("and then %v\n%w", next, err)))
	}
	return nil
}

// cutSome tries some states of a history.
func (p *prover) cutSome(h *history, o *oracle) error {
	for range 6 {
		c := h.anywhere(p.rnd)
		if err := p.try(h.state(c), o.at(c.at), deepest); err != nil {
			return h.failure(c, err)
		}
	}
	return nil
}
