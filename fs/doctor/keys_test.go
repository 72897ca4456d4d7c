package doctor

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// service is a key service of which only questions can be asked.
type service struct {
	keywrap.Provider // nil: a real call is a bug, and panics
	states           map[string]keywrap.Description
	fails            map[string]error // "Decrypt KEY PURPOSE", "Decrypt KEY", "KEY"

	mu    sync.Mutex
	asked []keywrap.Check
}

func (s *service) failure(keys ...string) error {
	for _, k := range keys {
		if err := s.fails[k]; err != nil {
			return &keywrap.CallError{Op: "x", Key: k, Err: err, Hint: "the hint"}
		}
	}
	return nil
}

func (s *service) Check(_ context.Context, c keywrap.Check) error {
	s.mu.Lock()
	s.asked = append(s.asked, c)
	s.mu.Unlock()
	key := c.KeyURI()
	return s.failure(c.Op+" "+key+" "+string(c.Context.Purpose), c.Op+" "+key, key)
}

func (s *service) Describe(_ context.Context, key string) (keywrap.Description, error) {
	if err := s.failure("Describe "+key, key); err != nil {
		return keywrap.Description{}, err
	}
	return s.states[key], nil
}

const (
	first  = "arn:aws:kms:us-east-1:111122223333:key/first"
	second = "arn:aws:kms:us-east-1:111122223333:key/second"
	old    = "keyring:old"
)

func testStore() *Store {
	return &Store{ID: envelope.NewID(), Classes: []Class{{Name: "phi", Keys: []string{first, second}, Retired: []string{old},
		NameID: "0123", NameKey: []keywrap.Wrapped{{Key: first, Blob: []byte("wrapped")}}}}}
}

func healthy() *service {
	d := keywrap.Description{State: keywrap.Enabled, Rotation: true, Rotated: time.Now().Add(-49 * time.Hour)}
	return &service{states: map[string]keywrap.Description{first: d, second: d, old: d}, fails: map[string]error{}}
}

// look runs all key checks and returns the findings by check and subject.
func look(t *testing.T, s *service, needs Needs) map[string]Finding {
	t.Helper()
	st := testStore()
	out := map[string]Finding{}
	for _, f := range Run(t.Context(), time.Minute, st.KeyChecks(s, st.Keys(), needs)...) {
		if (f.Level == Error || f.Level == Warning) && f.Remedy == "" {
			t.Errorf("%+v has no remedy", f)
		}
		out[f.Check+" "+f.Subject] = f
	}
	return out
}

func TestKeysThatWork(t *testing.T) {
	s := healthy()
	got := look(t, s, nil)
	for name, f := range got {
		if f.Level != OK {
			t.Errorf("%s: %+v", name, f)
		}
	}
	if f := got["key.rotation "+first]; !strings.Contains(f.Text, "2 days") {
		t.Errorf("rotation: %+v", f)
	}
	if len(got) != 3+2+5 {
		t.Errorf("%d findings: %v", len(got), got)
	}
	count := map[string]int{}
	for _, c := range s.asked {
		count[c.Op+" "+string(c.Context.Purpose)]++
		if c.Context.Class != "phi" || c.Op == keywrap.OpDecrypt && c.Context.Purpose == keywrap.PurposeNames && c.Context.ID != "0123" {
			t.Errorf("asked %+v", c)
		}
		if c.Op != keywrap.OpReEncrypt && c.Op != keywrap.OpDecrypt && c.KeyURI() == old {
			t.Errorf("%s of a retired key", c.Op)
		}
	}
	for what, want := range map[string]int{"GenerateDataKey data": 1, "Encrypt data": 1, "Decrypt data": 3, "Decrypt names": 3, "Decrypt store": 3, "ReEncrypt data": 4} {
		if count[what] != want {
			t.Errorf("%s was asked %d times, want %d", what, count[what], want)
		}
	}
}

func TestOnlyGivenKeysAreAsked(t *testing.T) {
	s, st := healthy(), testStore()
	Run(t.Context(), time.Minute, st.KeyChecks(s, []string{second}, nil)...)
	for _, c := range s.asked {
		if c.KeyURI() != second || c.ToKey != "" && c.ToKey != second {
			t.Errorf("asked %+v", c)
		}
	}
	if len(s.asked) == 0 || len(st.KeyChecks(s, nil, nil)) != 0 {
		t.Error("the given key was not asked, or others were")
	}
}

