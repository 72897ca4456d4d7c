// Package keymem holds secret keys in memory that is locked (never swapped),
// left out of core dumps, and wiped on release.
//
// A Key does not print: every formatting path gives "[redacted]". Bytes of a
// Key live outside the Go heap, in slots of an mmap'ed arena, so that the
// garbage collector neither copies nor keeps them. Where the system refuses to
// lock memory (RLIMIT_MEMLOCK), keys still work and Locked reports false.
package keymem
