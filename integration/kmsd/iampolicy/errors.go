package iampolicy

import "errors"

// ErrMalformed is what Parse and ParseIdentity wrap for every document that
// they refuse.
var ErrMalformed = errors.New("iampolicy: malformed policy document")
