package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// leaseStore is a store on a disk that two machines share, where flock(2) does
// not reach from one to the other: its lock file is another one for each.
type leaseStore struct {
	t     *testing.T
	h     *rig.Home
	store string
}

// leaseMachine is a machine as far as kmsfs sees it: a mount namespace with
// machine and boot ids of its own, and a UTS namespace with a name.
type leaseMachine struct {
	s    *leaseStore
	name string
}

func newLeaseStore(t *testing.T) *leaseStore {
	rig.Need(t, "root", "fuse", "unshare", "nsenter")
	s := &leaseStore{t: t, h: rig.NewHome(t)}
	s.store = filepath.Join(t.TempDir(), "S")
	s.h.Run("init", s.store)
	return s
}

func (s *leaseStore) machine(name string) *leaseMachine { return &leaseMachine{s, name} }

// enter is a script that becomes the machine, then its arguments. A system
// without machine-id(5) is known by its boot.
const leaseEnter = `set -e
hostname "$1"; d=$2; shift 2
[ ! -e /etc/machine-id ] || mount --bind "$d/machine" /etc/machine-id
mount --bind "$d/boot" /proc/sys/kernel/random/boot_id
exec "$@"`

// command is kmsfs on the machine. The store's lock is no other machine's.
func (m *leaseMachine) command(args ...string) *exec.Cmd {
	t := m.s.t
	t.Helper()
	ids := t.TempDir()
	for name, text := range map[string]string{"machine": fmt.Sprintf("%032x\n", m.name), "boot": "boot of " + m.name + "\n"} {
		if err := os.WriteFile(filepath.Join(ids, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(m.s.store, ".kmsfs/lock")); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", append([]string{"--mount", "--uts", "--propagation", "private",
		"sh", "-c", leaseEnter, "sh", m.name, ids, rig.Binary(t)}, args...)...)
	cmd.Env = append(os.Environ(), m.s.h.Env...)
	return cmd
}

// try runs a command on the machine to its end.
func (m *leaseMachine) try(args ...string) (code int, text string) {
	m.s.t.Helper()
	var out bytes.Buffer
	cmd := m.command(args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		m.s.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String()
}

// leaseMount is a mount on a machine.
type leaseMount struct {
	t   *testing.T
	cmd *exec.Cmd
	dir string // on the machine
	log string
}

// start begins to mount.
func (m *leaseMachine) start(flags ...string) *leaseMount {
	t := m.s.t
	t.Helper()
	l := &leaseMount{t: t, dir: t.TempDir(), log: filepath.Join(t.TempDir(), "log")}
	args := append([]string{"mount", "--foreground", "--lease-interval", "1s", "--log-file", l.log}, flags...)
	l.cmd = m.command(append(args, m.s.store, l.dir)...)
	l.cmd.Stderr = os.Stderr
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if l.cmd.ProcessState == nil {
			_ = l.cmd.Process.Kill()
			_ = l.cmd.Wait()
		}
	})
	return l
}

func (m *leaseMachine) mount(flags ...string) *leaseMount {
	m.s.t.Helper()
	l := m.start(flags...)
	l.await("msg=mounted")
	return l
}

func (l *leaseMount) logged(text string) bool {
	b, _ := os.ReadFile(l.log)
	return strings.Contains(string(b), text)
}

func (l *leaseMount) await(text string) {
	l.t.Helper()
	for end := time.Now().Add(60 * time.Second); !l.logged(text); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			b, _ := os.ReadFile(l.log)
			l.t.Fatalf("no %q in the log:\n%s", text, b)
		}
	}
}

// path is a file on the mount, as it is to be had from outside the machine.
func (l *leaseMount) path(name string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", l.cmd.Process.Pid), l.dir, name)
}

func (l *leaseMount) put(name, data string) error {
	f, err := os.Create(l.path(name))
	if err != nil {
		return err
	}
	_, err = f.WriteString(data)
	return errors.Join(err, f.Sync(), f.Close())
}

func (l *leaseMount) want(name, data string) {
	l.t.Helper()
	b, err := os.ReadFile(l.path(name))
	if err != nil || string(b) != data {
		l.t.Errorf("%s: got %q, %v, want %q", name, b, err, data)
	}
}

// end sends a signal and waits until the process has ended.
func (l *leaseMount) end(s os.Signal) int {
	l.t.Helper()
	if err := l.cmd.Process.Signal(s); err != nil {
		l.t.Fatal(err)
	}
	_ = l.cmd.Wait()
	return l.cmd.ProcessState.ExitCode()
}

// kmsfs runs a command in the machine of the mount.
func (l *leaseMount) kmsfs(h *rig.Home, args ...string) rig.Result {
	l.t.Helper()
	target := fmt.Sprint(l.cmd.Process.Pid)
	return h.Exec(nil, "nsenter", append([]string{"--mount", "--target", target, rig.Binary(l.t)}, args...)...)
}

