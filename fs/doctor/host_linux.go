package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/keymem"
)

// Host is the machine to look at.
type Host struct {
	Root string // "" is this machine; tests give a tree with dev, etc and proc
	UID  int
}

// Checks returns the checks of the machine alone.
func (h Host) Checks() []Check {
	return []Check{
		{"fuse.device", func(context.Context) []Finding { return h.device() }},
		{"fuse.helper", func(context.Context) []Finding { return h.helper() }},
		{"fuse.allow-other", func(context.Context) []Finding { return h.allowOther() }},
		{"kernel.version", func(context.Context) []Finding { return kernel() }},
		{"memory.locked", func(context.Context) []Finding { return h.locked() }},
		{"memory.swap", func(context.Context) []Finding { return h.swap() }},
		{"memory.core", func(context.Context) []Finding { return core() }},
		{"clock.synchronised", func(context.Context) []Finding { return synchronised() }},
	}
}

func (h Host) path(abs string) string { return filepath.Join(h.Root, abs) }

// device opens /dev/fuse as a mount would.
func (h Host) device() []Finding {
	const path, check = "/dev/fuse", "fuse.device"
	f, err := os.OpenFile(h.path(path), os.O_RDWR, 0)
	if err == nil {
		st, serr := f.Stat()
		if err = f.Close(); err == nil {
			err = serr
		}
		if err == nil && st.Mode()&os.ModeCharDevice == 0 {
			return one(check, Error, path, "is not a device", "rm it, then: modprobe fuse")
		}
	}
	switch {
	case err == nil:
		return one(check, OK, path, "can be opened", "")
	case errors.Is(err, os.ErrNotExist):
		return one(check, Error, path, "does not exist", "modprobe fuse; in a container: --device /dev/fuse")
	case errors.Is(err, os.ErrPermission):
		return one(check, Error, path, "this user may not open it",
			"chmod 666 /dev/fuse, as distributions have it; in a container: --device /dev/fuse --cap-add SYS_ADMIN")
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return one(check, Error, path, "there is no driver behind it", "modprobe fuse; the kernel needs CONFIG_FUSE_FS")
	}
	return one(check, Error, path, err.Error(), "modprobe fuse")
}

// helper looks for fusermount3: everybody but root mounts through it.
func (h Host) helper() []Finding {
	const check = "fuse.helper"
	path, err := exec.LookPath("fusermount3")
	if h.Root != "" {
		path = h.path("/usr/bin/fusermount3")
		_, err = os.Stat(path)
	}
	switch {
	case err != nil && h.UID == 0:
		return one(check, OK, "fusermount3", "is not installed; root mounts without it", "")
	case err != nil:
		return one(check, Error, "fusermount3", "is not installed, and only root mounts without it", "install the package fuse3")
	}
	st, err := os.Stat(path)
	if err != nil {
		return one(check, Error, path, err.Error(), "install the package fuse3")
	}
	if h.UID != 0 && st.Mode()&os.ModeSetuid == 0 {
		return one(check, Error, path, "lacks the set-user-id bit, without which only root can mount", "chmod u+s "+path+", or install the package fuse3 again")
	}
	return one(check, OK, path, "is installed", "")
}

func (h Host) allowOther() []Finding {
	const check, path = "fuse.allow-other", "/etc/fuse.conf"
	if h.UID == 0 {
		return one(check, OK, path, "root may let other users in (--allow-other)", "")
	}
	b, err := os.ReadFile(h.path(path))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return one(check, Info, path, err.Error(), "")
	}
	for line := range strings.Lines(string(b)) {
		if strings.TrimSpace(line) == "user_allow_other" {
			return one(check, OK, path, "users may let other users in (--allow-other)", "")
		}
	}
	return one(check, Info, path, "only root may let other users in (--allow-other)", "a line user_allow_other in /etc/fuse.conf allows it to everybody")
}

func kernel() []Finding {
	const check = "kernel.version"
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return one(check, Info, "", err.Error(), "")
	}
	return kernelFinding(unix.ByteSliceToString(u.Release[:]))
}

