package keywraptest

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestToy: the suite passes a provider that keeps the contract.
func TestToy(t *testing.T) {
	s := newToy(os.Getenv("KEYWRAPTEST_BUG")).setup()
	switch os.Getenv("KEYWRAPTEST_BUG") {
	case "lists what is no case":
		s.NotCovered = map[string]string{"no such case": "reason"}
	case "lists what must be shown":
		s.NotCovered = map[string]string{"round trip": "reason"}
	}
	Run(t, s)
}

// bugs maps each bug that toy can have to the case that must see it; "" is Run
// itself.
var bugs = map[string]string{
	"forgets context store":           "every_context_pair_is_bound/store",
	"forgets context class":           "every_context_pair_is_bound/class",
	"forgets context purpose":         "every_context_pair_is_bound/purpose",
	"forgets context id":              "every_context_pair_is_bound/id",
	"forgets context order":           "every_context_pair_is_bound/values_moved",
	"tries every key":                 "wrong_key",
	"same data key":                   "two_data_keys_differ",
	"keeps the alias":                 "alias",
	"opens under an alias":            "alias",
	"disabled works":                  "disabled_key",
	"pending works":                   "key_pending_deletion",
	"cancelled deletion enables":      "cancelled_deletion",
	"rotation forgets":                "rotated_key",
	"one material id":                 "rotated_key:_material_id",
	"bare errors":                     "damaged_blob",
	"ignores cancellation":            "cancelled_context",
	"wraps anything":                  "encrypt",
	"takes the key":                   "encrypt",
	"panics on short blobs":           "damaged_blob",
	"damage looks like an outage":     "damaged_blob",
	"shared result":                   "results_are_the_caller's",
	"re-encrypt keeps the context":    "re-encrypt",
	"re-encrypt makes another key":    "re-encrypt",
	"describes everything as enabled": "disabled_key",
	"traces nothing":                  "trace",
	"traces twice":                    "trace",
	"traces no failures":              "trace_of_failures",
	"traces what never left":          "trace_of_failures",
	"failures look like successes":    "trace_of_failures",
	"one request id":                  "request_ids",
	"failures without request id":     "request_ids",
	"checks for real":                 "check",
	"check leaves a key":              "check",
	"check allows everything":         "check:_refusals",
	"check ignores the wrapped key":   "check:_refusals",
	"check forgets the destination":   "check:_refusals",
	"check ignores the state":         "check:_key_state",
	"check needs a wrapped key":       "check:_no_wrapped_key",
	"leaks":                           "",
	"lists what is no case":           "",
	"lists what must be shown":        "",
}

// TestSuiteSeesBugs runs the suite, in a process of its own because it has to
// fail, on a provider with one bug after another.
func TestSuiteSeesBugs(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for bug, name := range bugs {
		t.Run(bug, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(exe, "-test.run=^TestToy$", "-test.count=1")
			cmd.Env = append(os.Environ(), "KEYWRAPTEST_BUG="+bug)
			out, err := cmd.CombinedOutput()
			want := "--- FAIL: TestToy"
			if name != "" {
				want += "/" + name + " "
			}
			if err == nil || !strings.Contains(string(out), want) {
				t.Errorf("the suite does not see it (%v), want %q in\n%s", err, want, out)
			}
		})
	}
}
