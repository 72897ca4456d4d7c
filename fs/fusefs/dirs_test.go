package fusefs

import (
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// TestPlusSize: an entry that plusSize says fits must fit, or its reference
// would be handed out and lost.
func TestPlusSize(t *testing.T) {
	for n := 1; n <= 255; n++ {
		name := strings.Repeat("x", n)
		size := plusSize(name)
		if fuse.NewDirEntryList(make([]byte, size), 0).AddDirLookupEntry(fuse.DirEntry{Name: name, Ino: 1}) == nil {
			t.Errorf("name of %d bytes does not fit into %d", n, size)
		}
		if fuse.NewDirEntryList(make([]byte, size-1), 0).AddDirLookupEntry(fuse.DirEntry{Name: name, Ino: 1}) != nil {
			t.Errorf("name of %d bytes fits into %d", n, size-1)
		}
	}
}

func TestAnswer(t *testing.T) {
	value := []byte("value")
	if n, status := answer(nil, value); n != 5 || status != fuse.OK {
		t.Errorf("size probe: %d, %v", n, status)
	}
	if n, status := answer(make([]byte, 4), value); n != 5 || status != statusRange {
		t.Errorf("short buffer: %d, %v", n, status)
	}
	dest := make([]byte, 8)
	if n, status := answer(dest, value); n != 5 || status != fuse.OK || string(dest[:n]) != "value" {
		t.Errorf("got %q, %v", dest[:n], status)
	}
	if n, status := answer(dest, nil); n != 0 || status != fuse.OK {
		t.Errorf("empty value: %d, %v", n, status)
	}
}
