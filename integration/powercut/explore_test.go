package powercut

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"
)

// perSequence is how many states of a sequence are tried.
const perSequence = 1

// deepest is how often the power is cut, at most, while the cut before is being
// recovered from.
const deepest = 3

// prover tries states. What it chooses follows from its seeds.
type prover struct {
	r      *rig
	rnd    *rand.Rand
	seldom int // one of so many recoveries is cut
	states int
}

func newProver(r *rig, seed, stream uint64) *prover {
	return &prover{r: r, rnd: rand.New(rand.NewPCG(seed, stream)), seldom: 6}
}

// limit is how long this may take: CRASH_TIME for each part of it, or 0 for as
// long as it needs.
func limit(t testing.TB) time.Duration {
	t.Helper()
	s := os.Getenv("CRASH_TIME")
	if s == "" {
		return 0
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// seed is CRASH_SEED, or one of its own for each run.
func seed(t testing.TB) (n uint64, given bool) {
	t.Helper()
	s := os.Getenv("CRASH_SEED")
	if s == "" {
		return uint64(time.Now().UnixNano()), false
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n, true
}

// progress tells how far a long run is, twice a minute.
type progress struct {
	t           *testing.T
	begun, told time.Time
}

func newProgress(t *testing.T) *progress {
	now := time.Now()
	return &progress{t, now, now}
}

func (p *progress) tell(n, of, states int) {
	if full && time.Since(p.told) > 30*time.Second {
		p.told = time.Now()
		p.t.Logf("%s: sequence %d of %d, %d states", time.Since(p.begun).Round(time.Second), n, of, states)
	}
}

// over tells whether the time is up.
func (p *progress) over(limit time.Duration) bool { return limit > 0 && time.Since(p.begun) > limit }

// promise is what a state must fulfil.
type promise interface{ check(root *found) error }

// both is two promises.
type both [2]promise

func (b both) check(root *found) error { return errors.Join(b[0].check(root), b[1].check(root)) }

// unchanged promises what was found before.
type unchanged struct{ was *found }

func (u unchanged) check(root *found) error { return u.was.same(".", root) }

// cutEverywhere tries states after each event of a history, up to limit of them
// taken at random, or all with CRASH_FULL.
func (p *prover) cutEverywhere(h *history, o *oracle, limit int) error {
	return p.tryAll(h, o, h.choose(p.rnd, limit))
}

// cutBroadly tries the broad cuts after each event of the steps, up to limit of
// them taken at random, or all with CRASH_FULL.
func (p *prover) cutBroadly(h *history, o *oracle, limit int) error {
	var all []cut
	for at := h.from; at <= h.to; at++ {
		all = append(all, h.broad(at, h.open(at))...)
	}
	if p.rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] }); !full {
		all = all[:min(limit, len(all))]
	}
	return p.tryAll(h, o, all)
}

// tryAll tries cuts, those that leave the same disk once.
func (p *prover) tryAll(h *history, o *oracle, cuts []cut) error {
	seen := map[[32]byte]bool{}
	for _, c := range cuts {
		v := o.at(c.at)
		d := h.state(c)
		sum := d.sum()
		if seen[sum] && v.over < o.now { // what may be there grows with time, what must, too
			continue
		}
		seen[sum] = true
		if err := p.try(d, v, deepest); err != nil {
			return h.failure(c, err)
		}
	}
	return nil
}

func (h *history) failure(c cut, err error) error {
	return fmt.Errorf("cut after %d of %d events (=: durable, -: lost, ~: torn):\n%s%w", c.at, len(h.events), h.describe(c), err)
}

func (h *history) choose(rnd *rand.Rand, limit int) (out []cut) {
	if full {
		for at := h.first; at <= len(h.events); at++ {
			out = append(out, h.cuts(at, rnd, 4)...)
		}
		return out
	}
	for range limit {
		out = append(out, h.anywhere(rnd))
	}
	return out
}

// try builds a state, recovers it, and holds it against the promise. The
// recovery is cut in turn, now and then, and what that leaves is tried as well,
// down to a depth. It is a mount, or fsck --repair.
func (p *prover) try(d *disk, want promise, depth int) error {
	p.states++
	store, remove := p.r.folder()
	defer remove()
	if err := d.build(store); err != nil {
		return err
	}
	again := depth > 0 && p.rnd.IntN(p.seldom) == 0
	var mounting, checking *recorder
	var before, between *disk
	tap := func(rec **recorder, at **disk) (err error) {
		if !again {
			return nil
		}
		if *at, err = loadDisk(store); err == nil {
			*rec = newRecorder(*at)
		}
		return err
	}
	mount := func() (*found, int, error) {
		if err := tap(&mounting, &before); err != nil {
			return nil, 0, err
		}
		root, opened, err := p.r.look(store, mounting)
		if err == nil {
			err = want.check(root)
		}
		return root, opened, err
	}
	fsck := func() error {
		if err := tap(&checking, &between); err != nil {
			return err
		}
		return p.r.repair(store, checking)
	}
	var root *found
	var opened int
	var err error
	repaired := want
	if p.rnd.IntN(4) == 0 {
		if err = fsck(); err == nil {
			root, opened, err = mount()
		}
	} else {
		if root, opened, err = mount(); err == nil {
			repaired = both{want, unchanged{root}}
			err = fsck()
		}
	}
	if err != nil || !again {
		return err
	}
	err = p.cutRecovery("the mount", &history{base: before, events: mounting.events}, depth, func(at int) promise {
		if at >= opened {
			return both{want, unchanged{root}}
		}
		return want
	})
	if err != nil {
		return err
	}
	return p.cutRecovery("fsck --repair", &history{base: between, events: checking.events}, depth, func(int) promise { return repaired })
}

// cutRecovery tries states that a cut in a recovery leaves.
func (p *prover) cutRecovery(what string, h *history, depth int, want func(at int) promise) error {
	if len(h.events) == 0 {
		return nil
	}
	for range 2 {
		c := h.anywhere(p.rnd)
		if err := p.try(h.state(c), want(c.at), depth-1); err != nil {
			return fmt.Errorf("in the recovery by %s: %w", what, h.failure(c, err))
		}
	}
	return nil
}
