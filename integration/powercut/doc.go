// Package powercut proves that what was fsynced survives a power cut. It records
// every operation that a mount makes on its store's disk, builds from the record
// the disks that a cut may leave behind, opens each as a store, and holds what
// is in it against what programs were promised.
//
// The model of the disk is that of ALICE (OSDI 2014) and CrashMonkey (OSDI
// 2018), made stricter than any Linux file system:
//
//   - Of the writes to a file that were not synced any subset is on the disk,
//     each whole or some of its sectors only, of 512 bytes or 4 KiB. The size is
//     what the surviving writes make it.
//   - Truncates of one file persist in order, and a write after one not without
//     it.
//   - Attributes of one file persist in order, and a size that a write makes not
//     before the attributes that were set before it. With other data there is no
//     order.
//   - The names of one directory persist in order, those of different ones
//     independently of each other, a rename from one to another in both or in
//     neither. What is below a directory needs the directory's own name.
//   - fsync(2) of a file makes its data, size and attributes durable, and not its
//     name; fdatasync(2) not its attributes; fsync(2) of a directory its names;
//     syncfs(2) everything.
//
// A recovery, by a mount or by fsck --repair, is recorded and cut in its turn. What
// a mount has shown after a cut is durable, and the next recovery must give it.
//
// CRASH_FULL=1 tries every state of every sequence on every placement, and many
// more sequences at random, for as long as that takes, or CRASH_TIME for each of
// the two parts (10m). CRASH_SEED=N repeats a sequence at random that failed. Needs
// FUSE.
package powercut
