package fusefs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// Options of a mount.
type Options struct {
	AllowOther bool         // other users than the one who mounts may use it
	ReadOnly   bool         // mount read-only, whatever Extra says; so is a volume that was opened read-only
	Extra      []string     // -o options; see mount(8)
	Log        *slog.Logger // nil: slog.Default()

	// Failed is told of each operation that failed for a reason that somebody
	// should hear of: those that are logged at least as warnings. It must not
	// block and must not use the mount. nil: nobody.
	Failed func(Failure)

	known int // instead of maxKnown, for tests; 0: maxKnown
}

// Failure is an operation that failed.
type Failure struct {
	Op       string
	Uid, Pid uint32 // of the caller; Pid is the thread's
	Err      error
}

// CallerOf returns who asked for what is done under ctx, a context that this
// package made; ok is false for any other.
func CallerOf(ctx context.Context) (uid, gid, pid uint32, ok bool) {
	c, ok := fuse.FromContext(ctx)
	if !ok {
		return 0, 0, 0, false
	}
	return c.Uid, c.Gid, c.Pid, true
}

// maxRequest is the most that one read or write request carries, and how far
// the kernel reads ahead: 1 MiB, the kernel's own limit.
const maxRequest = 1 << 20

// capabilities are asked for beyond go-fuse's own choice; see fuse(4) and the
// kernel's include/uapi/linux/fuse.h. The kernel takes those that it knows.
//
// CAP_WRITEBACK_CACHE makes small writes many times faster. With it the kernel
// has the size and times of files that are being written, and what of them it
// has not written out yet: see kernelView and openFlags.
const capabilities = fuse.CAP_ATOMIC_O_TRUNC | // open with O_TRUNC is one request, one key
	fuse.CAP_DONT_MASK | // the umask comes with the request: a default ACL overrides it
	fuse.CAP_HANDLE_KILLPRIV_V2 | // writes say when setuid must go, no getxattr before each of them
	fuse.CAP_WRITEBACK_CACHE | // small writes cost no request
	fuse.CAP_DIRECT_IO_ALLOW_MMAP | // also where writes go through
	fuse.CAP_SETXATTR_EXT | // setting an ACL says when setgid must go
	fuse.CAP_EXPORT_SUPPORT | // file handles outlive the kernel's inodes
	fuse.CAP_READDIRPLUS_AUTO | // a bare listing does not look every entry up
	fuse.CAP_PARALLEL_DIROPS

// Server is one mount. Its methods are safe for concurrent use.
type Server struct {
	fuse       *fuse.Server
	mountpoint string
	done       chan struct{} // closed when everything is released

	unmounting sync.Mutex
}

// Mount mounts v on the directory mountpoint and serves it in the background
// until it is unmounted. When Mount returns, the mount is usable. The volume
// stays the caller's, who closes it after Wait.
//
// Root mounts directly, without the nosuid and nodev that fusermount3 forces
// upon others; `-o nosuid,nodev` is honoured.
func Mount(v *cryptfs.Volume, mountpoint string, o Options) (*Server, error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	store := v.Path()
	mountpoint, err := checkMountpoint(mountpoint, store)
	if err != nil {
		return nil, err
	}
	args, err := parseOptions(o.Extra)
	if err != nil {
		return nil, err
	}
	if o.ReadOnly || v.ReadOnly() {
		err = args.add("ro")
	}
	if err == nil {
		err = checkFuse()
	}
	if err != nil {
		return nil, err
	}
	args.allowOther = args.allowOther || o.AllowOther
	files := newFileSystem(v, o.Log)
	files.failed = o.Failed
	server, err := fuse.NewServer(files, mountpoint, mountOptions(store, args, o))
	if err != nil {
		return nil, refused(err, args)
	}
	files.pruner.forget = server.PruneNotify
	if o.known > 0 {
		files.pruner.max = o.known
	}
	if files.kernel, err = newKernelView(mountpoint); err != nil {
		o.Log.Debug("holes of files that are being written do not show", "err", err)
	}
	s := &Server{fuse: server, mountpoint: mountpoint, done: make(chan struct{})}
	go func() {
		server.Serve()
		close(s.done)
	}()
	go files.pruner.run(s.done)
	// The kernel has its answer to INIT: the mount is usable. go-fuse's WaitMount
	// would open a file on it besides. A process killed while it waits for an
	// answer of its own never ends, and keeps the store's lock: nothing in this
	// package may send a request to its own mount.
	readAhead(mountpoint, o.Log)
	return s, nil
}

