package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const modulePath = "github.com/kmsfs/kmsfs"

// system is something that can be mounted.
type system struct {
	name    string
	what    string   // one line for the report: version and options
	env     []string // HOME stands for the run's directory
	prepare []string // makes a store in STORE
	serve   []string // mounts STORE on MOUNT, and ends when it is unmounted
	peer    bool     // an encrypting file system that kmsfs is held against
	floor   bool     // FUSE without any work
}

// findSystems returns the systems that are asked for and installed.
func findSystems(o *options, programs string) ([]*system, error) {
	all := []*system{
		kmsfsSystem("kmsfs", filepath.Join(programs, "kmsfs"), o.placement),
		{
			name: "gocryptfs", peer: true, what: versionOf("gocryptfs", "-version"),
			prepare: []string{"gocryptfs", "-q", "-init", "-scryptn", "10", "-extpass", "echo bench", "STORE"},
			serve:   []string{"gocryptfs", "-q", "-fg", "-extpass", "echo bench", "STORE", "MOUNT"},
		},
		{
			name: "securefs", peer: true, what: packageOf("securefs"),
			prepare: []string{"securefs", "create", "--pass", "bench", "STORE"},
			serve:   []string{"securefs", "mount", "--pass", "bench", "STORE", "MOUNT"},
		},
		{name: "floor", floor: true, what: "go-fuse's loopback without passthrough", serve: []string{filepath.Join(programs, "floor"), "STORE", "MOUNT"}},
		{name: "floor+wb", floor: true, what: "the same with the kernel's writeback cache", serve: []string{filepath.Join(programs, "floor"), "-writeback", "STORE", "MOUNT"}},
		{name: "raw", what: "the disk below"},
	}
	var out []*system
	for _, name := range o.systems {
		i := slices.IndexFunc(all, func(s *system) bool { return s.name == name })
		if i < 0 {
			return nil, fmt.Errorf("%s: no such system", name)
		}
		s := all[i]
		if len(s.serve) > 0 {
			if _, err := exec.LookPath(s.serve[0]); err != nil {
				fmt.Fprintf(os.Stderr, "bench: %s is not installed, and left out\n", name)
				continue
			}
		}
		out = append(out, s)
	}
	for _, further := range o.kmsfs {
		name, path, ok := strings.Cut(further, "=")
		if !ok {
			return nil, fmt.Errorf("%s: want NAME=PATH", further)
		}
		out = append(out, kmsfsSystem(name, path, o.placement))
	}
	return out, nil
}

func kmsfsSystem(name, path, placement string) *system {
	return &system{
		name: name, what: versionOf(path, "version") + ", placement " + placement,
		env:     []string{"HOME=HOME", "XDG_CONFIG_HOME=HOME/config", "XDG_STATE_HOME=HOME/state"},
		prepare: []string{path, "init", "--placement", placement, "STORE"},
		serve:   []string{path, "mount", "--foreground", "STORE", "MOUNT"},
	}
}

// versionOf returns the first line that a program says of itself.
func versionOf(program string, args ...string) string {
	out, err := exec.Command(program, args...).CombinedOutput()
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}

// packageOf returns what Debian's package manager says of a program that does
// not know its own version.
func packageOf(name string) string {
	return versionOf("dpkg-query", "-W", "-f", "${Package} ${Version}", name)
}