func TestKeyStates(t *testing.T) {
	s := healthy()
	at := time.Date(2026, 12, 24, 18, 0, 0, 0, time.UTC)
	s.states[first] = keywrap.Description{State: keywrap.PendingDeletion, DeletionAt: at}
	s.states[second] = keywrap.Description{State: keywrap.Disabled}
	s.states[old] = keywrap.Description{State: keywrap.Unavailable}
	got := look(t, s, nil)
	wantFinding(t, []Finding{got["key.state "+first]}, Error, "2026-12-24 18:00:00 UTC", "cancel-key-deletion")
	wantFinding(t, []Finding{got["key.state "+second]}, Error, "disabled", "aws kms enable-key")
	wantFinding(t, []Finding{got["key.state "+old]}, Error, "not usable")
	s = healthy()
	s.states[first] = keywrap.Description{State: keywrap.Enabled}
	s.states[old] = keywrap.Description{State: keywrap.PendingDeletion, DeletionAt: at}
	s.fails["Describe "+second] = keywrap.ErrNotFound
	got = look(t, s, nil)
	wantFinding(t, []Finding{got["key.rotation "+first]}, Info, "enable-key-rotation")
	wantFinding(t, []Finding{got["key.state "+second]}, Error, "not found", "the hint")
	wantFinding(t, []Finding{got["key.state "+old]}, Error, "kmsfs keyring cancel-deletion old")
}

// TestDenials: what a denial means depends on what the host is to do.
func TestDenials(t *testing.T) {
	reader, auditor := Needs{Mounts: true, Lists: true, Reads: true}, Needs{Looks: true}
	for _, tc := range []struct {
		name  string
		fails map[string]error
		needs Needs
		check string
		want  Level
	}{
		{"a read-only host by its policy", map[string]error{"GenerateDataKey " + first: keywrap.ErrDenied}, nil, "create", Warning},
		{"the same as a reader", map[string]error{"GenerateDataKey " + first: keywrap.ErrDenied}, reader, "create", Info},
		{"a further recipient denied", map[string]error{"Encrypt " + second: keywrap.ErrDenied}, nil, "create", Warning},
		{"a write-only host", map[string]error{"Decrypt " + first + " data": keywrap.ErrDenied, "Decrypt " + second + " data": keywrap.ErrDenied, "Decrypt " + old + " data": keywrap.ErrDenied}, nil, "read", Warning},
		{"no reader after all", map[string]error{"Decrypt " + first + " data": keywrap.ErrDenied, "Decrypt " + second + " data": keywrap.ErrDenied, "Decrypt " + old + " data": keywrap.ErrDenied}, reader, "read", Error},
		{"a recovery key that is somebody else's", map[string]error{"Decrypt " + second: keywrap.ErrDenied}, nil, "read", Info},
		{"a key that is lost", map[string]error{"Decrypt " + old: keywrap.ErrNotFound}, nil, "read", Warning},
		{"no listing", map[string]error{"Decrypt " + first: keywrap.ErrDenied, "Decrypt " + second: keywrap.ErrDenied, "Decrypt " + old: keywrap.ErrDenied}, nil, "list", Error},
		{"no mounting for an auditor", map[string]error{"Decrypt " + first: keywrap.ErrDenied, "Decrypt " + second: keywrap.ErrDenied, "Decrypt " + old: keywrap.ErrDenied}, auditor, "mount", Info},
		{"no rewrap", map[string]error{"ReEncrypt " + first: keywrap.ErrDenied}, nil, "rewrap", Info},
		{"a disabled key", map[string]error{"GenerateDataKey " + first: keywrap.ErrDisabled}, nil, "create", Error},
		{"a damaged record", map[string]error{"Decrypt " + first + " names": keywrap.ErrCiphertext, "Decrypt " + second + " names": keywrap.ErrDenied, "Decrypt " + old + " names": keywrap.ErrDenied}, nil, "list", Error},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := healthy()
			s.fails = tc.fails
			f := look(t, s, tc.needs)["class."+tc.check+" phi"]
			if f.Level != tc.want {
				t.Errorf("got %+v, want %s", f, tc.want)
			}
		})
	}
	for _, tc := range []struct {
		needs Needs
		want  Level
	}{{nil, Info}, {reader, Info}, {auditor, Error}} {
		s := healthy()
		s.fails["Describe "+first] = keywrap.ErrDenied
		if f := look(t, s, tc.needs)["key.state "+first]; f.Level != tc.want {
			t.Errorf("with needs %v: %+v, want %s", tc.needs, f, tc.want)
		}
	}
}
