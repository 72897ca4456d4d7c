// Package audit keeps an append-only log of key use and integrity failures,
// one JSON object a line, chained by hashes so that a missing or changed line
// shows (Verify). docs/audit.md describes the lines and what the chain proves.
//
// A Log has one writer goroutine that commits in groups. In the default mode
// it never stops its caller: what cannot be written is counted, and the count
// is written as a "lost" line as soon as writing works again. With
// Options.Required, Write returns only after the line was written, with an
// error if it was not, so that the caller can refuse the key.
//
// A line is
//
//	{"seq":N,"time":…,…,"prev":"<64 hex>","hash":"<64 hex>"}\n
//
// where prev is the hash of the line before (zeros for the first of all) and
// hash = SHA-256(the 32 bytes of prev || the line's bytes with the member hash
// taken out, from "{" to "}"). The chain goes on across rotated files: FILE is
// the newest, then FILE.1, FILE.2 and so on. FILE.head holds number and hash of
// a recent last line, so that a cut-off end shows unless both are changed.
// FILE.lock keeps a second writer out.
//
// Nothing in the chain is secret: whoever may write the files can rewrite all
// of them consistently. Heads that were noted elsewhere prove that this was not
// done before that line (see Verify).
//
// Events hold ids, key URIs, classes and program names, never keys, plaintext
// or plaintext names of files; the caller sees to that, with Failure for errors.
package audit
