package metrics

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// stateCollector reads what others count when it is asked.
type stateCollector struct {
	mu   sync.Mutex // one scrape at a time
	opts Options

	services, classes, keys *values
}

func newStateCollector(o Options) *stateCollector {
	return &stateCollector{opts: o, services: newValues(), classes: newValues(), keys: newValues()}
}

// volumeMetric is a number of a volume's status.
type volumeMetric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	of   func(*cryptfs.Status) float64
}

func counter(name, help string, of func(*cryptfs.Status) uint64) volumeMetric {
	return volumeMetric{prometheus.NewDesc(name, help, nil, nil), prometheus.CounterValue,
		func(s *cryptfs.Status) float64 { return float64(of(s)) }}
}

func gauge(name, help string, of func(*cryptfs.Status) float64) volumeMetric {
	return volumeMetric{prometheus.NewDesc(name, help, nil, nil), prometheus.GaugeValue, of}
}

var volumeMetrics = []volumeMetric{
	counter("kmsfs_key_cache_hits_total", "Opens of files whose data key was in the cache.",
		func(s *cryptfs.Status) uint64 { return s.Keys.CacheHits }),
	counter("kmsfs_key_shared_calls_total", "Opens of files that joined a call to the key service under way for another.",
		func(s *cryptfs.Status) uint64 { return s.Keys.Shared }),
	counter("kmsfs_key_failures_total", "Calls to key services that failed, after all retries.",
		func(s *cryptfs.Status) uint64 { return s.Keys.Failures }),
	gauge("kmsfs_key_cache_entries", "Unwrapped data keys in the cache.",
		func(s *cryptfs.Status) float64 { return float64(s.Keys.Entries) }),
	counter("kmsfs_key_pool_hits_total", "New files whose data key was there before it was needed.",
		func(s *cryptfs.Status) uint64 { return s.Keys.PoolHits }),
	counter("kmsfs_key_pool_misses_total", "New files that waited for the key service, since the pool was empty.",
		func(s *cryptfs.Status) uint64 { return s.Keys.PoolMisses }),
	gauge("kmsfs_key_pool_entries", "Data keys in the pools, for files that are not there yet.",
		func(s *cryptfs.Status) float64 { return float64(s.Keys.PoolKeys) }),
	counter("kmsfs_key_ahead_calls_total", "Data keys unwrapped ahead of a reader.",
		func(s *cryptfs.Status) uint64 { return s.Keys.Ahead }),
	gauge("kmsfs_key_memory_locked", "1 if key memory is locked and cannot reach the swap, else 0.",
		func(s *cryptfs.Status) float64 { return truth(s.KeysLocked) }),
	gauge("kmsfs_open_files", "Regular files that are open.",
		func(s *cryptfs.Status) float64 { return float64(s.Counters.OpenFiles) }),
	gauge("kmsfs_known_nodes", "Files and directories that the kernel knows.",
		func(s *cryptfs.Status) float64 { return float64(s.Counters.KnownNodes) }),
	counter("kmsfs_read_bytes_total", "Plaintext bytes read, those from the kernel's cache not among them.",
		func(s *cryptfs.Status) uint64 { return s.Counters.BytesRead }),
	counter("kmsfs_written_bytes_total", "Plaintext bytes written.",
		func(s *cryptfs.Status) uint64 { return s.Counters.BytesWritten }),
	counter("kmsfs_integrity_failures_total", "Reads that failed because something in the store is not as it was written.",
		func(s *cryptfs.Status) uint64 { return s.Counters.Integrity }),
	gauge("kmsfs_store_damaged", "1 since something in the store is not as it was written, until it is mounted anew, else 0.",
		func(s *cryptfs.Status) float64 { return truth(s.Condition.Damage.Count > 0) }),
	gauge("kmsfs_integrity_failure_first_timestamp_seconds", "When the first integrity failure of the mount was, 0 if there was none.",
		func(s *cryptfs.Status) float64 { return timestamp(s.Condition.Damage.First) }),
	gauge("kmsfs_integrity_failure_last_timestamp_seconds", "When the last integrity failure of the mount was, 0 if there was none.",
		func(s *cryptfs.Status) float64 { return timestamp(s.Condition.Damage.Last) }),
	gauge("kmsfs_writes_halted", "1 since nothing more is written, because the journal failed or another machine took the store over, else 0.",
		func(s *cryptfs.Status) float64 { return truth(s.Condition.Halt != nil) }),
	counter("kmsfs_repairs_total", "Repairs of files that were open when a mount ended without notice.",
		func(s *cryptfs.Status) uint64 { return s.Counters.Repairs }),
	counter("kmsfs_foreign_entries_total", "Entries and attributes of the store that are not kmsfs's and were left out.",
		func(s *cryptfs.Status) uint64 { return s.Counters.ForeignEntries }),
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

var (
	mountInfo = desc("kmsfs_mount_info", "Always 1; the labels tell about the mount.", "store", "placement", "mode")
	available = desc("kmsfs_class_available", "1 if the class's name key is unwrapped, so that its directories can be used, else 0.", "class")

	limitRate     = desc("kmsfs_kms_rate_limit", "Calls per second that the client lets through to the key service now; 0 is no limit.", "service")
	limitInFlight = desc("kmsfs_kms_calls_in_flight", "Calls to the key service under way.", "service")
	limitWaiting  = desc("kmsfs_kms_calls_waiting", "Calls that wait for admission by the client's own limits.", "service")
	breakerOpen   = desc("kmsfs_kms_breaker_open", "1 while calls with the key fail at once, because its service is away, else 0.", "key")

	auditEvents = desc("kmsfs_audit_events_total", "Events written to the audit log.")
	auditLost   = desc("kmsfs_audit_events_lost_total", "Events that could not be written to the audit log.")
)

// Describe implements prometheus.Collector.
func (c *stateCollector) Describe(ch chan<- *prometheus.Desc) {
	for i := range volumeMetrics {
		ch <- volumeMetrics[i].desc
	}
	for _, d := range []*prometheus.Desc{
		mountInfo, available, limitRate, limitInFlight, limitWaiting, breakerOpen, auditEvents, auditLost,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *stateCollector) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.opts.Status != nil {
		c.volume(ch, c.opts.Status())
	}
	if c.opts.Limiters != nil {
		c.limiters(ch, c.opts.Limiters())
	}
	if c.opts.Audit != nil {
		a := c.opts.Audit()
		ch <- prometheus.MustNewConstMetric(auditEvents, prometheus.CounterValue, float64(a.Events))
		ch <- prometheus.MustNewConstMetric(auditLost, prometheus.CounterValue, float64(a.Lost))
	}
}

func (c *stateCollector) volume(ch chan<- prometheus.Metric, s cryptfs.Status) {
	for i := range volumeMetrics {
		m := &volumeMetrics[i]
		ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.of(&s))
	}
	mode := "read-write"
	if s.ReadOnly {
		mode = "read-only"
	}
	ch <- prometheus.MustNewConstMetric(mountInfo, prometheus.GaugeValue, 1, s.ID, s.Placement, mode)
	each(ch, available, c.classes, s.Classes, func(cl cryptfs.ClassStatus) (string, float64) { return cl.Name, truth(cl.Available) })
}

