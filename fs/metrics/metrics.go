package metrics

import (
	"log/slog"
	"net/http"
	"runtime"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// Options are what the metrics come from. Functions are called when somebody
// asks for the metrics, one request at a time, and may be nil.
type Options struct {
	Version  string                // of the program
	Keys     []string              // key URIs that the mount may call: their series exist from the start
	Status   func() cryptfs.Status // of the volume
	Limiters func() []Limiter      // one for each key service
	Audit    func() Audit          // of the audit log, if there is one
	Log      *slog.Logger          // default: nothing is logged
}

// Limiter is the state of one key service's client-side limits.
type Limiter struct {
	Service  string   // "aws-kms", "keyring", "pkcs11"
	Rate     float64  // calls per second that are let through now, 0: no limit
	InFlight int      // calls under way
	Waiting  int      // calls that wait for admission
	Open     []string // key URIs whose calls fail at once, since the service is away
}

// Audit is the state of the audit log.
type Audit struct {
	Events uint64 // written
	Lost   uint64 // not written, since writing failed
}

// Metrics are the metrics of one mount. All methods are safe for concurrent use.
type Metrics struct {
	registry *prometheus.Registry
	calls    *callMetrics
	opts     Options
	log      *slog.Logger
	server   server
}

// New returns the metrics of the mount that o tells about.
func New(o Options) *Metrics {
	m := &Metrics{registry: prometheus.NewPedanticRegistry(), calls: newCallMetrics(), opts: o, log: o.Log}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	m.registry.MustRegister(m.calls.collectors()...)
	m.registry.MustRegister(
		newStateCollector(o),
		buildInfo(o.Version),
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	for _, key := range o.Keys {
		m.calls.expect(key)
	}
	return m
}

func buildInfo(version string) prometheus.Collector {
	g := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "kmsfs_build_info", Help: "Always 1; the labels tell about the program.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	})
	g.Set(1)
	return g
}

// ObserveCall counts one call to a key service. It takes a microsecond and waits
// for nothing.
func (m *Metrics) ObserveCall(c Call) { m.calls.observe(c) }

// Handler answers GET /metrics and GET /healthz.
func (m *Metrics) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(m.log.Handler(), slog.LevelWarn), MaxRequestsInFlight: maxRequests, Timeout: answerTime,
	}))
	mux.HandleFunc("GET /healthz", m.health)
	return mux
}
