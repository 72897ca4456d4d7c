package lease_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/lease"
)

const (
	interval = 40 * time.Millisecond
	// patient is that of machines that watch a living owner, which may be slow:
	// the machine that the tests are on may have much else to do.
	patient = 1500 * time.Millisecond
)

// disk is a store's directory, with one log of all machines.
type disk struct {
	t    testing.TB
	path string
	dir  *backing.Dir
	key  *keymem.Key
	mu   sync.Mutex
	log  bytes.Buffer
}

func (d *disk) Write(b []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.log.Write(b)
}

func (d *disk) logged(text string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return strings.Contains(d.log.String(), text)
}

func newDisk(t testing.TB) *disk {
	t.Helper()
	return diskAt(t, t.TempDir())
}

func diskAt(t testing.TB, path string) *disk {
	t.Helper()
	dir, err := backing.OpenRoot(path)
	if err != nil {
		t.Fatal(err)
	}
	d := &disk{t: t, path: path, dir: dir, key: keymem.Random(32)}
	t.Cleanup(func() {
		_ = dir.Close()
		d.key.Wipe()
		entries, err := os.ReadDir(path)
		for _, e := range entries {
			if e.Name() != lease.FileName {
				t.Errorf("left over: %s", e.Name())
			}
		}
		if err != nil {
			t.Error(err)
		}
	})
	return d
}

// machine returns the configuration of a machine at a disk that several have.
func (d *disk) machine(name string) lease.Config {
	return lease.Config{
		Dir: d.dir, Store: []byte("store"), Key: d.key, Interval: interval,
		Identity: &lease.Identity{Machine: "machine " + name, Boot: "boot " + name, Host: name},
		Log:      slog.New(slog.NewTextHandler(d, nil)),
	}.Shared(true)
}

func (d *disk) acquire(c lease.Config) *lease.Lease {
	d.t.Helper()
	l, err := lease.Acquire(context.Background(), c)
	if err != nil {
		d.t.Fatalf("Acquire: %v", err)
	}
	d.t.Cleanup(func() { _ = l.Release() })
	return l
}

func (d *disk) bytes() []byte {
	b, err := os.ReadFile(filepath.Join(d.path, lease.FileName))
	if err != nil {
		d.t.Fatal(err)
	}
	return b
}

func (d *disk) put(b []byte) {
	if err := os.WriteFile(filepath.Join(d.path, lease.FileName), b, 0o600); err != nil {
		d.t.Fatal(err)
	}
}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(interval / 8) {
		if time.Now().After(end) {
			t.Fatalf("does not happen: %s", what)
		}
	}
}

func TestTakeAndRelease(t *testing.T) {
	d := newDisk(t)
	for range 3 {
		l := d.acquire(d.machine("a"))
		was := d.bytes()
		eventually(t, "a heartbeat", func() bool { return !bytes.Equal(d.bytes(), was) })
		if err := l.Held(); err != nil {
			t.Errorf("Held: %v", err)
		}
		if err := l.Release(); err != nil {
			t.Errorf("Release: %v", err)
		}
		if _, err := os.Stat(filepath.Join(d.path, lease.FileName)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("after the release: got %v, want no file", err)
		}
		if err := l.Release(); err != nil {
			t.Errorf("second Release: %v", err)
		}
	}
}

func TestNoIDsOnTheDisk(t *testing.T) {
	d := newDisk(t)
	d.acquire(d.machine("a"))
	for _, id := range []string{"machine a", "boot a"} {
		if bytes.Contains(d.bytes(), []byte(id)) {
			t.Errorf("%q stands in the lease", id)
		}
	}
}

func TestLivingOwnerElsewhere(t *testing.T) {
	for name, second := range map[string]func(lease.Config) lease.Config{
		"another machine":      func(c lease.Config) lease.Config { return c },
		"without the key":      func(c lease.Config) lease.Config { c.Key = nil; return c },
		"on a local disk":      func(c lease.Config) lease.Config { return c.Shared(false) },
		"a clone's machine id": func(c lease.Config) lease.Config { c.Identity.Machine = "machine a"; return c },
		"on the same kernel":   func(c lease.Config) lease.Config { c.Identity.Boot = "boot a"; return c },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(t)
			l := d.acquire(d.machine("a"))
			c := second(d.machine("b"))
			c.Interval = patient
			for range 2 {
				_, err := lease.Acquire(context.Background(), c)
				if !errors.Is(err, lease.ErrHeld) || !strings.Contains(err.Error(), `host "a"`) {
					t.Errorf("Acquire: got %v, want ErrHeld with the host", err)
				}
			}
			if err := lease.Check(context.Background(), c); !errors.Is(err, lease.ErrHeld) {
				t.Errorf("Check: got %v, want ErrHeld", err)
			}
			if err := l.Held(); err != nil {
				t.Errorf("the owner's Held: %v", err)
			}
		})
	}
}

