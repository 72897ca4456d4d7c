package kmsserver

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"time"
)

// Outage is a way for the whole service to be down.
type Outage string

// The outages. The admin API answers during each: on AdminURL always, on URL
// in all but OutageRefuse.
const (
	OutageNone        Outage = ""
	OutageRefuse      Outage = "refuse"      // nobody listens: connection refused
	OutageReset       Outage = "reset"       // connections are accepted, and reset after the request
	OutageHang        Outage = "hang"        // no answer until the client gives up; calls that hang stay so
	OutageInternal    Outage = "internal"    // HTTP 500 KMSInternalException
	OutageUnavailable Outage = "unavailable" // HTTP 503 ServiceUnavailableException
)

// Pseudo error codes of a Fault.
const (
	CodeHang  = "kmsd:hang"  // no answer until the client gives up
	CodeReset = "kmsd:reset" // the connection is reset
)

// Faults are the server's misbehaviour. The zero value is none.
type Faults struct {
	LatencyMS int     `json:"latency_ms,omitempty"` // added to every call
	JitterMS  int     `json:"jitter_ms,omitempty"`  // up to this much more, uniformly
	RateLimit float64 `json:"rate_limit,omitempty"` // calls per second, beyond which ThrottlingException; 0: none
	Burst     int     `json:"burst,omitempty"`      // size of the token bucket; 0: one second's worth, at least 1
	Outage    Outage  `json:"outage,omitempty"`
	OutageMS  int     `json:"outage_ms,omitempty"` // the outage ends by itself after so long; 0: when the faults are replaced
	Rules     []Fault `json:"rules,omitempty"`     // the first that matches answers
}

// Fault fails, or slows, the calls that match all the filters given.
type Fault struct {
	ID int `json:"id,omitempty"` // given by the server

	Operations []string          `json:"operations,omitempty"` // names; none: all
	Key        string            `json:"key,omitempty"`        // ARN, key id, or the alias that the caller uses
	Principal  string            `json:"principal,omitempty"`  // access key id or ARN
	Context    map[string]string `json:"context,omitempty"`    // pairs that an encryption context of the call must have

	Skip  int `json:"skip,omitempty"`  // let so many matching calls through first: the n-th fails with Skip n-1, Times 1
	Times int `json:"times,omitempty"` // fail so many, then no more; 0: until removed

	Error     string `json:"error,omitempty"`   // error code, CodeHang or CodeReset; "": latency only
	Message   string `json:"message,omitempty"` // "": as AWS words it where known; {key} stands for the key's ARN
	Status    int    `json:"status,omitempty"`  // HTTP status; 0: that of the code
	LatencyMS int    `json:"latency_ms,omitempty"`

	seen int // matching calls so far
}

