package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// listenNotify returns the socket that a service manager would hold.
func listenNotify(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func receive(t *testing.T, conn *net.UnixConn) string {
	t.Helper()
	b := make([]byte, 1024)
	n, err := conn.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn := listenNotify(t, path)
	t.Setenv("NOTIFY_SOCKET", path)
	if err := sdNotify("READY=1"); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, conn); got != "READY=1" {
		t.Errorf("got %q", got)
	}
	abstract := "kmsfs-test-" + filepath.Base(filepath.Dir(path)) + filepath.Base(t.TempDir())
	conn = listenNotify(t, "\x00"+abstract)
	t.Setenv("NOTIFY_SOCKET", "@"+abstract)
	if err := sdNotify("STOPPING=1"); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, conn); got != "STOPPING=1" {
		t.Errorf("got %q", got)
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "none"))
	if err := sdNotify("READY=1"); err == nil {
		t.Error("nobody listens, and that is no error")
	}
	t.Setenv("NOTIFY_SOCKET", "")
	if err := sdNotify("READY=1"); err != nil {
		t.Errorf("without a service manager: %v", err)
	}
}

// TestServiceOfTypeNotify runs a mount as systemd does.
func TestServiceOfTypeNotify(t *testing.T) {
	if ok, err := condition("fuse"); err != nil {
		t.Fatal(err)
	} else if !ok {
		t.Skip("mounting takes root and /dev/fuse")
	}
	home := testHome(t)
	store, mountpoint := filepath.Join(home, "s"), filepath.Join(home, "m")
	if err := os.Mkdir(mountpoint, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("kmsfs", "init", store).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	conn := listenNotify(t, filepath.Join(home, "notify"))
	cmd := exec.Command("kmsfs", "mount", "--foreground", store, mountpoint)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(home, "notify"))
	var log strings.Builder
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, conn); !strings.HasPrefix(got, "READY=1\n") {
		t.Errorf("got %q, want READY=1", got)
	}
	if err := os.WriteFile(filepath.Join(mountpoint, "x"), []byte("x"), 0o644); err != nil {
		t.Errorf("READY=1, but: %v", err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, conn); got != "STOPPING=1" {
		t.Errorf("got %q, want STOPPING=1", got)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, log.String())
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(mountpoint, "x"), &st); err != unix.ENOENT {
		t.Errorf("after the end: %v", err)
	}
}

// TestServiceInTheBackground: the process that serves says who it is, and
// SIGTERM ends a mount in use without taking open files away.
func TestServiceInTheBackground(t *testing.T) {
	if ok, err := condition("fuse"); err != nil {
		t.Fatal(err)
	} else if !ok {
		t.Skip("mounting takes root and /dev/fuse")
	}
	home := testHome(t)
	store, mountpoint := filepath.Join(home, "s"), filepath.Join(home, "m")
	if err := os.Mkdir(mountpoint, 0o755); err != nil {
		t.Fatal(err)
	}
	kmsfs := func(args ...string) {
		t.Helper()
		cmd := exec.Command("kmsfs", args...)
		cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(home, "notify"))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("kmsfs %q: %v: %s", args, err, out)
		}
	}
	kmsfs("init", store)
	conn := listenNotify(t, filepath.Join(home, "notify"))
	kmsfs("mount", "--pid-file", filepath.Join(home, "pid"), store, mountpoint)
	var pid int
	b, err := os.ReadFile(filepath.Join(home, "pid"))
	if err == nil {
		_, err = fmt.Sscan(string(b), &pid)
	}
	if err != nil {
		t.Fatal(err)
	}
	if got := receive(t, conn); !strings.HasPrefix(got, fmt.Sprintf("READY=1\nMAINPID=%d\n", pid)) {
		t.Errorf("got %q, want READY=1 and MAINPID=%d", got, pid)
	}
	f, err := os.Create(filepath.Join(mountpoint, "x"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, conn); got != "STOPPING=1" {
		t.Errorf("got %q, want STOPPING=1", got)
	}
	for n := 0; n < 6000; n++ { // until it is out of the tree
		if _, err := os.Stat(filepath.Join(mountpoint, "x")); errors.Is(err, os.ErrNotExist) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if _, err := f.WriteString("written after SIGTERM"); err != nil {
		t.Errorf("the open file: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	for n := 0; n < 6000 && syscall.Kill(pid, 0) == nil; n++ {
		time.Sleep(10 * time.Millisecond)
	}
	if out, err := exec.Command("kmsfs", "cat", store, "x").Output(); err != nil || string(out) != "written after SIGTERM" {
		t.Errorf("in the store afterwards: %q, %v", out, err)
	}
}
