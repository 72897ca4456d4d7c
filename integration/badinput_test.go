package integration

import (
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// wantFailure wants the exit code, and on standard error one line that says what
// is wrong and one that says what to do.
func wantFailure(t *testing.T, r rig.Result, code int) {
	t.Helper()
	errors, hints := 0, 0
	for line := range strings.Lines(r.Stderr) {
		switch {
		case strings.HasPrefix(line, "kmsfs: error: "):
			errors++
		case strings.HasPrefix(line, "kmsfs: hint: "):
			hints++
		}
	}
	if r.Code != code || errors != 1 || hints != 1 {
		t.Errorf("exit %d, want %d; %d errors, %d hints, want one of each\n%s%s", r.Code, code, errors, hints, r.Stdout, r.Stderr)
	}
}
