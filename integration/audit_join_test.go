package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/audit"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// readAudit returns the events of a log whose chain holds.
func readAudit(t *testing.T, path string) (out []audit.Event) {
	t.Helper()
	r, err := audit.Walk(path, func(e audit.Event) error { out = append(out, e); return nil })
	if err != nil || !r.OK() {
		t.Fatalf("audit log: %v, %v", err, r.Problems)
	}
	return out
}

// TestAuditJoin uses keys in every way, the failing ones included, and joins the
// audit log with the key service's own: each of its lines has exactly one call
// in ours, with the same operation, key, class, purpose and id, and each use of
// a key names calls that are there.
func TestAuditJoin(t *testing.T) {
	s := newKMSStore(t, envelope.Prefix, []string{"general", "phi", "bulk"}, map[string]kmsClass{
		"general": {}, "phi": {cache: "0s"}, "bulk": {options: "data_keys: shared"}})
	log := filepath.Join(t.TempDir(), "audit.log")
	m := s.h.Mount(s.dir)
	for _, d := range []string{"phi", "bulk"} {
		if err := os.Mkdir(m.Path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 40 {
		for _, d := range []string{"", "phi", "bulk"} {
			m.Put(filepath.Join(d, fmt.Sprintf("record-%02d", i)), smallFile(i))
		}
	}
	m.Unmount()
	s.kms.ResetCalls()
	m.Again("--audit", log)
	for i := range 40 { // read ahead where there is a cache
		for _, d := range []string{"", "phi", "bulk"} {
			readAll(m.Path(d, fmt.Sprintf("record-%02d", i)))
		}
	}
	for i := range 20 {
		m.Put(fmt.Sprintf("new-%02d", i), smallFile(i))
	}
	s.faults(kmsserver.Faults{RateLimit: 20, Burst: 2})
	for i := range 10 {
		readAll(m.Path("phi", fmt.Sprintf("record-%02d", i)))
	}
	s.faults(kmsserver.Faults{Rules: []kmsserver.Fault{{Key: s.arn["phi"], Error: "AccessDeniedException"}}})
	if _, errno := readAll(m.Path("phi", "record-00")); errno != unix.EACCES {
		t.Errorf("denied: got %s", errnoName(errno))
	}
	s.faults(kmsserver.Faults{})
	s.h.Run("health", "--since", "0", m.Dir)
	m.Unmount()

	byRequest := map[string]audit.Event{}
	uses, denied := 0, 0
	for _, e := range readAudit(t, log) {
		switch e.Kind {
		case audit.KindCall:
			for _, id := range e.Requests {
				if _, twice := byRequest[id]; twice {
					t.Errorf("request %s is in two calls", id)
				}
				byRequest[id] = e
			}
		case audit.KindUse:
			uses++
			if e.Result != audit.OK {
				denied++
			}
			for _, id := range e.Requests {
				if _, ok := byRequest[id]; !ok {
					t.Errorf("use %d of file %s names request %s, which no call before it has", e.Seq, e.File, id)
				}
			}
			if e.Purpose == "data" && (e.Caller == nil || int(e.UID) != os.Getuid() || e.PID == 0) {
				t.Errorf("use %d has no caller: %+v", e.Seq, e)
			}
		}
	}
	calls := s.kms.Calls()
	for _, c := range calls {
		e, ok := byRequest[c.RequestID]
		if !ok {
			t.Errorf("the key service has %s %s (%s), and the audit log has not", c.EventName, c.RequestID, c.ErrorCode)
			continue
		}
		delete(byRequest, c.RequestID)
		if ec := c.EncryptionContext; c.KeyID != e.Key || ec != nil &&
			(c.EventName != e.Op || ec["kmsfs:class"] != e.Class || ec["kmsfs:purpose"] != e.Purpose || ec["kmsfs:id"] != e.File) {
			t.Errorf("request %s: the key service has %s %s %v, the audit log %+v", c.RequestID, c.EventName, c.KeyID, c.EncryptionContext, e)
		}
	}
	for id, e := range byRequest {
		if id != "" {
			t.Errorf("the audit log has request %s (%s), and the key service has not", id, e.Op)
		}
	}
	if uses < 150 || denied < 1 || len(calls) < 100 {
		t.Errorf("%d uses, %d of them refused, %d calls: the test did not do what it says", uses, denied, len(calls))
	}
}

// TestAuditOpenFile: a second opener of an open file is in the log, with its own
// process, though no key service and no cache is asked.
func TestAuditOpenFile(t *testing.T) {
	s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {cache: "0s"}})
	log := filepath.Join(t.TempDir(), "audit.log")
	m := s.h.Mount(s.dir, "--audit", log)
	m.Put("f", []byte("secret"))
	m.Unmount()
	m.Again("--audit", log)
	f, err := os.Open(m.Path("f"))
	if err != nil {
		t.Fatal(err)
	}
	s.h.Sh(`cat "$1"`, m.Path("f"))
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	m.Unmount()
	var sources []string
	pids := map[uint32]bool{}
	for _, e := range readAudit(t, log) {
		if e.Kind == audit.KindUse && e.Op == "open" && e.Purpose == "data" {
			sources = append(sources, e.Source)
			pids[e.PID] = true
		}
	}
	if len(sources) != 2 || sources[0] != envelope.SourceCall || sources[1] != envelope.SourceOpen || len(pids) != 2 {
		t.Errorf("opens in the log: %v, by %d processes", sources, len(pids))
	}
}

// TestAuditRequired: with --audit-required no key is used that cannot be logged,
// and without it a full disk of the log stops nothing. What is missing is told.
func TestAuditRequired(t *testing.T) {
	rig.Need(t, "root", "fuse")
	for _, required := range []bool{true, false} {
		t.Run(fmt.Sprint("required=", required), func(t *testing.T) {
			s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {cache: "0s"}})
			small := t.TempDir()
			if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=64k"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
			log := filepath.Join(small, "audit.log")
			flags := []string{"--audit", log}
			if required {
				flags = append(flags, "--audit-required")
			}
			m := s.h.Mount(s.dir, flags...)
			m.Put("f", []byte("secret"))
			if err := os.WriteFile(filepath.Join(small, "filler"), make([]byte, 64<<10), 0o600); err == nil {
				t.Log("the filler found room for all of itself")
			}
			refused := 0
			for range 60 { // the last page of the log has room for a few lines
				switch got, errno := readAll(m.Path("f")); {
				case errno != 0:
					refused++
				case string(got) != "secret":
					t.Fatalf("%q", got)
				}
			}
			switch {
			case required && refused < 40:
				t.Errorf("the log is full, and %d of 60 opens were refused", refused)
			case !required && refused > 0:
				t.Errorf("%d opens were refused for the log's sake", refused)
			}
			if err := os.Remove(filepath.Join(small, "filler")); err != nil {
				t.Fatal(err)
			}
			works := false
			for end := time.Now().Add(10 * time.Second); !works && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
				_, errno := readAll(m.Path("f"))
				works = errno == 0
			}
			if !works {
				t.Error("with room again, the file cannot be read")
			}
			m.Unmount()
			ok, lost := 0, uint64(0)
			for _, e := range readAudit(t, log) {
				if e.Kind == audit.KindUse && e.Op == "open" && e.Purpose == "data" && e.Result == audit.OK {
					ok++
				}
				lost += e.Lost
			}
			if required && ok < 61-refused {
				t.Errorf("%d opens succeeded, %d are in the log", 61-refused, ok)
			}
			if !required && lost == 0 {
				t.Error("events were lost, and no line says so")
			}
		})
	}
}