// Wait returns when the file system is unmounted, by whom and however, and
// every handle that the kernel left is flushed and released.
func (s *Server) Wait() { <-s.done }

// Unmount unmounts the file system and waits until everything is released.
// While somebody uses it, Unmount fails with ErrBusy and changes nothing.
// Unmounting again is no error.
func (s *Server) Unmount() error {
	s.unmounting.Lock()
	defer s.unmounting.Unlock()
	select {
	case <-s.done:
		return nil
	default:
	}
	if err := s.fuse.Unmount(); err != nil {
		// fusermount3 has words only where umount(2) has an errno.
		if errors.Is(err, unix.EBUSY) || strings.Contains(err.Error(), "busy") {
			return fmt.Errorf("%s: %w", s.mountpoint, ErrBusy)
		}
		return fmt.Errorf("unmount %s: %w", s.mountpoint, err)
	}
	<-s.done
	return nil
}

func mountOptions(store string, args mountArgs, o Options) *fuse.MountOptions {
	m := &fuse.MountOptions{
		AllowOther:               args.allowOther,
		Options:                  append([]string{"default_permissions"}, args.data...),
		MaxWrite:                 maxRequest,
		MaxReadAhead:             maxRequest,
		FsName:                   store,
		Name:                     "kmsfs",
		Logger:                   slog.NewLogLogger(o.Log.Handler(), slog.LevelWarn),
		EnableSymlinkCaching:     true,
		ExplicitDataCacheControl: true,
		EnableAcl:                true,
		DisableSplice:            true, // plaintext is in memory, there is no file to splice from
		ExtraCapabilities:        capabilities,
		DisabledCapabilities:     fuse.CAP_PASSTHROUGH, // would cost a level of stacking, for overlayfs on top
		PanicHandler: func(value any) fuse.Status {
			o.Log.Error("bug: a request panicked", "panic", value, "stack", string(debug.Stack()))
			return fuse.EIO
		},
	}
	if args.flags&unix.MS_RDONLY != 0 {
		// Nothing is held back there, and sizes are the volume's word: what the
		// journal still has of a file shows once it is open.
		m.ExtraCapabilities &^= fuse.CAP_WRITEBACK_CACHE
	}
	if os.Geteuid() == 0 {
		// Without the magic number, zero flags would mean nosuid and nodev.
		m.DirectMountStrict = true
		m.DirectMountFlags = unix.MS_MGC_VAL | args.flags
	} else {
		m.Options = append(m.Options, args.names...)
	}
	return m
}

// checkMountpoint returns the mountpoint's absolute path without symlinks. A
// mountpoint in the store would make the daemon wait for itself.
func checkMountpoint(mountpoint, store string) (string, error) {
	path, err := filepath.Abs(mountpoint)
	if err != nil {
		return "", err
	}
	path, err = filepath.EvalSymlinks(path)
	if errors.Is(err, unix.ENOTCONN) {
		return "", fmt.Errorf("%s: a dead mount is on it, run umount first: %w", mountpoint, ErrMountpoint)
	}
	if err != nil {
		return "", err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return "", fmt.Errorf("%s: no directory: %w", path, ErrMountpoint)
	}
	if real, err := filepath.EvalSymlinks(store); err == nil {
		store = real
	}
	if path == store || strings.HasPrefix(path, store+"/") {
		return "", fmt.Errorf("%s: lies in the store: %w", path, ErrMountpoint)
	}
	return path, nil
}

// readAhead lifts the kernel's limit of 128 KiB for reading ahead, which the
// FUSE protocol can only lower. It takes root; without it sequential reads are
// slower, so a failure is no error.
func readAhead(mountpoint string, log *slog.Logger) {
	var st unix.Statx_t
	// Without a request to ourselves, see Mount.
	err := unix.Statx(unix.AT_FDCWD, mountpoint, unix.AT_STATX_DONT_SYNC, 0, &st)
	if err == nil {
		file := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", st.Dev_major, st.Dev_minor)
		err = os.WriteFile(file, fmt.Appendf(nil, "%d", maxRequest>>10), 0)
	}
	if err != nil {
		log.Debug("the kernel's read-ahead stays as it is", "err", err)
	}
}
