// Package classify holds a store's policy: which data classes exist, which keys
// and options each has, and which directories belong to which. It does no I/O.
//
// A policy is written as YAML (or JSON, which Marshal makes):
//
//	version: 1
//	default: general
//	classes:
//	  general: { keys: ["keyring:general"] }
//	  phi:
//	    keys: ["arn:aws:kms:us-east-1:111122223333:key/1f0c…", "alias/recovery"]
//	    retired: ["alias/old"] # may still unwrap; new files get no copy under it
//	    data_keys: per-file    # or shared: one call for the keys of many files
//	    cache: 0s              # default 5m; 0s: every open is a call
//	    names: encrypted       # or plain
//	    chunk_size: 16KiB      # a power of two, 4KiB to 64KiB
//	directories:
//	  /patients: phi
//
// Reading is strict: unknown and duplicate fields, aliases, second documents
// and anything beyond the bounds below are refused, with line, field and a hint.
// The longest rule that is a directory or lies above it decides its class;
// without one, the default does. Paths are bytes of the plaintext tree with "/"
// between components, and rules are UTF-8.
//
// A *Policy that Parse, Single, Clone or WithRule returned is never changed by
// this package; concurrent reads are safe.
package classify
