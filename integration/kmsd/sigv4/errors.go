package sigv4

import "errors"

// What is wrong with a request's authentication.
var (
	ErrMissing    = errors.New("sigv4: no Authorization header")
	ErrIncomplete = errors.New("sigv4: Authorization header cannot be read")
	ErrMismatch   = errors.New("sigv4: signature does not match")
	ErrSkewed     = errors.New("sigv4: signature too old or from the future")
)
