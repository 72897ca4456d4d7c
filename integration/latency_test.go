package integration

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
	"github.com/kmsfs/kmsfs/integration/rig"
)

const (
	// latency is what KMS usually takes.
	latency = 20 * time.Millisecond
	rounds  = 3
	// ratioLimit is what tests hold a ratio of times under: the aim is 1.15, and
	// machines that run tests do other things as well. docs/performance.md has
	// the ratios that were measured.
	ratioLimit = 3.0
)

// full reports whether the tests of this file take their full size, which is
// too much for every run.
func full() bool { return os.Getenv("INTEGRATION_FULL") == "1" }

func size(small, large int) int {
	if full() {
		return large
	}
	return small
}

// ratio runs a workload without and with latency, taking turns, and returns
// the medians' ratio. run returns the time that counts.
func (s *kmsStore) ratio(what string, run func(round string) time.Duration) float64 {
	s.t.Helper()
	times := map[time.Duration][]time.Duration{}
	for i := range rounds {
		for _, l := range []time.Duration{0, latency} {
			s.faults(kmsserver.Faults{})
			took := run(fmt.Sprintf("round%d-%s", i, l))
			times[l] = append(times[l], took)
		}
	}
	s.faults(kmsserver.Faults{})
	with, without := median(times[latency]), median(times[0])
	ratio := with.Seconds() / without.Seconds()
	s.t.Logf("%s: %.2f times as long with %v a call: %v, without: %v", what, ratio, latency, times[latency], times[0])
	return ratio
}

func median[T cmp.Ordered](list []T) T {
	list = slices.Sorted(slices.Values(list))
	return list[len(list)/2]
}

// slow makes the calls of a round slow that has latency in its name.
func (s *kmsStore) slow(round string) {
	s.t.Helper()
	if strings.HasSuffix(round, latency.String()) {
		s.faults(kmsserver.Faults{LatencyMS: int(latency.Milliseconds())})
	}
}

func (s *kmsStore) wantRatio(what string, got float64) {
	s.t.Helper()
	if got > ratioLimit {
		s.t.Errorf("%s: %.2f times as long, want at most %.2f", what, got, ratioLimit)
	}
}

// sources makes an archive of n of Go's own source files, and returns it and
// how many files are in it.
func sources(t *testing.T, h *rig.Home, n int) (archive string, files int) {
	t.Helper()
	rig.Need(t, "go", "tar")
	archive = filepath.Join(t.TempDir(), "src.tar")
	out := h.Sh(`cd "$(go env GOROOT)"; find -L src -type f | sort > "$1".all; head -n "$2" "$1".all > "$1".list
		tar -chf "$1" -T "$1".list; wc -l < "$1".list`, archive, fmt.Sprint(n))
	if _, err := fmt.Sscan(out, &files); err != nil || files < min(n, 8000)/2 {
		t.Fatalf("%q source files, %v", out, err)
	}
	return archive, files
}

// TestLatencyUnpack unpacks an archive of many small files, each under a data
// key of its own: the keys are there before they are needed.
func TestLatencyUnpack(t *testing.T) {
	s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
	archive, files := sources(t, s.h, size(2000, 1_000_000))
	m := s.mount()
	ratio := s.ratio(fmt.Sprintf("unpacking %d files", files), func(round string) time.Duration {
		s.again(m) // every round begins with an empty pool
		dir := m.Path(round)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		s.slow(round)
		start := time.Now()
		s.h.Sh(`tar -xf "$1" -C "$2"`, archive, dir)
		took := time.Since(start)
		s.faults(kmsserver.Faults{})
		if n := s.distinctIDs("GenerateDataKey"); n < files-files/100 { // a few may be empty, and need no key
			t.Errorf("%s: data keys for %d of %d files", round, n, files)
		}
		s.h.Sh(`tar -df "$1" -C "$2" && rm -r "$2"`, archive, dir)
		return took
	})
	s.wantRatio("unpacking", ratio)
	m.Unmount()
	s.fsck(0)
}

// distinctIDs returns how many file ids the successful data calls of an
// operation were for.
func (s *kmsStore) distinctIDs(op string) int {
	ids := map[string]bool{}
	for _, c := range s.kms.Calls() {
		if c.EventName == op && c.ErrorCode == "" && c.EncryptionContext["kmsfs:purpose"] == "data" {
			ids[c.EncryptionContext["kmsfs:id"]] = true
		}
	}
	return len(ids)
}

// fillRecords makes n files of 1 kB.
func fillRecords(t *testing.T, dir string, n int) {
	t.Helper()
	for i := range n {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("record-%05d", i)), smallFile(i), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func smallFile(i int) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "record %05d\n", i), 86)[:1024]
}

// readInOrder reads every file of a directory, one after another in the order in
// which the directory lists them, as tar and scanners do, and calls after with
// the number of files read so far.
func readInOrder(t *testing.T, dir string, after func(n int)) {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		t.Fatal(err)
	}
	for n, name := range names {
		var i int
		if _, err := fmt.Sscanf(name, "record-%d", &i); err != nil {
			t.Fatal(err)
		}
		got, errno := readAll(filepath.Join(dir, name))
		if errno != 0 || !bytes.Equal(got, smallFile(i)) {
			t.Fatalf("%s: %d bytes, %s", name, len(got), errnoName(errno))
		}
		after(n + 1)
	}
}

