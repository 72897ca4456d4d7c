// Package metrics tells Prometheus about one mount: its calls to the key
// service, its caches, what it read and wrote, what failed authentication, and
// its process. docs/operations.md lists every metric.
//
// The metrics are in a registry of their own. Names follow Prometheus's
// conventions (https://prometheus.io/docs/practices/naming/): base units,
// counters end in _total. No label has a path, a name of a file, a file id or a
// user in it; every label has a bounded number of values, whatever a key service
// answers (maxValues). A counter that comes from a Status is read when it is
// asked for, so a mount that nobody asks does no work for its metrics, other than
// adding numbers at a call to the key service.
//
// The server (Metrics.Serve) is meant for loopback and knows no users: everyone who
// can reach it sees which keys a mount uses and how much.
package metrics
