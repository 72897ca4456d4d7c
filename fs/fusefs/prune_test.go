package fusefs

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// TestPrune: of many files that were looked at, the mount does not keep more
// than its limit; what is in use stays in use, and everything is still there.
func TestPrune(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{known: 400})
	if !m.server.fuse.KernelSettings().SupportsNotify(fuse.NOTIFY_PRUNE) {
		t.Skip("the kernel cannot be asked to forget names (before Linux 6.18)")
	}
	const files = 3000
	dir := m.path("d")
	must(t, os.Mkdir(dir, 0o755))
	for i := range files {
		must(t, os.WriteFile(fmt.Sprintf("%s/%d", dir, i), fmt.Append(nil, i), 0o600))
	}
	var open []*os.File
	for i := range 100 {
		f, err := os.OpenFile(fmt.Sprintf("%s/%d", dir, i), os.O_RDWR, 0)
		must(t, err)
		defer f.Close()
		open = append(open, f)
	}
	inside := openDir(t, dir)
	m.requireFewNodes(t, 500)

	for i := range files {
		st, err := os.Stat(fmt.Sprintf("%s/%d", dir, i))
		if err != nil || st.Size() != int64(len(fmt.Sprint(i))) {
			t.Fatalf("%d: %v, %v", i, st, err)
		}
	}
	for i, f := range open {
		_, err := f.WriteAt([]byte("open "), 10)
		must(t, err)
		got, err := io.ReadAll(f)
		if want := fmt.Sprint(i) + strings.Repeat("\x00", 10-len(fmt.Sprint(i))) + "open "; err != nil || string(got) != want {
			t.Errorf("open file %d: %q, %v, want %q", i, got, err, want)
		}
	}
	var st unix.Stat_t
	must(t, unix.Fstatat(inside, "1", &st, 0))
	if list, err := os.ReadDir(dir); err != nil || len(list) != files {
		t.Errorf("%d names, %v, want %d", len(list), err, files)
	}
	m.requireFewNodes(t, 500)
}

// requireFewNodes waits until the mount has at most n nodes: the kernel forgets
// in its own time.
func (m *mounted) requireFewNodes(t *testing.T, n int) {
	t.Helper()
	var got int
	for range 500 {
		if got = m.volume.Status().Counters.KnownNodes; got <= n {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("the mount has %d nodes, want at most %d", got, n)
}

// TestPruneGivesUp: without the notification nothing else changes.
func TestPruneGivesUp(t *testing.T) {
	p := &pruner{max: 10, wake: make(chan struct{}, 1), log: slog.New(slog.DiscardHandler),
		count: func() int { return 100 }, sample: func(n int) []uint64 { return make([]uint64, n) },
		forget: func([]uint64) fuse.Status { return statusUnsupported }}
	p.crowded(100)
	p.crowded(100)
	p.run(make(chan struct{})) // returns
}
