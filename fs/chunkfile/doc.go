// Package chunkfile is one open file: plaintext reads and writes over sealed
// chunks in a store file (docs/format.md, section 3).
//
// At most one chunk is held in memory in plaintext (the hot chunk): the end of
// a file being appended to, or the chunk that small writes fall into. It is
// sealed when another chunk takes its place and at Flush, so that appending
// does not seal the same chunk again and again.
//
// What a crash of the process can leave, and what undoes it:
//
//   - a file whose end is not sealed as the last chunk, or ends in a torn
//     chunk: the Owner entered it in the writing list first (Begin), and Repair
//     seals the end again;
//   - bytes in place half replaced: the Owner has the whole replacement in a
//     redo record first (Redo), and Apply does it again.
//
// A disk that fails, above all one that is full, takes nothing away: new bytes
// go to the disk before any are replaced, and are cut off again if they do not
// fit. Once bytes in place are being replaced there is no way back; then the
// operation counts as done, is put off, and is tried again before anything else
// (and by Flush and Fsync, which tell).
package chunkfile