func (s *leaseStore) hasLease() bool {
	_, err := os.Stat(filepath.Join(s.store, ".kmsfs/lease"))
	return err == nil
}

// TestLeaseOfALivingMachine: a store that another machine has is not written.
func TestLeaseOfALivingMachine(t *testing.T) {
	t.Parallel()
	s := newLeaseStore(t)
	a, b := s.machine("alpha"), s.machine("beta")
	m := a.mount()
	if err := m.put("file", "contents"); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"mount", s.store, t.TempDir()}, {"fsck", "--repair", s.store}, {"rewrap", s.store}, {"rekey", s.store},
	} {
		code, text := b.try(args...)
		if code != 6 || !strings.Contains(text, `"alpha"`) {
			t.Errorf("%s on another machine: got exit code %d, want 6 with the host's name: %s", args[0], code, text)
		}
	}
	r := b.mount("--read-only")
	r.want("file", "contents")
	if code := r.end(unix.SIGTERM); code != 0 {
		t.Errorf("read-only mount: got exit code %d, want 0", code)
	}
	if err := m.put("file", "later"); err != nil {
		t.Errorf("the owner: %v", err)
	}
	if code := m.end(unix.SIGTERM); code != 0 || s.hasLease() {
		t.Errorf("unmount: got exit code %d, lease left: %v, want 0 and none", code, s.hasLease())
	}
	next := b.mount()
	next.want("file", "later")
	if next.logged("waiting to see") {
		t.Error("a mount waits after a clean unmount")
	}
	if code := next.end(unix.SIGTERM); code != 0 {
		t.Errorf("unmount: got exit code %d, want 0", code)
	}
}

// TestLeaseOfADeadMachine: the lease of a killed owner lasts, and no longer than
// it must.
func TestLeaseOfADeadMachine(t *testing.T) {
	t.Parallel()
	s := newLeaseStore(t)
	a, b := s.machine("alpha"), s.machine("beta")
	m := a.mount()
	if err := m.put("file", "contents"); err != nil {
		t.Fatal(err)
	}
	m.end(unix.SIGKILL)
	if !s.hasLease() {
		t.Fatal("a killed owner leaves no lease")
	}
	m = a.mount()
	if m.logged("waiting to see") {
		t.Error("after a crash on the same machine a mount waits")
	}
	m.want("file", "contents")
	m.end(unix.SIGKILL)

	waits := b.start()
	waits.await("waiting to see")
	if code := waits.end(unix.SIGINT); code != 130 {
		t.Errorf("an interrupted wait: got exit code %d, want 130", code)
	}
	next := b.mount()
	if !next.logged("waiting to see") || !next.logged("shows no sign of life was taken over") || !next.logged("host=alpha") {
		t.Error("the takeover is not in the log")
	}
	next.want("file", "contents")
	if err := next.put("more", "data"); err != nil {
		t.Error(err)
	}
	if code := next.end(unix.SIGTERM); code != 0 || s.hasLease() {
		t.Errorf("unmount: got exit code %d, lease left: %v, want 0 and none", code, s.hasLease())
	}
	fsck(t, s.h, s.store, 0)
}

// TestLeaseLostWhileMounted: a machine that stood still finds its store taken
// over, and changes nothing any more.
func TestLeaseLostWhileMounted(t *testing.T) {
	t.Parallel()
	s := newLeaseStore(t)
	m := s.machine("alpha").mount()
	if err := m.put("file", "contents"); err != nil {
		t.Fatal(err)
	}
	if r := m.kmsfs(s.h, "health", m.dir); r.Code != 0 {
		t.Errorf("before: %s", r.Stderr)
	}
	if err := m.cmd.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	next := s.machine("beta").mount()
	if err := next.put("file", "of the new owner"); err != nil {
		t.Fatal(err)
	}
	if err := m.cmd.Process.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"create":   m.put("other", "x"),
		"truncate": os.Truncate(m.path("file"), 1),
		"mkdir":    os.Mkdir(m.path("dir"), 0o755),
		"unlink":   os.Remove(m.path("file")),
	} {
		if errnoOf(err) != unix.EROFS {
			t.Errorf("%s after the loss: got %v, want EROFS", name, err)
		}
	}
	if r := m.kmsfs(s.h, "health", "--since", "0", m.dir); r.Code != 4 || !strings.Contains(r.Stderr, "beta") {
		t.Errorf("health: got exit code %d, want 4 with the new owner's name: %s", r.Code, r.Stderr)
	}
	if r := m.kmsfs(s.h, "status", m.dir); r.Code != 0 || !strings.Contains(r.Stdout, "halted") {
		t.Errorf("status: got %s, want it halted", r.Stdout)
	}
	m.end(unix.SIGTERM)
	next.want("file", "of the new owner")
	if err := next.put("more", "data"); err != nil {
		t.Errorf("the new owner: %v", err)
	}
	if code := next.end(unix.SIGTERM); code != 0 {
		t.Errorf("unmount: got exit code %d, want 0", code)
	}
	fsck(t, s.h, s.store, 0)
}
