package metrics

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// Call is one call to a key service, however many requests it took. Its fields
// are those of the call records of crypto/keywrap/limit.
type Call struct {
	Op, Key      string
	Waited, Took time.Duration // before admission; from then to the end
	Attempts     []keywrap.Attempt
	Err          error // nil: success
	Check        bool  // only asked: keywrap.Checker
}

// callMetrics are fed by ObserveCall.
type callMetrics struct {
	calls    *prometheus.CounterVec
	took     *prometheus.HistogramVec
	waited   *prometheus.HistogramVec
	requests *prometheus.CounterVec
	throttle *prometheus.CounterVec

	keys, ops, codes *values
}

// Buckets: a call takes 20 to 50 ms usually, 300 ms cold, and its budget is
// 10 s; waiting for admission may take longer.
var (
	tookBuckets   = []float64{.001, .0025, .005, .01, .02, .035, .05, .1, .2, .5, 1, 2, 5, 10, 15}
	waitedBuckets = []float64{.001, .01, .1, .5, 1, 2, 5, 10, 30, 60}
)

func newCallMetrics() *callMetrics {
	labels := []string{"key", "op"}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	histogram := func(name, help string, buckets []float64) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
	}
	return &callMetrics{
		calls: counter("kmsfs_kms_calls_total",
			"Calls to key services by result: ok, or why they failed.", "key", "op", "result"),
		took: histogram("kmsfs_kms_call_duration_seconds",
			"Time of calls to key services from admission by the client's own limits to the end, retries included.", tookBuckets),
		waited: histogram("kmsfs_kms_call_wait_seconds",
			"Time that calls to key services waited for admission by the client's own limits.", waitedBuckets),
		requests: counter("kmsfs_kms_requests_total",
			"Requests sent to key services, retries included, by the service's answer: ok, its error code, or NoAnswer.", "key", "op", "code"),
		throttle: counter("kmsfs_kms_throttled_requests_total",
			"Requests that key services answered with throttling.", "key", "op"),
		keys: newValues(), ops: newValues(), codes: newValues(),
	}
}

func (c *callMetrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{c.calls, c.took, c.waited, c.requests, c.throttle}
}

// expect makes the series of a key that will be called, so that a rate over them
// is right from the first call, and the first failure, on.
func (c *callMetrics) expect(key string) {
	key = c.keys.label(key)
	for _, op := range []string{"GenerateDataKey", "Decrypt"} {
		op = c.ops.label(op)
		c.calls.WithLabelValues(key, op, resultOK)
		c.calls.WithLabelValues(key, op, resultOther)
		for _, r := range results {
			c.calls.WithLabelValues(key, op, r.name)
		}
		c.took.WithLabelValues(key, op)
		c.throttle.WithLabelValues(key, op)
	}
}

// observe counts a call and its requests. The answer to a question is nobody's
// failure, so that of checks only the requests count.
func (c *callMetrics) observe(call Call) {
	if !call.Check {
		key, op := c.keys.label(call.Key), c.ops.label(call.Op)
		c.calls.WithLabelValues(key, op, result(call.Err)).Inc()
		c.took.WithLabelValues(key, op).Observe(call.Took.Seconds())
		c.waited.WithLabelValues(key, op).Observe(call.Waited.Seconds())
	}
	for _, a := range call.Attempts {
		key, op := c.keys.label(a.Key), c.ops.label(a.Op)
		code := strings.TrimSuffix(a.Code, "Exception")
		if code == "" {
			code = resultOK
		}
		c.requests.WithLabelValues(key, op, c.codes.label(code)).Inc()
		if throttling[code] {
			c.throttle.WithLabelValues(key, op).Inc()
		}
	}
}

// throttling are the codes of throttled requests, without "Exception".
var throttling = map[string]bool{
	"Throttling": true, "Throttled": true, "RequestThrottled": true, "RequestLimitExceeded": true,
	"LimitExceeded": true, "TooManyRequests": true, "SlowDown": true,
}

const (
	resultOK    = "ok"
	resultOther = "other"
)

// results are the label's values besides ok and other, in the order in which
// they are tried.
var results = []struct {
	err  error
	name string
}{
	{keywrap.ErrDenied, "denied"},
	{keywrap.ErrCredentials, "credentials"},
	{keywrap.ErrNotFound, "not_found"},
	{keywrap.ErrDisabled, "disabled"},
	{keywrap.ErrPending, "pending_deletion"},
	{keywrap.ErrExpired, "expired_material"},
	{keywrap.ErrCiphertext, "ciphertext"},
	{keywrap.ErrWrongKey, "wrong_key"},
	{keywrap.ErrThrottled, "throttled"},
	{keywrap.ErrUnavailable, "unavailable"},
	{context.Canceled, "cancelled"},
	{context.DeadlineExceeded, "unavailable"},
}

func result(err error) string {
	if err == nil {
		return resultOK
	}
	for _, r := range results {
		if errors.Is(err, r.err) {
			return r.name
		}
	}
	return resultOther
}
