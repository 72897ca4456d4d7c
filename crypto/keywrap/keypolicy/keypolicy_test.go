package keypolicy_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/keywrap/keypolicy"
)

const (
	keyA = "arn:aws:kms:us-east-1:111122223333:key/a"
	keyB = "arn:aws:kms:us-west-2:111122223333:key/b"
	old  = "arn:aws:kms:us-east-1:111122223333:key/old"
	who  = "arn:aws:iam::111122223333:role/ingest"
)

var sample = keypolicy.Store{ID: "0123456789abcdef0123456789abcdef", Classes: []keypolicy.Class{
	{Name: "phi", Keys: []string{keyA, keyB}, Retired: []string{old}},
	{Name: "general", Keys: []string{keyB}},
}}

// actions returns what a role may do with a key: action, classes, purposes.
func actions(t *testing.T, key string, r keypolicy.Role) []string {
	t.Helper()
	d, err := keypolicy.For(sample, key, r, who)
	if err != nil {
		t.Fatal(err)
	}
	if d == nil {
		return nil
	}
	var out []string
	for _, s := range d.Statement {
		is := s.Condition["StringEquals"]
		line := strings.Join(s.Action, " ")
		if is != nil {
			line += " of " + strings.Join(is["kms:EncryptionContext:kmsfs:class"], ",") + " for " + strings.Join(is["kms:EncryptionContext:kmsfs:purpose"], ",")
			if store := is["kms:EncryptionContext:kmsfs:store"]; len(store) != 1 || store[0] != sample.ID {
				t.Errorf("%s: store %q", s.Sid, store)
			}
			if n := len(s.Condition["ForAllValues:StringEquals"]["kms:EncryptionContextKeys"]); n != 4 {
				t.Errorf("%s: %d context keys, want 4", s.Sid, n)
			}
		}
		out = append(out, line)
	}
	return out
}

func TestRoles(t *testing.T) {
	const look = "kms:DescribeKey kms:GetKeyRotationStatus kms:ListKeyRotations"
	for role, want := range map[keypolicy.Role]map[string][]string{
		keypolicy.Reader: {
			keyA: {"kms:Decrypt of phi for data,names,store"},
			keyB: {"kms:Decrypt of general,phi for data,names,store"},
			old:  {"kms:Decrypt of phi for data,names,store"},
		},
		keypolicy.Writer: {
			keyA: {"kms:GenerateDataKey of phi for data", "kms:Decrypt of phi for names,store"},
			keyB: {"kms:GenerateDataKey of general for data", "kms:Encrypt of phi for data", "kms:Decrypt of general,phi for names,store"},
			old:  {"kms:Decrypt of phi for names,store"},
		},
		keypolicy.User: {
			keyA: {"kms:GenerateDataKey of phi for data", "kms:Decrypt of phi for data,names,store"},
			keyB: {"kms:GenerateDataKey of general for data", "kms:Encrypt of phi for data", "kms:Decrypt of general,phi for data,names,store"},
			old:  {"kms:Decrypt of phi for data,names,store"},
		},
		keypolicy.Names: {
			keyA: {"kms:Decrypt of phi for names,store"},
			keyB: {"kms:Decrypt of general,phi for names,store"},
			old:  {"kms:Decrypt of phi for names,store"},
		},
		keypolicy.Rewrapper: {
			keyA: {"kms:ReEncryptFrom of phi for data,names,store", "kms:ReEncryptTo of phi for data,names,store", "kms:DescribeKey"},
			keyB: {"kms:ReEncryptFrom of general,phi for data,names,store", "kms:ReEncryptTo of general,phi for data,names,store", "kms:DescribeKey"},
			old:  {"kms:ReEncryptFrom of phi for data,names,store", "kms:DescribeKey"},
		},
		keypolicy.Auditor: {keyA: {look}, keyB: {look}, old: {look}},
	} {
		for key, lines := range want {
			if got := actions(t, key, role); !slices.Equal(got, lines) {
				t.Errorf("%s on %s:\n got %q\nwant %q", role, key, got, lines)
			}
		}
		if got := actions(t, keyA+"-of-nobody", role); got != nil {
			t.Errorf("%s on a key that is not the store's: %q", role, got)
		}
	}
	for key, want := range map[string]bool{keyA: false, keyB: false, old: false} {
		if got := sample.Further(key); got != want {
			t.Errorf("Further(%s) = %v", key, got)
		}
	}
	if s := (keypolicy.Store{Classes: sample.Classes[:1]}); !s.Further(keyB) || s.Further(keyA) || s.Further(old) {
		t.Error("of phi alone, not the second key is the further one")
	}
	if got := sample.Keys(); !slices.Equal(got, []string{keyA, keyB, old}) {
		t.Errorf("keys %q", got)
	}
}

