package cryptfs

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// Health is what `kmsfs health` tells about a volume.
type Health struct {
	Time      time.Time     `json:"time"` // of the probes
	Store     string        `json:"store"`
	ID        string        `json:"id"`
	ReadOnly  bool          `json:"read_only"`
	WriteOnly bool          `json:"write_only"`
	Classes   []ClassHealth `json:"classes"`
	Condition Condition     `json:"condition"` // of the store, as far as the volume has seen it
	Failures  []Failure     `json:"failures"`  // of late, the newest last; the oldest are dropped
}

// ClassHealth says what works for a class now.
type ClassHealth struct {
	Name   string  `json:"name"`
	Wrap   []Probe `json:"wrap"`   // can new files get keys; empty on a read-only volume
	Unwrap []Probe `json:"unwrap"` // can keys that are there be used
}

// Probe is one question to a key service, which no key is made for.
type Probe struct {
	Op        string `json:"op"`
	Key       string `json:"key"`
	Purpose   string `json:"purpose"`
	OK        bool   `json:"ok"`
	Error     string `json:"error,omitempty"`
	RequestID string `json:"request_id,omitempty"`
	Hint      string `json:"hint,omitempty"`
}

// Failure is something that went wrong while the volume was in use.
type Failure struct {
	Time      time.Time `json:"time"`
	Kind      string    `json:"kind"` // of fault: integrity, key denied, …
	Damage    bool      `json:"damage"`
	Class     string    `json:"class,omitempty"`
	Key       string    `json:"key,omitempty"`
	RequestID string    `json:"request_id,omitempty"`
	Error     string    `json:"error"`
}

// Usable reports whether every class can do now what the volume is for: wrap
// unless it is read-only, and unwrap under at least one key.
func (h *Health) Usable() bool {
	for _, c := range h.Classes {
		for _, p := range c.Wrap { // a new file needs all its recipients
			if !p.OK {
				return false
			}
		}
		if !usable(c.Unwrap, keywrap.PurposeNames) || !usable(c.Unwrap, keywrap.PurposeData) {
			return false
		}
	}
	return true
}

// usable reports whether one of the probes of a purpose went well, or there is none.
func usable(probes []Probe, p keywrap.Purpose) bool {
	asked := false
	for _, x := range probes {
		if x.Purpose == string(p) {
			asked = true
			if x.OK {
				return true
			}
		}
	}
	return !asked
}

const (
	healthTime  = 4 * time.Second // for all probes together
	healthAge   = time.Second     // an answer is given again for so long: asking costs calls
	maxFailures = 64
)

// healthState is the volume's memory of failures, and the last answer.
type healthState struct {
	mu       sync.Mutex
	failures []Failure
	damage   Damage
	halt     *Halt

	asking sync.Mutex
	last   *Health
}

// Health asks the key services, by calls without effect, whether each class can
// wrap and unwrap now.
func (v *Volume) Health(ctx context.Context) *Health {
	s := &v.health
	s.asking.Lock()
	defer s.asking.Unlock()
	if s.last == nil || time.Since(s.last.Time) >= healthAge {
		s.last = v.askHealth(ctx)
	}
	out := *s.last
	out.Condition = v.condition()
	s.mu.Lock()
	defer s.mu.Unlock()
	out.Failures = slices.Clone(s.failures)
	return &out
}

func (v *Volume) askHealth(ctx context.Context) *Health {
	ctx, cancel := context.WithTimeout(ctx, healthTime)
	defer cancel()
	v.ns.RLock()
	classes := maps.Clone(v.classes)
	v.ns.RUnlock()
	h := &Health{Store: v.path, ID: v.layout.ID.String(), ReadOnly: v.conf.ReadOnly, WriteOnly: v.conf.WriteOnly,
		Classes: make([]ClassHealth, len(classes))}
	var wg sync.WaitGroup
	for i, name := range slices.Sorted(maps.Keys(classes)) {
		wg.Go(func() { h.Classes[i] = v.askClass(ctx, classes[name]) })
	}
	wg.Wait()
	h.Time = time.Now()
	return h
}

func (v *Volume) askClass(ctx context.Context, c *class) ClassHealth {
	c.mu.Lock()
	ec, names, data := c.ec, c.header, c.sample.Load()
	c.mu.Unlock()
	context := func(p keywrap.Purpose, id envelope.ID) keywrap.Context {
		return keywrap.Context{Store: v.layout.ID.String(), Class: c.name, Purpose: p, ID: id.String()}
	}
	out := ClassHealth{Name: c.name}
	if !v.conf.ReadOnly {
		ec0 := context(keywrap.PurposeData, envelope.NewID())
		for i, key := range ec.Keys {
			op := keywrap.OpEncrypt
			if i == 0 {
				op = keywrap.OpGenerate
			}
			out.Wrap = append(out.Wrap, v.ask(ctx, keywrap.Check{Op: op, Key: key, Context: ec0}))
		}
	}
	unwrap := func(p keywrap.Purpose, h *envelope.Header) {
		if h == nil {
			return
		}
		id := h.File
		if h.Shared {
			id = h.Branch
		}
		for _, r := range h.Recipients {
			if r.Class == c.name && slices.Contains(ec.Allowed, r.Wrapped.Key) {
				out.Unwrap = append(out.Unwrap, v.ask(ctx, keywrap.Check{Op: keywrap.OpDecrypt, Wrapped: r.Wrapped, Context: context(p, id)}))
			}
		}
	}
	unwrap(keywrap.PurposeNames, names)
	if !v.conf.WriteOnly {
		unwrap(keywrap.PurposeData, data)
	}
	return out
}

// ask makes one probe. A service that knows no calls without effect is asked
// about the key's state.
func (v *Volume) ask(ctx context.Context, c keywrap.Check) Probe {
	p := Probe{Op: c.Op, Key: c.KeyURI(), Purpose: string(c.Context.Purpose)}
	err := keywrap.CheckWith(ctx, v.conf.Provider, c)
	if errors.Is(err, keywrap.ErrUnsupported) {
		var d keywrap.Description
		if d, err = v.conf.Provider.Describe(ctx, c.KeyURI()); err == nil && d.State != keywrap.Enabled {
			err = ErrKeyState
		}
	}
	if err == nil {
		p.OK = true
		return p
	}
	p.Error = err.Error()
	var call *keywrap.CallError
	if errors.As(err, &call) {
		p.RequestID, p.Hint = call.RequestID, call.Hint
	}
	return p
}

// failed remembers a failure for Health.
func (v *Volume) failed(class string, err error) {
	kind := fault.Of(err)
	if kind == fault.None {
		return
	}
	f := Failure{Time: time.Now(), Kind: kind.String(), Damage: kind == fault.Integrity || kind == fault.BadFormat,
		Class: class, Error: err.Error()}
	var call *keywrap.CallError
	if errors.As(err, &call) {
		f.Key, f.RequestID = call.Key, call.RequestID
	}
	s := &v.health
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.failures) == maxFailures {
		s.failures = slices.Delete(s.failures, 0, 1)
	}
	s.failures = append(s.failures, f)
}
