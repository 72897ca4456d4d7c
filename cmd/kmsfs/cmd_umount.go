package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

type umountOptions struct {
	mountpoint string
	lazy       bool
	timeout    time.Duration
}

func newUmountCommand(a *app) *cobra.Command {
	var o umountOptions
	cmd := &cobra.Command{
		Use:     "umount MOUNTPOINT",
		Aliases: []string{"unmount"},
		Short:   "Unmount, and wait until everything is written",
		Long: `Unmount, and wait until the mount's process has written everything to the
store, wiped its keys and unlocked the store.`,
		Example: `  kmsfs umount ~/plain
  kmsfs umount --lazy ~/plain     # detach now, although it is in use`,
		Args:              operands("MOUNTPOINT"),
		ValidArgsFunction: completeMountpoints,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.mountpoint = args[0]
			return a.runUmount(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.lazy, "lazy", false, "detach now, and let the mount end when its last file is closed; does not wait")
	cmd.Flags().DurationVar(&o.timeout, "timeout", time.Minute, "how long to wait for the mount's process")
	return cmd
}

func (a *app) runUmount(ctx context.Context, o umountOptions) error {
	m, err := findMount(o.mountpoint)
	if err != nil {
		return err
	}
	server := serverOf(ctx, m)
	defer server.close()
	if err := detachPatiently(ctx, m.Mountpoint, o.lazy); err != nil {
		if errors.Is(err, unix.EBUSY) {
			return fail(errBusy, o.mountpoint+" is in use", "fuser -vm "+shellQuote(m.Mountpoint)+" shows by whom; --lazy detaches it all the same")
		}
		return fmt.Errorf("unmount %s: %w", o.mountpoint, err)
	}
	if o.lazy {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	if err := server.wait(ctx); err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			return fail(errBusy, fmt.Sprintf("%s is unmounted, but its process still writes after %v", o.mountpoint, o.timeout), "wait until the process has ended before you copy the store")
		}
		return err
	}
	return nil
}

// findMount returns the kmsfs mount at path.
func findMount(path string) (*mountEntry, error) {
	abs, err := mountpointPath(path)
	if err != nil {
		return nil, hint(err, "kmsfs status lists the mounts")
	}
	mounts, err := readMounts()
	if err != nil {
		return nil, err
	}
	m := mountAt(mounts, abs)
	if m == nil || m.Type != fsType {
		return nil, fail(errNotAMount, path+" is not a kmsfs mountpoint", "kmsfs status lists the mounts")
	}
	return m, nil
}

// busyPatience is how long a mount may be in use before umount says so. A
// descriptor that a program just closed can live on for a moment in a child
// that it is starting.
const busyPatience = time.Second

func detachPatiently(ctx context.Context, mountpoint string, lazy bool) error {
	for end := time.Now().Add(busyPatience); ; {
		err := detach(mountpoint, lazy)
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * pollPause):
		}
	}
}

// detach unmounts: with umount(2) where this process may, else through
// fusermount3, which unmounts for the user who mounted.
func detach(mountpoint string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(mountpoint, flags)
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	args := []string{"-u"}
	if lazy {
		args = append(args, "-z")
	}
	for _, program := range []string{"fusermount3", "fusermount"} {
		path, lookErr := exec.LookPath(program)
		if lookErr != nil {
			continue
		}
		cmd := exec.Command(path, append(args, "--", mountpoint)...)
		cmd.Env = append(os.Environ(), "LC_ALL=C")
		out, err := cmd.CombinedOutput()
		if err == nil {
			return nil
		}
		if strings.Contains(strings.ToLower(string(out)), "busy") {
			return unix.EBUSY
		}
		return fmt.Errorf("%s: %s: %w", program, strings.TrimSpace(string(out)), unix.EPERM)
	}
	return fail(errNoFUSE, "fusermount3 is not installed, and only root can do without", "install the package fuse3")
}

// mountServer is the process behind a mount, as far as it can be found.
type mountServer struct {
	pidfd int    // -1 if the process is not known
	store string // whose lock tells as well
}

// serverOf finds the process behind m, before it is unmounted. A mount that
// does not answer leaves the lock of the store to tell.
func serverOf(ctx context.Context, m *mountEntry) *mountServer {
	s := &mountServer{pidfd: -1, store: m.Source}
	status, err := readStatus(ctx, m.Mountpoint)
	if err != nil || status.PID <= 0 {
		return s
	}
	if fd, err := unix.PidfdOpen(status.PID, 0); err == nil {
		s.pidfd = fd
	}
	return s
}

func (s *mountServer) close() {
	if s.pidfd >= 0 {
		_ = unix.Close(s.pidfd)
	}
}

// pollPause is how often a wait looks again.
const pollPause = 20 * time.Millisecond

// wait returns when the process has ended, or, if it is not known, when the
// store is unlocked.
func (s *mountServer) wait(ctx context.Context) error {
	for {
		gone, err := s.gone()
		if gone || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pollPause):
		}
	}
}

func (s *mountServer) gone() (bool, error) {
	if s.pidfd < 0 {
		return storeUnlocked(s.store), nil
	}
	fds := []unix.PollFd{{Fd: int32(s.pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	if errors.Is(err, unix.EINTR) {
		return false, nil
	}
	return n > 0, err
}

// storeUnlocked reports whether nobody holds the store's lock. A lock file that
// cannot be opened cannot be waited for.
func storeUnlocked(store string) bool {
	f, err := os.OpenFile(store+"/.kmsfs/lock", os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return true
	}
	defer f.Close()
	return !errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}
