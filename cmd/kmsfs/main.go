package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first signal ends the work in hand cleanly, a second one the process.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// run is the whole program: args is os.Args, the result the exit code. The
// program's name decides whether it speaks as kmsfs or as a helper of mount(8).
// ctx ends at the first SIGINT or SIGTERM.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr}
	if err := hideMemory(); err != nil {
		a.warn("%v", err)
	}
	name, rest := "kmsfs", []string(nil)
	if len(args) > 0 {
		name, rest = filepath.Base(args[0]), args[1:]
	}
	if mountHelperNames[name] {
		return mountHelperCode(a.finish(a.runMountHelper(ctx, rest)))
	}
	root := newRootCommand(a)
	root.SetArgs(rest)
	return a.finish(root.ExecuteContext(ctx))
}
