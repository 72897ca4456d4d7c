package fusefs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// checkFuse finds out before the mount what is missing for one, because
// neither mount(2) nor fusermount3 says it in a way that helps.
func checkFuse() error {
	const device = "/dev/fuse"
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFCHR {
		return noDevice(unix.ENODEV) // a file that a container's setup left in its place
	}
	if os.Geteuid() != 0 {
		// fusermount3 opens the device with its caller's rights.
		if err := unix.Access(device, unix.R_OK|unix.W_OK); err != nil {
			return noDevice(err)
		}
		if _, err := fusermount(); err != nil {
			return fmt.Errorf("no fusermount3 (install the package fuse3, or mount as root): %w", ErrNoFuse)
		}
		return nil
	}
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return noDevice(err)
	}
	return unix.Close(fd)
}

// fusermount looks where go-fuse will.
func fusermount() (string, error) {
	for _, name := range []string{"fusermount3", "/bin/fusermount3", "fusermount", "/bin/fusermount"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", exec.ErrNotFound
}

func noDevice(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("/dev/fuse may not be opened (chmod 666 /dev/fuse; in a container, pass --device /dev/fuse and --cap-add SYS_ADMIN): %w", ErrNoFuse)
	}
	return fmt.Errorf("/dev/fuse: %w (modprobe fuse; in a container, pass --device /dev/fuse): %w", err, ErrNoFuse)
}

// refused explains why the mount did not come about.
func refused(err error, args mountArgs) error {
	var errno syscall.Errno
	switch {
	case errors.As(err, &errno) && errno != unix.EPERM && errno != unix.EACCES:
		return fmt.Errorf("mount: %w", err)
	case errors.As(err, &errno):
		return fmt.Errorf("mount: %w (it takes CAP_SYS_ADMIN): %w", err, ErrRefused)
	case args.allowOther:
		return fmt.Errorf("fusermount3 failed, its message is above; allow_other takes user_allow_other in /etc/fuse.conf: %w", ErrRefused)
	}
	return fmt.Errorf("fusermount3 failed, its message is above: %w", ErrRefused)
}
