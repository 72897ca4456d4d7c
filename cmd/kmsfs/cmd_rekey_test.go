package main

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

func TestParseAge(t *testing.T) {
	now := time.Date(2026, 3, 31, 12, 0, 0, 0, time.Local)
	for s, want := range map[string]time.Time{
		"":                     {},
		"2026-01-31":           time.Date(2026, 1, 31, 0, 0, 0, 0, time.Local),
		"2026-01-31T12:30":     time.Date(2026, 1, 31, 12, 30, 0, 0, time.Local),
		"2026-01-31T12:00:00Z": time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC),
		"90d":                  now.AddDate(0, 0, -90),
		"12h30m":               now.Add(-12*time.Hour - 30*time.Minute),
		"0s":                   now,
	} {
		if got, err := parseAge(s, now); err != nil || !got.Equal(want) {
			t.Errorf("%q: %v, %v, want %v", s, got, err, want)
		}
	}
	for _, s := range []string{"yesterday", "-1d", "-5m", "10", "d", "1.5d", "2026-13-01", "999999999999d", "90 d"} {
		if got, err := parseAge(s, now); !errors.Is(err, errUsage) {
			t.Errorf("%q: %v, %v, want a usage error", s, got, err)
		}
	}
}

func TestFailuresVerdict(t *testing.T) {
	of := func(kinds ...fault.Kind) (out []cryptfs.JobFailure) {
		for _, k := range kinds {
			out = append(out, cryptfs.JobFailure{Kind: k})
		}
		return out
	}
	for _, tt := range []struct {
		failures []cryptfs.JobFailure
		want     int
	}{
		{of(fault.None), exitFailure},
		{of(fault.None, fault.KeyDenied), exitKeys},
		{of(fault.KeyDenied, fault.Integrity, fault.None), exitDamage},
	} {
		if code, _, hint := explain(failuresVerdict("files", tt.failures)); code != tt.want || hint == "" {
			t.Errorf("%v: exit %d, hint %q, want exit %d", tt.failures, code, hint, tt.want)
		}
	}
	if err := failuresVerdict("files", nil); err != nil {
		t.Errorf("no failure: %v", err)
	}
}

func TestPace(t *testing.T) {
	p := &pace{every: 20 * time.Millisecond}
	start := time.Now()
	for range 6 {
		if err := p.wait(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := time.Since(start); got < 5*p.every {
		t.Errorf("six passed within %v, want at least %v", got, 5*p.every)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	slow := &pace{every: time.Hour}
	_ = slow.wait(t.Context())
	if err := slow.wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
