package keywraptest

import (
	"context"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// checksOf is every check that can be made of key and a key wrapped under it.
func checksOf(key string, w keywrap.Wrapped, ec keywrap.Context) []keywrap.Check {
	return []keywrap.Check{
		{Op: keywrap.OpDescribe, Key: key},
		{Op: keywrap.OpGenerate, Key: key, Context: ec},
		{Op: keywrap.OpEncrypt, Key: key, Context: ec},
		{Op: keywrap.OpDecrypt, Wrapped: w, Context: ec},
		{Op: keywrap.OpReEncrypt, Wrapped: w, Context: ec, ToKey: key, ToContext: ec},
	}
}

// check asks with a Trace, and wants the question in it and no key left.
func check(t testing.TB, s Setup, c keywrap.Check) error {
	t.Helper()
	checker, ok := s.Provider.(keywrap.Checker)
	if !ok {
		t.Fatalf("%T is no keywrap.Checker", s.Provider)
	}
	live := keymem.Live()
	var trace keywrap.Trace
	err := checker.Check(keywrap.WithTrace(context.Background(), &trace), c)
	if got := keymem.Live(); got != live {
		t.Errorf("Check of %s leaves %d keys", c.Op, got-live)
	}
	if len(trace.Attempts()) == 0 {
		t.Errorf("Check of %s leaves no trace", c.Op)
	}
	for _, a := range trace.Attempts() {
		if c.Op != keywrap.OpDescribe && !a.DryRun {
			t.Errorf("Check of %s made a real %s", c.Op, a.Op)
		}
	}
	return err
}

// mustNot wants c to be refused as the call would be.
func mustNot(t testing.TB, s Setup, c keywrap.Check, key string, kinds ...fault.Kind) {
	t.Helper()
	err := check(t, s, c)
	if err == nil {
		t.Errorf("Check allows %s of %s", c.Op, key)
		return
	}
	checkCallError(t, err, c.Op, key)
	wantKind(t, err, kinds...)
}

func testCheck(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	dk := generate(t, s.Provider, key, ec)
	for _, c := range checksOf(key, dk.Wrapped, ec) {
		if err := check(t, s, c); err != nil {
			t.Errorf("Check of %s: %v", c.Op, err)
		}
	}
	mustOpen(t, s.Provider, dk.Wrapped, ec, dk.Plain)
	for _, c := range checksOf("https://example.org", keywrap.Wrapped{Key: "https://example.org", Blob: []byte{1}}, ec) {
		err := s.Provider.(keywrap.Checker).Check(context.Background(), c)
		if err == nil {
			t.Fatalf("Check of %s takes a URI that is none", c.Op)
		}
		checkCallError(t, err, c.Op, "https://example.org")
		wantKind(t, err, fault.Invalid)
	}
	err := s.Provider.(keywrap.Checker).Check(context.Background(), keywrap.Check{Op: "Sign", Key: key})
	if err == nil {
		t.Fatal("Check takes an operation that is none")
	}
	checkCallError(t, err, "Sign", key)
	wantKind(t, err, fault.Unsupported)
}

func testCheckRefusals(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	dk := generate(t, s.Provider, key, ec)
	unknown := dk.Wrapped
	unknown.Key = s.Unknown
	for _, c := range checksOf(s.Unknown, unknown, ec) {
		mustNot(t, s, c, s.Unknown, fault.KeyMissing)
	}
	mustNot(t, s, keywrap.Check{Op: keywrap.OpReEncrypt, Wrapped: dk.Wrapped, Context: ec, ToKey: s.Unknown, ToContext: ec}, s.Unknown, fault.KeyMissing)

	other := ec
	other.ID = "00"
	damaged := dk.Wrapped
	damaged.Blob = append([]byte(nil), damaged.Blob...)
	damaged.Blob[len(damaged.Blob)-1] ^= 1
	for _, op := range []string{keywrap.OpDecrypt, keywrap.OpReEncrypt} {
		mustNot(t, s, keywrap.Check{Op: op, Wrapped: dk.Wrapped, Context: other, ToKey: key, ToContext: ec}, key, fault.Integrity)
		mustNot(t, s, keywrap.Check{Op: op, Wrapped: damaged, Context: ec, ToKey: key, ToContext: ec}, key, fault.Integrity)
	}
}

func testCheckState(t *testing.T, s Setup) {
	ec := sampleContext()
	for _, tt := range []struct {
		change func(testing.TB, string)
		kind   fault.Kind
	}{{s.Disable, fault.KeyMissing}, {s.ScheduleDeletion, fault.KeyRevoked}} {
		key := s.NewKey(t)
		dk := generate(t, s.Provider, key, ec)
		tt.change(t, key)
		for _, c := range checksOf(key, dk.Wrapped, ec) {
			if c.Op == keywrap.OpDescribe {
				if err := check(t, s, c); err != nil {
					t.Errorf("Check of Describe: %v", err)
				}
				continue
			}
			mustNot(t, s, c, key, tt.kind)
		}
	}
}

func testCheckBare(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	for _, op := range []string{keywrap.OpDecrypt, keywrap.OpReEncrypt} {
		c := keywrap.Check{Op: op, Key: key, Context: ec, ToKey: key, ToContext: ec}
		if err := check(t, s, c); err != nil {
			t.Errorf("Check of %s without a wrapped key: %v", op, err)
		}
		c.Key = s.Unknown
		mustNot(t, s, c, s.Unknown, fault.KeyMissing)
	}
}