func kernelFinding(release string) []Finding {
	const check = "kernel.version"
	var major, minor int
	if n, _ := fmt.Sscanf(release, "%d.%d", &major, &minor); n != 2 {
		return one(check, Info, release, "is no version that is known here", "")
	}
	before := func(ma, mi int) bool { return major < ma || major == ma && minor < mi }
	switch {
	case before(4, 20):
		return one(check, Warning, release, "has small FUSE requests only, which is slow", "use Linux 4.20 or newer")
	case before(6, 6):
		return one(check, OK, release, "works; files on a mount have no birth time before Linux 6.6", "")
	}
	return one(check, OK, release, "works", "")
}

// locked tries to lock key memory, and compares the limit with what a mount
// with some thousand keys takes.
func (h Host) locked() []Finding {
	const check, enough = "memory.locked", 1 << 20
	keymem.Random(32).Wipe()
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil {
		return one(check, Info, "", err.Error(), "")
	}
	const remedy = "ulimit -l 65536, LimitMEMLOCK=64M in a systemd unit, or memlock in /etc/security/limits.conf"
	switch {
	case !keymem.Locked():
		return one(check, Warning, "RLIMIT_MEMLOCK", fmt.Sprintf("keys cannot be locked into memory and may reach the swap (limit %s)", bytesText(l.Max)), remedy)
	case l.Max < enough && h.UID != 0:
		return one(check, Warning, "RLIMIT_MEMLOCK", fmt.Sprintf("only %s of keys can be locked into memory", bytesText(l.Max)), remedy)
	}
	return one(check, OK, "RLIMIT_MEMLOCK", "keys are locked into memory", "")
}

func bytesText(n uint64) string {
	const unit = 1024
	if n == unix.RLIM_INFINITY {
		return "unlimited"
	}
	if n < unit {
		return fmt.Sprintf("%d bytes", n)
	}
	size, names := float64(n)/unit, []string{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	for size >= unit && len(names) > 1 {
		size, names = size/unit, names[1:]
	}
	return fmt.Sprintf("%.3g %s", size, names[0])
}

func (h Host) swap() []Finding {
	const check = "memory.swap"
	b, err := os.ReadFile(h.path("/proc/swaps"))
	if err != nil {
		return one(check, Info, "", err.Error(), "")
	}
	var on []string
	for i, line := range bytes.Split(bytes.TrimSpace(b), []byte("\n")) {
		f := strings.Fields(string(line))
		if i > 0 && len(f) > 1 && !strings.HasPrefix(f[0], "/dev/zram") { // zram is memory
			on = append(on, f[0])
		}
	}
	switch {
	case len(on) == 0:
		return one(check, OK, "", "nothing reaches a disk by swapping", "")
	case !keymem.Locked():
		return one(check, Warning, strings.Join(on, " "), "swap is on, and keys are not locked into memory", "raise the limit on locked memory, encrypt the swap, or turn it off")
	}
	return one(check, Info, strings.Join(on, " "), "swap is on: keys are locked into memory, but what programs read from a mount may reach it", "encrypt the swap")
}

// core asks whether this process, which is set up as a mount is, could leave its
// memory behind.
func core() []Finding {
	const check = "memory.core"
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &l); err != nil {
		return one(check, Info, "", err.Error(), "")
	}
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil || l.Cur != 0 || dumpable != 0 {
		return one(check, Warning, "", "a crash could write keys to a core dump", "ulimit -c 0, or LimitCORE=0 in a systemd unit")
	}
	return one(check, OK, "", "no core dumps, no debuggers", "")
}

func synchronised() []Finding {
	const check = "clock.synchronised"
	state, err := unix.Adjtimex(&unix.Timex{})
	switch {
	case err != nil:
		return one(check, Info, "", "cannot be told: "+err.Error(), "")
	case state == unix.TIME_ERROR:
		return one(check, Info, "", "the kernel does not know its clock to be synchronised", "run a time service: systemd-timesyncd, chrony")
	}
	return one(check, OK, "", "the clock is synchronised", "")
}
