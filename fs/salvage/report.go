package salvage

import (
	"slices"
	"strings"
	"sync"

	"github.com/kmsfs/kmsfs/crypto/fault"
)

// The states of a Problem.
const (
	Damaged = "damaged" // written, with something missing
	Lost    = "lost"    // not written
	Unnamed = "unnamed" // written under another name
	Bare    = "bare"    // written, without some of its attributes
)

// Range is a part of a plaintext, in bytes.
type Range struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// Problem is something that could not be brought back whole.
type Problem struct {
	Source    string     `json:"source"`        // ciphertext path
	Out       string     `json:"out,omitempty"` // path in the output, in plaintext
	State     string     `json:"state"`
	ID        string     `json:"id,omitempty"` // of the file
	Class     string     `json:"class,omitempty"`
	What      string     `json:"what"`                // for people
	Cause     string     `json:"cause,omitempty"`     // the fault's kind
	Zeroed    []Range    `json:"zeroed,omitempty"`    // zeros in place of what is damaged
	Truncated bool       `json:"truncated,omitempty"` // the end is missing, or nobody knows where it is
	Kind      fault.Kind `json:"-"`
}

// Report is the outcome.
type Report struct {
	Directories uint64    `json:"directories"`
	Files       uint64    `json:"files"`  // written, whole or not
	Others      uint64    `json:"others"` // symlinks and special files written
	Bytes       uint64    `json:"bytes"`  // plaintext bytes authenticated and written
	Notes       []string  `json:"notes"`  // about the store as a whole
	Problems    []Problem `json:"problems"`

	mu sync.Mutex
}

func (r *Report) count(f func(r *Report)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(r)
}

func (r *Report) note(text string) {
	r.count(func(r *Report) { r.Notes = append(r.Notes, text) })
}

// add lists a problem; err, if any, says why.
func (r *Report) add(p Problem, err error) {
	if err != nil {
		p.Kind = fault.Of(err)
		if p.What != "" {
			p.What += ": "
		}
		p.What += err.Error()
	}
	if p.Kind != fault.None {
		p.Cause = p.Kind.String()
	}
	r.count(func(r *Report) { r.Problems = append(r.Problems, p) })
}

func (r *Report) sort() {
	slices.SortStableFunc(r.Problems, func(a, b Problem) int { return strings.Compare(a.Source+"\x00"+a.State, b.Source+"\x00"+b.State) })
}

// keyKind reports whether a failure is one of a key and not of the store.
func keyKind(k fault.Kind) bool {
	switch k {
	case fault.KeyDenied, fault.KeyMissing, fault.KeyRevoked, fault.KeyExpired, fault.KeyRejected, fault.KeyUnavailable:
		return true
	}
	return false
}

// Damaged reports whether something is missing for another reason than keys
// that cannot be used, and attributes that the output does not take.
func (r *Report) Damaged() bool {
	return slices.ContainsFunc(r.Problems, func(p Problem) bool {
		return !keyKind(p.Kind) && (p.State != Bare || p.Kind != fault.None)
	})
}

// KeysMissing reports whether something is missing for want of a key.
func (r *Report) KeysMissing() bool {
	return slices.ContainsFunc(r.Problems, func(p Problem) bool { return keyKind(p.Kind) })
}
