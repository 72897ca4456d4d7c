package audit

import (
	"context"
	"io"
	"os"
	"strconv"
	"strings"
)

// Caller is the process that an operation is done for, as the kernel names it
// in a FUSE request. All of it is what the process claims to be: any process
// may choose its own program name (prctl(2), PR_SET_NAME).
type Caller struct {
	UID     uint32 `json:"uid"`
	GID     uint32 `json:"gid"`
	PID     uint32 `json:"pid"`               // of the thread, in the mount's pid namespace; 0 if it has none there
	Program string `json:"program,omitempty"` // /proc/PID/comm, read by Write if empty
}

type callerKey struct{}

// WithCaller returns a context that carries c.
func WithCaller(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// CallerOf returns the caller that ctx carries; ok is false for work that is
// done for nobody, such as a refill of a pool.
func CallerOf(ctx context.Context) (c Caller, ok bool) {
	c, ok = ctx.Value(callerKey{}).(Caller)
	return c, ok
}

// withProgram returns a copy of c with its program's name. The process waits
// for its operation meanwhile, so it still exists, unless it was killed.
func (c Caller) withProgram() *Caller {
	if c.Program == "" && c.PID != 0 {
		c.Program = comm(c.PID)
	}
	c.Program = clip(c.Program, maxField)
	return &c
}

// comm reads /proc/PID/comm (proc_pid_comm(5)): at most 15 bytes, for kernel
// threads up to 63.
func comm(pid uint32) string {
	f, err := os.Open("/proc/" + strconv.FormatUint(uint64(pid), 10) + "/comm")
	if err != nil {
		return "" // the process has ended, or /proc is hidden
	}
	defer f.Close()
	var b [64]byte
	n, _ := io.ReadFull(f, b[:]) // a short file is the rule
	return strings.TrimRight(string(b[:n]), "\n")
}
