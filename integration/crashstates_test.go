package integration

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
)

// crash makes the store as it would be if the process died now, in place of
// the present one. The volume stays open on the old one.
func (s *formatStore) crash() {
	s.t.Helper()
	dir := s.t.TempDir() + "/crashed"
	if out, err := exec.Command("cp", "-a", s.dir, dir).CombinedOutput(); err != nil {
		s.t.Fatalf("cp: %v: %s", err, out)
	}
	s.dir = dir
}

// F-34
func TestCrashWhileAppending(t *testing.T) {
	for _, p := range []envelope.Placement{envelope.Prefix, envelope.Xattr, envelope.Sidecar} {
		t.Run(p.String(), func(t *testing.T) {
			s := newFormatStore(t, p)
			data := noise(8*formatChunk+7, 1)
			_, h := s.put(s.v.Root(), "file", data[:formatChunk+1])
			for _, part := range [][2]int64{{formatChunk + 1, 5 * formatChunk}, {5 * formatChunk, int64(len(data))}} {
				if _, err := h.WriteAt(data[part[0]:part[1]], part[0], false); err != nil {
					t.Fatal(err)
				}
			}
			s.crash()
			base := int(p.Base(1024))
			editFile(t, s.body(), func(b []byte) []byte { return b[:base+6*formatSlot+100] }) // a torn chunk
			h.Release()
			s.close()
			s.open()
			if got, err := s.read("file"); err != nil || !bytes.Equal(got, data[:6*formatChunk]) {
				t.Errorf("%d bytes, %v, want %d", len(got), err, 6*formatChunk)
			}
			if got := s.v.Status().Counters.Repairs; got != 1 {
				t.Errorf("%d repairs, want 1", got)
			}
			s.close()
			s.open()
			if got := s.v.Status().Counters.Repairs; got != 0 {
				t.Errorf("%d repairs at the second mount", got)
			}
		})
	}
}

// F-30 F-31 F-35
func TestFilesThatARepairMustNotCut(t *testing.T) {
	segment := func(s *formatStore) string { return s.dir + "/.kmsfs/journal/1" }
	for name, tt := range map[string]func(s *formatStore, b []byte) []byte{
		"less than the fsync promised": func(_ *formatStore, b []byte) []byte { return b[:1024+2*formatSlot] },
		"epoch forged": func(s *formatStore, b []byte) []byte {
			editFile(s.t, segment(s), func(l []byte) []byte { l[15] ^= 1; return l })
			return b[:1024+2*formatSlot]
		},
		"no epoch": func(s *formatStore, b []byte) []byte {
			editFile(s.t, segment(s), func([]byte) []byte { return nil })
			return b[:1024+2*formatSlot]
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newFormatStore(t, envelope.Prefix)
			_, h := s.put(s.v.Root(), "file", noise(3*formatChunk, 1))
			if err := h.Fsync(false); err != nil {
				t.Fatal(err)
			}
			s.crash()
			body := s.body()
			editFile(t, body, func(b []byte) []byte { return tt(s, b) })
			cut, err := os.ReadFile(body)
			if err != nil {
				t.Fatal(err)
			}
			h.Release()
			s.close()
			s.open()
			if _, err := s.read("file"); fault.Of(err) != fault.Integrity {
				t.Errorf("read: got %v, want an integrity failure", err)
			}
			if b, err := os.ReadFile(body); err != nil || !bytes.Equal(b, cut) {
				t.Errorf("the file was changed: %d bytes, %v", len(b), err)
			}
		})
	}
}

// F-32 F-33 F-34
func TestCrashWhileReplacing(t *testing.T) {
	s := newFormatStore(t, envelope.Prefix)
	old, changed := noise(3*formatChunk, 1), noise(formatChunk, 2)
	_, h := s.put(s.v.Root(), "file", old)
	if err := h.Fsync(false); err != nil {
		t.Fatal(err)
	}
	if _, err := h.WriteAt(changed, formatChunk, false); err != nil {
		t.Fatal(err)
	}
	if err := h.Flush(); err != nil { // the record is the last of the journal, the bytes in place are the old ones
		t.Fatal(err)
	}
	after := append(bytes.Clone(old[:formatChunk]), changed...)
	after = append(after, old[2*formatChunk:]...)
	live, v := s.dir, s.v
	for name, tt := range map[string]struct {
		torn    bool // the slot has half of something else
		journal func(b []byte) []byte
		want    []byte
	}{
		"half replaced":      {true, func(b []byte) []byte { return b }, after},
		"not begun":          {false, func(b []byte) []byte { return b }, after},
		"garbage behind it":  {true, func(b []byte) []byte { return append(b, "of a longer record"...) }, after},
		"record torn":        {false, func(b []byte) []byte { return b[:len(b)-2000] }, old},
		"record not genuine": {false, func(b []byte) []byte { b[len(b)-100] ^= 1; return b }, old},
	} {
		t.Run(name, func(t *testing.T) {
			s.t, s.dir = t, live
			s.crash()
			editFile(t, s.dir+"/.kmsfs/journal/1", tt.journal)
			editFile(t, s.body(), func(b []byte) []byte {
				if tt.torn {
					copy(b[1024+formatSlot+100:], noise(1000, 9))
				}
				return b
			})
			s.open()
			defer s.close()
			if got, err := s.read("file"); err != nil || !bytes.Equal(got, tt.want) {
				t.Errorf("%d bytes, %v; as wanted: %v", len(got), err, bytes.Equal(got, tt.want))
			}
		})
	}
	h.Release()
	if err := v.Close(); err != nil {
		t.Error(err)
	}
}

// F-65
func TestCrashBeforeAnythingWasWhole(t *testing.T) {
	s := newFormatStore(t, envelope.Prefix)
	_, h := s.put(s.v.Root(), "file", noise(formatChunk, 1))
	s.crash()
	h.Release()
	torn := noise(300, 2) // less than a header
	editFile(t, s.body(), func([]byte) []byte { return torn })
	s.close()
	s.open()
	if got, err := s.read("file"); err != nil || len(got) != 0 {
		t.Errorf("%d bytes, %v, want an empty file", len(got), err)
	}
	kept, err := filepath.Glob(s.dir + "/.kmsfs/quarantine/*")
	if err != nil || len(kept) == 0 {
		t.Fatalf("quarantine: %q, %v", kept, err)
	}
	if b, err := os.ReadFile(kept[0]); err != nil || !bytes.Equal(b, torn) {
		t.Errorf("in the quarantine: %d bytes, %v", len(b), err)
	}
}
