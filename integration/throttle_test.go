package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// herdSource forks processes that wait at a pipe, lets all of them go at once,
// and counts those that read the file's first byte. A process holds the file
// open until every other one has it open, so that none comes late. Statically
// linked, a process costs the machine some 100 kB.
const herdSource = `
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv) {
	int n = atoi(argv[1]), start[2], opened[2], finish[2], good = 0, failure = 0;
	char c;
	if (pipe(start) || pipe(opened) || pipe(finish)) return 1;
	for (int i = 0; i < n; i++) {
		pid_t p = fork();
		if (p < 0) { fprintf(stderr, "fork %d: %s\n", i, strerror(errno)); return 1; }
		if (p > 0) continue;
		close(start[1]); close(finish[1]); close(opened[0]);
		if (read(start[0], &c, 1) != 0) _exit(200);
		int fd = open(argv[2], O_RDONLY);
		int err = fd < 0 ? errno : 0;
		if (fd >= 0 && read(fd, &c, 1) != 1) err = errno ? errno : 201;
		if (write(opened[1], "x", 1) != 1) _exit(202);
		read(finish[0], &c, 1);
		_exit(err);
	}
	close(start[1]); /* now */
	for (int i = 0; i < n; i++) if (read(opened[0], &c, 1) != 1) return 1;
	close(finish[1]);
	for (int i = 0; i < n; i++) {
		int status;
		if (wait(&status) < 0) return 1;
		if (status == 0) good++; else failure = WEXITSTATUS(status);
	}
	printf("%d %s\n", good, failure ? strerror(failure) : "");
	return 0;
}
`

// TestThrottleHerd lets 3,000 processes open one cold file at the same instant:
// the key service is asked once.
func TestThrottleHerd(t *testing.T) {
	rig.Need(t, "gcc")
	s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
	m := s.mount()
	m.Put("hot", bytes.Repeat([]byte("z"), 10_000))
	source, program := filepath.Join(t.TempDir(), "herd.c"), filepath.Join(t.TempDir(), "herd")
	if err := os.WriteFile(source, []byte(herdSource), 0o600); err != nil {
		t.Fatal(err)
	}
	s.h.Sh(`gcc -O2 -static -o "$1" "$2" 2>/dev/null || gcc -O2 -o "$1" "$2"`, program, source)
	s.again(m)
	s.faults(kmsserver.Faults{LatencyMS: int(latency.Milliseconds())})
	const herd = 3000
	r := s.h.Exec(nil, program, fmt.Sprint(herd), m.Path("hot"))
	if got := strings.TrimSpace(r.Stdout); r.Code != 0 || got != fmt.Sprint(herd) {
		t.Errorf("exit %d: %s of %d processes read the file; %s", r.Code, got, herd, r.Stderr)
	}
	s.wantCalls("3,000 opens at once", map[string]int{"Decrypt": 1})
	m.Unmount()
}

// TestThrottleScan scans files whose key service throttles, one after another
// with keys asked for ahead, and all at once. No application sees it, and the
// client settles near what the service allows.
func TestThrottleScan(t *testing.T) {
	const limit = 50.0
	n := 400
	if full() {
		n = 2000
	}
	for _, scan := range []struct {
		name string
		run  func(s *kmsStore, dir string)
	}{
		{"one reader", func(s *kmsStore, dir string) { readInOrder(s.t, dir, func(int) {}) }},
		{"a reader for each file", func(s *kmsStore, dir string) {
			var wg sync.WaitGroup
			for i := range n {
				wg.Go(func() {
					got, errno := readAll(filepath.Join(dir, fmt.Sprintf("record-%05d", i)))
					if errno != 0 || !bytes.Equal(got, smallFile(i)) {
						s.t.Errorf("file %d: %d bytes, %s", i, len(got), errnoName(errno))
					}
				})
			}
			wg.Wait()
		}},
	} {
		t.Run(scan.name, func(t *testing.T) {
			t.Parallel() // mostly waiting
			s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
			m := s.mount("d")
			fillRecords(t, m.Path("d"), n)
			s.again(m)
			s.faults(kmsserver.Faults{LatencyMS: 5, RateLimit: limit, Burst: 5})
			start := time.Now()
			scan.run(s, m.Path("d"))
			s.wantSettled(time.Since(start), limit)
			if ids := s.distinctIDs("Decrypt"); ids != n {
				t.Errorf("keys of %d files were unwrapped, want %d", ids, n)
			}
			s.faults(kmsserver.Faults{})
			m.Unmount()
		})
	}
}

