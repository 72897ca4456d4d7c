package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// helpers run in a process of their own, for what must not happen in the
// process that serves the mount: page faults on mapped files (no thread could
// serve them during a garbage collection), other users, other umasks.
var helpers = map[string]func(args []string) error{
	"mkdir":   func(args []string) error { return unix.Mkdir(args[0], 0o777) },
	"create":  helperCreate,
	"append":  helperAppend,
	"setacl":  func(args []string) error { return unix.Setxattr(args[0], aclAccess, groupACL, 0) },
	"mmap":    helperMmap,
	"workout": helperWorkout,
}

const (
	helperName  = "FUSEFS_TEST_HELPER"
	helperUid   = "FUSEFS_TEST_UID"
	helperUmask = "FUSEFS_TEST_UMASK"
)

func TestMain(m *testing.M) {
	name := os.Getenv(helperName)
	if name == "" {
		syscall.Umask(0) // as a mount's server does: each request brings its caller's
		os.Exit(m.Run())
	}
	if err := becomeHelper(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err := helpers[name](os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}

func becomeHelper() error {
	umask, err := strconv.Atoi(os.Getenv(helperUmask))
	if err != nil {
		return err
	}
	unix.Umask(umask)
	uid, err := strconv.Atoi(os.Getenv(helperUid))
	if err != nil || uid == 0 {
		return err
	}
	return errors.Join(unix.Setgroups(nil), unix.Setresgid(uid, uid, uid), unix.Setresuid(uid, uid, uid))
}

// helper prepares a helper process that runs as uid under umask.
func helper(uid, umask int, name string, args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), helperName+"="+name,
		helperUid+"="+strconv.Itoa(uid), helperUmask+"="+strconv.Itoa(umask))
	return cmd
}

func runHelper(t *testing.T, uid, umask int, name string, args ...string) {
	t.Helper()
	if out, err := helper(uid, umask, name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q as user %d: %v\n%s", name, args, uid, err, out)
	}
}

func helperCreate(args []string) error {
	f, err := os.OpenFile(args[0], os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o666)
	if err != nil {
		return err
	}
	return f.Close()
}

func helperAppend(args []string) error {
	f, err := os.OpenFile(args[0], os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString("more")
	return errors.Join(err, f.Close())
}

// helperMmap changes a file through a shared mapping and through write(2) and
// sees each change in the other.
func helperMmap(args []string) error {
	f, err := os.OpenFile(args[0], os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	at := len(data) / 2
	if _, err := f.WriteAt([]byte("by write"), int64(at)); err != nil {
		return err
	}
	if got := string(data[at : at+8]); got != "by write" {
		return fmt.Errorf("mapping shows %q", got)
	}
	copy(data[len(data)-6:], "by map")
	if err := unix.Msync(data, unix.MS_SYNC); err != nil {
		return err
	}
	got := make([]byte, 6)
	if _, err := f.ReadAt(got, st.Size()-6); err != nil || string(got) != "by map" {
		return fmt.Errorf("read after msync: %q, %v", got, err)
	}
	return unix.Munmap(data)
}

// helperWorkout writes, reads and lists without any tolerance for errors,
// while its parent sends it signals.
func helperWorkout(args []string) error {
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<15)
	for i := range 30 {
		name := fmt.Sprintf("%s/%d", args[0], i)
		if err := os.WriteFile(name, want, 0o600); err != nil {
			return err
		}
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			return err
		}
		got, err := os.ReadFile(name)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("%s: read %d bytes that differ", name, len(got))
		}
		if list, err := os.ReadDir(args[0]); err != nil || len(list) != i+1 {
			return fmt.Errorf("%d entries, want %d: %v", len(list), i+1, err)
		}
	}
	return nil
}
