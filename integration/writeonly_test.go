package integration

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
)

// TestWriteOnly holds a write-only mount to S-52, for a principal that the key
// service would let read, on every placement.
func TestWriteOnly(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newKMSStore(t, p, []string{"general"}, map[string]kmsClass{"general": {}})
		m := s.mount()
		m.Put("old", []byte("old contents"))
		m.Unmount()
		m.Again("--write-only")
		s.kms.ResetCalls()

		s.wantRefused(m.Path("old"), unix.O_RDONLY, unix.O_RDWR, unix.O_WRONLY, unix.O_WRONLY|unix.O_APPEND)
		m.Put("new", []byte("new contents"))
		s.wantRefused(m.Path("new"), unix.O_RDONLY, unix.O_RDWR, unix.O_WRONLY)
		if got := s.calls(); got["Decrypt"] != 0 {
			t.Errorf("refused opens made calls: %v", got)
		}

		f, err := os.OpenFile(m.Path("both"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString("written here"); err != nil {
			t.Error(err)
		}
		b := make([]byte, 7)
		if _, err := f.ReadAt(b, 0); err != nil || string(b) != "written" {
			t.Errorf("through the descriptor that made the file: %q, %v", b, err)
		}
		second, err := os.OpenFile(m.Path("both"), os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			t.Errorf("a second writer of an open file: %v", err)
		} else if _, err := second.WriteString(", and there"); err != nil || second.Close() != nil {
			t.Errorf("a second writer: %v", err)
		}
		s.wantRefused(m.Path("both"), unix.O_RDONLY)
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		s.h.Sh(`cd "$1"; echo replaced > old; mv new renamed; ln renamed link; mkdir d; ls -lR > /dev/null; rm link
			ln -s old sym; readlink sym; chmod 600 old; ! cat renamed 2>/dev/null`, m.Dir)
		if err := unix.Truncate(m.Path("both"), 0); err != nil {
			t.Errorf("truncate to nothing: %v", err)
		}
		m.Unmount()

		m.Again()
		for name, want := range map[string]string{"old": "replaced\n", "renamed": "new contents", "both": ""} {
			if got, errno := readAll(m.Path(name)); errno != 0 || string(got) != want {
				t.Errorf("%s: got %q, %s, want %q", name, got, errnoName(errno), want)
			}
		}
		m.Unmount()
		s.fsck(0)
	})
}

// wantRefused opens a file in ways that must be EACCES. The close of whoever
// wrote it reaches the mount's process a moment after close(2) returned, and
// until then a second writer is let in.
func (s *kmsStore) wantRefused(path string, flags ...int) {
	s.t.Helper()
	for _, flag := range flags {
		fd, err := unix.Open(path, flag, 0)
		for end := time.Now().Add(5 * time.Second); err == nil && flag == unix.O_WRONLY && time.Now().Before(end); {
			_ = unix.Close(fd)
			time.Sleep(10 * time.Millisecond)
			fd, err = unix.Open(path, flag, 0)
		}
		if err != unix.EACCES {
			s.t.Errorf("open with flags %#o: got %v, want EACCES", flag, err)
		}
	}
}

// TestHealth asks for the health of a mount in the states that a monitor tells
// apart by its exit code.
func TestHealth(t *testing.T) {
	s := newKMSStore(t, envelope.Prefix, []string{"general", "phi"}, map[string]kmsClass{"general": {}, "phi": {cache: "0s"}})
	m := s.mount("phi")
	m.Put("phi/f", []byte("secret"))
	health := func(what string, want int, flags ...string) string {
		t.Helper()
		time.Sleep(1100 * time.Millisecond) // an answer is given again for a second
		r := s.h.Try(append(append([]string{"health"}, flags...), m.Dir)...)
		if r.Code != want {
			t.Errorf("%s: exit %d, want %d: %s%s", what, r.Code, want, r.Stdout, r.Stderr)
		}
		return r.Stdout + r.Stderr
	}
	health("all is well", 0)
	s.disable(s.arn["phi"])
	health("a key is disabled", 5, "--since", "0")
	if _, errno := readAll(m.Path("phi/f")); errno != unix.ENOKEY {
		t.Errorf("disabled: got %s", errnoName(errno))
	}
	s.enable(s.arn["phi"])
	s.recovers(m.Path("phi/f"))
	health("the key works again", 0, "--since", "0")
	health("it failed a moment ago", 1)
	s.faults(kmsserver.Faults{Outage: kmsserver.OutageReset})
	health("the service is away", 5, "--since", "0", "--json")
	s.faults(kmsserver.Faults{})
	s.recovers(m.Path("phi/f"))
	health("the service answers again", 0, "--since", "0")
	m.Unmount()
	health("no mount", 2)
}