var codeForm = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9.:]{0,99}$`)

func (f *Fault) check() error {
	switch {
	case f.Error == "" && f.LatencyMS == 0:
		return fmt.Errorf("%w: a fault has an error or a latency", ErrOptions)
	case f.Error != "" && !codeForm.MatchString(f.Error):
		return fmt.Errorf("%w: error code %q", ErrOptions, f.Error)
	case f.Status != 0 && (f.Status < 400 || f.Status > 599):
		return fmt.Errorf("%w: HTTP status %d", ErrOptions, f.Status)
	case f.Skip < 0 || f.Times < 0 || f.LatencyMS < 0:
		return fmt.Errorf("%w: a fault's numbers are not negative", ErrOptions)
	}
	for _, o := range f.Operations {
		if operations[o] == nil {
			return fmt.Errorf("%w: unknown operation %q", ErrOptions, o)
		}
	}
	return nil
}

func (f *Faults) check() error {
	if f.LatencyMS < 0 || f.JitterMS < 0 || f.RateLimit < 0 || f.Burst < 0 || f.OutageMS < 0 {
		return fmt.Errorf("%w: faults' numbers are not negative", ErrOptions)
	}
	switch f.Outage {
	case OutageNone, OutageRefuse, OutageReset, OutageHang, OutageInternal, OutageUnavailable:
	default:
		return fmt.Errorf("%w: outage %q", ErrOptions, f.Outage)
	}
	if f.OutageMS > 0 && f.Outage == OutageNone {
		return fmt.Errorf("%w: outage_ms without an outage", ErrOptions)
	}
	for i := range f.Rules {
		if err := f.Rules[i].check(); err != nil {
			return err
		}
	}
	return nil
}

// faultBox holds the faults in force.
type faultBox struct {
	change sync.Mutex  // serialises changes with the listener's state
	end    *time.Timer // of an outage with OutageMS; guarded by change
	mu     sync.Mutex
	now    Faults
	nextID int
	tokens float64
	filled time.Time
}

// SetFaults replaces all faults, their counts included. The zero Faults end
// every misbehaviour, except that calls which hang already stay hanging.
func (s *Server) SetFaults(f Faults) error {
	if err := f.check(); err != nil {
		return err
	}
	s.faults.change.Lock()
	defer s.faults.change.Unlock()
	s.faults.replace(f)
	if s.faults.end != nil {
		s.faults.end.Stop()
		s.faults.end = nil
	}
	if f.OutageMS > 0 {
		var timer *time.Timer
		timer = time.AfterFunc(time.Duration(f.OutageMS)*time.Millisecond, func() { s.endOutage(&timer) })
		s.faults.end = timer
	}
	return s.net.refuse(f.Outage == OutageRefuse)
}

// endOutage ends the outage that timer is of, unless the faults were replaced
// meanwhile, and leaves the other faults as they are.
func (s *Server) endOutage(timer **time.Timer) {
	b := &s.faults
	b.change.Lock()
	defer b.change.Unlock()
	if b.end == nil || b.end != *timer {
		return
	}
	b.end = nil
	b.mu.Lock()
	b.now.Outage, b.now.OutageMS = OutageNone, 0
	b.mu.Unlock()
	// Listening again on a port that this process holds does not fail; if it
	// did, the client under test would see the outage go on.
	_ = s.net.refuse(false)
}

func (b *faultBox) replace(f Faults) {
	f.Rules = append([]Fault(nil), f.Rules...)
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range f.Rules {
		b.nextID++
		f.Rules[i].ID, f.Rules[i].seen = b.nextID, 0
	}
	b.now, b.filled = f, time.Now()
	b.tokens = f.bucket()
}

// Faults returns the faults in force, with their ids.
func (s *Server) Faults() Faults {
	s.faults.mu.Lock()
	defer s.faults.mu.Unlock()
	f := s.faults.now
	f.Rules = append([]Fault(nil), f.Rules...)
	return f
}

// AddFault adds a rule behind the others and returns its id.
func (s *Server) AddFault(f Fault) (int, error) {
	if err := f.check(); err != nil {
		return 0, err
	}
	b := &s.faults
	b.mu.Lock()
	defer b.mu.Unlock()
	b.nextID++
	f.ID, f.seen = b.nextID, 0
	b.now.Rules = append(b.now.Rules, f)
	return f.ID, nil
}

// RemoveFault removes a rule and tells whether there was one.
func (s *Server) RemoveFault(id int) bool {
	b := &s.faults
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.now.Rules {
		if b.now.Rules[i].ID == id {
			b.now.Rules = append(b.now.Rules[:i:i], b.now.Rules[i+1:]...)
			return true
		}
	}
	return false
}

func (f *Faults) bucket() float64 {
	if f.Burst > 0 {
		return float64(f.Burst)
	}
	return max(1, f.RateLimit)
}

// action is what faults do to one call.
type action struct {
	latency  time.Duration
	err      *apiError
	injected string // as in Call
}

// decide takes the call's place in all counts.
func (b *faultBox) decide(q *request) action {
	b.mu.Lock()
	defer b.mu.Unlock()
	a := action{latency: time.Duration(b.now.LatencyMS) * time.Millisecond}
	if b.now.JitterMS > 0 {
		a.latency += rand.N(time.Duration(b.now.JitterMS) * time.Millisecond)
	}
	switch b.now.Outage {
	case OutageRefuse, OutageReset: // refuse: the request came in before the listener closed
		a.injected = "reset"
	case OutageHang:
		a.injected = "hang"
	case OutageInternal:
		a.injected, a.err = "outage", fail("KMSInternalException", "injected by kmsd")
	case OutageUnavailable:
		a.injected, a.err = "outage", fail("ServiceUnavailableException", "injected by kmsd")
	}
	if a.injected != "" {
		return a
	}
	for i := range b.now.Rules {
		f := &b.now.Rules[i]
		if !f.matches(q) {
			continue
		}
		f.seen++
		if f.seen <= f.Skip || f.Times > 0 && f.seen > f.Skip+f.Times {
			continue
		}
		a.apply(f, q)
		if a.injected != "" {
			return a
		}
	}
	if b.now.RateLimit > 0 && !b.take() {
		a.injected, a.err = "throttle", fail("ThrottlingException", "%s", defaultMessage("ThrottlingException", ""))
	}
	return a
}

func (b *faultBox) take() bool {
	now := time.Now()
	b.tokens = min(b.now.bucket(), b.tokens+now.Sub(b.filled).Seconds()*b.now.RateLimit)
	b.filled = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

func (f *Fault) matches(q *request) bool {
	if len(f.Operations) > 0 {
		found := false
		for _, o := range f.Operations {
			found = found || o == q.op
		}
		if !found {
			return false
		}
	}
	if f.Principal != "" && f.Principal != q.rec.UserIdentity.AccessKeyID && f.Principal != q.rec.UserIdentity.ARN {
		return false
	}
	if f.Key != "" && !f.matchesKey(q) {
		return false
	}
	if len(f.Context) == 0 {
		return true
	}
	for _, have := range q.peek.contexts() {
		if containsAll(have, f.Context) {
			return true
		}
	}
	return false
}

func (f *Fault) matchesKey(q *request) bool {
	p := &q.peek
	for _, ref := range []string{q.rec.KeyID, q.rec.SourceKeyID, p.KeyId, p.SourceKeyId, p.DestinationKeyId, p.TargetKeyId} {
		if ref != "" && (ref == f.Key || strings.HasSuffix(ref, ":key/"+f.Key)) {
			return true
		}
	}
	return false
}

func containsAll(have, want map[string]string) bool {
	for k, v := range want {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}

func (a *action) apply(f *Fault, q *request) {
	a.latency += time.Duration(f.LatencyMS) * time.Millisecond
	switch f.Error {
	case "":
	case CodeHang:
		a.injected = "hang"
	case CodeReset:
		a.injected = "reset"
	default:
		message := f.Message
		if message == "" {
			message = defaultMessage(f.Error, q.rec.KeyID)
		}
		message = strings.ReplaceAll(message, "{key}", q.rec.KeyID)
		a.injected, a.err = "error", &apiError{code: f.Error, message: message, status: f.Status}
	}
}

// silent tells whether the call is never answered.
func (a *action) silent() bool { return a.injected == "hang" || a.injected == "reset" }

// wait lets the latency pass. It reports false if the caller left meanwhile,
// and then marks the action as abandoned.
func (a *action) wait(ctx context.Context) bool {
	if a.latency <= 0 {
		return true
	}
	t := time.NewTimer(a.latency)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		a.injected, a.err = "abandoned", nil
		return false
	}
}

func (a *action) record(c *Call) {
	c.Injected = a.injected
	if a.err == nil {
		c.ErrorCode = CodeNoAnswer
	}
}

// vanish ends a call without an answer.
func (a *action) vanish(w http.ResponseWriter, r *http.Request) {
	if a.injected != "reset" {
		<-r.Context().Done() // the client gave up, or the server closes
		panic(http.ErrAbortHandler)
	}
	if h, ok := w.(http.Hijacker); ok {
		if conn, _, err := h.Hijack(); err == nil {
			if tcp, ok := conn.(*net.TCPConn); ok {
				_ = tcp.SetLinger(0) // closing sends RST
			}
			conn.Close()
			return
		}
	}
	panic(http.ErrAbortHandler) // net/http closes the connection without an answer
}
