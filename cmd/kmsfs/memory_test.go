package main

import (
	"math"
	"runtime/debug"
	"testing"
)

// TestBoundMemory: a mount has a soft limit, unless its environment has another.
func TestBoundMemory(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	t.Cleanup(func() { debug.SetMemoryLimit(before) })
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
