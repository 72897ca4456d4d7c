package placement

import "github.com/kmsfs/kmsfs/crypto/fault"

// ErrHeader means that a file's header is missing, or not whole.
var ErrHeader = fault.New(fault.Integrity, "placement: file has no header")
