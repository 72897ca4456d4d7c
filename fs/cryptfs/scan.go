package cryptfs

import "time"

const (
	// aheadWindow is how many files a scan is followed ahead at most: what a
	// reader of small files opens in the time of one call of 50 ms, and more.
	aheadWindow = 128
	// aheadSlack is how far an open may be from the last one in the order and
	// still go on with the scan: entries that were no files, or a few readers
	// side by side.
	aheadSlack = 8
	// aheadBreaks is how often a pattern may break before the directory is left
	// alone for aheadRest.
	aheadBreaks = 3
	aheadRest   = 10 * time.Second
)

// scan follows the opens of one directory's files and says which ones come
// next. It knows nothing of keys or disks. Callers lock around it.
type scan struct {
	entries []string       // in the order that the reader keeps to
	pos     map[string]int // of each entry
	at      int            // the last open
	sent    int            // entries before it were handed out
	window  int            // entries to be ahead by; 0: no pattern now
	breaks  int
	rest    time.Time // left alone until then
}

// newScan returns the scan of a reader who opened entries[at] last.
func newScan(entries []string, at int) *scan {
	s := &scan{entries: entries, pos: make(map[string]int, len(entries)), at: at, sent: at + 1}
	for i, e := range entries {
		s.pos[e] = i
	}
	return s
}

// opened notes an open and returns the entries whose keys the reader will want
// next and that were not handed out yet, often none.
func (s *scan) opened(entry string, now time.Time) []string {
	pos, ok := s.pos[entry]
	if !ok || now.Before(s.rest) { // made since the scan began, or left alone
		return nil
	}
	step := pos - s.at
	switch {
	case step <= 0 && step >= -aheadSlack:
		return nil // another reader of the same scan, or the same file again
	case step > aheadSlack || step < 0:
		s.broken(pos, now)
		return nil
	}
	s.at, s.window = pos, min(max(2*s.window, 4), aheadWindow)
	s.sent = max(s.sent, pos+1)
	end := min(pos+1+s.window, len(s.entries))
	// In portions, so that the hand-over costs little.
	if end-s.sent < min(s.window/4, len(s.entries)-s.sent) || end <= s.sent {
		return nil
	}
	out := s.entries[s.sent:end]
	s.sent = end
	return out
}

func (s *scan) broken(pos int, now time.Time) {
	s.at, s.sent, s.window = pos, pos+1, 0
	if s.breaks++; s.breaks >= aheadBreaks {
		s.breaks, s.rest = 0, now.Add(aheadRest)
	}
}

// follows reports whether an open of b right after a is a step of a scan over
// entries, and where b is.
func follows(entries []string, a, b string) (at int, ok bool) {
	from, at := -1, -1
	for i, e := range entries {
		switch e {
		case a:
			from = i
		case b:
			at = i
		}
	}
	return at, from >= 0 && at > from && at-from <= aheadSlack
}
