package integration

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
)

// freeAddress returns an address of loopback that nobody listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// get asks a mount's metrics server.
func get(t *testing.T, addr, path string) (int, string) {
	t.Helper()
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + addr + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// samples are the values of one scrape by series.
type samples map[string]float64

func scrape(t *testing.T, addr string) samples {
	t.Helper()
	code, text := get(t, addr, "/metrics")
	if code != http.StatusOK {
		t.Fatalf("%d %s", code, text)
	}
	out := samples{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		i := strings.LastIndexByte(line, ' ')
		if i < 0 || strings.HasPrefix(line, "#") {
			continue
		}
		v, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		out[line[:i]] = v
	}
	return out
}

// sum adds the series of a metric that have all the labels, given as a="b".
func (s samples) sum(name string, labels ...string) (total float64) {
	for series, v := range s {
		metric, rest, _ := strings.Cut(series, "{")
		ok := metric == name
		for _, l := range labels {
			ok = ok && (strings.HasPrefix(rest, l) || strings.Contains(rest, ","+l))
		}
		if ok {
			total += v
		}
	}
	return total
}

// TestMetrics scrapes a mount before and after operations whose numbers are
// known, and compares what it says of the key service with the service's log.
func TestMetrics(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newKMSStore(t, p, []string{"general"}, map[string]kmsClass{"general": {}})
		m := s.mount("secret-dir")
		m.Put("old", bytes.Repeat([]byte("o"), 3*threatChunk))
		s.locate(map[uint64]string{inode(t, m.Path("old")): "old"})
		m.Unmount()
		addr := freeAddress(t)
		m.Again("--metrics", addr)
		before, logged := scrape(t, addr), s.kms.Count("")
		if before.sum("kmsfs_build_info") != 1 || before.sum("kmsfs_mount_info", `store="`+s.storeID()+`"`, `mode="read-write"`) != 1 ||
			before.sum("kmsfs_class_available", `class="general"`) != 1 || before.sum("process_open_fds") < 5 {
			t.Errorf("before: %v", before)
		}
		s.kms.ResetCalls()

		const files = 10
		for i := range files {
			m.Put(fmt.Sprintf("secret-dir/secret%d", i), bytes.Repeat([]byte("x"), 1000))
		}
		f, err := os.OpenFile(m.Path("old"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.ReadAt(make([]byte, threatChunk), 0); err != nil {
			t.Fatal(err)
		}
		s.settle()
		after := scrape(t, addr)
		s.wantMetrics(before, after, files)
		for series := range after {
			if strings.Contains(series, "secret") || strings.Contains(series, m.Dir) || strings.Contains(series, s.dir) {
				t.Errorf("the metrics tell a path: %s", series)
			}
		}
		t.Logf("%d calls at the mount, %d series", logged, len(after))
		if code, text := get(t, addr, "/healthz"); code != http.StatusOK || text != "ok\n" {
			t.Errorf("/healthz: %d %q", code, text)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		s.damaged(m.Path("old"), addr)
		m.Unmount()
		if c, err := net.Dial("tcp", addr); err == nil {
			_ = c.Close()
			t.Error("somebody answers at the metrics' address after the unmount")
		}
	})
}

// wantMetrics compares two scrapes with what was done between them: files made
// with 1000 bytes each, one cold file opened, and kept open, and read.
func (s *kmsStore) wantMetrics(before, after samples, files float64) {
	s.t.Helper()
	grown := func(name string, labels ...string) float64 {
		return after.sum(name, labels...) - before.sum(name, labels...)
	}
	for name, want := range map[string]float64{
		"kmsfs_written_bytes_total": files * 1000, "kmsfs_open_files": 1,
		"kmsfs_integrity_failures_total": 0, "kmsfs_key_failures_total": 0, "kmsfs_repairs_total": 0,
	} {
		if got := grown(name); got != want {
			s.t.Errorf("%s: grew by %v, want %v", name, got, want)
		}
	}
	if got := grown("kmsfs_read_bytes_total"); got < threatChunk || got > 3*threatChunk { // the kernel reads ahead
		s.t.Errorf("kmsfs_read_bytes_total: grew by %v", got)
	}
	if got := grown("kmsfs_key_pool_hits_total") + grown("kmsfs_key_pool_misses_total"); got != files {
		s.t.Errorf("the pool was asked %v times for %v files", got, files)
	}
	key := fmt.Sprintf("key=%q", s.arn["general"])
	calls := s.calls()
	if calls["Decrypt"] != 1 || calls["GenerateDataKey"] < int(files) {
		s.t.Errorf("calls: %v", calls)
	}
	for _, op := range []string{"Decrypt", "GenerateDataKey"} {
		want, label := float64(calls[op]), fmt.Sprintf("op=%q", op)
		for _, name := range []string{"kmsfs_kms_calls_total", "kmsfs_kms_requests_total", "kmsfs_kms_call_duration_seconds_count"} {
			if got := grown(name, key, label); got != want {
				s.t.Errorf("%s of %s: grew by %v, the service's log has %v", name, op, got, want)
			}
		}
		if got := grown("kmsfs_kms_calls_total", key, label, `result="ok"`); got != want {
			s.t.Errorf("%v calls of %s are ok, want %v", got, op, want)
		}
		if got := grown("kmsfs_kms_call_duration_seconds_sum", label); got <= 0 {
			s.t.Errorf("%s took %v seconds", op, got)
		}
	}
}

// damaged changes an open mount's store file and reads it.
func (s *kmsStore) damaged(path, addr string) {
	s.t.Helper()
	body := s.body("old")
	s.slot(body, 1)[50] ^= 1 // not the last one, which is read when the file is opened
	s.setBody("old", body)
	s.h.Sh(`sync; echo 3 > /proc/sys/vm/drop_caches`)
	before := scrape(s.t, addr).sum("kmsfs_integrity_failures_total")
	f, err := os.Open(path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(make([]byte, 100), threatChunk); errnoOf(err) != unix.EIO {
		s.t.Errorf("a damaged chunk: %v", err)
	}
	if got := scrape(s.t, addr).sum("kmsfs_integrity_failures_total"); got <= before {
		s.t.Errorf("kmsfs_integrity_failures_total: %v, was %v", got, before)
	}
}

// TestMetricsOfTrouble: throttling, outages and refusals show, and are gone when
// they are over.
func TestMetricsOfTrouble(t *testing.T) {
	t.Parallel()
	s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {cache: "0s"}})
	m := s.mount()
	m.Put("a", []byte("a"))
	m.Unmount()
	addr := freeAddress(t)
	m.Again("--metrics", addr)
	s.kms.ResetCalls()
	key := fmt.Sprintf("key=%q", s.arn["general"])

	s.faults(kmsserver.Faults{Rules: []kmsserver.Fault{{Error: "ThrottlingException", Times: 2}}})
	if _, errno := readAll(m.Path("a")); errno != 0 {
		t.Fatal(errnoName(errno))
	}
	if got := scrape(t, addr).sum("kmsfs_kms_throttled_requests_total", key, `op="Decrypt"`); got != 2 {
		t.Errorf("%v throttled requests, want 2", got)
	}
	s.faults(kmsserver.Faults{Rules: []kmsserver.Fault{{Error: "AccessDeniedException"}}})
	if _, errno := readAll(m.Path("a")); errno != unix.EACCES {
		t.Error(errnoName(errno))
	}
	if got := scrape(t, addr).sum("kmsfs_kms_calls_total", key, `result="denied"`); got != 1 {
		t.Errorf("%v denied calls, want 1", got)
	}
	s.faults(kmsserver.Faults{Outage: kmsserver.OutageUnavailable})
	time.Sleep(1100 * time.Millisecond) // a failure is remembered for a second
	if _, errno := readAll(m.Path("a")); errno != unix.ETIMEDOUT {
		t.Error(errnoName(errno))
	}
	now := scrape(t, addr)
	if now.sum("kmsfs_kms_calls_total", key, `result="unavailable"`) < 1 || now.sum("kmsfs_kms_requests_total", `code="ServiceUnavailable"`) < 1 ||
		now.sum("kmsfs_kms_breaker_open", key) != 1 || now.sum("kmsfs_key_failures_total") < 2 {
		t.Errorf("in an outage: %v", now)
	}
	if code, _ := get(t, addr, "/healthz"); code != http.StatusOK { // the mount itself is well
		t.Errorf("/healthz in an outage: %d", code)
	}
	s.faults(kmsserver.Faults{})
	s.recovers(m.Path("a"))
	if now := scrape(t, addr); now.sum("kmsfs_kms_breaker_open") != 0 || now.sum("kmsfs_class_available") != 1 {
		t.Errorf("after the outage: %v", now)
	}
	m.Unmount()
}

// TestMetricsAddress: nobody listens to the network who did not say so, and a
// mount whose metrics cannot be served does not begin.
func TestMetricsAddress(t *testing.T) {
	t.Parallel()
	s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
	addr := freeAddress(t)
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	m := s.h.Mount(s.dir, "--metrics", ":"+port)
	scrape(t, addr)
	if out := s.h.Sh(`ss -Hltn "sport = :$1" 2>/dev/null || true`, port); strings.Contains(out, "0.0.0.0:"+port) || strings.Contains(out, "*:"+port) {
		t.Errorf("listening on %s", out)
	}
	other := newKMSStoreAt(t, s.kms, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
	dir := t.TempDir()
	for _, bad := range []string{addr, "nonsense", "127.0.0.1:99999"} {
		if r := other.h.Try("mount", "--metrics", bad, other.dir, dir); r.Code == 0 || !strings.Contains(r.Stderr, "kmsfs: hint: ") {
			t.Errorf("--metrics %s: exit %d: %s", bad, r.Code, r.Stderr)
		}
	}
	other.h.Run("mount", other.dir, dir) // nothing of it is left
	other.h.Run("umount", dir)
	m.Unmount()
}
