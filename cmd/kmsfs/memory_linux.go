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
// earlier then. An idle mount has 20 MiB, streaming takes about 120, and neither
// comes near; a listing of a million names does.
const softMemory = 320 << 20

// boundMemory sets the limit, unless the environment does (GOMEMLIMIT), until the
// function that it returns is called. If more than that is live, which takes
// directories of millions of names, the limit is raised, or the collector would
// do nothing but run.
func boundMemory() (stop func()) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return func() {}
	}
	debug.SetMemoryLimit(softMemory)
	done := make(chan struct{})
	go func() {
		tick := time.NewTicker(2 * time.Second)
		defer tick.Stop()
		live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
		limit := int64(softMemory)
		for {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			metrics.Read(live)
			if want := max(softMemory, int64(live[0].Value.Uint64())/4*5); want != limit {
				limit = want
				debug.SetMemoryLimit(limit)
			}
		}
	}()
	return func() { close(done) }
}
