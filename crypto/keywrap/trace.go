package keywrap

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/kmsfs/kmsfs/crypto/fault"
)

// Attempt is one request that went to a key service. A call makes one, and
// more when it is tried again or needs several operations of the service.
type Attempt struct {
	Op        string        // the service's name of the operation: "Decrypt", "DescribeKey", …
	Key       string        // key URI as sent; the destination for ReEncrypt, as in CloudTrail
	RequestID string        // the service's request id, "" if no answer came
	At        time.Time     // start
	Took      time.Duration // until the answer, or until it was given up
	Code      string        // the service's error code, "" for success; "NoAnswer" if none came
	DryRun    bool          // only asked whether it would be allowed: see Checker
}

// NoAnswer is the Code of an Attempt that got no answer of the service.
const NoAnswer = "NoAnswer"

// Trace collects the attempts of the calls whose context carries it. The zero
// Trace is ready. Methods are safe for concurrent use; on a nil *Trace they do
// nothing.
type Trace struct {
	mu   sync.Mutex
	list []Attempt
}

type traceKey struct{}

// WithTrace returns a context whose calls add their attempts to t. A Trace that
// ctx carries already gets none of them any more.
func WithTrace(ctx context.Context, t *Trace) context.Context {
	return context.WithValue(ctx, traceKey{}, t)
}

// TraceOf returns ctx's Trace, or nil, which is ready for use as well.
func TraceOf(ctx context.Context) *Trace {
	t, _ := ctx.Value(traceKey{}).(*Trace)
	return t
}

// Add appends a.
func (t *Trace) Add(a Attempt) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.list = append(t.list, a)
}

// Attempts returns a copy of what was added so far, in order of completion.
func (t *Trace) Attempts() []Attempt {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.list)
}

// CodeOf is the Attempt.Code for a service that has no error codes: the name of
// err's kind, "" for nil, "canceled" where the caller gave up.
func CodeOf(err error) string {
	switch kind := fault.Of(err); {
	case err == nil:
		return ""
	case kind == fault.None && errors.Is(err, context.Canceled):
		return "canceled"
	case kind == fault.None:
		return "unknown"
	default:
		return kind.String()
	}
}

// NewRequestID returns a random UUID (RFC 9562, version 4) for a call to a
// service that gives no request ids of its own.
func NewRequestID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails (Go 1.24)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
