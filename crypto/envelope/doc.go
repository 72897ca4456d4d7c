// Package envelope is the life cycle of data keys: it makes one for a file,
// writes what unwraps it into the file's header, and gives it back at open.
//
// A header block (docs/format.md, section 4) is big endian and zero padded to
// its size:
//
//	 0  6  magic "kmsfs\0"
//	 6  2  format version: 3 with a birth, else 2 if shared, else 1
//	 8  1  cipher suite, not 0 if there is a chunk size
//	 9  1  log2 of the chunk size; 0 if the key has no contents (name and store keys)
//	10  2  flags: bit 0 sparse, bit 1 shared, the others 0
//	12  4  size of the header block
//	16 16  store id
//	32 16  file id
//	48 32  commitment = HMAC-SHA256(header key, bytes 0 to 47)
//	80  1  number of recipients, 1 to 8
//	81  1  0
//	82  2  length of the recipients in bytes
//	84     recipients: class, key URI, wrapped key, key-material id, each after
//	       its length (1, 2, 2 and 1 bytes)
//	       if shared: branch id (16), wrapped data key (40)
//
// In version 3 the birth (8 bytes, not 0) stands at 48, and the rest 8 bytes
// later; the commitment covers it.
//
// Keys are derived from the data key (DEK) that the key service unwraps:
//
//	PRK        = HKDF-Extract-SHA256(salt = store id || file id, ikm = DEK)
//	header key = HKDF-Expand(PRK, "kmsfs v1 header", 32)
//
// Where many files share the key service's work (Class.Shared), the recipients
// hold a branch key, which the service knows by the branch id, and the data key
// of each file is made here and wrapped (RFC 5649) under a key of its own:
//
//	branch PRK   = HKDF-Extract-SHA256(salt = store id || branch id, ikm = branch key)
//	wrapping key = HKDF-Expand(branch PRK, "kmsfs v2 branch" || store id || file id || class, 32)
//
// The commitment binds the bytes before it to one data key. Recipients are
// outside of it, since a rewrap changes them without the data key. What guards
// them: the list of keys that the class allows, asked before any call; the key
// service's own authentication of the encryption context; and the commitment,
// which every unwrapped key must meet before the caller gets it. Whoever edits
// recipients can therefore make a file unreadable, never make it open under
// another key. Branch id and wrapped data key are in the same position.
//
// # Calls and keys ahead of need
//
// The key service is slow, so a Manager asks it as seldom and as early as it
// may: unwrapped keys stay in a cache for the class's time, concurrent requests
// for one key make one call, Create takes keys from a pool that is filled in the
// background, and Ahead unwraps what a reader is about to open. Options.Observe
// sees every use of a key before it happens, and Options.Call every call, with
// the request ids that join the two, and both with the service's own log.
package envelope
