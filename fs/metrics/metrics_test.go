package metrics

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

const testKey = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"

func testStatus() cryptfs.Status {
	first, last := time.Unix(1_700_000_000, 0), time.Unix(1_700_000_000, 500_000_000)
	return cryptfs.Status{
		ID: "0123456789abcdef0123456789abcdef", Store: "/srv/a secret place", Placement: "header", KeysLocked: true,
		Classes: []cryptfs.ClassStatus{{Name: "general", Available: true}, {Name: "phi"}},
		Keys: envelope.Stats{Calls: 20, CacheHits: 7, Shared: 3, Failures: 2, Entries: 5,
			PoolHits: 31, PoolMisses: 32, PoolKeys: 33, Ahead: 34},
		Condition: cryptfs.Condition{Damage: cryptfs.Damage{Count: 1, First: &first, Last: &last}, Halt: &cryptfs.Halt{}},
		Counters: cryptfs.Counters{OpenFiles: 2, KnownNodes: 11, BytesRead: 1000, BytesWritten: 2000,
			Integrity: 1, Repairs: 4, ForeignEntries: 6},
	}
}

// full is a mount about which everything is known.
func full() *Metrics {
	m := New(Options{
		Version: "v1.2.3", Keys: []string{testKey}, Status: testStatus,
		Limiters: func() []Limiter {
			return []Limiter{{Service: "aws-kms", Rate: 48.5, InFlight: 3, Waiting: 9, Open: []string{testKey}}, {Service: "keyring"}}
		},
		Audit: func() Audit { return Audit{Events: 12, Lost: 1} },
	})
	m.ObserveCall(Call{Op: "Decrypt", Key: testKey, Took: 30 * time.Millisecond, Waited: 2 * time.Second, Attempts: []keywrap.Attempt{
		{Op: "Decrypt", Key: testKey, Code: "ThrottlingException"}, {Op: "Decrypt", Key: testKey},
	}})
	m.ObserveCall(Call{Op: "Decrypt", Key: testKey, Took: 10 * time.Second, Attempts: []keywrap.Attempt{
		{Op: "Decrypt", Key: testKey, Code: keywrap.NoAnswer},
	}, Err: &keywrap.CallError{Err: keywrap.ErrUnavailable}})
	m.ObserveCall(Call{Op: "Decrypt", Key: testKey, Check: true, Attempts: []keywrap.Attempt{{Op: "Decrypt", Key: testKey, Code: "AccessDeniedException"}},
		Err: &keywrap.CallError{Err: keywrap.ErrDenied}})
	return m
}