func TestUnsignedOwnerIsHonoured(t *testing.T) {
	d := newDisk(t)
	c := d.machine("a")
	c.Key = nil
	d.acquire(c)
	c = d.machine("b")
	c.Interval = patient
	if _, err := lease.Acquire(context.Background(), c); !errors.Is(err, lease.ErrHeld) {
		t.Errorf("got %v, want ErrHeld", err)
	}
}

func TestDeadOwnerElsewhere(t *testing.T) {
	d := newDisk(t)
	d.acquire(d.machine("a")).Crash()
	begun := time.Now()
	if err := lease.Check(context.Background(), d.machine("b")); err != nil {
		t.Errorf("Check: %v", err)
	}
	if waited := time.Since(begun); waited < 3*interval {
		t.Errorf("Check waited %v, want three intervals of %v at least", waited, interval)
	}
	was := d.bytes()
	l := d.acquire(d.machine("b"))
	if bytes.Equal(d.bytes(), was) {
		t.Error("the lease is still the dead owner's")
	}
	if !d.logged(`audit=true host=a`) {
		t.Errorf("log: got %s, want the takeover as an audit event", d.log.String())
	}
	if err := l.Held(); err != nil {
		t.Error(err)
	}
}

// TestDeadOwnerHere wants no wait where nobody can be there.
func TestDeadOwnerHere(t *testing.T) {
	child := exec.Command("true")
	if err := child.Run(); err != nil {
		t.Fatal(err)
	}
	gone := uint32(child.Process.Pid)
	for name, tc := range map[string]struct {
		shared bool
		second func(*lease.Config)
		pid    uint32 // 0: this process, which lives
	}{
		"killed":                               {false, func(*lease.Config) {}, 0},
		"before a reboot":                      {false, func(c *lease.Config) { c.Identity.Boot = "boot later" }, 0},
		"in another container":                 {false, func(c *lease.Config) { c.Identity.Machine = "container" }, 0},
		"killed, shared disk, process is gone": {true, func(*lease.Config) {}, gone},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(t)
			c := d.machine("a").Shared(tc.shared)
			c.Interval = time.Hour // who waits, waits for ever
			l := d.acquire(c)
			if tc.pid != 0 {
				l.SetProcess(tc.pid, 1)
			}
			l.Crash()
			c = d.machine("a").Shared(tc.shared)
			c.Interval = time.Hour
			tc.second(&c)
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			next, err := lease.Acquire(ctx, c)
			if err != nil {
				t.Fatalf("Acquire: %v", err)
			}
			if err := next.Release(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestUncertainOwnerIsWatched are the cases that look like a dead owner here.
func TestUncertainOwnerIsWatched(t *testing.T) {
	for name, second := range map[string]func(*lease.Config){
		"its process lives":                func(*lease.Config) {},
		"a clone of the machine, rebooted": func(c *lease.Config) { c.Identity.Boot = "boot later" },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(t)
			c := d.machine("a")
			c.Interval = time.Hour
			d.acquire(c).Crash()
			second(&c)
			ctx, cancel := context.WithTimeout(context.Background(), 5*interval)
			defer cancel()
			if _, err := lease.Acquire(ctx, c); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Acquire: got %v, want one that watches until it is stopped", err)
			}
		})
	}
}

func TestReleasedWhileWatched(t *testing.T) {
	d := newDisk(t)
	c := d.machine("a")
	c.Interval = time.Hour
	l := d.acquire(c)
	got := make(chan error)
	go func() {
		next, err := lease.Acquire(context.Background(), d.machine("b"))
		if err == nil {
			err = next.Release()
		}
		got <- err
	}()
	eventually(t, "the other waits", func() bool { return d.logged("waiting to see") })
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Errorf("Acquire after the release: %v", err)
	}
}