// TestText holds the text itself: people paste it.
func TestText(t *testing.T) {
	d, err := keypolicy.For(sample, keyA, keypolicy.Writer, who)
	if err != nil {
		t.Fatal(err)
	}
	const want = `{
  "Version": "2012-10-17",
  "Statement": [
    {
      "Sid": "KmsfsWriterMakesFiles01234567",
      "Effect": "Allow",
      "Principal": {
        "AWS": "arn:aws:iam::111122223333:role/ingest"
      },
      "Action": "kms:GenerateDataKey",
      "Resource": "*",
      "Condition": {
        "ForAllValues:StringEquals": {
          "kms:EncryptionContextKeys": [
            "kmsfs:class",
            "kmsfs:id",
            "kmsfs:purpose",
            "kmsfs:store"
          ]
        },
        "Null": {
          "kms:EncryptionContext:kmsfs:id": "false"
        },
        "StringEquals": {
          "kms:EncryptionContext:kmsfs:class": "phi",
          "kms:EncryptionContext:kmsfs:purpose": "data",
          "kms:EncryptionContext:kmsfs:store": "0123456789abcdef0123456789abcdef"
        }
      }
    },
`
	got, err := d.JSON()
	if err != nil || !bytes.HasPrefix(got, []byte(want)) || !json.Valid(got) {
		t.Errorf("got %s, %v", got, err)
	}
	for range 20 {
		if again, err := d.JSON(); err != nil || !bytes.Equal(again, got) {
			t.Fatalf("another text for the same policy: %s, %v", again, err)
		}
	}
	for _, r := range keypolicy.Roles() {
		for _, key := range sample.Keys() {
			d, err := keypolicy.For(sample, key, r, who, "arn:aws:iam::444455556666:root")
			if err != nil {
				t.Fatal(err)
			}
			text, err := d.JSON()
			if err != nil || bytes.Contains(text, []byte("ViaService")) || !bytes.Contains(text, []byte("444455556666")) {
				t.Errorf("%s on %s: %s, %v", r, key, text, err)
			}
		}
	}
}

func TestRefused(t *testing.T) {
	for _, p := range []string{"*", "", "arn:aws:iam::111122223333:role/*", "arn:aws:iam::1:role/x", "arn:aws:kms:us-east-1:111122223333:key/a", "111122223333", who + "\n"} {
		if _, err := keypolicy.For(sample, keyA, keypolicy.Reader, p); !errors.Is(err, keypolicy.ErrPrincipal) {
			t.Errorf("principal %q: got %v, want ErrPrincipal", p, err)
		}
	}
	if _, err := keypolicy.For(sample, keyA, keypolicy.Reader); !errors.Is(err, keypolicy.ErrPrincipal) {
		t.Errorf("no principal: got %v", err)
	}
	for _, r := range []string{"", "root", "Reader"} {
		if _, err := keypolicy.ParseRole(r); !errors.Is(err, keypolicy.ErrRole) {
			t.Errorf("role %q: got %v, want ErrRole", r, err)
		}
		if _, err := keypolicy.For(sample, keyA, keypolicy.Role(r), who); !errors.Is(err, keypolicy.ErrRole) {
			t.Errorf("role %q: got %v, want ErrRole", r, err)
		}
	}
	for _, r := range keypolicy.Roles() {
		got, err := keypolicy.ParseRole(string(r))
		if err != nil || got != r {
			t.Errorf("%s: %q, %v", r, got, err)
		}
		if p := keypolicy.DefaultPrincipal(keyA, r); keypolicy.CheckPrincipal(p) != nil || !strings.HasSuffix(p, "role/kmsfs-"+string(r)) {
			t.Errorf("default principal of %s: %q", r, p)
		}
	}
	if p := keypolicy.DefaultPrincipal("keyring:a", keypolicy.Reader); p != "" {
		t.Errorf("default principal of a keyring key: %q", p)
	}
}
