// Package faultsweep shows what a volume does on a disk that fails: every call
// that an operation makes on the store's disk fails once, one run for each, with
// EIO, EDQUOT or ENOSPC; or it and all calls after it, all of one kind, or a
// write in the middle. After each run holds:
//
//   - There was no panic, no hang, and no descriptor left open.
//   - Who was told of success has it, in this volume and in the next one, and who
//     was told of a failure has the old state or the new. The errno is the disk's,
//     or EIO after a failed sync, and an error of the disk is not taken for damage.
//   - A sync that failed is not called a success by a later one: the kernel has
//     forgotten what it could not write.
//   - The next volume opens, fsck --repair finds nothing that it cannot mend, and
//     fsck then nothing at all; and the store is used again.
//
// FAULT_FULL=1 tries every call with every errno. A few runs go through a mount.
package faultsweep
