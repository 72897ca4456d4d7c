// Package cryptfs is a store in plaintext terms: a volume of directories and
// files with their real names and contents, over a ciphertext directory, key
// services, and a policy. It knows no FUSE; fs/fusefs translates for the
// kernel, and the command line uses it without a mount.
//
// Lock order: Node.opening, the chunkfile's own, openFile.mu, unsettled.dooming,
// Volume.ns, nodeTable.mu, Node.mu, Node.linksMu, dirCache.mu, sharing.mu,
// unsettled.mu; the journal's own come last. With Volume.ns held, an open file is only asked what it answers
// without waiting. No key service is called with any of them held.
//
// What a crash can leave, and what the next Open does about it, stands in
// docs/format.md, section 9.
package cryptfs
