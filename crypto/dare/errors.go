package dare

import "github.com/kmsfs/kmsfs/crypto/fault"

// What this package answers. Integrity errors are about bytes from the store,
// Invalid ones about the caller's arguments.
var (
	ErrChunk     = fault.New(fault.Integrity, "dare: chunk fails authentication")
	ErrSize      = fault.New(fault.Integrity, "dare: no plaintext has this store size")
	ErrChunkSize = fault.New(fault.Invalid, "dare: chunk size is not a power of two from 4 KiB to 64 KiB")
	ErrBase      = fault.New(fault.Invalid, "dare: base is out of range")
	ErrSuite     = fault.New(fault.Invalid, "dare: unknown cipher suite")
	ErrKey       = fault.New(fault.Invalid, "dare: key is not 32 bytes, or wiped")
	ErrLength    = fault.New(fault.Invalid, "dare: plaintext length does not fit this chunk")
	ErrIndex     = fault.New(fault.Invalid, "dare: negative chunk index")
)
