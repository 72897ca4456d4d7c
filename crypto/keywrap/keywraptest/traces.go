package keywraptest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// traced is one call of every operation on key; each returns its own error.
// Results are wiped.
func traced(s Setup, key string, w keywrap.Wrapped, ec keywrap.Context) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		keywrap.OpGenerate: func(ctx context.Context) error {
			dk, err := s.Provider.GenerateDataKey(ctx, key, ec)
			dk.Plain.Wipe()
			return err
		},
		keywrap.OpEncrypt: func(ctx context.Context) error {
			plain := keymem.Random(keywrap.DataKeyLen)
			defer plain.Wipe()
			_, err := s.Provider.Encrypt(ctx, key, ec, plain)
			return err
		},
		keywrap.OpDecrypt: func(ctx context.Context) error {
			plain, err := s.Provider.Decrypt(ctx, w, ec)
			plain.Wipe()
			return err
		},
		keywrap.OpReEncrypt: func(ctx context.Context) error {
			_, err := s.Provider.ReEncrypt(ctx, w, ec, key, ec)
			return err
		},
		keywrap.OpDescribe: func(ctx context.Context) error {
			_, err := s.Provider.Describe(ctx, key)
			return err
		},
	}
}

// attempts runs call with a Trace and returns what is in it.
func attempts(t testing.TB, op string, call func(context.Context) error) ([]keywrap.Attempt, error) {
	t.Helper()
	var trace keywrap.Trace
	start := time.Now()
	err := call(keywrap.WithTrace(context.Background(), &trace))
	took := time.Since(start)
	list := trace.Attempts()
	for _, a := range list {
		if a.Op == "" || a.Key == "" || a.At.Before(start) || a.Took < 0 || a.At.Sub(start)+a.Took > took {
			t.Errorf("%s: attempt %+v of a call that began at %v and took %v", op, a, start, took)
		}
		if a.DryRun {
			t.Errorf("%s: a real call's attempt is said to be a dry run", op)
		}
	}
	return list, err
}

func testTrace(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	dk := generate(t, s.Provider, key, ec)
	for op, call := range traced(s, key, dk.Wrapped, ec) {
		list, err := attempts(t, op, call)
		if err != nil {
			t.Fatalf("%s: %v", op, err)
		}
		// Describe may need several operations of the service, under its names.
		if len(list) == 0 || op != keywrap.OpDescribe && (len(list) != 1 || list[0].Op != op) {
			t.Errorf("%s: attempts %+v", op, list)
		}
		for _, a := range list {
			if a.Key != key {
				t.Errorf("%s: attempt is about %q, want %q", op, a.Key, key)
			}
		}
		if len(list) > 0 && list[0].Code != "" {
			t.Errorf("%s: a success has code %q", op, list[0].Code)
		}
	}
}

func testTraceFailures(t *testing.T, s Setup) {
	ec := sampleContext()
	dk := generate(t, s.Provider, s.NewKey(t), ec)
	unknown := dk.Wrapped
	unknown.Key = s.Unknown
	for op, call := range traced(s, s.Unknown, unknown, ec) {
		list, err := attempts(t, op, call)
		if err == nil || len(list) != 1 || list[0].Code == "" || list[0].Key != s.Unknown {
			t.Errorf("%s with an unknown key: %v, attempts %+v", op, err, list)
		}
	}
	// What never reaches the service leaves no attempt.
	for op, call := range traced(s, "https://example.org", keywrap.Wrapped{Key: "https://example.org", Blob: []byte{1}}, ec) {
		if list, err := attempts(t, op, call); err == nil || len(list) != 0 {
			t.Errorf("%s with a bad URI: %v, attempts %+v", op, err, list)
		}
	}
	for op, call := range traced(s, dk.Wrapped.Key, dk.Wrapped, ec) {
		list, err := attempts(t, op, func(ctx context.Context) error {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			return call(ctx)
		})
		if err == nil || len(list) != 0 {
			t.Errorf("%s under a cancelled context: %v, attempts %+v", op, err, list)
		}
	}
}

func testRequestIDs(t *testing.T, s Setup) {
	key, ec := s.NewKey(t), sampleContext()
	dk := generate(t, s.Provider, key, ec)
	unknown := dk.Wrapped
	unknown.Key = s.Unknown
	other := ec
	other.Class = "general"
	seen := map[string]string{}
	check := func(what string, list []keywrap.Attempt, err error) {
		t.Helper()
		for _, a := range list {
			if before, twice := seen[a.RequestID]; twice || a.RequestID == "" {
				t.Errorf("%s: request id %q, that of %q", what, a.RequestID, before)
			}
			seen[a.RequestID] = what
		}
		var ce *keywrap.CallError
		if errors.As(err, &ce) && (len(list) == 0 || ce.RequestID != list[len(list)-1].RequestID) {
			t.Errorf("%s: CallError has request id %q, attempts %+v", what, ce.RequestID, list)
		}
	}
	for op, call := range traced(s, key, dk.Wrapped, ec) {
		list, err := attempts(t, op, call)
		check(op, list, err)
	}
	for op, call := range traced(s, s.Unknown, unknown, ec) {
		list, err := attempts(t, op, call)
		check(op+" with an unknown key", list, err)
	}
	for _, op := range []string{keywrap.OpDecrypt, keywrap.OpReEncrypt} {
		list, err := attempts(t, op, traced(s, key, dk.Wrapped, other)[op])
		if err == nil {
			t.Errorf("%s under another context works", op)
		}
		check(op+" under another context", list, err)
	}
}
