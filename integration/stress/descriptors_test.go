package stress

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// openerArgs is a program that has many files in use.
type openerArgs struct {
	Dir   string
	Seed  uint64
	Files int
	Keep  bool // all of them stay open; else one after the other is
}

func playOpener(args []byte) error {
	var o openerArgs
	if err := json.Unmarshal(args, &o); err != nil {
		return err
	}
	o.raise()
	if err := os.Mkdir(o.Dir, 0o755); err != nil {
		return err
	}
	if o.Keep {
		return o.together()
	}
	return o.inTurn()
}

// raise lets this process have as many descriptors as it wants.
func (o *openerArgs) raise() {
	n := uint64(o.Files + 100)
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: n}) // else an open says so
}

func (o *openerArgs) path(i int) string { return filepath.Join(o.Dir, fmt.Sprint(i)) }

func (o *openerArgs) text(i, version int) string {
	return fmt.Sprintf("file %d of seed %d, version %d", i, o.Seed, version)
}

// together makes the files, keeps all of them open, and then uses them in any
// order. Some of them lose their names meanwhile, or others' take their place.
func (o *openerArgs) together() error {
	rnd := rand.New(rand.NewPCG(o.Seed, 3))
	fds, versions := make([]int, o.Files), make([]int, o.Files)
	for i := range fds {
		var err error
		if fds[i], err = unix.Open(o.path(i), unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o644); err != nil {
			return fmt.Errorf("file %d: %w", i, err)
		}
		if err := fullWrite(fds[i], []byte(o.text(i, 0)), 0); err != nil {
			return err
		}
	}
	for range o.Files {
		i := rnd.IntN(o.Files)
		if rnd.IntN(2) == 0 {
			versions[i]++
			if err := fullWrite(fds[i], []byte(o.text(i, versions[i])), 0); err != nil {
				return fmt.Errorf("file %d: %w", i, err)
			}
		}
		if rnd.IntN(200) == 0 {
			if err := unix.Fsync(fds[i]); err != nil {
				return err
			}
		}
		if rnd.IntN(200) == 0 { // it goes on without a name of its own
			if err := unix.Rename(o.path(i), o.path(o.Files+rnd.IntN(10))); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
		_ = unix.Fadvise(fds[i], 0, 0, unix.FADV_DONTNEED) // or the server would not be asked
		if err := holds(fds[i], o.text(i, versions[i])); err != nil {
			return fmt.Errorf("file %d: %w", i, err)
		}
	}
	for i, fd := range fds {
		if err := holds(fd, o.text(i, versions[i])); err != nil {
			return fmt.Errorf("file %d, in the end: %w", i, err)
		}
		if err := unix.Close(fd); err != nil {
			return err
		}
	}
	return nil
}

func holds(fd int, want string) error {
	got := make([]byte, 200)
	n, err := unix.Pread(fd, got, 0)
	if err == nil && string(got[:n]) != want {
		err = fmt.Errorf("%q, want %q", got[:n], want)
	}
	return err
}

func (o *openerArgs) inTurn() error {
	for i := range o.Files {
		if err := os.WriteFile(o.path(i), []byte(o.text(i, 0)), 0o644); err != nil {
			return err
		}
	}
	for i := range o.Files {
		got, err := os.ReadFile(o.path(i))
		if err != nil || string(got) != o.text(i, 0) {
			return fmt.Errorf("file %d: %q, %w", i, got, err)
		}
		if fi, err := os.Stat(o.path(i)); err != nil || fi.Size() != int64(len(got)) {
			return fmt.Errorf("file %d: %w", i, err)
		}
	}
	entries, err := os.ReadDir(o.Dir)
	if err == nil && len(entries) != o.Files {
		err = fmt.Errorf("%d entries, want %d", len(entries), o.Files)
	}
	return err
}

// TestFewDescriptors: S-62 with a server that may have 256 descriptors and no
// more.
func TestFewDescriptors(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root", "fuse", "prlimit")
	seed := seedOf(t)
	m := newLimitedMount(t, "256")
	n := opsOf(10_000, 10_000)
	programs := []*program{start(t, "opener", openerArgs{m.Path("together"), seed, n, true})}
	const others = 16
	for i := range others {
		programs = append(programs, start(t, "opener", openerArgs{m.Path(fmt.Sprint("turn", i)), seed, n / others, false}))
	}
	all(t, programs...)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", m.PID))
	if err != nil {
		t.Fatal(err)
	}
	var soft, hard int
	for line := range linesOf(b) {
		_, _ = fmt.Sscanf(line, "Max open files %d %d", &soft, &hard)
	}
	if soft != 256 || hard != 256 {
		t.Errorf("the server may have %d descriptors, %d after asking", soft, hard)
	}
	clean(t, m)
}

// newLimitedMount mounts a store with a server that may have so many
// descriptors.
func newLimitedMount(t testing.TB, limit string, initArgs ...string) *rig.Mount {
	t.Helper()
	h, store := rig.NewHome(t), filepath.Join(memoryDir(t), "S")
	h.Run(append(append([]string{"init"}, initArgs...), store)...)
	h.Wrap = []string{"prlimit", "--nofile=" + limit + ":" + limit}
	return h.Mount(store)
}
