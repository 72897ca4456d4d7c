package fault

import (
	"errors"
	"fmt"
	"io"
	"testing"
)

func TestOfSeesThroughWrapping(t *testing.T) {
	sentinel := New(KeyDenied, "x: denied")
	err := fmt.Errorf("open: %w", errors.Join(io.EOF, sentinel))
	if got := Of(err); got != KeyDenied {
		t.Errorf("Of = %v, want %v", got, KeyDenied)
	}
	if !errors.Is(err, sentinel) {
		t.Error("errors.Is does not find the sentinel")
	}
	if got := Of(io.EOF); got != None {
		t.Errorf("Of(io.EOF) = %v, want none", got)
	}
}

func TestKindNamesRoundTrip(t *testing.T) {
	seen := map[string]bool{}
	for _, k := range Kinds() {
		name := k.String()
		if name == "" || seen[name] {
			t.Errorf("kind %d has no name of its own: %q", k, name)
		}
		seen[name] = true
		if back, ok := ParseKind(name); !ok || back != k {
			t.Errorf("ParseKind(%q) = %v, %v", name, back, ok)
		}
	}
	if _, ok := ParseKind("no such kind"); ok {
		t.Error("ParseKind accepts an unknown name")
	}
	if got := Kind(200).String(); got != "unknown" {
		t.Errorf("Kind(200) = %q", got)
	}
}
