package metrics

import "github.com/kmsfs/kmsfs/crypto/fault"

// ErrAddress is an address that nothing can listen on: see Serve.
var ErrAddress = fault.New(fault.Invalid, "metrics: not a HOST:PORT to listen on")

// errNoAnswer is the health check's, when the volume does not answer.
var errNoAnswer = fault.New(fault.Conflict, "metrics: the volume does not answer")
