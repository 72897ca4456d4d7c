package cryptfs

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func scanNames(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("e%05d", i)
	}
	return out
}

// TestScanRunsAhead: a reader in order finds every file but the first few
// handed out before it comes, each once, and never more than a window ahead.
func TestScanRunsAhead(t *testing.T) {
	for _, step := range []int{1, 2, aheadSlack} {
		names := scanNames(3000)
		s := newScan(names, 0)
		handed := map[string]int{}
		late := 0
		for i := step; i < len(names); i += step {
			if handed[names[i]] == 0 {
				late++
			}
			for _, e := range s.opened(names[i], time.Now()) {
				handed[e]++
				if at := slices.Index(names, e); at <= i || at > i+aheadWindow {
					t.Fatalf("step %d: at %d, %d was handed out", step, i, at)
				}
			}
		}
		for e, n := range handed {
			if n != 1 {
				t.Fatalf("step %d: %s was handed out %d times", step, e, n)
			}
		}
		if late > 3 {
			t.Errorf("step %d: the reader was there first %d times, want at most 3", step, late)
		}
	}
}

// TestScanSeveralReaders: readers side by side are one scan.
func TestScanSeveralReaders(t *testing.T) {
	names := scanNames(400)
	s := newScan(names, 0)
	handed := map[string]bool{}
	for i := 1; i+3 < len(names); i += 4 {
		for _, j := range []int{i + 2, i, i + 3, i + 1} {
			for _, e := range s.opened(names[j], time.Now()) {
				handed[e] = true
			}
		}
	}
	if len(handed) < 380 {
		t.Errorf("%d of 400 were handed out", len(handed))
	}
}

// TestScanGivesUp: random opens make few entries wait for nobody, and then none.
func TestScanGivesUp(t *testing.T) {
	names := scanNames(50_000)
	rng := rand.New(rand.NewPCG(1, 2))
	s, now, handed := newScan(names, 0), time.Now(), 0
	for range 5000 {
		handed += len(s.opened(names[rng.IntN(len(names))], now))
	}
	if handed > 20 {
		t.Errorf("random opens: %d entries were handed out", handed)
	}
	now = now.Add(2 * aheadRest)
	s.opened(names[100], now)
	if got := s.opened(names[101], now); len(got) == 0 {
		t.Error("after a rest, a reader in order gets nothing")
	}
	if got := s.opened("new", now); got != nil {
		t.Errorf("an unknown entry: got %v", got)
	}
}

func TestFollows(t *testing.T) {
	names := scanNames(100)
	for _, c := range []struct {
		a, b string
		at   int
		ok   bool
	}{
		{names[0], names[1], 1, true},
		{names[5], names[5+aheadSlack], 5 + aheadSlack, true},
		{names[5], names[6+aheadSlack], 6 + aheadSlack, false},
		{names[6], names[5], 5, false},
		{names[6], names[6], 6, false},
		{"gone", names[6], 6, false},
		{names[6], "gone", -1, false},
	} {
		if at, ok := follows(names, c.a, c.b); at != c.at && ok || ok != c.ok {
			t.Errorf("follows(%s, %s): got %d, %v, want %d, %v", c.a, c.b, at, ok, c.at, c.ok)
		}
	}
}
