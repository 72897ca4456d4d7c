package keywrap_test

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"sync"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

func TestTrace(t *testing.T) {
	var none *keywrap.Trace
	none.Add(keywrap.Attempt{})
	if got := none.Attempts(); got != nil {
		t.Errorf("nil Trace has attempts %v", got)
	}
	if got := keywrap.TraceOf(context.Background()); got != nil {
		t.Errorf("TraceOf of a bare context = %v", got)
	}
	var outer, inner keywrap.Trace
	ctx := keywrap.WithTrace(context.Background(), &outer)
	keywrap.TraceOf(ctx).Add(keywrap.Attempt{Op: "a"})
	sub := keywrap.WithTrace(ctx, &inner)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() { keywrap.TraceOf(sub).Add(keywrap.Attempt{Op: "b"}) })
	}
	wg.Wait()
	got := outer.Attempts()
	if len(got) != 1 || got[0].Op != "a" || len(inner.Attempts()) != 50 {
		t.Errorf("outer has %v, inner %d attempts, want a and 50", got, len(inner.Attempts()))
	}
	got[0].Op = "changed"
	if outer.Attempts()[0].Op != "a" {
		t.Error("Attempts gives out the Trace's own memory")
	}
}

func TestNewRequestID(t *testing.T) {
	form := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	seen := map[string]bool{}
	for range 100 {
		id := keywrap.NewRequestID()
		if !form.MatchString(id) || seen[id] {
			t.Fatalf("request id %q", id)
		}
		seen[id] = true
	}
}

func TestCodeOf(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{nil, ""}, {keywrap.ErrDisabled, "key-missing"}, {context.Canceled, "canceled"}, {errors.New("x"), "unknown"},
		{&keywrap.CallError{Err: fmt.Errorf("%w: %w", keywrap.ErrUnavailable, context.Canceled)}, "key-unavailable"},
	} {
		if got := keywrap.CodeOf(tt.err); got != tt.want {
			t.Errorf("CodeOf(%v) = %q, want %q", tt.err, got, tt.want)
		}
	}
}

func TestScheme(t *testing.T) {
	for key, want := range map[string]string{
		"arn:aws:kms:us-east-1:111122223333:key/x": "aws", "alias/x": "aws", "keyring:x": "keyring",
		"pkcs11:token=a;object=b": "pkcs11", "pkcs11:": "", "keyring:": "", "": "", "x": "",
	} {
		if got := keywrap.Scheme(key); got != want {
			t.Errorf("Scheme(%q) = %q, want %q", key, got, want)
		}
	}
}

// noter is a key service that only notes what it is asked; its Check fails for
// the operation refused.
type noter struct {
	keywrap.Provider
	name    string
	refused string
	log     *[]string
}

func (n noter) Check(_ context.Context, c keywrap.Check) error {
	*n.log = append(*n.log, n.name+" "+c.Op+" "+c.KeyURI()+" "+c.Context.Class+" "+c.ToKey)
	if c.Op == n.refused {
		return &keywrap.CallError{Op: c.Op, Key: c.KeyURI(), Err: keywrap.ErrDenied}
	}
	return nil
}

// bare hides a Checker.
type bare struct{ keywrap.Provider }

func TestMuxCheck(t *testing.T) {
	const arn = "arn:aws:kms:us-east-1:111122223333:key/x"
	var log []string
	m := keywrap.Mux{AWS: noter{name: "aws", log: &log}, Keyring: noter{name: "keyring", refused: keywrap.OpEncrypt, log: &log}, PKCS11: bare{}}
	from, to := keywrap.Context{Class: "from"}, keywrap.Context{Class: "to"}
	for _, tt := range []struct {
		name  string
		check keywrap.Check
		want  error
		calls []string
	}{
		{"one service", keywrap.Check{Op: keywrap.OpGenerate, Key: "alias/x", Context: from}, nil, []string{"aws GenerateDataKey alias/x from "}},
		{"refused", keywrap.Check{Op: keywrap.OpEncrypt, Key: "keyring:a", Context: from}, keywrap.ErrDenied, []string{"keyring Encrypt keyring:a from "}},
		{"wrapped names the key", keywrap.Check{Op: keywrap.OpDecrypt, Key: "keyring:a", Wrapped: keywrap.Wrapped{Key: arn}, Context: from}, nil,
			[]string{"aws Decrypt " + arn + " from "}},
		{"within one service", keywrap.Check{Op: keywrap.OpReEncrypt, Key: "keyring:a", ToKey: "keyring:b", Context: from}, nil,
			[]string{"keyring ReEncrypt keyring:a from keyring:b"}},
		{"between two services", keywrap.Check{Op: keywrap.OpReEncrypt, Wrapped: keywrap.Wrapped{Key: arn}, Context: from, ToKey: "keyring:a", ToContext: to},
			keywrap.ErrDenied, []string{"aws Decrypt " + arn + " from ", "keyring Encrypt keyring:a to "}},
		{"no such scheme", keywrap.Check{Op: keywrap.OpDescribe, Key: "vault:x"}, keywrap.ErrBadURI, nil},
		{"destination of no scheme", keywrap.Check{Op: keywrap.OpReEncrypt, Key: arn, ToKey: "vault:x"}, keywrap.ErrBadURI, nil},
		{"no Checker", keywrap.Check{Op: keywrap.OpEncrypt, Key: "pkcs11:token=a"}, keywrap.ErrUnsupported, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			log = nil
			err := m.Check(context.Background(), tt.check)
			if !errors.Is(err, tt.want) {
				t.Errorf("Check = %v, want %v", err, tt.want)
			}
			var ce *keywrap.CallError
			if err != nil && !errors.As(err, &ce) {
				t.Errorf("Check fails with %T, want *keywrap.CallError", err)
			}
			if !slices.Equal(log, tt.calls) {
				t.Errorf("calls = %q, want %q", log, tt.calls)
			}
		})
	}
	_, err := keywrap.Mux{}.GenerateDataKey(context.Background(), "pkcs11:token=a", from)
	if fault.Of(err) != fault.Invalid {
		t.Errorf("without a PKCS#11 provider: %v", err)
	}
}
