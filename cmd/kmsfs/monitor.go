package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/kmsfs/kmsfs/crypto/audit"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/limit"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
	"github.com/kmsfs/kmsfs/fs/fusefs"
	"github.com/kmsfs/kmsfs/fs/metrics"
)

// monitor is where a mount's use of keys is told: the audit log and the
// metrics, either of which may be missing. Its methods are called by the layers
// below and are safe for concurrent use.
type monitor struct {
	log *audit.Log // nil without --audit

	mu      sync.Mutex
	metrics *metrics.Metrics // nil without --metrics, and until the volume is open
}

// openMonitor opens the audit log of a mount, if it is to have one.
func openMonitor(p *mountPlan, log *slog.Logger) (*monitor, error) {
	if p.Audit == "" {
		return &monitor{}, nil
	}
	l, err := audit.Open(p.Audit, audit.Options{Required: p.AuditRequired, Sync: p.AuditRequired, Mount: p.Mountpoint, Store: p.ID, Log: log})
	if err != nil {
		return nil, hint(fmt.Errorf("audit log: %w", err), "give an --audit file that can be written and that no other mount uses")
	}
	return &monitor{log: l}, nil
}

func (m *monitor) close(log *slog.Logger) {
	if m.log == nil {
		return
	}
	if s := m.log.Stats(); s.Lost > 0 {
		log.Error("events are missing from the audit log", "lost", s.Lost)
	}
	if err := m.log.Close(); err != nil {
		log.Error("audit log", "err", err)
	}
}

// reopen begins a new audit log file, for whoever rotates logs.
func (m *monitor) reopen(log *slog.Logger) {
	if m.log == nil {
		return
	}
	if err := m.log.Reopen(); err != nil {
		log.Error("audit log", "err", err)
	}
}

// write adds an event. Its error is ErrNotLogged, and only if the log is
// required.
func (m *monitor) write(e audit.Event) error {
	if m.log == nil {
		return nil
	}
	return m.log.Write(e)
}

// use is envelope.Options.Observe.
func (m *monitor) use(ctx context.Context, u envelope.Use) error {
	if m.log == nil {
		return nil
	}
	e := audit.Event{Kind: audit.KindUse, Op: u.Op, File: u.File.String(), Class: u.Class, Key: u.Key,
		Purpose: string(u.Purpose), Requests: u.Requests, Source: u.Source,
		Cached: u.Source != envelope.SourceCall && u.Source != envelope.SourceJoined && u.Source != "",
		Caller: callerOf(ctx)}
	if n := len(u.Requests); n > 0 {
		e.Request = u.Requests[n-1]
	}
	e.Result, e.Detail = audit.Failure(u.Err)
	return m.write(e)
}

// call is envelope.Options.Call.
func (m *monitor) call(ctx context.Context, c envelope.CallRecord) error {
	if m.log == nil {
		return nil
	}
	e := callEvent(c.Op, c.Key, c.Attempts, c.Err)
	e.File, e.Class, e.Purpose, e.Background, e.Caller = c.ID.String(), c.Class, string(c.Purpose), c.Background, callerOf(ctx)
	return m.write(e)
}

func callEvent(op, key string, attempts []keywrap.Attempt, err error) audit.Event {
	e := audit.Event{Kind: audit.KindCall, Op: op, Key: key}
	for _, a := range attempts {
		e.Requests = append(e.Requests, a.RequestID)
		e.Request, e.Code = a.RequestID, a.Code
	}
	e.Result, e.Detail = audit.Failure(err)
	return e
}

// ended is limit.Options.Observe. The volume's own calls reach the audit log
// through call, which can refuse; questions about keys do not pass there.
func (m *monitor) ended(c limit.Call) {
	m.mu.Lock()
	to := m.metrics
	m.mu.Unlock()
	if to != nil {
		to.ObserveCall(metrics.Call{Op: c.Op, Key: c.Key, Waited: c.Waited, Took: c.Took, Attempts: c.Attempts, Err: c.Err, Check: c.Check})
	}
	if m.log == nil || !c.Check && c.Op != keywrap.OpDescribe {
		return
	}
	e := callEvent(c.Op, c.Key, c.Attempts, c.Err)
	e.File, e.Class, e.Purpose, e.Background = c.Context.ID, c.Context.Class, string(c.Context.Purpose), c.Background
	_ = m.write(e) // no key was used
}

