package main

import (
	"math"
	"runtime/debug"
	"testing"
)

// TestBoundMemory: a mount has a soft limit, unless its environment has another.
func TestBoundMemory(t *testing.T) {
	before, percent := debug.SetMemoryLimit(-1), debug.SetGCPercent(100)
	t.Cleanup(func() { debug.SetMemoryLimit(before); debug.SetGCPercent(percent) })
	for env, want := range map[string]int64{"": softMemory, "1GiB": math.MaxInt64} {
		t.Setenv("GOMEMLIMIT", env)
		debug.SetMemoryLimit(math.MaxInt64)
		stop := boundMemory()
		if got := debug.SetMemoryLimit(-1); got != want {
			t.Errorf("GOMEMLIMIT=%q: the limit is %d, want %d", env, got, want)
		}
		stop()
	}
}

// TestHeadroom: the less is live, the more may come before the collector runs,
// and never so much that it counts.
func TestHeadroom(t *testing.T) {
	for live, want := range map[uint64]int{0: 800, 4 << 20: 800, 5 << 20: 400, 16 << 20: 200, 17 << 20: 100, 300 << 20: 100} {
		if got := gcPercent(live); got != want {
			t.Errorf("%d MiB live: GOGC %d, want %d", live>>20, got, want)
		}
	}
	if got := memoryLimit(10 << 20); got != softMemory {
		t.Errorf("little live: a limit of %d, want %d", got, int64(softMemory))
	}
	if got, live := memoryLimit(softMemory), int64(softMemory); got <= live {
		t.Errorf("%d live: a limit of %d", live, got)
	}
}
