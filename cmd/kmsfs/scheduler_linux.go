package main

import (
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// How a mount's process is scheduled. A request takes tens of microseconds, most
// of it waking up and going to sleep, and what Go's runtime adds to that counts.
// docs/performance.md has the measurements.
const (
	// timerSlack is how much later than it asks for a thread of a mount may be
	// woken (prctl(2), PR_SET_TIMERSLACK). The runtime's monitor looks every 20 µs
	// whether a processor is held by a system call, and with the kernel's slack of
	// 50 µs that is 14,000 interruptions a second, on a machine's few cores. The
	// runtime's timers, and pauses in which all of minProcs are in a system call,
	// are at most this much longer.
	timerSlack = 2 * time.Millisecond

	// minProcs is GOMAXPROCS on a machine with fewer cores. A thread that waits for
	// a request, or for the disk, keeps its processor until the monitor takes it
	// away: with a few to spare none is waited for.
	minProcs = 16
)

// relaxed reports whether the calling thread has timerSlack.
func relaxed() bool {
	slack, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	return err == nil && int64(slack) >= timerSlack.Nanoseconds()
}

// relaxTimers gives the calling thread, and the threads and processes that it
// starts, timerSlack, and reports whether they have it: with a real-time policy
// they take none. The caller has locked the thread.
func relaxTimers() bool {
	return relaxed() || unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(timerSlack.Nanoseconds()), 0, 0, 0) == nil && relaxed()
}

// beginRelaxed starts the program once more in its process, if it was not started
// with timerSlack: the runtime's own threads began before main did. It returns if
// there is nothing to be done, or if that is not to be had.
func beginRelaxed() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if relaxed() || !relaxTimers() {
		return
	}
	if path, err := os.Executable(); err == nil {
		_ = unix.Exec(path, os.Args, os.Environ())
	}
}

// spareProcs raises GOMAXPROCS to minProcs, unless the environment sets it.
func spareProcs() {
	if os.Getenv("GOMAXPROCS") == "" && runtime.GOMAXPROCS(0) < minProcs {
		runtime.GOMAXPROCS(minProcs)
	}
}
