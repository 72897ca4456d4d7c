package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// partial is what an interrupted command still says with --json.
type partial struct {
	Complete *bool
	Files    int
}

// interrupt starts a command, interrupts it when the key service has had some
// calls, and returns what it printed. It has to end by itself, with 130.
func (s *kmsStore) interrupt(sig os.Signal, args ...string) (p partial) {
	s.t.Helper()
	s.kms.ResetCalls()
	s.faults(kmsserver.Faults{LatencyMS: 100})
	defer s.faults(kmsserver.Faults{})
	cmd := exec.Command(rig.Binary(s.t), args...)
	cmd.Env = append(os.Environ(), s.h.Env...)
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for range 6000 {
		if len(s.kms.Calls()) > 40 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := cmd.Process.Signal(sig); err != nil {
		s.t.Errorf("%s ended before the signal: %v", args[0], err)
	}
	select {
	case <-ended:
	case <-time.After(time.Minute):
		_ = cmd.Process.Kill()
		s.t.Fatalf("%s goes on after %v", args[0], sig)
	}
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		s.t.Errorf("%s after %v: got exit code %d, want 130: %s", args[0], sig, code, errb.String())
	}
	if err := json.Unmarshal(out.Bytes(), &p); err != nil || p.Complete == nil || *p.Complete {
		s.t.Errorf("%s after %v: got %v of %.500q, want a report that says it is not complete", args[0], sig, err, out.String())
	}
	return p
}

// TestInterrupted stops fsck, fsck --repair and salvage in their middle: each
// ends soon, says what it had found by then, leaves the store as sound as it was,
// and does all of its work when it is called again.
func TestInterrupted(t *testing.T) {
	eachPlacement(t, func(t *testing.T, place envelope.Placement) {
		s := newKMSStore(t, place, []string{"general"}, map[string]kmsClass{"general": {cache: "0s"}})
		m := s.mount("a", "b")
		const files = 200
		for i := range files {
			m.Put(fmt.Sprintf("%c/%03d", 'a'+i%2, i), []byte(fmt.Sprint("contents of ", i)))
		}
		m.Unmount()
		// A directory's second copy is lost, and a crash has left a temporary file.
		for _, dir := range subdirectories(t, s.dir) {
			if err := unix.Lremovexattr(dir, "user.kmsfs.dir"); err != nil {
				t.Fatal(err)
			}
			put(t, filepath.Join(dir, ".kmsfs.tmp.0123456789abcdef01234567"), nil)
		}
		before := readTree(t, s.dir)

		p := s.interrupt(unix.SIGINT, "fsck", "--json", "--jobs", "2", s.dir)
		if p.Files >= files {
			t.Errorf("fsck: %d files of %d: that was the whole check", p.Files, files)
		}
		mustEqual(t, "the store after an interrupted fsck", readTree(t, s.dir), before)

		out := filepath.Join(t.TempDir(), "out")
		if p = s.interrupt(unix.SIGTERM, "salvage", "--json", s.dir, out); p.Files >= files {
			t.Errorf("salvage: %d files of %d: that was all of it", p.Files, files)
		}
		mustEqual(t, "the store after an interrupted salvage", readTree(t, s.dir), before)
		for name, e := range readTree(t, out) { // what is there is whole
			if e.mode&unix.S_IFMT == unix.S_IFREG && e.size == 0 {
				t.Errorf("salvage left an empty %s", name)
			}
		}

		s.interrupt(unix.SIGINT, "fsck", "--repair", "--json", "--jobs", "2", s.dir)
		s.h.Run("fsck", "--repair", s.dir)
		s.fsck(0)
		again := filepath.Join(t.TempDir(), "again")
		s.h.Run("salvage", s.dir, again)
		m.Again()
		for i := range files {
			name := fmt.Sprintf("%c/%03d", 'a'+i%2, i)
			for _, path := range []string{m.Path(name), filepath.Join(again, name)} {
				if got, want := string(readFile(t, path)), fmt.Sprint("contents of ", i); got != want {
					t.Errorf("%s: got %q, want %q", path, got, want)
				}
			}
		}
		m.Unmount()
	})
}

// subdirectories returns those of the plaintext tree's top in a store.
func subdirectories(t *testing.T, store string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(store)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() && e.Name() != ".kmsfs" {
			out = append(out, filepath.Join(store, e.Name()))
		}
	}
	if len(out) == 0 {
		t.Fatal("no directories")
	}
	return out
}
