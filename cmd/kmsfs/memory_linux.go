package main

import (
	"fmt"

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
