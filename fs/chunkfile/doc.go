// Package chunkfile is one open file: plaintext reads and writes over sealed
// chunks in a store file (docs/format.md, section 3).
//
// At most one chunk is held in memory in plaintext (the hot chunk): the end of
// a file being appended to, or the chunk that small writes fall into. It is
// sealed when another chunk takes its place and at Flush, so that appending
// does not seal the same chunk again and again.
//
// What reaches the store file, and when (docs/format.md, sections 7 to 9):
//
//   - bytes past its end are written there, once the Owner has it on record that
//     the file grows (Direct): after a crash Repair keeps what is whole;
//   - bytes that replace others go to the journal first (Log). If those others
//     are durable, the journal has to be on the disk before they are touched:
//     until then the operation is pending, and reads show it as done. An fsync of
//     a file with nothing but such changes is one of the journal.
//
// A disk that fails, above all one that is full, takes nothing away: new bytes
// go to the disk before any are replaced, and are cut off again if they do not
// fit. Once the journal has an operation it counts as done, is tried again until
// it succeeds, and before anything else.
package chunkfile
