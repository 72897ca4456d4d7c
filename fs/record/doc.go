// Package record holds the byte formats of what a store keeps beside its
// files: the store record, directory records and rewrap batches
// (docs/format.md, sections 5, 6 and 15). It only encodes and parses; keys, MACs
// and disks are the caller's. Parsers take bytes from an untrusted store: they
// bound every length, accept exactly what the encoder writes, and never panic.
package record
