package keywraptest

import (
	"maps"
	"slices"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// Setup is one provider and the means to change its keys from outside, as an
// administrator would. Every function takes the URI that NewKey returned.
type Setup struct {
	// Provider is under test. Run uses it for all cases; the caller closes it.
	Provider keywrap.Provider
	// NewKey makes a fresh, enabled key and returns its URI, never an alias.
	NewKey func(t testing.TB) string
	// NewAlias makes an alias for a key and returns the alias's URI.
	NewAlias func(t testing.TB, key string) string
	// Disable and Enable change the key's state.
	Disable, Enable func(t testing.TB, key string)
	// ScheduleDeletion makes the key pending deletion; CancelDeletion takes
	// that back and leaves the key disabled.
	ScheduleDeletion, CancelDeletion func(t testing.TB, key string)
	// Rotate gives the key new material.
	Rotate func(t testing.TB, key string)
	// Unknown is a well-formed URI that names no key.
	Unknown string
	// NotCovered names each case that the server behind the provider cannot
	// show, with the reason. The functions that only such cases use may be nil.
	NotCovered map[string]string
}

// The cases that a server may be unable to show, for Setup.NotCovered.
const (
	// CaseAlias: an alias works where a key does, and resolves to the key.
	CaseAlias = "alias"
	// CaseWrongKeyKind: a blob under another key is refused as Integrity or
	// KeyRejected. (That it is refused at all is always covered.)
	CaseWrongKeyKind = "wrong key: kind"
	// CaseDamagedKind: a damaged blob is refused as Integrity or KeyRejected.
	// (That it is refused at all is always covered.)
	CaseDamagedKind = "damaged blob: kind"
	// CaseDisabled: a disabled key does nothing and gives KeyMissing.
	CaseDisabled = "disabled key"
	// CasePending: a key pending deletion does nothing and gives KeyRevoked.
	CasePending = "key pending deletion"
	// CaseCancelled: after a cancelled deletion the key is disabled until
	// somebody enables it.
	CaseCancelled = "cancelled deletion"
	// CaseRotation: a rotated key opens what it wrapped before.
	CaseRotation = "rotated key"
	// CaseMaterial: a rotated key has another material id, and both open.
	CaseMaterial = "rotated key: material id"
	// CaseRequestIDs: every request has an id of its own, in the Trace and, for
	// a failure, in the CallError. (That the Trace has every request is always
	// covered.)
	CaseRequestIDs = "request ids"
	// CaseCheck: Check knows unknown keys and wrapped keys that do not open.
	// (That it allows what works, and leaves no key, is always covered.)
	CaseCheck = "check: refusals"
	// CaseCheckState: Check knows a disabled key and one pending deletion.
	CaseCheckState = "check: key state"
	// CaseCheckBare: a Decrypt or ReEncrypt can be checked without a wrapped key.
	CaseCheckBare = "check: no wrapped key"
)

type testCase struct {
	name     string
	optional bool // a name that NotCovered may list
	run      func(t *testing.T, s Setup)
}

func cases() []testCase {
	return []testCase{
		{"round trip", false, testRoundTrip},
		{"two data keys differ", false, testTwoDiffer},
		{"every context pair is bound", false, testContextBound},
		{"damaged blob", false, testDamaged},
		{CaseDamagedKind, true, testDamagedKind},
		{"wrong key", false, testWrongKey},
		{CaseWrongKeyKind, true, testWrongKeyKind},
		{"encrypt", false, testEncrypt},
		{"re-encrypt", false, testReEncrypt},
		{CaseDisabled, true, testDisabled},
		{CasePending, true, testPending},
		{CaseCancelled, true, testCancelled},
		{CaseRotation, true, testRotation},
		{CaseMaterial, true, testMaterial},
		{"unknown key", false, testUnknown},
		{"no such URI", false, testBadURI},
		{"describe", false, testDescribe},
		{CaseAlias, true, testAlias},
		{"cancelled context", false, testCancelledContext},
		{"results are the caller's", false, testOwnership},
		{"concurrent use", false, testConcurrent},
		{"trace", false, testTrace},
		{"trace of failures", false, testTraceFailures},
		{CaseRequestIDs, true, testRequestIDs},
		{"check", false, testCheck},
		{CaseCheck, true, testCheckRefusals},
		{CaseCheckState, true, testCheckState},
		{CaseCheckBare, true, testCheckBare},
	}
}

// Run checks p against the contract of keywrap.Provider, one subtest a case.
// Cases that Setup.NotCovered names are logged as not covered. A name there
// that is no case, or is a case that every provider can show, fails the test.
// Run also fails if a key is left in memory at the end, so nothing else in the
// process may make keys meanwhile.
func Run(t *testing.T, s Setup) {
	t.Helper()
	live := keymem.Live()
	left := maps.Clone(s.NotCovered)
	for _, c := range cases() {
		if reason, out := left[c.name]; out && c.optional {
			delete(left, c.name)
			t.Logf("not covered: %s: %s", c.name, reason)
			continue
		}
		t.Run(c.name, func(t *testing.T) { c.run(t, s) })
	}
	for _, name := range slices.Sorted(maps.Keys(left)) {
		t.Errorf("NotCovered lists %q, which is no case that may be left out", name)
	}
	if got := keymem.Live(); got != live {
		t.Errorf("%d keys live after the suite, want %d: a provider or the suite does not wipe", got, live)
	}
}