// command is a program in a process group of its own, so that Ctrl-C on the
// terminal does not reach it, and that is killed with all that it started when
// ctx ends.
func command(ctx context.Context, env []string, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// mount is a mounted store of a system, or, for raw, a bare directory.
type mount struct {
	sys  *system
	root string // of store and mount point
	dir  string // where the workloads run
	cmd  *exec.Cmd
	log  bytes.Buffer
	gone chan struct{} // closed when the daemon has ended

	brief bool
}

// mount makes a store below dir, mounts it, and returns when it is usable. The
// caller calls end.
func (s *system) mount(ctx context.Context, dir string) (*mount, error) {
	root, err := os.MkdirTemp(dir, "mount-")
	if err != nil {
		return nil, err
	}
	m := &mount{sys: s, root: root, dir: filepath.Join(root, "m"), gone: make(chan struct{})}
	if err := errors.Join(os.Mkdir(m.dir, 0o755), os.Mkdir(filepath.Join(root, "s"), 0o755)); err != nil {
		return nil, err
	}
	if err := m.begin(ctx); err != nil {
		return nil, errors.Join(err, m.end())
	}
	return m, nil
}

func (m *mount) expand(words []string) []string {
	replace := strings.NewReplacer("STORE", filepath.Join(m.root, "s"), "MOUNT", m.dir)
	out := make([]string, len(words))
	for i, w := range words {
		out[i] = replace.Replace(w)
	}
	return out
}

func (m *mount) begin(ctx context.Context) error {
	s := m.sys
	var env []string
	for _, e := range s.env {
		name, value, _ := strings.Cut(e, "=")
		env = append(env, name+"="+strings.Replace(value, "HOME", m.root, 1))
	}
	if len(s.prepare) > 0 {
		args := m.expand(s.prepare)
		if out, err := command(ctx, env, args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	if len(s.serve) == 0 {
		close(m.gone)
		return nil
	}
	// Not under ctx: the daemon ends by being unmounted.
	args := m.expand(s.serve)
	m.cmd = command(context.Background(), env, args[0], args[1:]...)
	m.cmd.Stdout, m.cmd.Stderr = &m.log, &m.log
	if err := m.cmd.Start(); err != nil {
		m.cmd = nil
		close(m.gone)
		return err
	}
	go func() {
		_ = m.cmd.Wait()
		close(m.gone)
	}()
	for !mounted(m.dir) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-m.gone:
			return fmt.Errorf("the daemon ended: %s", bytes.TrimSpace(m.log.Bytes()))
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

// mounted reports whether dir is a mount point.
func mounted(dir string) bool {
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

// end unmounts, waits for the daemon, and removes the store. What does not end
// by itself within a minute is detached and killed.
func (m *mount) end() error {
	var failed error
	if m.cmd != nil {
		deadline := time.Now().Add(time.Minute)
		for mounted(m.dir) && time.Now().Before(deadline) {
			if unmount(m.dir, false) != nil {
				time.Sleep(100 * time.Millisecond)
			}
		}
		if mounted(m.dir) {
			failed = errors.Join(errors.New("busy: unmounted by force"), unmount(m.dir, true))
		}
		select {
		case <-m.gone:
		case <-time.After(time.Minute):
			failed = errors.Join(failed, errors.New("the daemon did not end and was killed"), unix.Kill(m.cmd.Process.Pid, unix.SIGKILL))
			<-m.gone
		}
	}
	return errors.Join(failed, os.RemoveAll(m.root))
}

// unmount takes a mount away, as whoever may.
func unmount(dir string, lazy bool) error {
	if os.Geteuid() == 0 {
		flags := 0
		if lazy {
			flags = unix.MNT_DETACH
		}
		return unix.Unmount(dir, flags)
	}
	args := []string{"-u", dir}
	if lazy {
		args = []string{"-u", "-z", dir}
	}
	return exec.Command("fusermount3", args...).Run()
}

// reply is a line of the client's: one measurement.
type reply struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Error string  `json:"error,omitempty"`
}

// client runs this program again, as the one that uses the mount, and calls f
// with everything that it measured.
func (m *mount) client(ctx context.Context, part string, args []string, f func(reply)) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// Without signals of the Go runtime's to itself, each of which interrupts a
	// request.
	env := []string{"GODEBUG=asyncpreemptoff=1"}
	cmd := command(ctx, env, self, append([]string{"client", part, "-dir", m.dir, fmt.Sprintf("-brief=%v", m.brief)}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var r reply
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return fmt.Errorf("client: %q: %w", lines.Text(), err)
		}
		f(r)
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("client: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	return nil
}

// memory returns what the daemon has resident, and the most that it ever had,
// in MiB; 0 without a daemon.
func (m *mount) memory() (now, peak float64) {
	if m.cmd == nil {
		return 0, 0
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.cmd.Process.Pid))
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(b)) {
		var kib float64
		if n, _ := fmt.Sscanf(line, "VmRSS: %f kB", &kib); n == 1 {
			now = kib / 1024
		}
		if n, _ := fmt.Sscanf(line, "VmHWM: %f kB", &kib); n == 1 {
			peak = kib / 1024
		}
	}
	return now, peak
}
