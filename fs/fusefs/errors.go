package fusefs

import "github.com/kmsfs/kmsfs/crypto/fault"

// The failures of Mount and Unmount. Errors of file system calls go to the
// kernel as errno and are not returned to Go callers.
var (
	// ErrNoFuse: this machine cannot mount; the text says what is missing.
	ErrNoFuse = fault.New(fault.Unsupported, "fusefs: FUSE is not available")
	// ErrMountpoint: the mountpoint is no directory, or lies inside the store.
	ErrMountpoint = fault.New(fault.Invalid, "fusefs: not usable as a mountpoint")
	// ErrOption: a mount option (-o) that this program or kernel does not know.
	ErrOption = fault.New(fault.Invalid, "fusefs: unknown mount option")
	// ErrRefused: the kernel or fusermount3 does not let this user mount.
	ErrRefused = fault.New(fault.Forbidden, "fusefs: mount refused")
	// ErrBusy: Unmount found the mount in use and changed nothing.
	ErrBusy = fault.New(fault.Conflict, "fusefs: mount is in use")
)
