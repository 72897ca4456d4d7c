// Package journal is the redo journal of a store: what it was told of, and what
// was synced of it, is found after the process died or the power went
// (docs/format.md, section 7). It knows nothing of chunks and keys of files;
// chunkfile says what to log and cryptfs does again what is found.
//
// What it promises:
//
//   - Commit returns when all records up to a place are on the disk. After that
//     Open finds them, in order, until they are done. Records after it may be
//     found or not; one that is found has all before it.
//   - Records come from whoever had the store key, and from this use of the file:
//     each one's MAC covers the one before, the first the header's, and that has a
//     random number. A torn record, and what is behind it, is no record.
//   - An epoch is done only after Checkpoint's settle put everything of it in
//     place and sync, a syncfs(2), made that durable.
//   - After a failed sync nothing more is promised: the log is stopped (ErrAborted)
//     and the store has to be opened again.
//
// Layout: two files, .kmsfs/journal/0 and 1, the segments. Epoch e is written to
// segment e mod 2: a header of 4,096 bytes, then records, each with kind, length,
// MAC, and a body of at most 8 MiB. A segment is overwritten by the epoch after
// the next.
//
// Direct is for bytes that need no record, those past a file's end: it keeps a
// checkpoint from coming between the write and the end of its epoch, and has it on
// record, once for each file and epoch, that the file grows.
//
// What a crash can leave, and what Open makes of it:
//
//   - a header that is torn: no header; the other segment counts alone;
//   - a header of a new epoch without records, the old one not done: both are live,
//     and what the old one has is done again;
//   - a record that is torn, or missing between others: the segment ends before it;
//   - a record that says done, not on the disk: its epoch is done again, which
//     changes nothing, since operations are idempotent and in their order;
//   - a segment of the last process whose records the kernel had, and the disk not:
//     Open writes what it found over itself and syncs it before anybody acts on it,
//     and goes on behind a record of its own (resume), so that nothing which comes
//     to light later continues the chain;
//   - a segment that is gone, while the newest header says that it was live:
//     ErrMissing.
//
// A full disk never takes away what is there: both files are made and get some
// room with the first epoch, and that an epoch is done may be said by a header,
// which goes over an old one, where there is no room for a record.
package journal
