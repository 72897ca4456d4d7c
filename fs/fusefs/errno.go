package fusefs

import (
	"context"
	"errors"
	"log/slog"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// This file is the only place of the package that turns an error into an
// errno and the only one that logs an error. It exists because go-fuse's own
// helpers (fuse.ToStatus, fs.ToErrno) know no kinds, and because the kernel
// reads ENOSYS as "never ask again": for fsync and close it then reports
// success without asking.

// A row says what the caller of the system call gets and at which level the
// operator hears of it. Rows at slog.LevelDebug are everyday answers, such as
// EXDEV, on which mv copies.
type row struct {
	errno syscall.Errno
	level slog.Level
	audit bool // somebody may have changed the store: audit=true in the log line
}

// rows has one entry per fault kind (docs/semantics.md repeats the table).
var rows = map[fault.Kind]row{
	fault.Integrity:      {unix.EIO, slog.LevelError, true},
	fault.BadFormat:      {unix.EIO, slog.LevelError, true},
	fault.KeyDenied:      {unix.EACCES, slog.LevelWarn, false},
	fault.KeyMissing:     {unix.ENOKEY, slog.LevelWarn, false},
	fault.KeyRevoked:     {unix.EKEYREVOKED, slog.LevelWarn, false},
	fault.KeyExpired:     {unix.EKEYEXPIRED, slog.LevelWarn, false},
	fault.KeyRejected:    {unix.EKEYREJECTED, slog.LevelError, true},
	fault.KeyUnavailable: {unix.ETIMEDOUT, slog.LevelWarn, false},
	fault.Forbidden:      {unix.EPERM, slog.LevelWarn, false},
	fault.CrossClass:     {unix.EXDEV, slog.LevelDebug, false},
	fault.Unsupported:    {unix.EOPNOTSUPP, slog.LevelDebug, false},
	fault.Invalid:        {unix.EINVAL, slog.LevelDebug, false},
	fault.TooLong:        {unix.ENAMETOOLONG, slog.LevelDebug, false},
	fault.Conflict:       {unix.ESTALE, slog.LevelWarn, false},
}

// hints say what to do where the error itself does not.
var hints = map[fault.Kind]string{
	fault.Integrity:   "the store was damaged or altered: run kmsfs fsck on it, and compare with a backup",
	fault.BadFormat:   "the store was damaged or altered: run kmsfs fsck on it, and compare with a backup",
	fault.KeyDenied:   "the mount may not do this; see how it was mounted, and the key's policy",
	fault.KeyRejected: "kmsfs policy show prints the keys that a class may have: somebody may have changed the store",
	fault.Forbidden:   "kmsfs policy show prints the rules; where they changed, kmsfs reclassify brings the directory along",
}

// unknown is the row of an error without kind and errno: a bug or a library's
// own error that nobody gave a kind.
var unknown = row{unix.EIO, slog.LevelError, false}

// loud lists the errnos from the store that do not happen in normal use, or
// whose reason the errno alone does not tell. Every other one (ENOENT,
// ENOTEMPTY, ENOSPC, …) is the caller's business only; so is ESTALE, on which
// the kernel walks the path again, when a name changed between lookup and use.
var loud = map[syscall.Errno]slog.Level{
	unix.EIO:     slog.LevelError,
	unix.EUCLEAN: slog.LevelError,
	unix.EBADF:   slog.LevelError,
	unix.EMFILE:  slog.LevelError,
	unix.ENFILE:  slog.LevelError,
	unix.ENOMEM:  slog.LevelError,
	unix.EROFS:   slog.LevelWarn,
	unix.EBUSY:   slog.LevelWarn,
}

// maxErrno is the first number that the kernel refuses in a reply. A request
// answered with it would never end.
const maxErrno = 512

// Statuses that need no error value.
const (
	statusStale       = fuse.Status(unix.ESTALE)
	statusBadHandle   = fuse.Status(unix.EBADF)
	statusInvalid     = fuse.Status(unix.EINVAL)
	statusRange       = fuse.Status(unix.ERANGE)
	statusNoTTY       = fuse.Status(unix.ENOTTY)
	statusUnsupported = fuse.Status(unix.EOPNOTSUPP)

	// statusNeverAsk is for requests that are not needed: the kernel takes it for
	// success, and does without them from then on.
	statusNeverAsk = fuse.Status(unix.ENOSYS)
)

// translate finds err's row. The kind goes before an errno in the same tree:
// a key service that cannot be reached wraps ECONNREFUSED, and that is not
// what open(2) fails with. Only what the policy forbids has no errno below it,
// so that one found there was joined to it on purpose: EBUSY for a directory
// that must stay in its place.
func translate(err error) (fault.Kind, row) {
	kind := fault.Of(err)
	if r, ok := rows[kind]; ok {
		if errno, ok := errnoOf(err); ok && kind == fault.Forbidden {
			r.errno = errno
		}
		return kind, r
	}
	if errors.Is(err, context.Canceled) {
		return kind, row{errno: unix.EINTR, level: slog.LevelDebug}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return kind, row{errno: unix.ETIMEDOUT, level: slog.LevelWarn}
	}
	errno, ok := errnoOf(err)
	if !ok {
		return kind, unknown
	}
	level, ok := loud[errno]
	if !ok {
		level = slog.LevelDebug
	}
	return kind, row{errno: errno, level: level}
}

// errnoOf returns the errno that err wraps, if it is one that the kernel takes.
func errnoOf(err error) (syscall.Errno, bool) {
	var errno syscall.Errno
	if !errors.As(err, &errno) || errno == 0 || errno >= maxErrno {
		return 0, false
	}
	if errno == unix.ENOSYS {
		errno = unix.EOPNOTSUPP
	}
	return errno, true
}

// status ends operation op of request h: it translates err and logs it where
// it is worth a line. A nil err is success.
func (f *fileSystem) status(op string, h *fuse.InHeader, err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	kind, r := translate(err)
	ctx := context.Background()
	if f.log.Enabled(ctx, r.level) {
		f.log.LogAttrs(ctx, r.level, "operation failed", details(op, f.inode(h.NodeId), h, kind, r, err)...)
	}
	if f.failed != nil && r.level >= slog.LevelWarn {
		f.failed(Failure{Op: op, Uid: h.Uid, Pid: h.Pid, Err: err})
	}
	return fuse.Status(r.errno)
}

// inode returns the inode number behind one of the kernel's ids, or the id if it
// is not known.
func (f *fileSystem) inode(id uint64) uint64 {
	if n, ok := f.nodes.get(id); ok {
		return n.Ino()
	}
	return id
}

// details are the attributes of the log line. They hold no plaintext: errors
// of this module never do, and operating-system errors name store objects.
func details(op string, inode uint64, h *fuse.InHeader, kind fault.Kind, r row, err error) []slog.Attr {
	attrs := []slog.Attr{
		slog.String("op", op),
		slog.Uint64("inode", inode),
		slog.String("errno", unix.ErrnoName(r.errno)),
		slog.String("kind", kind.String()),
		slog.Any("err", err),
	}
	if r.audit {
		attrs = append(attrs, slog.Bool("audit", true),
			slog.Uint64("uid", uint64(h.Uid)), slog.Uint64("pid", uint64(h.Pid)))
	}
	var about *cryptfs.FileError
	if errors.As(err, &about) {
		attrs = append(attrs, slog.String("class", about.Class))
		if !about.File.IsZero() {
			attrs = append(attrs, slog.Any("file", about.File))
		}
	}
	hint := hints[kind]
	var call *keywrap.CallError
	if errors.As(err, &call) {
		attrs = append(attrs, slog.String("key", call.Key))
		if call.RequestID != "" {
			attrs = append(attrs, slog.String("request_id", call.RequestID))
		}
		if call.Hint != "" {
			hint = call.Hint
		}
	}
	if hint != "" {
		attrs = append(attrs, slog.String("hint", hint))
	}
	return attrs
}
