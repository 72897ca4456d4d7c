package limit

import (
	"math"
	"time"
)

const (
	floorRate = 1.0      // calls per second, however often the service throttles
	topRate   = 10_000.0 // above which there is no limit: KMS's default quota
	decrease  = 0.8
	increase  = 1.05 // per second
	leastStep = 0.5  // calls per second, per second

	lowerTime = 200 * time.Millisecond // between two decreases
	quietTime = time.Second            // after which throttling shows a limit anew

	slots   = 10
	slotLen = 100 * time.Millisecond
)

// pace finds the rate that a service bears: additive increase in proportion to
// the rate, multiplicative decrease, as TCP finds a link's. It is not safe for
// concurrent use.
type pace struct {
	rate    float64   // calls per second, 0: no limit
	high    float64   // below which the rate grows twofold a second
	grown   time.Time // when rate was true
	lowered time.Time

	answers [slots]int // that were no throttling, by slot of the last second
	slot    int64      // newest
}

// answer counts an answer of the service other than throttling.
func (p *pace) answer(now time.Time) {
	p.advance(now)
	p.answers[p.slot%slots]++
}

func (p *pace) advance(now time.Time) {
	slot := now.UnixNano() / int64(slotLen)
	for ; p.slot < slot; p.slot++ {
		if slot-p.slot > slots {
			p.slot = slot - slots
		}
		p.answers[(p.slot+1)%slots] = 0
	}
}

// measured returns the number of answers in the last second.
func (p *pace) measured(now time.Time) float64 {
	p.advance(now)
	n := 0
	for _, a := range p.answers {
		n += a
	}
	return float64(n)
}

// at returns the rate now, 0 for none.
func (p *pace) at(now time.Time) float64 {
	dt := now.Sub(p.grown).Seconds()
	if p.rate == 0 || dt < 0.01 {
		return p.rate
	}
	p.grown = now
	if p.rate < p.high {
		quick := min(dt, math.Log2(p.high/p.rate))
		p.rate *= math.Pow(2, quick)
		dt -= quick
	}
	p.rate = max(p.rate*math.Pow(increase, dt), p.rate+leastStep*dt)
	if p.rate >= topRate {
		p.rate = 0
	}
	return p.rate
}

// throttled takes a throttling answer to a call that began at start, and reports
// whether it lowers the rate. Of the calls that were under way together only the
// first does: the others were sent under the old one. One that comes soon after
// says that the service has not recovered yet, not where its limit is.
func (p *pace) throttled(now, start time.Time) bool {
	old := p.at(now)
	since := now.Sub(p.lowered)
	if old > 0 && (!start.After(p.lowered) || since < lowerTime) {
		return false
	}
	bears := p.measured(now)
	if old > 0 {
		bears = min(bears, old)
	}
	rate := max(floorRate, bears*decrease)
	switch {
	case old == 0:
		p.high = math.Inf(1) // nothing is known yet: look for the limit from below
	case since >= quietTime:
		p.high = max(rate, min(0.7*p.high, old))
	}
	p.rate, p.grown, p.lowered = rate, now, now
	return true
}
