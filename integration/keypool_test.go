package integration

import (
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
)

// TestPoolCreate makes files one after another while each call takes its time:
// after the first few no create waits for one.
func TestPoolCreate(t *testing.T) {
	s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
	m := s.mount()
	s.faults(kmsserver.Faults{LatencyMS: int(latency.Milliseconds())})
	const files = 200
	var waited []int
	start := time.Now()
	for i := range files {
		before := time.Now()
		f, err := os.OpenFile(m.Path(fmt.Sprintf("f%d", i)), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if time.Since(before) >= latency {
			waited = append(waited, i)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	took := time.Since(start)
	t.Logf("%d files in %v; those that took as long as a call: %v", files, took, waited)
	// A create may take that long for reasons of the machine's.
	if len(waited) > files/2 {
		t.Errorf("%d of %d creates took as long as a call: %v", len(waited), files, waited)
	}
	if serial := files * latency; took > serial*2/3 {
		t.Errorf("%d files took %v, want at most two thirds of %v", files, took, serial)
	}
	m.Unmount()
	s.fsck(0)
}

// TestPoolContexts wants each file to be under the very key that was asked for
// under its id, and no id to be asked for twice.
func TestPoolContexts(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newKMSStore(t, p, []string{"general", "phi"}, map[string]kmsClass{"general": {}, "phi": {}})
		m := s.mount("phi")
		const files = 50
		for i := range files {
			m.Put(fmt.Sprintf("f%d", i), []byte("x"))
			m.Put(fmt.Sprintf("phi/f%d", i), []byte("x"))
		}
		s.settle()
		class := map[string]string{}
		for _, c := range s.kms.Calls() {
			if c.EventName != "GenerateDataKey" {
				continue
			}
			id := c.EncryptionContext["kmsfs:id"]
			if class[id] != "" {
				t.Errorf("two data keys for the id %s", id)
			}
			class[id] = c.EncryptionContext["kmsfs:class"]
		}
		for i := range files {
			for dir, want := range map[string]string{"": "general", "phi": "phi"} {
				if got := class[s.info(m.Path(dir, fmt.Sprintf("f%d", i))).ID]; got != want {
					t.Errorf("%s/f%d: its key was made for class %q, want %q", dir, i, got, want)
				}
			}
		}
		s.again(m) // nothing but the headers is left of the pool
		for i := range files {
			for _, dir := range []string{"", "phi"} {
				if got, errno := readAll(m.Path(dir, fmt.Sprintf("f%d", i))); errno != 0 || string(got) != "x" {
					t.Errorf("%s/f%d: %q, %s", dir, i, got, errnoName(errno))
				}
			}
		}
		m.Unmount()
	})
}

// TestPoolIdle: a mount that makes no files makes no calls, before the first and
// after the last.
func TestPoolIdle(t *testing.T) {
	t.Parallel()
	s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
	m := s.mount()
	time.Sleep(2 * time.Second)
	s.wantCalls("an idle mount", nil)
	for i := range 100 {
		m.Put(fmt.Sprintf("f%d", i), []byte("x"))
	}
	s.settle()
	if n := s.kms.Count("GenerateDataKey"); n < 100 || n > 100+256 {
		t.Errorf("%d data keys for 100 files", n)
	}
	s.kms.ResetCalls()
	time.Sleep(3 * time.Second)
	s.wantCalls("an idle mount with a pool", nil)
	m.Unmount()
	s.wantCalls("unmount", nil)
}

// TestPoolOutage: what is in the pool makes files in an outage; then creates fail
// as they do without a pool, nothing is called over and over, and afterwards the
// pool works again.
func TestPoolOutage(t *testing.T) {
	t.Parallel()
	s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
	m := s.mount()
	for i := range 20 {
		m.Put(fmt.Sprintf("before%d", i), []byte("x"))
	}
	s.settle()
	s.faults(kmsserver.Faults{Rules: []kmsserver.Fault{{Operations: []string{"GenerateDataKey"}, Error: "AccessDeniedException"}}})
	s.kms.ResetCalls()
	made, denied := 0, 0
	for i := range 600 { // more than a pool holds
		err := os.WriteFile(m.Path(fmt.Sprintf("in%d", i)), []byte("x"), 0o600)
		switch errnoOf(err) {
		case 0:
			made++
		case unix.EACCES:
			denied++
		default:
			t.Fatalf("create: %v", err)
		}
		if denied >= 3 {
			break
		}
	}
	if denied < 3 {
		t.Errorf("%d files were made without a key", made)
	}
	t.Logf("%d files from the pool, then %d refusals", made, denied)
	s.kms.ResetCalls()
	time.Sleep(3 * time.Second)
	if n := s.kms.Count("GenerateDataKey"); n > 6 {
		t.Errorf("%d calls in three seconds of a denied mount that nobody uses", n)
	}
	s.faults(kmsserver.Faults{})
	time.Sleep(1200 * time.Millisecond) // a failure is remembered for a second
	for i := range 20 {
		m.Put(fmt.Sprintf("after%d", i), []byte("x"))
	}
	m.Unmount()
	s.fsck(0)
}
