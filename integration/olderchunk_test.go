package integration

import (
	"bytes"
	"os"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
)

// TestOlderChunkIsNotDetected shows a limit that docs/threat-model.md states:
// a chunk's key does not depend on time, so that an older version of a chunk
// opens at its own place, and only there.
func TestOlderChunkIsNotDetected(t *testing.T) {
	s := newFormatStore(t, envelope.Prefix)
	old, changed := noise(4*formatChunk, 1), noise(4*formatChunk, 2)
	_, h := s.put(s.v.Root(), "file", old)
	before, err := os.ReadFile(s.body())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.WriteAt(changed, 0, false); err != nil {
		t.Fatal(err)
	}
	h.Release()
	s.close()
	slot := func(b []byte, i int) []byte { return b[1024+i*formatSlot : 1024+(i+1)*formatSlot] }
	editFile(t, s.body(), func(b []byte) []byte { copy(slot(b, 1), slot(before, 1)); return b })
	s.open()
	want := slicesOf(changed[:formatChunk], old[formatChunk:2*formatChunk], changed[2*formatChunk:])
	if got, err := s.read("file"); err != nil || !bytes.Equal(got, want) {
		t.Errorf("older chunk at its place: %d bytes, %v", len(got), err)
	}
	s.close()
	editFile(t, s.body(), func(b []byte) []byte { copy(slot(b, 2), slot(before, 1)); return b })
	s.open()
	if _, err := s.read("file"); fault.Of(err) != fault.Integrity {
		t.Errorf("older chunk at another place: got %v, want an integrity failure", err)
	}
}