// TestOnlyOneGetsIt has many machines come at once, to a free store and to a
// dead owner's.
func TestOnlyOneGetsIt(t *testing.T) {
	for _, dead := range []bool{false, true} {
		d := newDisk(t)
		if dead {
			d.acquire(d.machine("dead")).Crash()
		}
		var owners atomic.Int32
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				c := d.machine(string(rune('a' + i)))
				c.Interval = 5 * interval
				l, err := lease.Acquire(context.Background(), c)
				if errors.Is(err, lease.ErrHeld) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				if n := owners.Add(1); n > 1 && l.Held() == nil {
					t.Errorf("dead owner %v: %d owners", dead, n)
				}
				time.Sleep(20 * interval) // longer than the others watch
				if err := l.Held(); err != nil {
					t.Errorf("dead owner %v: Held: %v", dead, err)
				}
				owners.Add(-1)
				if err := l.Release(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
}

// TestLost has an owner's machine stop, and go on after another has taken over.
func TestLost(t *testing.T) {
	for name, then := range map[string]func(*lease.Lease){
		"and is there":      func(*lease.Lease) {},
		"and is done again": func(l *lease.Lease) { _ = l.Release() },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(t)
			var told atomic.Pointer[error]
			c := d.machine("a")
			c.Lost = func(err error) { told.Store(&err) }
			old := d.acquire(c)
			old.Hang()
			next := d.acquire(d.machine("b"))
			then(next)
			if err := old.Held(); !errors.Is(err, lease.ErrLost) {
				t.Errorf("Held: got %v, want ErrLost", err)
			}
			if p := told.Load(); p == nil || !errors.Is(*p, lease.ErrLost) {
				t.Error("Lost was not called with ErrLost")
			}
			if err := old.Release(); err != nil {
				t.Error(err)
			}
			if !errors.Is(old.Err(), lease.ErrLost) {
				t.Errorf("Err: got %v, want ErrLost", old.Err())
			}
			if err := next.Held(); err != nil {
				t.Errorf("the new owner's Held: %v", err)
			}
			if _, err := os.Stat(filepath.Join(d.path, lease.FileName)); name == "and is there" && err != nil {
				t.Errorf("the old owner's release took the new one's lease: %v", err)
			}
		})
	}
}

// TestLostInTheBackground needs no call of Held.
func TestLostInTheBackground(t *testing.T) {
	d := newDisk(t)
	lost := make(chan error, 1)
	c := d.machine("a")
	c.Lost = func(err error) { lost <- err }
	d.acquire(c)
	other := newDisk(t)
	other.key = d.key
	other.acquire(other.machine("b"))
	if err := os.Rename(filepath.Join(other.path, lease.FileName), filepath.Join(d.path, lease.FileName)); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-lost:
		if !errors.Is(err, lease.ErrLost) || !strings.Contains(err.Error(), `host "b"`) {
			t.Errorf("got %v, want ErrLost with the host", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("a replaced lease is not noticed")
	}
}

// TestTakerThatWasLate moves a living owner's lease aside, as one does that
// judged the lease before and stopped meanwhile.
func TestTakerThatWasLate(t *testing.T) {
	d := newDisk(t)
	l := d.acquire(d.machine("a"))
	if moved, err := l.MoveAway([]byte("what was judged")); moved || err != nil {
		t.Errorf("MoveAway: got %v, %v, want the lease put back", moved, err)
	}
	if err := l.Held(); err != nil {
		t.Errorf("Held: %v", err)
	}
	// And one that dies with it aside.
	if err := l.Aside("aside"); err != nil {
		t.Fatal(err)
	}
	l.Hang()
	if err := l.Held(); err != nil {
		t.Errorf("Held after a dead taker: %v", err)
	}
	if d.bytes() == nil {
		t.Error("the lease has no name")
	}
	if err := os.Remove(filepath.Join(d.path, "aside")); err != nil {
		t.Fatal(err)
	}
}

// garbage is what may be found in a lease's place: not an owner's.
func garbage(d *disk) map[string][]byte {
	c := d.machine("forger")
	c.Key = keymem.Random(32)
	other := newDisk(d.t)
	c.Dir = other.dir
	l := other.acquire(c)
	forged := other.bytes()
	_ = l.Release()
	c.Key.Wipe()
	good := d.bytes()
	flipped := bytes.Clone(good)
	flipped[20] ^= 1
	downgraded := bytes.Clone(good) // an owner's, with the flag of an unsigned one
	downgraded[11] = 0
	return map[string][]byte{"empty": {}, "zeros": make([]byte, 512), "cut": good[:300], "long": append(bytes.Clone(good), 1),
		"flipped": flipped, "downgraded": downgraded, "forged": forged}
}

func TestGarbledLease(t *testing.T) {
	d := newDisk(t)
	l := d.acquire(d.machine("a"))
	all := garbage(d)
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	for name, b := range all {
		t.Run(name, func(t *testing.T) {
			d.put(b)
			// Watched where another machine may be behind it,
			begun := time.Now()
			l := d.acquire(d.machine("a"))
			if waited := time.Since(begun); waited < 3*interval {
				t.Errorf("waited %v, want three intervals of %v at least", waited, interval)
			}
			// and taken at once where nobody can be.
			if err := l.Release(); err != nil {
				t.Fatal(err)
			}
			d.put(b)
			c := d.machine("a").Shared(false)
			c.Interval = time.Hour
			if err := d.acquire(c).Release(); err != nil {
				t.Fatal(err)
			}
			if !d.logged("neither whole nor authentic and was taken over") {
				t.Error("no warning is logged")
			}
		})
	}
}

func TestGarbageThatChanges(t *testing.T) {
	d := newDisk(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	d.put([]byte("0"))
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(interval / 2):
				d.put([]byte{byte(i), byte(i >> 8)})
			}
		}
	})
	c := d.machine("a")
	c.Interval = patient
	if _, err := lease.Acquire(context.Background(), c); !errors.Is(err, lease.ErrHeld) {
		t.Errorf("got %v, want ErrHeld", err)
	}
	close(stop)
	wg.Wait()
}