// TestValues compares every metric of kmsfs's own with what it was fed.
func TestValues(t *testing.T) {
	t.Parallel()
	m := full()
	for name, want := range map[string][]string{
		"kmsfs_kms_calls_total": {
			`kmsfs_kms_calls_total{key="K",op="Decrypt",result="ok"} 1`,
			`kmsfs_kms_calls_total{key="K",op="Decrypt",result="unavailable"} 1`,
		},
		"kmsfs_kms_call_duration_seconds_count": {
			`kmsfs_kms_call_duration_seconds_count{key="K",op="Decrypt"} 2`,
			`kmsfs_kms_call_duration_seconds_count{key="K",op="GenerateDataKey"} 0`,
		},
		"kmsfs_kms_call_wait_seconds_sum": {`kmsfs_kms_call_wait_seconds_sum{key="K",op="Decrypt"} 2`},
		"kmsfs_kms_requests_total": {
			`kmsfs_kms_requests_total{code="AccessDenied",key="K",op="Decrypt"} 1`,
			`kmsfs_kms_requests_total{code="NoAnswer",key="K",op="Decrypt"} 1`,
			`kmsfs_kms_requests_total{code="Throttling",key="K",op="Decrypt"} 1`,
			`kmsfs_kms_requests_total{code="ok",key="K",op="Decrypt"} 1`,
		},
		"kmsfs_kms_throttled_requests_total": {
			`kmsfs_kms_throttled_requests_total{key="K",op="Decrypt"} 1`,
			`kmsfs_kms_throttled_requests_total{key="K",op="GenerateDataKey"} 0`,
		},
		"kmsfs_kms_rate_limit":                            {`kmsfs_kms_rate_limit{service="aws-kms"} 48.5`, `kmsfs_kms_rate_limit{service="keyring"} 0`},
		"kmsfs_kms_calls_in_flight":                       {`kmsfs_kms_calls_in_flight{service="aws-kms"} 3`, `kmsfs_kms_calls_in_flight{service="keyring"} 0`},
		"kmsfs_kms_calls_waiting":                         {`kmsfs_kms_calls_waiting{service="aws-kms"} 9`, `kmsfs_kms_calls_waiting{service="keyring"} 0`},
		"kmsfs_kms_breaker_open":                          {`kmsfs_kms_breaker_open{key="K"} 1`},
		"kmsfs_class_available":                           {`kmsfs_class_available{class="general"} 1`, `kmsfs_class_available{class="phi"} 0`},
		"kmsfs_key_cache_hits_total":                      {`kmsfs_key_cache_hits_total 7`},
		"kmsfs_key_shared_calls_total":                    {`kmsfs_key_shared_calls_total 3`},
		"kmsfs_key_failures_total":                        {`kmsfs_key_failures_total 2`},
		"kmsfs_key_cache_entries":                         {`kmsfs_key_cache_entries 5`},
		"kmsfs_key_pool_hits_total":                       {`kmsfs_key_pool_hits_total 31`},
		"kmsfs_key_pool_misses_total":                     {`kmsfs_key_pool_misses_total 32`},
		"kmsfs_key_pool_entries":                          {`kmsfs_key_pool_entries 33`},
		"kmsfs_key_ahead_calls_total":                     {`kmsfs_key_ahead_calls_total 34`},
		"kmsfs_key_memory_locked":                         {`kmsfs_key_memory_locked 1`},
		"kmsfs_open_files":                                {`kmsfs_open_files 2`},
		"kmsfs_known_nodes":                               {`kmsfs_known_nodes 11`},
		"kmsfs_read_bytes_total":                          {`kmsfs_read_bytes_total 1000`},
		"kmsfs_written_bytes_total":                       {`kmsfs_written_bytes_total 2000`},
		"kmsfs_integrity_failures_total":                  {`kmsfs_integrity_failures_total 1`},
		"kmsfs_repairs_total":                             {`kmsfs_repairs_total 4`},
		"kmsfs_store_damaged":                             {`kmsfs_store_damaged 1`},
		"kmsfs_writes_halted":                             {`kmsfs_writes_halted 1`},
		"kmsfs_integrity_failure_first_timestamp_seconds": {`kmsfs_integrity_failure_first_timestamp_seconds 1.7e+09`},
		"kmsfs_integrity_failure_last_timestamp_seconds":  {`kmsfs_integrity_failure_last_timestamp_seconds 1.7000000005e+09`},
		"kmsfs_foreign_entries_total":                     {`kmsfs_foreign_entries_total 6`},
		"kmsfs_audit_events_total":                        {`kmsfs_audit_events_total 12`},
		"kmsfs_audit_events_lost_total":                   {`kmsfs_audit_events_lost_total 1`},
		"kmsfs_mount_info":                                {`kmsfs_mount_info{mode="read-write",placement="header",store="0123456789abcdef0123456789abcdef"} 1`},
	} {
		got := series(t, m, name)
		if name == "kmsfs_kms_calls_total" {
			got = slices.DeleteFunc(got, func(line string) bool { return strings.HasSuffix(line, " 0") })
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	if text := body(t, m, "/metrics"); strings.Contains(text, "secret") {
		t.Error("the store's path is in the metrics")
	}
}

// TestFailuresAreThereFromTheStart: an increase from nothing is none to
// Prometheus, so the first failure must find its series.
func TestFailuresAreThereFromTheStart(t *testing.T) {
	t.Parallel()
	got := strings.Join(series(t, New(Options{Keys: []string{testKey}}), "kmsfs_kms_calls_total"), "\n")
	for _, r := range results {
		for _, op := range []string{"Decrypt", "GenerateDataKey"} {
			if line := fmt.Sprintf(`kmsfs_kms_calls_total{key="K",op="%s",result="%s"} 0`, op, r.name); !strings.Contains(got, line) {
				t.Errorf("no %s", line)
			}
		}
	}
}

// body answers a request to the handler.
func body(t *testing.T, m *Metrics, path string) string {
	t.Helper()
	code, text := get(t, m, path)
	if code != http.StatusOK {
		t.Fatalf("%s: %d %s", path, code, text)
	}
	return text
}

// series returns the sorted lines of a metric, with testKey as K.
func series(t *testing.T, m *Metrics, name string) (out []string) {
	t.Helper()
	for line := range strings.Lines(body(t, m, "/metrics")) {
		if strings.HasPrefix(line, name+" ") || strings.HasPrefix(line, name+"{") {
			out = append(out, strings.ReplaceAll(strings.TrimSpace(line), testKey, "K"))
		}
	}
	slices.Sort(out)
	return out
}

// TestLint holds the metrics to Prometheus's conventions, and would find one
// that breaks them.
func TestLint(t *testing.T) {
	t.Parallel()
	var own []string
	for _, name := range names(t, full()) {
		if strings.HasPrefix(name, "kmsfs_") {
			own = append(own, name)
		}
	}
	if len(own) < 25 {
		t.Fatalf("only %d metrics", len(own))
	}
	problems, err := testutil.GatherAndLint(full().registry, own...)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	bad := newCallMetrics()
	bad.calls = counterVec("kmsfs_calls", "")
	bad.calls.WithLabelValues("K").Inc()
	if problems, err = testutil.CollectAndLint(bad.calls); err != nil || len(problems) == 0 {
		t.Errorf("the lint does not see a bad name: %v", err)
	}
}

// TestLabelsAreBounded feeds what a hostile key service could answer.
func TestLabelsAreBounded(t *testing.T) {
	t.Parallel()
	m := New(Options{})
	for i := range 10 * maxValues {
		junk := fmt.Sprintf("%d\xff\n\"%s", i, strings.Repeat("x", 5000))
		m.ObserveCall(Call{Op: junk, Key: junk, Attempts: []keywrap.Attempt{{Op: junk, Key: junk, Code: junk}}})
	}
	m.ObserveCall(Call{Op: "one more", Key: "one more"})
	if n := testutil.CollectAndCount(m.calls.calls); n != maxValues+1 {
		t.Errorf("%d series, want %d", n, maxValues+1)
	}
	if n := testutil.CollectAndCount(m.calls.requests); n > maxValues+1 {
		t.Errorf("%d series of requests", n)
	}
	if n := testutil.ToFloat64(m.calls.calls.WithLabelValues("other", "other", "ok")); n != 9*maxValues+1 {
		t.Errorf("other = %v, want %d", n, 9*maxValues+1)
	}
	text := body(t, m, "/metrics")
	if len(text) > 2<<20 || strings.Contains(text, strings.Repeat("x", maxValue)) {
		t.Errorf("%d bytes of metrics", len(text))
	}
	many := make([]cryptfs.ClassStatus, 3*maxValues)
	for i := range many {
		many[i] = cryptfs.ClassStatus{Name: fmt.Sprintf("class%d", i), Available: true}
	}
	m = New(Options{Status: func() cryptfs.Status { return cryptfs.Status{Classes: many} }})
	if got := series(t, m, "kmsfs_class_available"); len(got) != maxValues+1 || !slices.Contains(got, `kmsfs_class_available{class="other"} 200`) {
		t.Errorf("%d series of classes", len(got))
	}
}

// TestResults names every failure that a provider may answer with.
func TestResults(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, r := range results {
		err := fmt.Errorf("call: %w", &keywrap.CallError{Op: "Decrypt", Key: testKey, Err: fmt.Errorf("%w: words", r.err)})
		if got := result(err); got != r.name {
			t.Errorf("%v: %s, want %s", r.err, got, r.name)
		}
		seen[r.name] = true
	}
	for _, err := range []error{keywrap.ErrUnsupported, keywrap.ErrBadURI, io.EOF} {
		if got := result(err); got != "other" {
			t.Errorf("%v: %s, want other", err, got)
		}
	}
	if len(seen) != len(results)-1 || result(nil) != "ok" {
		t.Errorf("results %v", seen)
	}
}

func TestServe(t *testing.T) {
	t.Parallel()
	m := full()
	addr, err := m.Serve(t.Context(), ":0")
	if err != nil {
		t.Fatal(err)
	}
	if ip := addr.(*net.TCPAddr).IP; !ip.IsLoopback() {
		t.Errorf("listening on %v", addr)
	}
	if _, err := m.Serve(t.Context(), ":0"); err == nil {
		t.Error("a second server")
	}
	for path, want := range map[string]string{"/metrics": "kmsfs_open_files 2\n", "/healthz": "ok\n"} {
		resp, err := http.Get("http://" + addr.String() + path)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK || !strings.Contains(string(text), want) {
			t.Errorf("%s: %s %.100s", path, resp.Status, text)
		}
	}
	for method, path := range map[string]string{"POST": "/metrics", "PUT": "/healthz", "GET": "/", "DELETE": "/debug/pprof/"} {
		req, _ := http.NewRequest(method, "http://"+addr.String()+path, nil)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusMethodNotAllowed && resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s %s: %s", method, path, resp.Status)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	m.Close()
	m.Close()
	if c, err := net.Dial("tcp", addr.String()); err == nil {
		_ = c.Close()
		t.Error("open after Close")
	}
}

func TestServeEndsWithContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(context.Background())
	m := New(Options{})
	addr, err := m.Serve(ctx, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	select {
	case <-m.server.served:
	case <-time.After(time.Minute):
		t.Error("the server runs on")
	}
	if c, err := net.Dial("tcp", addr.String()); err == nil {
		_ = c.Close()
		t.Error("open after the context's end")
	}
}

func TestListenAddress(t *testing.T) {
	t.Parallel()
	for addr, want := range map[string]string{
		":9464": "127.0.0.1:9464", "127.0.0.1:0": "127.0.0.1:0", "[::1]:9464": "[::1]:9464", "localhost:9464": "localhost:9464",
		"0.0.0.0:9464": "0.0.0.0:9464", "10.0.0.5:9464": "10.0.0.5:9464", // written out, so meant
		"": "", "9464": "", "127.0.0.1": "", ":port": "", ":99999": "", ":-1": "", "::1:9464": "",
	} {
		got, err := listenAddress(addr)
		if got != want || (want == "") != (err != nil) {
			t.Errorf("%q: got %q, %v; want %q", addr, got, err, want)
		}
	}
	m := New(Options{})
	defer m.Close()
	if _, err := m.Serve(t.Context(), "192.0.2.1:9464"); err == nil { // TEST-NET-1 is no address of this machine
		t.Error("listening on a foreign address")
	}
	if _, err := m.Serve(t.Context(), ":0"); err != nil { // a failure leaves nothing behind
		t.Error(err)
	}
}

// TestHealthStuck answers 503 for a volume that does not answer, when the
// client's patience ends.
func TestHealthStuck(t *testing.T) {
	t.Parallel()
	stuck := make(chan struct{})
	defer close(stuck)
	m := New(Options{Status: func() cryptfs.Status { <-stuck; return cryptfs.Status{} }})
	if code, text := get(t, m, "/healthz"); code != http.StatusServiceUnavailable || !strings.Contains(text, "does not answer") {
		t.Errorf("%d %q", code, text)
	}
}