func (c *stateCollector) limiters(ch chan<- prometheus.Metric, list []Limiter) {
	each(ch, limitRate, c.services, list, func(l Limiter) (string, float64) { return l.Service, l.Rate })
	each(ch, limitInFlight, c.services, list, func(l Limiter) (string, float64) { return l.Service, float64(l.InFlight) })
	each(ch, limitWaiting, c.services, list, func(l Limiter) (string, float64) { return l.Service, float64(l.Waiting) })
	open := map[string]bool{}
	for _, l := range list {
		for _, key := range l.Open {
			open[key] = true
		}
	}
	keys := append([]string(nil), c.opts.Keys...)
	for key := range open {
		keys = append(keys, key)
	}
	each(ch, breakerOpen, c.keys, keys, func(key string) (string, float64) { return key, truth(open[key]) })
}

// each sends one gauge for each item. Items with the same label, such as those
// beyond a label's bound, make one gauge, the sum.
func each[T any](ch chan<- prometheus.Metric, d *prometheus.Desc, bound *values, list []T, of func(T) (string, float64)) {
	sum := map[string]float64{}
	seen := map[string]bool{}
	for _, item := range list {
		name, v := of(item)
		if seen[name] {
			continue
		}
		seen[name] = true
		sum[bound.label(name)] += v
	}
	for label, v := range sum {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, label)
	}
}

func timestamp(t *time.Time) float64 {
	if t == nil {
		return 0
	}
	return float64(t.UnixMilli()) / 1000
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