// TestOverwrittenWhileHeld: nothing that only looks like a lease stops an owner.
func TestOverwrittenWhileHeld(t *testing.T) {
	d := newDisk(t)
	l := d.acquire(d.machine("a"))
	token := l.Token()
	ours := func() bool {
		b := d.bytes()
		return len(b) == 512 && bytes.Equal(b[88:104], token[:])
	}
	for name, b := range garbage(d) {
		tmp := filepath.Join(t.TempDir(), "x")
		if err := os.WriteFile(tmp, b, 0o600); err != nil {
			t.Fatal(err)
		}
		d.put(b) // in place
		eventually(t, name+" is healed", ours)
		if err := os.Rename(tmp, filepath.Join(d.path, lease.FileName)); err != nil { // in its place
			t.Fatal(err)
		}
		eventually(t, name+" is replaced", ours)
		if err := l.Held(); err != nil {
			t.Errorf("%s: Held: %v", name, err)
		}
	}
	if !d.logged("was overwritten") {
		t.Error("no warning is logged")
	}
}

func TestLinksAndDirectoriesInItsPlace(t *testing.T) {
	for name, plant := range map[string]func(string) error{
		"symlink": func(p string) error { return os.Symlink("/etc/hostname", p) },
		"fifo":    func(p string) error { return unix.Mkfifo(p, 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(t)
			if err := plant(filepath.Join(d.path, lease.FileName)); err != nil {
				t.Fatal(err)
			}
			l := d.acquire(d.machine("a").Shared(false))
			if err := l.Held(); err != nil {
				t.Error(err)
			}
		})
	}
}

// fullDisk is a file system without room.
func fullDisk(t *testing.T) (d *disk, fill, free func()) {
	t.Helper()
	path := t.TempDir()
	if err := unix.Mount("tmpfs", path, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("root is missing: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, 0); err != nil {
			t.Error(err)
		}
	})
	d = diskAt(t, path)
	filler := filepath.Join(path, "filler")
	fill = func() {
		f, err := os.Create(filler)
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = f.Write(make([]byte, 4096))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		_ = f.Close()
	}
	free = func() {
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
	}
	return d, fill, free
}

func TestFullDisk(t *testing.T) {
	d, fill, free := fullDisk(t)
	l := d.acquire(d.machine("a"))
	fill()
	for range 3 { // in place, which takes no room
		was := d.bytes()
		eventually(t, "a heartbeat", func() bool { return !bytes.Equal(d.bytes(), was) })
	}
	l.Hang()
	if err := l.Held(); err != nil {
		t.Errorf("Held on a full disk: %v", err)
	}
	if err := l.Release(); err != nil {
		t.Errorf("Release on a full disk: %v", err)
	}
	free()
	fill() // what the lease had, too
	if _, err := lease.Acquire(context.Background(), d.machine("a")); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("Acquire on a full shared disk: got %v, want ENOSPC", err)
	}
	l = d.acquire(d.machine("a").Shared(false))
	if err := l.Held(); err != nil {
		t.Errorf("Held on a full local disk: %v", err)
	}
	free()
	eventually(t, "the lease is written when there is room", func() bool {
		_, err := os.Stat(filepath.Join(d.path, lease.FileName))
		return err == nil
	})
}

// TestUnreachableDisk: whoever cannot renew for so long that another may have
// taken over stops, on a shared disk.
func TestUnreachableDisk(t *testing.T) {
	for _, shared := range []bool{true, false} {
		path := t.TempDir()
		d := diskAt(t, path)
		l := d.acquire(d.machine("a").Shared(shared))
		l.Hang()
		if err := os.Rename(filepath.Join(path, lease.FileName), filepath.Join(path, "x")); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(path, lease.FileName), 0o700); err != nil {
			t.Fatal(err)
		}
		err := l.Held() // a rename over a directory fails
		if got, want := errors.Is(err, lease.ErrLost), shared; got != want {
			t.Errorf("shared %v: Held: got %v, want ErrLost: %v", shared, err, want)
		}
		for _, name := range []string{"x", lease.FileName} {
			if err := os.Remove(filepath.Join(path, name)); err != nil {
				t.Fatal(err)
			}
		}
		_ = l.Release()
	}
}

func TestThisMachine(t *testing.T) {
	id := lease.ThisMachine()
	if len(id.Boot) != 36 {
		t.Errorf("boot id: got %q, want 36 characters", id.Boot)
	}
	d := newDisk(t)
	c := d.machine("a")
	c.Identity = nil
	d.acquire(c)
}
