package metrics

import (
	"context"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// get asks the handler, for at most a second unless the answer is the metrics'.
func get(t *testing.T, m *Metrics, path string) (int, string) {
	t.Helper()
	ctx := t.Context()
	if path == "/healthz" {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Second)
		defer cancel()
	}
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequestWithContext(ctx, "GET", path, nil))
	return w.Code, w.Body.String()
}

// names returns the names of all metrics, as Prometheus's queries have them.
func names(t *testing.T, m *Metrics) (out []string) {
	t.Helper()
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		out = append(out, f.GetName())
	}
	return out
}

func counterVec(name, help string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{"key"})
}
