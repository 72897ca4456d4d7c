package lease

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Identity tells one machine, and one run of its kernel, from others.
type Identity struct {
	Machine string // as in machine-id(5); empty: not known, and Boot stands for it
	Boot    string // of the running kernel: new at each boot, the same in its containers
	Host    string // for people
}

const (
	machineFile = "/etc/machine-id"
	bootFile    = "/proc/sys/kernel/random/boot_id"
)

// ThisMachine reads the identity of the machine that this process is on.
func ThisMachine() Identity {
	id := Identity{Machine: line(machineFile), Boot: line(bootFile)}
	if id.Machine == "uninitialized" { // systemd writes that into images
		id.Machine = ""
	}
	id.Host, _ = os.Hostname() // for people; empty is as good
	return id
}

func line(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(b))
}

// hashes are the machine and the boot as a lease of the store names them: not
// the ids themselves, and others in each store.
func (id Identity) hashes(store []byte) (machine, boot [sha256.Size]byte) {
	hash := func(what, s string) [sha256.Size]byte {
		return sha256.Sum256([]byte("kmsfs v1 lease " + what + "\x00" + string(store) + "\x00" + s))
	}
	machine, boot = hash("machine", id.Machine), hash("boot", id.Boot)
	if id.Machine == "" {
		machine = boot
	}
	return machine, boot
}

// thisProcess returns the calling process.
func thisProcess() process {
	p := process{pid: uint32(os.Getpid()), namespace: pidNamespace()}
	p.start, _, _ = startOf("self")
	return p
}

func pidNamespace() uint64 {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil {
		return 0
	}
	return st.Ino
}

// startOf returns when a process started, in clock ticks after boot, and its state.
func startOf(pid string) (start uint64, state byte, err error) {
	b, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return 0, 0, err
	}
	// The command's name stands in parentheses, and may have any in it.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 20 {
		return 0, 0, errors.New("lease: short stat")
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	return start, fields[0][0], err
}

// gone reports whether a process of this kernel has ended for certain.
func (p process) gone() bool {
	if p.pid == 0 || p.namespace == 0 || p.namespace != pidNamespace() {
		return false
	}
	if errors.Is(unix.Kill(int(p.pid), 0), unix.ESRCH) {
		return true
	}
	start, state, err := startOf(strconv.Itoa(int(p.pid)))
	return err == nil && (start != p.start || state == 'Z' || state == 'X')
}

// localTypes are the file systems that one kernel alone has mounted, so that its
// locks reach every process that can get at the files. Others, FUSE's among them,
// may have other machines at the other end.
var localTypes = map[int64]bool{
	unix.EXT4_SUPER_MAGIC: true, unix.XFS_SUPER_MAGIC: true, unix.BTRFS_SUPER_MAGIC: true,
	unix.TMPFS_MAGIC: true, unix.RAMFS_MAGIC: true, unix.F2FS_SUPER_MAGIC: true, unix.OVERLAYFS_SUPER_MAGIC: true,
	unix.REISERFS_SUPER_MAGIC: true, unix.NILFS_SUPER_MAGIC: true, unix.MSDOS_SUPER_MAGIC: true, unix.EXFAT_SUPER_MAGIC: true,
	unix.ECRYPTFS_SUPER_MAGIC: true,
	0x2fc12fc1:                true, // ZFS
	0xca451a4e:                true, // bcachefs
	0x3153464a:                true, // JFS
	0x7366746e:                true, // NTFS3
}

// uptime counts nanoseconds, those in which the machine slept included.
func uptime() int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0
	}
	return t.Nano()
}
