package stress

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// The programs that use a mount are processes of their own: page faults of this
// one could not be served while its garbage is collected, and some are killed or
// have limits.

const (
	roleEnv = "STRESS_ROLE"
	argsEnv = "STRESS_ARGS"
)

// roles are the programs. args is JSON.
var roles = map[string]func(args []byte) error{
	"fsx": playFsx, "opener": playOpener, "mapper": playMapper, "appender": playAppender,
}

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		if err := roles[role]([]byte(os.Getenv(argsEnv))); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	rig.Clean()
	os.Exit(code)
}

// program is a running role.
type program struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Scanner
	stderr strings.Builder
}

// start runs a role. Programs before it, such as prlimit, may wrap it.
func start(t testing.TB, role string, args any, wrap ...string) *program {
	t.Helper()
	b, err := json.Marshal(args)
	if err != nil {
		t.Fatal(err)
	}
	command := append(wrap, os.Args[0])
	p := &program{cmd: exec.Command(command[0], command[1:]...)}
	p.cmd.Env = append(os.Environ(), roleEnv+"="+role, argsEnv+"="+string(b))
	p.cmd.Stderr = &p.stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewScanner(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.cmd.Process.Kill() }) // if it has not ended
	return p
}

// serve answers what the program asks for, until it ends, and returns how it
// ended.
func (p *program) serve(answer func(question string)) error {
	for p.out.Scan() {
		answer(p.out.Text())
		if _, err := io.WriteString(p.in, "done\n"); err != nil {
			break // it has ended
		}
	}
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("%w: %s", err, p.stderr.String())
	}
	return nil
}

var replies = bufio.NewScanner(os.Stdin)

// ask is a role's question to the test; it returns when that has been done.
func ask(question string) error {
	fmt.Println(question)
	if !replies.Scan() {
		return errors.New("the test is gone")
	}
	return nil
}

// all runs programs side by side to their end.
func all(t testing.TB, programs ...*program) {
	t.Helper()
	var wg sync.WaitGroup
	for _, p := range programs {
		wg.Go(func() {
			if err := p.serve(func(string) {}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func full() bool { return os.Getenv("INTEGRATION_FULL") == "1" }

// sized returns how much is done by default, and in full.
func sized(normal, inFull int) int {
	if full() {
		return inFull
	}
	return normal
}

// seedOf returns the seed of a random run, and prints how to repeat it.
func seedOf(t testing.TB) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("KMSFS_STRESS_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("KMSFS_STRESS_SEED=%d", seed)
	return seed
}

func opsOf(normal, inFull int) int {
	if n, err := strconv.Atoi(os.Getenv("KMSFS_STRESS_OPS")); err == nil {
		return n
	}
	return sized(normal, inFull)
}

// memoryDir returns a directory in memory, where the disk's speed is not in the
// way; on disk where that knows no extended attributes.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "kmsfs-stress-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if unix.Setxattr(dir, "user.test", []byte("x"), 0) != nil {
		return t.TempDir()
	}
	return dir
}

// newMount makes a store in memory and mounts it.
func newMount(t testing.TB, initArgs ...string) *rig.Mount {
	t.Helper()
	rig.Need(t, "root", "fuse")
	h, store := rig.NewHome(t), filepath.Join(memoryDir(t), "S")
	h.Run(append(append([]string{"init"}, initArgs...), store)...)
	return h.Mount(store)
}

// clean unmounts and wants nothing to be wrong with the store.
func clean(t testing.TB, m *rig.Mount) {
	t.Helper()
	m.Unmount()
	if r := m.Home.Try("fsck", m.Store); r.Code != 0 {
		t.Errorf("fsck: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

var placements = []string{"header", "xattr", "sidecar"}

func linesOf(b []byte) func(func(string) bool) { return strings.Lines(string(b)) }
