package integration

import (
	"fmt"
	"os"
	"os/exec"
)

// helperVar makes the test program play another part when it is started again:
// its value is the part, its arguments are the part's.
const helperVar = "INTEGRATION_HELPER"

var helpers = map[string]func(args []string) error{
	"preempted-opens": preemptedOpens,
	"crash-client":    crashClient,
}

// runHelper plays a part, if one is asked for, and ends the process. TestMain
// calls it first.
func runHelper() {
	name := os.Getenv(helperVar)
	if name == "" {
		return
	}
	play, ok := helpers[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "%s=%s: no such part\n", helperVar, name)
		os.Exit(2)
	}
	if err := play(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// helper returns a command that plays a part.
func helper(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), helperVar+"="+name)
	cmd.Stderr = os.Stderr
	return cmd
}
