package powercut

import (
	"fmt"
	"math/rand/v2"
)

// perSequence is how many states of a sequence are tried.
const perSequence = 2

// cutEverywhere tries states after each event of a history, up to limit of them
// taken at random, or all with CRASH_FULL. It returns how many differed.
func (r *rig) cutEverywhere(h *history, o *oracle, rnd *rand.Rand, limit int) (int, error) {
	seen := map[[32]byte]bool{}
	for _, c := range h.choose(rnd, limit) {
		v := o.at(c.at)
		d := h.state(c)
		sum := d.sum()
		if seen[sum] && v.over < o.now { // what may be there grows with time, what must, too
			continue
		}
		seen[sum] = true
		if err := r.try(d, v, nil); err != nil {
			return len(seen), fmt.Errorf("cut after %d of %d events (=: durable, -: lost, ~: torn):\n%s%w", c.at, len(h.events), h.describe(c), err)
		}
	}
	return len(seen), nil
}

func (h *history) choose(rnd *rand.Rand, limit int) (out []cut) {
	if full {
		for at := range len(h.events) + 1 {
			out = append(out, h.cuts(at, rnd, 4)...)
		}
		return out
	}
	for range limit {
		at := rnd.IntN(len(h.events) + 1)
		all := h.cuts(at, rnd, 4)
		out = append(out, all[rnd.IntN(len(all))])
	}
	return out
}