// failed is fusefs.Options.Failed: what an auditor must hear of and what no key
// was used for is damage.
func (m *monitor) failed(f fusefs.Failure) {
	kind := fault.Of(f.Err)
	if m.log == nil || kind != fault.Integrity && kind != fault.BadFormat && kind != fault.KeyRejected {
		return
	}
	e := audit.Event{Kind: audit.KindIntegrity, Op: f.Op, Caller: &audit.Caller{UID: f.Uid, PID: f.Pid}}
	e.Result, e.Detail = audit.Failure(f.Err)
	var about *cryptfs.FileError
	if errors.As(f.Err, &about) {
		e.Class = about.Class
		if !about.File.IsZero() {
			e.File = about.File.String()
		}
	}
	_ = m.write(e) // the operation has failed already
}

// classified is cryptfs.Config.Classified.
func (m *monitor) classified(ctx context.Context, class string) {
	_ = m.write(audit.Event{Kind: audit.KindPolicy, Op: "classify", Class: class, Result: audit.OK, Caller: callerOf(ctx)})
}

// callerOf is who asked; nil for what the mount does by itself.
func callerOf(ctx context.Context) *audit.Caller {
	uid, gid, pid, ok := fusefs.CallerOf(ctx)
	if !ok {
		return nil
	}
	return &audit.Caller{UID: uid, GID: gid, PID: pid}
}

// serveMetrics starts the metrics server of an open volume, if it is to have one.
func (m *monitor) serveMetrics(ctx context.Context, p *mountPlan, v *volume, log *slog.Logger) error {
	if p.Metrics == "" {
		return nil
	}
	out := metrics.New(metrics.Options{
		Version: version, Keys: allKeys(p.Keys), Status: v.Status, Limiters: v.providers.limiters, Audit: m.auditState, Log: log,
	})
	addr, err := out.Serve(ctx, p.Metrics)
	if err != nil {
		return hint(err, "give --metrics 127.0.0.1:PORT with a free port")
	}
	log.Info("metrics", "address", addr.String())
	m.mu.Lock()
	defer m.mu.Unlock()
	m.metrics = out
	return nil
}

func (m *monitor) auditState() metrics.Audit {
	if m.log == nil {
		return metrics.Audit{}
	}
	s := m.log.Stats()
	return metrics.Audit{Events: s.Written, Lost: s.Lost}
}

const (
	keyAskTime  = 3 * time.Second // for the states of all keys at mount
	keyAskEvery = time.Hour
)

// keyWarnings tells which of the keys in use will not be there for long, or are
// not now. A service that does not answer in time warns of nothing here: what
// depends on it says so itself.
func keyWarnings(ctx context.Context, p *providers, keys []string) []string {
	ctx, cancel := context.WithTimeout(ctx, keyAskTime)
	defer cancel()
	found := make([]string, len(keys))
	var wg sync.WaitGroup
	for i, key := range keys {
		wg.Go(func() {
			d, err := p.Describe(ctx, key)
			switch {
			case err != nil && errors.Is(err, keywrap.ErrNotFound):
				found[i] = fmt.Sprintf("key %s is in use and does not exist", key)
			case err != nil:
			case d.State == keywrap.PendingDeletion:
				found[i] = fmt.Sprintf("key %s is in use and pending deletion, on %s: what only it opens is lost then; cancel that, or rewrap to another key",
					key, d.DeletionAt.Format(time.DateOnly))
			case d.State != keywrap.Enabled:
				found[i] = fmt.Sprintf("key %s is in use and %s", key, d.State)
			}
		})
	}
	wg.Wait()
	var out []string
	for _, w := range found {
		if w != "" {
			out = append(out, w)
		}
	}
	return out
}

// watchKeys logs keyWarnings now and then, until ctx ends.
func watchKeys(ctx context.Context, p *providers, keys []string, log *slog.Logger) {
	t := time.NewTicker(keyAskEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			for _, w := range keyWarnings(ctx, p, keys) {
				log.Warn(w)
			}
		}
	}
}
