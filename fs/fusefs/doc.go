// Package fusefs serves a cryptfs.Volume to the Linux kernel over FUSE. It
// translates calls and decides nothing: what a file system operation means is
// cryptfs's business, and what a user reads about it is in docs/semantics.md.
//
// Four things are this package's own:
//
//   - the table from error to errno, and the one log line for an error that
//     somebody has to act on (errno.go);
//   - the kernel's references: every inode number the kernel has been told is
//     one or more references on a cryptfs.Node, given back when the kernel
//     forgets them or the mount ends (node_table.go);
//   - what the kernel may cache (node_api.go). One mount owns the store, so
//     entries, attributes and pages stay valid until the kernel itself
//     changes them;
//   - mounting, and what is left to do when the kernel goes away (server.go).
//
// It implements go-fuse's RawFileSystem rather than its node package, which
// hides the caller's umask and the write flags. Without the umask no default
// ACL is inherited rightly, without the flags no write clears setuid.
//
// Advisory locks (fcntl, flock) stay in the kernel, as does the permission
// check (default_permissions is always on). copy_file_range is answered such
// that the kernel copies through the page cache.
//
// Log lines hold inode numbers and errors, never a plaintext name or path.
package fusefs
