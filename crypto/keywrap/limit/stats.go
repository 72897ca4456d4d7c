package limit

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// maxFailures bounds Stats.Failures.
const maxFailures = 64

// Stats counts since New; Waiting, InFlight, Rate, State and Outages are the
// present.
type Stats struct {
	Calls     uint64    `json:"calls"`     // ended, failed or not
	Failed    uint64    `json:"failed"`    // of these; without those whose caller gave up
	Refused   uint64    `json:"refused"`   // of these, without being sent, by an open breaker
	Throttled uint64    `json:"throttled"` // throttling answers
	Waiting   int       `json:"waiting"`   // for a turn
	InFlight  int       `json:"in_flight"`
	PerSecond float64   `json:"per_second"`         // the fixed limit, 0: none
	Rate      float64   `json:"rate"`               // the limit found by throttling, calls per second, 0: none
	State     string    `json:"state"`              // "closed", or "open" while any key's breaker is
	Outages   []Outage  `json:"outages,omitempty"`  // the open breakers, oldest first
	Failures  []Failure `json:"failures,omitempty"` // the last 64 that were sent, oldest first
}

// Outage is an open breaker.
type Outage struct {
	Key   string    `json:"key"`
	Since time.Time `json:"since"`
	Error string    `json:"error"`
}

// Failure is a call that failed.
type Failure struct {
	At        time.Time `json:"at"`
	Op        string    `json:"op"`
	Key       string    `json:"key"`
	Class     string    `json:"class,omitempty"`
	RequestID string    `json:"request_id,omitempty"`
	Kind      string    `json:"kind"` // fault.Kind's name
	Error     string    `json:"error"`
}

type counters struct {
	mu       sync.Mutex
	stats    Stats
	failures []Failure
}

func (c *counters) throttled() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stats.Throttled++
}

// ended counts a call. A failure is kept if it was sent.
func (c *counters) ended(call *Call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stats.Calls++
	if call.Err == nil || fault.Of(call.Err) == fault.None && errors.Is(call.Err, context.Canceled) {
		return
	}
	c.stats.Failed++
	if !call.sent {
		c.stats.Refused++
		return
	}
	f := Failure{At: time.Now(), Op: call.Op, Key: call.Key, Class: call.Context.Class,
		Kind: fault.Of(call.Err).String(), Error: call.Err.Error()}
	var ce *keywrap.CallError
	if errors.As(call.Err, &ce) {
		f.Key, f.RequestID = ce.Key, ce.RequestID
	}
	if len(c.failures) == maxFailures {
		c.failures = slices.Delete(c.failures, 0, 1)
	}
	c.failures = append(c.failures, f)
}

// Stats returns counts and state.
func (p *Provider) Stats() Stats {
	p.counters.mu.Lock()
	s := p.counters.stats
	s.Failures = slices.Clone(p.counters.failures)
	p.counters.mu.Unlock()
	s.Waiting, s.InFlight, s.Rate = p.gate.state()
	s.Waiting += int(p.pausing.Load())
	s.PerSecond, s.State, s.Outages = p.o.PerSecond, "closed", p.breakers.outages()
	if len(s.Outages) > 0 {
		s.State = "open"
	}
	return s
}
