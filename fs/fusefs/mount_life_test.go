package fusefs

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// S-47
func TestProcMounts(t *testing.T) {
	s := newStore(t, layouts[0])
	m := mountStore(t, s, Options{Extra: []string{"nosuid,noexec", "x-systemd.automount"}})
	var line []string
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	for l := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(l); fields[1] == m.dir {
			line = fields
		}
	}
	if len(line) < 4 || line[0] != s.dir || line[2] != "fuse.kmsfs" {
		t.Fatalf("line in /proc/self/mounts: %q", line)
	}
	options := "," + line[3] + ","
	for _, want := range []string{"nosuid", "noexec", "default_permissions", "rw"} {
		if !strings.Contains(options, ","+want+",") {
			t.Errorf("option %s is missing in %s", want, options)
		}
	}
	for _, bad := range []string{"nodev", "allow_other"} {
		if strings.Contains(options, ","+bad+",") {
			t.Errorf("option %s in %s", bad, options)
		}
	}
}

// S-44
func TestReadOnlyMount(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	must(t, os.WriteFile(m.path("file"), []byte("x"), 0o600))
	m.options.ReadOnly = true
	m.remount(t)
	if got, err := os.ReadFile(m.path("file")); err != nil || string(got) != "x" {
		t.Errorf("read: %q, %v", got, err)
	}
	if err := os.WriteFile(m.path("new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: got %v, want EROFS", err)
	}
}

// S-16
func TestUnmountWhileInUse(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	f, err := os.Create(m.path("file"))
	must(t, err)
	defer f.Close()
	if err := m.server.Unmount(); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), m.dir) {
		t.Errorf("unmount of a mount in use: %v", err)
	}
	if _, err := f.WriteString("still works"); err != nil {
		t.Errorf("write after it: %v", err)
	}
	must(t, f.Close())
	must(t, m.server.Unmount())
	must(t, m.server.Unmount())
	m.server.Wait()
}

// TestUnmountByOthers: umount(8) ends the mount as Unmount does, and Unmount
// must not touch what lies at the mountpoint afterwards.
func TestUnmountByOthers(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	must(t, os.WriteFile(m.path("file"), []byte("x"), 0o600))
	must(t, unix.Unmount(m.dir, 0))
	m.server.Wait()
	must(t, unix.Mount("none", m.dir, "tmpfs", 0, ""))
	defer unix.Unmount(m.dir, 0)
	must(t, m.server.Unmount())
	must(t, os.WriteFile(m.path("in tmpfs"), nil, 0o600))
}

// TestKernelGoesAway: after an abort nobody releases the open files but us,
// and what was synced is there at the next mount.
//
// S-16
func TestKernelGoesAway(t *testing.T) {
	for _, l := range layouts {
		t.Run(l.String(), func(t *testing.T) {
			m := mountStore(t, newStore(t, l), Options{})
			want := bytes.Repeat([]byte("data"), 50_001)
			f, err := os.Create(m.path("file"))
			must(t, err)
			defer f.Close()
			_, err = f.Write(want)
			must(t, err)
			must(t, f.Sync())
			dir, err := os.Open(m.dir)
			must(t, err)
			defer dir.Close()
			if _, err := dir.Readdirnames(1); err != nil {
				t.Error(err)
			}
			must(t, unix.Unmount(m.dir, unix.MNT_FORCE|unix.MNT_DETACH))
			m.server.Wait()
			_, err = f.Write(want)
			if err == nil {
				err = f.Sync()
			}
			if err == nil {
				t.Error("a write after the abort succeeds")
			}
			m.remount(t)
			if got, err := os.ReadFile(m.path("file")); err != nil || !bytes.Equal(got, want) {
				t.Errorf("after the abort: %d bytes, %v, want %d", len(got), err, len(want))
			}
		})
	}
}

// TestSignalStorm: Go programs interrupt their own system calls all the time;
// none of them may fail for it.
//
// S-43
func TestSignalStorm(t *testing.T) {
	for _, l := range layouts {
		t.Run(l.String(), func(t *testing.T) {
			m := mountStore(t, newStore(t, l), Options{})
			cmd := helper(0, 0o022, "workout", m.dir)
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			must(t, cmd.Start())
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			for {
				select {
				case err := <-ended:
					if err != nil {
						t.Errorf("%v\n%s", err, &out)
					}
					return
				case <-time.After(200 * time.Microsecond):
					signalThreads(cmd)
				}
			}
		})
	}
}

// signalThreads interrupts every thread of cmd with the signal that the Go
// runtime uses to preempt goroutines.
func signalThreads(cmd *exec.Cmd) {
	threads, _ := filepath.Glob(filepath.Join("/proc", strconv.Itoa(cmd.Process.Pid), "task", "*"))
	for _, thread := range threads {
		if id, err := strconv.Atoi(filepath.Base(thread)); err == nil {
			// A thread that is gone by now is none to interrupt.
			_ = unix.Tgkill(cmd.Process.Pid, id, unix.SIGURG)
		}
	}
}

func TestMountRefusals(t *testing.T) {
	requireFuse(t)
	s := newStore(t, layouts[0])
	v := s.open(t)
	defer s.close(t, v)
	inside := filepath.Join(s.dir, "inside")
	must(t, os.Mkdir(inside, 0o755))
	defer os.Remove(inside)
	for _, test := range []struct {
		dir     string
		options Options
		want    error
	}{
		{inside, Options{}, ErrMountpoint},
		{s.dir, Options{}, ErrMountpoint},
		{filepath.Join(t.TempDir(), "missing"), Options{}, os.ErrNotExist},
		{t.TempDir(), Options{Extra: []string{"no_such_option"}}, ErrOption},
	} {
		if server, err := Mount(v, test.dir, test.options); !errors.Is(err, test.want) {
			t.Errorf("Mount(%s, %v) = %v, want %v", test.dir, test.options, err, test.want)
			if server != nil {
				must(t, server.Unmount())
			}
		}
	}
}
