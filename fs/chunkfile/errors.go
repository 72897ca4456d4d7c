package chunkfile

import "github.com/kmsfs/kmsfs/crypto/fault"

var (
	// ErrNoKey means that the file was opened without its key.
	ErrNoKey = fault.New(fault.KeyMissing, "chunkfile: file has no key yet")
	// ErrSize means a store file of a size that no plaintext has.
	ErrSize = fault.New(fault.Integrity, "chunkfile: store file has an impossible size")
	// ErrRange means an offset or size outside what a file can have.
	ErrRange = fault.New(fault.Invalid, "chunkfile: offset out of range")
	// ErrLost means that repair found less than the last fsync promised.
	ErrLost = fault.New(fault.Integrity, "chunkfile: bytes that were synced are missing")
)
