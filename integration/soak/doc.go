// Package soak runs mixed load on one mount for as long as it is told: SQLite,
// PostgreSQL, tar, git, and random changes of files, each held against a model,
// while the key service is slow, throttles and is away, and while the mount is
// killed and mounted again. It samples the serving process, and requires in the
// end that its memory, descriptors and goroutines do not grow.
//
// SOAK is the time to run ("1h"), by default a few seconds; SOAK_OUT a directory
// for the results: soak.json, soak.svg, soak.txt. SOAK_PLACEMENT is where the
// store keeps its headers.
package soak
