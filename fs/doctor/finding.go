package doctor

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Level says how bad a finding is.
type Level string

// The levels.
const (
	OK      Level = "ok"
	Info    Level = "info"    // worth knowing, nothing to do
	Warning Level = "warning" // works, but not as it should, or not for long
	Error   Level = "error"   // does not work
)

// Finding is the answer of a check about one thing.
type Finding struct {
	Check   string `json:"check"` // "fuse.device"; stable, for scripts
	Level   Level  `json:"level"`
	Subject string `json:"subject,omitempty"` // what it is about: a path, key URI, or class
	Text    string `json:"text"`              // what was found, for people
	Remedy  string `json:"remedy,omitempty"`  // what to do
}

// Check is one thing to look at. Run returns what it found; when ctx ends it
// may return late or never.
type Check struct {
	Name string // of the finding if it does not end
	Run  func(ctx context.Context) []Finding
}

// Run runs all checks at once and returns their findings in the order of the
// checks. A check that takes longer than limit has an error in place of its
// findings, and is left behind.
func Run(ctx context.Context, limit time.Duration, checks ...Check) []Finding {
	results := make([][]Finding, len(checks))
	var wg sync.WaitGroup
	for i, c := range checks {
		wg.Go(func() { results[i] = bounded(ctx, limit, c) })
	}
	wg.Wait()
	var out []Finding
	for _, r := range results {
		out = append(out, r...)
	}
	return out
}

// grace is what a check gets beyond its limit to tell by itself what did not
// answer.
const grace = 500 * time.Millisecond

func bounded(ctx context.Context, limit time.Duration, c Check) []Finding {
	inner, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	done := make(chan []Finding, 1)
	go func() { done <- c.Run(inner) }()
	hung := time.NewTimer(limit + grace)
	defer hung.Stop()
	select {
	case found := <-done:
		return found
	case <-hung.C:
		return []Finding{{Check: c.Name, Level: Error, Text: fmt.Sprintf("no answer within %v", limit),
			Remedy: "find out what hangs (a network file system, a dead mount); --timeout waits longer"}}
	}
}

// Count returns how many findings have the level.
func Count(findings []Finding, l Level) int {
	n := 0
	for _, f := range findings {
		if f.Level == l {
			n++
		}
	}
	return n
}

func one(check string, l Level, subject, text, remedy string) []Finding {
	return []Finding{{check, l, subject, text, remedy}}
}