// TestLatencyColdReads reads cold files in directory order, in the ways that
// programs do: the keys of the next ones are asked for ahead.
func TestLatencyColdReads(t *testing.T) {
	s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
	n := size(1000, 3000)
	m := s.mount("d")
	fillRecords(t, m.Path("d"), n)
	serial := time.Duration(n) * latency
	for _, scan := range []struct {
		name string
		run  func()
	}{
		{"open, read, close", func() { readInOrder(t, m.Path("d"), func(int) {}) }},
		{"tar", func() { s.h.Sh(`tar -cf - -C "$1" d | wc -c >/dev/null`, m.Dir) }},
		{"cp -r", func() { s.h.Sh(`cp -r "$1"/d "$2"`, m.Dir, filepath.Join(t.TempDir(), "copy")) }},
		{"grep -r", func() { s.h.Sh(`grep -rq "no such line" "$1"/d && exit 1 || true`, m.Dir) }},
	} {
		s.again(m)
		s.faults(kmsserver.Faults{LatencyMS: int(latency.Milliseconds())})
		start := time.Now()
		scan.run()
		took := time.Since(start)
		s.faults(kmsserver.Faults{})
		t.Logf("%s: %d cold files in %v, one call after another takes %v", scan.name, n, took, serial)
		if took > serial/2 { // the aim is a twentieth; a machine with much else to do takes longer
			t.Errorf("%s: %v, want at most half of %v", scan.name, took, serial)
		}
		if ids, calls := s.distinctIDs("Decrypt"), s.kms.Count("Decrypt"); ids != n || calls > n+n/50 {
			t.Errorf("%s: %d calls for the keys of %d files, want one for each of %d", scan.name, calls, ids, n)
		}
	}
	m.Unmount()
}

// TestLatencyPatternBroken reads a few files of a large directory here and
// there: no reader pays for keys that nobody wants.
func TestLatencyPatternBroken(t *testing.T) {
	s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
	m := s.mount("d")
	fillRecords(t, m.Path("d"), 400)
	s.again(m)
	s.faults(kmsserver.Faults{LatencyMS: int(latency.Milliseconds())})
	const opens = 20
	for i := range opens {
		name := fmt.Sprintf("record-%05d", (i*157+11)%400)
		if _, errno := readAll(m.Path("d", name)); errno != 0 {
			t.Fatalf("%s: %s", name, errnoName(errno))
		}
	}
	s.settle()
	if n := s.kms.Count("Decrypt"); n > 3*opens {
		t.Errorf("%d calls for %d files in no order, want at most %d", n, opens, 3*opens)
	}
	m.Unmount()
}

// settle waits until no call has been logged for half a second. In kmsd a call
// is logged when it ends.
func (s *kmsStore) settle() {
	s.t.Helper()
	last := -1
	for range 60 {
		n := s.kms.Count("")
		if n == last {
			return
		}
		last = n
		time.Sleep(500 * time.Millisecond)
	}
	s.t.Errorf("calls go on: %d", last)
}

// TestLatencyShared reads cold files whose data keys are under a shared one.
func TestLatencyShared(t *testing.T) {
	s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {options: "data_keys: shared"}})
	n := size(1000, 3000)
	m := s.mount("d")
	s.faults(kmsserver.Faults{LatencyMS: int(latency.Milliseconds())})
	fillRecords(t, m.Path("d"), n)
	s.faults(kmsserver.Faults{})
	s.settle()
	if calls := s.kms.Count(""); calls >= 30 {
		t.Errorf("%d calls for %d new files, want less than 30", calls, n)
	}
	ratio := s.ratio(fmt.Sprintf("reading %d cold files", n), func(round string) time.Duration {
		s.again(m)
		s.slow(round)
		start := time.Now()
		readInOrder(t, m.Path("d"), func(int) {})
		took := time.Since(start)
		s.faults(kmsserver.Faults{})
		s.settle()
		if calls := s.kms.Count(""); calls >= 30 {
			t.Errorf("%s: %d calls, want less than 30", round, calls)
		}
		return took
	})
	s.wantRatio("reading", ratio)
	m.Unmount()
	s.fsck(0)
}

// TestLatencyNoCache: without a cache every open is a call of its own, made when
// the file is opened and not before.
func TestLatencyNoCache(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newKMSStore(t, p, []string{"phi"}, map[string]kmsClass{"phi": {cache: "0s"}})
		const n = 40
		m := s.mount("d")
		fillRecords(t, m.Path("d"), n)
		s.again(m)
		s.faults(kmsserver.Faults{LatencyMS: 5})
		readInOrder(t, m.Path("d"), func(done int) {
			if calls := s.kms.Count("Decrypt"); calls != done {
				t.Errorf("%d calls after %d opens", calls, done)
			}
		})
		s.settle()
		if calls, ids := s.kms.Count("Decrypt"), s.distinctIDs("Decrypt"); calls != n || ids != n {
			t.Errorf("%d calls for %d files, want %d", calls, ids, n)
		}
		m.Unmount()
	})
}
