package limit

import (
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

const (
	openTime    = time.Second     // between two probes of a key
	probeBudget = 2 * time.Second // of a probe, and of what is under way when a breaker opens
)

// subject is what a call is about.
type subject struct {
	op      string
	keys    []string // one; ReEncrypt has the destination as well
	context keywrap.Context
	// passes goes through an open breaker with a probe's budget; mute changes no
	// breaker.
	passes, mute bool
}

func (s *subject) key() string { return s.keys[0] }

// breaker is that of one key, while open.
type breaker struct {
	failure *keywrap.CallError
	since   time.Time
	next    time.Time // when a probe may go
	probing bool
}

// breakers holds the open ones, and what is under way by key.
type breakers struct {
	log *slog.Logger

	mu      sync.Mutex
	open    map[string]*breaker
	flights map[string]map[*budget]bool
}

func newBreakers(log *slog.Logger) *breakers {
	return &breakers{log: log, open: map[string]*breaker{}, flights: map[string]map[*budget]bool{}}
}

// enter answers for s whether it is a probe, or the failure of an open breaker
// if it may not go. A probe owes a leave.
func (b *breakers) enter(s *subject) (probe bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	for _, key := range s.keys {
		o := b.open[key]
		if o == nil || s.passes {
			continue
		}
		if o.probing || now.Before(o.next) {
			return false, refusal(o.failure, s)
		}
		probe = true
	}
	if !probe {
		return false, nil
	}
	for _, key := range s.keys {
		if o := b.open[key]; o != nil {
			o.probing, o.next = true, now.Add(openTime)
		}
	}
	return true, nil
}

// start registers a call that has its turn, and shortens it if a breaker is
// open that it passes. A breaker that opened while it waited refuses it.
func (b *breakers) start(s *subject, probe bool, f *budget) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, key := range s.keys {
		o := b.open[key]
		switch {
		case o == nil:
		case s.passes:
			f.shorten(probeBudget)
		case !probe:
			return refusal(o.failure, s)
		}
	}
	for _, key := range s.keys {
		if b.flights[key] == nil {
			b.flights[key] = map[*budget]bool{}
		}
		b.flights[key][f] = true
	}
	return nil
}

func (b *breakers) end(s *subject, f *budget) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, key := range s.keys {
		if delete(b.flights[key], f); len(b.flights[key]) == 0 {
			delete(b.flights, key)
		}
	}
}

// leave takes the outcome of a call. It returns the key whose breaker it opened,
// "" if none.
func (b *breakers) leave(s *subject, probe bool, how outcome, err error) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, key := range s.keys {
		o := b.open[key]
		if o == nil {
			continue
		}
		if probe {
			o.probing = false
		}
		if !s.mute && (how == answered || how == throttled) {
			delete(b.open, key)
			b.log.Info("the key service answers again", "key", key, "after", time.Since(o.since).Round(time.Millisecond))
		}
	}
	if how != unavailable || s.mute {
		return ""
	}
	failure := callError(err, s)
	key := s.key()
	if slices.Contains(s.keys, failure.Key) {
		key = failure.Key
	}
	if o := b.open[key]; o != nil {
		o.failure = failure
		return ""
	}
	now := time.Now()
	b.open[key] = &breaker{failure: failure, since: now, next: now.Add(openTime)}
	for f := range b.flights[key] {
		f.shorten(probeBudget)
	}
	b.log.Warn("the key service does not answer; calls fail at once, one a second tries again", "key", key, "error", err)
	return key
}

// refusalOf returns the error with which an open breaker of one of the subject's
// keys refuses it, or nil.
func (b *breakers) refusalOf(s *subject, key string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	o := b.open[key]
	if o == nil || s.passes || !slices.Contains(s.keys, key) {
		return nil
	}
	return refusal(o.failure, s)
}

// refusal is failure as the failure of s, which was not sent.
func refusal(failure *keywrap.CallError, s *subject) error {
	out := *failure
	out.Op = s.op
	if !slices.Contains(s.keys, out.Key) {
		out.Key = s.key()
	}
	return &out
}

// callError is err as the CallError that every failure is.
func callError(err error, s *subject) *keywrap.CallError {
	var ce *keywrap.CallError
	if errors.As(err, &ce) {
		return ce
	}
	return &keywrap.CallError{Op: s.op, Key: s.key(), Err: err}
}

func (b *breakers) outages() []Outage {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]Outage, 0, len(b.open))
	for key, o := range b.open {
		out = append(out, Outage{Key: key, Since: o.since, Error: o.failure.Error()})
	}
	slices.SortFunc(out, func(a, b Outage) int { return a.Since.Compare(b.Since) })
	return out
}