// wantSettled looks at the log of a time in which the service allowed limit
// calls a second: in the second half the client was near that, and few of its
// requests were in vain.
func (s *kmsStore) wantSettled(took time.Duration, limit float64) {
	s.t.Helper()
	calls := s.kms.Calls()
	if len(calls) == 0 {
		s.t.Fatal("no calls")
	}
	first, last := calls[0].EventTime, calls[len(calls)-1].EventTime
	middle := first.Add(last.Sub(first) / 2)
	var good, throttled, later, laterThrottled int
	for _, c := range calls {
		second := c.EventTime.After(middle)
		switch {
		case c.ErrorCode == "":
			good++
			if second {
				later++
			}
		case c.Injected == "throttle":
			throttled++
			if second {
				laterThrottled++
			}
		default:
			s.t.Errorf("%s: %s", c.EventName, c.ErrorCode)
		}
	}
	rate := float64(later) / last.Sub(middle).Seconds()
	s.t.Logf("%v; %d calls, %d throttled; in the second half %.1f calls/s (limit %.0f), %d throttled",
		took, good, throttled, rate, limit, laterThrottled)
	if rate < 0.4*limit || rate > 1.2*limit {
		s.t.Errorf("%.1f calls/s in the second half, want 40 %% to 120 %% of %.0f", rate, limit)
	}
	if laterThrottled > later/4 {
		s.t.Errorf("%d requests of the second half were throttled, %d were not", laterThrottled, later)
	}
}

// TestThrottleOwnLimit: a mount that is given a share of the quota keeps to it,
// so that the service has nothing to throttle, however much is asked of it.
func TestThrottleOwnLimit(t *testing.T) {
	t.Parallel()
	s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
	m := s.mount("d")
	const n = 200
	fillRecords(t, m.Path("d"), n)
	m.Unmount()
	m.Again("--kms-rate", "40")
	s.kms.ResetCalls()
	s.faults(kmsserver.Faults{RateLimit: 50, Burst: 60})
	var wg sync.WaitGroup
	start := time.Now()
	for i := range n {
		wg.Go(func() {
			if _, errno := readAll(m.Path("d", fmt.Sprintf("record-%05d", i))); errno != 0 {
				t.Errorf("file %d: %s", i, errnoName(errno))
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	for _, c := range s.kms.Calls() {
		if c.ErrorCode != "" {
			t.Fatalf("%s: %s", c.EventName, c.ErrorCode)
		}
	}
	// At least n-burst calls at 40 a second, the burst at most a second's worth.
	if least := time.Duration((n-40)/40) * time.Second; took < least {
		t.Errorf("%d calls in %v, want %v at least", n, took, least)
	}
	m.Unmount()
}

// TestThrottleConcurrency: no more calls are under way at once than the mount
// was given.
func TestThrottleConcurrency(t *testing.T) {
	t.Parallel()
	s := newKMSStore(t, envelope.Prefix, []string{"general"}, map[string]kmsClass{"general": {}})
	m := s.mount("d")
	const n, atOnce, each = 60, 4, 50 * time.Millisecond
	fillRecords(t, m.Path("d"), n)
	m.Unmount()
	m.Again("--kms-concurrency", fmt.Sprint(atOnce))
	s.kms.ResetCalls()
	s.faults(kmsserver.Faults{LatencyMS: int(each.Milliseconds())})
	var wg sync.WaitGroup
	start := time.Now()
	for i := range n {
		wg.Go(func() {
			if _, errno := readAll(m.Path("d", fmt.Sprintf("record-%05d", i))); errno != unix.Errno(0) {
				t.Errorf("file %d: %s", i, errnoName(errno))
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	// kmsd stamps a call when it comes in: within one call's time there are never
	// more than atOnce stamps.
	calls := s.kms.Calls()
	for i := atOnce; i < len(calls); i++ {
		if gap := calls[i].EventTime.Sub(calls[i-atOnce].EventTime); gap >= 0 && gap < each/2 {
			t.Errorf("calls %d to %d within %v of calls that take %v", i-atOnce, i, gap, each)
			break
		}
	}
	if least := n / atOnce * each; took < least {
		t.Errorf("%d calls in %v, want %v at least", n, took, least)
	}
	m.Unmount()
}
