package rig

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Need skips the test with the name of what is missing, or fails it where
// nothing may be (CI=true or REQUIRE_FUSE=1). Each need is a program on PATH, or
// one of "root" and "fuse".
func Need(t testing.TB, needs ...string) {
	t.Helper()
	for _, n := range needs {
		ok := false
		switch n {
		case "root":
			ok = os.Geteuid() == 0
		case "fuse":
			f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
			if ok = err == nil; ok {
				_ = f.Close()
			}
		case "postgres":
			_, err := PostgresBin()
			ok = err == nil
		default:
			_, err := exec.LookPath(n)
			ok = err == nil
		}
		if ok {
			continue
		}
		if os.Getenv("CI") == "true" || os.Getenv("REQUIRE_FUSE") == "1" {
			t.Fatalf("missing: %s", n)
		}
		t.Skipf("missing: %s", n)
	}
}

var built struct {
	once sync.Once
	path string
	err  error
}

// Binary returns the path of kmsfs, built once for the test process (with the
// race detector if RIG_RACE=1).
func Binary(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		dir, err := os.MkdirTemp("", "kmsfs-rig-")
		if err != nil {
			built.err = err
			return
		}
		built.path = filepath.Join(dir, "kmsfs")
		args := []string{"build", "-o", built.path}
		if os.Getenv("RIG_RACE") == "1" {
			args = append(args, "-race")
		}
		out, err := exec.Command("go", append(args, "github.com/kmsfs/kmsfs/cmd/kmsfs")...).CombinedOutput()
		if err != nil {
			built.err = fmt.Errorf("go build: %w: %s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.path
}

// Clean removes what Binary built. TestMain calls it last.
func Clean() {
	if built.path != "" {
		_ = os.RemoveAll(filepath.Dir(built.path))
	}
}

// Home is a user of kmsfs: a home directory of its own, and an environment.
type Home struct {
	T   testing.TB
	Dir string
	Env []string // added to every command's environment

	Wrap []string // a program that kmsfs is run by, such as prlimit, with its arguments
}

// NewHome returns a user whose files lie in a temporary directory.
func NewHome(t testing.TB, env ...string) *Home {
	t.Helper()
	h := &Home{T: t, Dir: t.TempDir()}
	h.Env = append([]string{
		"HOME=" + h.Dir, "XDG_CONFIG_HOME=" + h.Dir + "/.config", "XDG_STATE_HOME=" + h.Dir + "/.state",
		"AWS_EC2_METADATA_DISABLED=true", "AWS_CONFIG_FILE=/dev/null", "AWS_SHARED_CREDENTIALS_FILE=/dev/null",
	}, env...)
	return h
}

// Result is how a command ended.
type Result struct {
	Code           int
	Stdout, Stderr string
}

// Try runs kmsfs and returns how it ended.
func (h *Home) Try(args ...string) Result {
	h.T.Helper()
	command := append(append(slices.Clone(h.Wrap), Binary(h.T)), args...)
	return h.Exec(nil, command[0], command[1:]...)
}

// Run runs kmsfs, fails the test unless it succeeds, and returns its output.
func (h *Home) Run(args ...string) string {
	h.T.Helper()
	r := h.Try(args...)
	if r.Code != 0 {
		h.T.Fatalf("kmsfs %s: exit %d\n%s%s", strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// Exec runs any program with the user's environment; a minute-long hang is a
// failure.
func (h *Home) Exec(stdin []byte, name string, args ...string) Result {
	h.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), h.Env...)
	var out, errb bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &out, &errb
	cmd.WaitDelay = 5 * time.Second // a background child may keep the pipes
	err := cmd.Run()
	if ctx.Err() != nil {
		h.T.Fatalf("%s %s: no end in five minutes\n%s%s", name, strings.Join(args, " "), out.String(), errb.String())
	}
	if err != nil && cmd.ProcessState == nil {
		h.T.Fatalf("%s: %v", name, err)
	}
	return Result{cmd.ProcessState.ExitCode(), out.String(), errb.String()}
}

// Sh runs a shell script (bash, -e, pipefail) that must succeed, and returns
// its output.
func (h *Home) Sh(script string, args ...string) string {
	h.T.Helper()
	r := h.TrySh(script, args...)
	if r.Code != 0 {
		h.T.Fatalf("exit %d of:\n%s\n%s%s", r.Code, script, tail(r.Stdout), tail(r.Stderr))
	}
	return r.Stdout
}

// TrySh is Sh for a script that may fail. args are $1, $2, …
func (h *Home) TrySh(script string, args ...string) Result {
	h.T.Helper()
	return h.Exec(nil, "bash", append([]string{"-e", "-o", "pipefail", "-c", script, "bash"}, args...)...)
}

func tail(s string) string {
	if len(s) > 4000 {
		return "…" + s[len(s)-4000:]
	}
	return s
}

// Mount is a mounted store.
type Mount struct {
	Home  *Home
	Store string
	Dir   string // mount point
	PID   int    // of the serving process
}

// Mount mounts a store; the test's end unmounts it. Flags come before the
// operands.
func (h *Home) Mount(store string, flags ...string) *Mount {
	h.T.Helper()
	Need(h.T, "fuse")
	m := &Mount{Home: h, Store: store, Dir: filepath.Join(h.T.TempDir(), "m")}
	if err := os.Mkdir(m.Dir, 0o755); err != nil {
		h.T.Fatal(err)
	}
	m.Again(flags...)
	h.T.Cleanup(m.end)
	return m
}

// Again mounts the store once more at the same place.
func (m *Mount) Again(flags ...string) {
	m.Home.T.Helper()
	pidFile := filepath.Join(m.Home.T.TempDir(), "pid")
	args := append([]string{"mount", "--pid-file", pidFile}, flags...)
	m.Home.Run(append(args, m.Store, m.Dir)...)
	b, err := os.ReadFile(pidFile)
	if err != nil {
		m.Home.T.Fatal(err)
	}
	if _, err := fmt.Sscan(string(b), &m.PID); err != nil {
		m.Home.T.Fatalf("pid file %q: %v", b, err)
	}
}

// Unmount unmounts and waits until the server has ended.
func (m *Mount) Unmount() {
	m.Home.T.Helper()
	m.Home.Run("umount", m.Dir)
}

// Kill ends the server with SIGKILL and clears the dead mount away.
func (m *Mount) Kill() {
	m.Home.T.Helper()
	m.Die()
	m.Detach()
}

// Die ends the server with SIGKILL, and leaves the dead mount where it is, so
// that nobody's path leads to the directory below it.
func (m *Mount) Die() {
	m.Home.T.Helper()
	if err := unix.Kill(m.PID, unix.SIGKILL); err != nil {
		m.Home.T.Fatalf("kill %d: %v", m.PID, err)
	}
	m.Ended()
}

// Ended waits for the end of a server that was killed: until then it has the
// store's lock.
func (m *Mount) Ended() {
	for range 500 {
		if unix.Kill(m.PID, 0) != nil || zombie(m.PID) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Detach clears a dead mount away.
func (m *Mount) Detach() {
	for Mounted(m.Dir) {
		if err := unix.Unmount(m.Dir, unix.MNT_DETACH); err != nil {
			_ = exec.Command("fusermount3", "-u", "-z", m.Dir).Run()
		}
	}
}

// zombie reports whether nothing is left of a process but its exit status. Its
// first thread may be dead while others still hold its files, and locks.
func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil || len(threads) > 1 {
		return err != nil
	}
	i := bytes.LastIndexByte(b, ')')
	return i >= 0 && bytes.HasPrefix(b[i+1:], []byte(" Z"))
}

func (m *Mount) end() {
	if !Mounted(m.Dir) {
		return
	}
	if r := m.Home.Try("umount", m.Dir); r.Code != 0 {
		m.Home.T.Errorf("umount: %s", r.Stderr)
		m.Kill()
	}
}

// Mounted reports whether dir is a mount point.
func Mounted(dir string) bool {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == dir {
			return true
		}
	}
	return false
}

// Path joins names to the mount point.
func (m *Mount) Path(names ...string) string {
	return filepath.Join(append([]string{m.Dir}, names...)...)
}

// Put writes a file on the mount.
func (m *Mount) Put(name string, data []byte) {
	m.Home.T.Helper()
	if err := os.WriteFile(m.Path(name), data, 0o644); err != nil {
		m.Home.T.Fatal(err)
	}
}

// RSS returns the server's resident memory, in bytes.
func (m *Mount) RSS() int64 {
	m.Home.T.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.PID))
	if err != nil {
		m.Home.T.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var kb int64
		if n, _ := fmt.Sscanf(line, "VmRSS: %d kB", &kb); n == 1 {
			return kb << 10
		}
	}
	m.Home.T.Fatal("no VmRSS")
	return 0
}
