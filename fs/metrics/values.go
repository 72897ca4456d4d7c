package metrics

import (
	"strings"
	"sync"
)

const (
	// maxValues bounds the values of one label. A store's keys are pinned, and a
	// service's codes are few, but what a server answers is not ours to trust.
	maxValues = 100
	maxValue  = 256 // bytes of one value; a key ARN has 75
)

// values are the values that one label has had. Safe for concurrent use.
type values struct {
	mu   sync.Mutex
	seen map[string]bool
}

func newValues() *values { return &values{seen: map[string]bool{}} }

// label returns v as it may stand in a label: valid UTF-8, not too long, and
// "other" once there are too many.
func (v *values) label(s string) string {
	if len(s) > maxValue {
		s = s[:maxValue]
	}
	s = strings.ToValidUTF8(s, "?")
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.seen[s] {
		return s
	}
	if len(v.seen) >= maxValues {
		return resultOther
	}
	v.seen[s] = true
	return s
}
