package classify_test

import (
	"errors"
	"testing"

	"github.com/kmsfs/kmsfs/fs/classify"
)

// FuzzParse: nothing panics; what parses is canonical after one Marshal, and
// answers for every directory with a class that exists.
func FuzzParse(f *testing.F) {
	for _, v := range loadVectors(f) {
		f.Add(v.policy, "/patients/x")
	}
	f.Add([]byte(sample), "/cards")
	f.Fuzz(func(t *testing.T, text []byte, dir string) {
		p, err := classify.Parse(text)
		if err != nil {
			var bad *classify.ParseError
			if !errors.Is(err, classify.ErrPolicy) || !errors.As(err, &bad) || bad.Hint == "" || bad.Problem == "" {
				t.Errorf("Parse: %#v", err)
			}
			return
		}
		if err := p.Check(); err != nil {
			t.Errorf("Check: %v", err)
		}
		roundTrip(t, p)
		if _, ok := p.Classes[p.ClassOf(dir)]; !ok {
			t.Errorf("ClassOf(%q) = %q", dir, p.ClassOf(dir))
		}
		if q, err := p.WithRule(dir, p.Default); err == nil {
			roundTrip(t, q)
		} else if !errors.Is(err, classify.ErrPolicy) {
			t.Errorf("WithRule(%q): %v", dir, err)
		}
	})
}
