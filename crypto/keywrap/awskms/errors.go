package awskms

import "github.com/kmsfs/kmsfs/crypto/fault"

// ErrOptions means that Options makes no sense. The failures of calls are those
// of package keywrap.
var ErrOptions = fault.New(fault.Invalid, "awskms: bad option")
