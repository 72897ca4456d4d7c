package main

import (
	"fmt"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"

	"golang.org/x/sys/unix"
)

// hideMemory takes this process's memory out of everyone's reach, before it
// holds keys: no core dump, no ptrace and no /proc/PID/mem for others of the
// same user.
func hideMemory() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("core dumps cannot be turned off: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("memory cannot be hidden from debuggers: %w", err)
	}
	return nil
}

// softMemory is what a mount's memory is kept below while what is live fits: the
// collector, which otherwise waits until as much has come again as is live, runs
// earlier then. An idle mount has 20 MiB, streaming takes under 80, and neither
// comes near; a listing of a million names does.
const softMemory = 320 << 20

// headroom is how much comes before the collector runs, where less is live: of the
// few MiB that a mount mostly has, writing would make as many again, and so a
// run, in some milliseconds.
const headroom = 32 << 20

// boundMemory keeps softMemory and headroom, unless the environment decides
// (GOMEMLIMIT, GOGC), until the function that it returns is called. If more than
// softMemory is live, which takes directories of millions of names, the limit is
// raised, or the collector would do nothing but run.
func boundMemory() (stop func()) {
	var limit int64
	var percent int
	adjust := func() {
		live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
		metrics.Read(live)
		if want := memoryLimit(live[0].Value.Uint64()); want != limit && os.Getenv("GOMEMLIMIT") == "" {
			limit = want
			debug.SetMemoryLimit(limit)
		}
		if want := gcPercent(live[0].Value.Uint64()); want != percent && os.Getenv("GOGC") == "" {
			percent = want
			debug.SetGCPercent(percent)
		}
	}
	adjust()
	done := make(chan struct{})
	go func() {
		tick := time.NewTicker(2 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				adjust()
			}
		}
	}()
	return func() { close(done) }
}

func memoryLimit(live uint64) int64 { return max(softMemory, int64(live)/4*5) }

// gcPercent is what GOGC has to be for headroom, in steps: a change stops the
// program for a moment.
func gcPercent(live uint64) int {
	for percent := 800; percent > 100; percent /= 2 {
		if live*uint64(percent)/100 <= headroom {
			return percent
		}
	}
	return 100
}
