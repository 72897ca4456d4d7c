package integration

import (
	"bytes"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// clerk is a principal that the identity policy allows some of what phi's key
// can do.
func clerk(t *testing.T, statements ...map[string]any) kmsserver.Principal {
	t.Helper()
	doc, err := json.Marshal(map[string]any{"Version": "2012-10-17", "Statement": statements})
	if err != nil {
		t.Fatal(err)
	}
	return kmsserver.Principal{
		AccessKeyID: "AKIAKMSDCLERK0000000", SecretAccessKey: "no secret either",
		ARN: "arn:aws:iam::" + kmsserver.DefaultAccount + ":user/clerk", Policy: doc,
	}
}

func allow(resource string, context map[string][]string, actions ...string) map[string]any {
	out := map[string]any{"Effect": "Allow", "Action": actions, "Resource": resource}
	if context != nil {
		is := map[string]any{}
		for name, values := range context {
			is["kms:EncryptionContext:"+name] = values
		}
		out["Condition"] = map[string]any{"StringEquals": is}
	}
	return out
}

// as returns the same user of this machine with another principal's
// credentials.
func (s *kmsStore) as(p kmsserver.Principal) *rig.Home {
	s.t.Helper()
	if err := s.kms.AddPrincipal(p); err != nil {
		s.t.Fatal(err)
	}
	h := *s.h
	h.Env = append(slices.Clone(s.h.Env), s.kms.Env(p)...)
	return &h
}

// twoClasses is a store with a file in each of its classes, unmounted.
func twoClasses(t *testing.T, p envelope.Placement) *kmsStore {
	t.Helper()
	s := newKMSStore(t, p, []string{"general", "phi"}, map[string]kmsClass{"general": {}, "phi": {cache: "0s"}})
	m := s.mount("phi")
	m.Put("memo", bytes.Repeat([]byte("memo "), 3000))
	m.Put("phi/record", bytes.Repeat([]byte("record "), 3000))
	m.Unmount()
	return s
}

// TestKMSPrincipalOfOneClass: whoever may use one key only can mount, works in
// its class, and sees EACCES in the other.
func TestKMSPrincipalOfOneClass(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := twoClasses(t, p)
		h := s.as(clerk(t, allow(s.arn["general"], nil, "kms:*")))
		m := h.Mount(s.dir)
		if got, errno := readAll(m.Path("memo")); errno != 0 || len(got) != 15000 {
			t.Errorf("the file of the own class: %s", errnoName(errno))
		}
		m.Put("new", []byte("of the clerk"))
		if got := h.Sh(`ls "$1"`, m.Dir); strings.Join(strings.Fields(got), " ") != "memo new phi" {
			t.Errorf("ls: %q", got)
		}
		_, err := os.ReadDir(m.Path("phi"))
		if errno := errnoOf(err); errno != unix.EACCES {
			t.Errorf("ls of the other class: %s, want EACCES", errnoName(errno))
		}
		if _, errno := readAll(m.Path("phi/record")); errno != unix.EACCES {
			t.Errorf("a file of the other class: %s, want EACCES", errnoName(errno))
		}
		err = os.WriteFile(m.Path("phi/new"), []byte("x"), 0o600)
		if errno := errnoOf(err); errno != unix.EACCES {
			t.Errorf("a new file in the other class: %s, want EACCES", errnoName(errno))
		}
		m.Unmount()
		if res := h.Try("fsck", s.dir); res.Code != 5 {
			t.Errorf("fsck without one of the keys: exit %d, want 5: %s%s", res.Code, res.Stdout, res.Stderr)
		}
		s.fsck(0)
	})
}

// TestKMSPrincipalOfNames: a policy that allows the purposes names and store
// only, and GenerateDataKey, makes a mount on which phi can be listed and
// written, not read.
func TestKMSPrincipalOfNames(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := twoClasses(t, p)
		h := s.as(clerk(t,
			allow(s.arn["general"], nil, "kms:*"),
			allow(s.arn["phi"], map[string][]string{"kmsfs:purpose": {"names", "store"}}, "kms:Decrypt"),
			allow(s.arn["phi"], nil, "kms:GenerateDataKey")))
		m := h.Mount(s.dir)
		if got := strings.TrimSpace(h.Sh(`ls "$1"/phi`, m.Dir)); got != "record" {
			t.Errorf("ls: %q", got)
		}
		m.Put("phi/dropped", []byte("the clerk may write this, and not read it again"))
		for _, name := range []string{"phi/record", "phi/dropped"} {
			if got, errno := readAll(m.Path(name)); errno != unix.EACCES {
				t.Errorf("%s: %q, %s, want EACCES", name, got, errnoName(errno))
			}
		}
		if err := os.Rename(m.Path("phi/dropped"), m.Path("phi/renamed")); err != nil {
			t.Errorf("rename: %v", err)
		}
		if got, errno := readAll(m.Path("memo")); errno != 0 || len(got) != 15000 {
			t.Errorf("the file of the own class: %s", errnoName(errno))
		}
		m.Unmount()
		m = s.h.Mount(s.dir)
		if got, errno := readAll(m.Path("phi/renamed")); errno != 0 || !strings.HasPrefix(string(got), "the clerk") {
			t.Errorf("the doctor reads %q, %s", got, errnoName(errno))
		}
		m.Unmount()
	})
}

// TestKMSMoveReencrypts: mv between classes copies, and what arrives is another
// file under another key with the same contents.
func TestKMSMoveReencrypts(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := twoClasses(t, p)
		m := s.mount()
		before := s.info(m.Path("memo"))
		for what, err := range map[string]error{
			"rename": os.Rename(m.Path("memo"), m.Path("phi/memo")),
			"link":   os.Link(m.Path("memo"), m.Path("phi/memo")),
		} {
			if errno := errnoOf(err); errno != unix.EXDEV {
				t.Errorf("%s: %s, want EXDEV", what, errnoName(errno))
			}
		}
		s.kms.ResetCalls()
		s.h.Sh(`mv "$1"/memo "$1"/phi/memo`, m.Dir)
		if n := s.kms.Count("GenerateDataKey"); n != 1 {
			t.Errorf("%d data keys were made, want 1", n)
		}
		after := s.info(m.Path("phi/memo"))
		if before.Class != "general" || after.Class != "phi" || before.ID == after.ID ||
			len(after.Keys) != 1 || after.Keys[0] != s.arn["phi"] || before.Keys[0] != s.arn["general"] {
			t.Errorf("before %+v, after %+v", before, after)
		}
		got, errno := readAll(m.Path("phi/memo"))
		if errno != 0 || !bytes.Equal(got, bytes.Repeat([]byte("memo "), 3000)) {
			t.Errorf("%d bytes, %s", len(got), errnoName(errno))
		}
		if _, err := os.Stat(m.Path("memo")); !os.IsNotExist(err) {
			t.Errorf("the source is still there: %v", err)
		}
		m.Unmount()
		s.fsck(0)
	})
}

// TestKMSSecondRecipient: while the first key cannot be used, files open through
// the second, in another Region; new files wait for the first.
func TestKMSSecondRecipient(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		server := kmsserver.StartT(t, kmsserver.Options{})
		first, err := server.CreateKey(kmsserver.KeyOptions{})
		if err != nil {
			t.Fatal(err)
		}
		second, err := server.CreateKey(kmsserver.KeyOptions{Region: "us-west-2"})
		if err != nil {
			t.Fatal(err)
		}
		s := newKMSStoreAt(t, server, p, []string{"phi"}, map[string]kmsClass{"phi": {keys: []string{first, second}, cache: "0s"}})
		m := s.mount()
		m.Put("a", []byte("a"))
		s.wantCalls("a new file for two recipients", map[string]int{"GenerateDataKey": 1, "Encrypt": 1})
		if keys := s.info(m.Path("a")).Keys; !slices.Equal(keys, []string{first, second}) {
			t.Errorf("recipients %q", keys)
		}
		s.again(m)
		s.disable(first)
		if got, errno := readAll(m.Path("a")); errno != 0 || string(got) != "a" {
			t.Errorf("%q, %s", got, errnoName(errno))
		}
		var last kmsserver.Call
		for _, c := range s.kms.Calls() {
			if c.EventName == "Decrypt" {
				last = c
			}
		}
		if last.KeyID != second || last.AWSRegion != "us-west-2" || last.ErrorCode != "" {
			t.Errorf("the last Decrypt was %s in %s: %q", last.KeyID, last.AWSRegion, last.ErrorCode)
		}
		err = os.WriteFile(m.Path("b"), []byte("b"), 0o600)
		if errno := errnoOf(err); errno != unix.ENOKEY {
			t.Errorf("a new file: %s, want ENOKEY", errnoName(errno))
		}
		m.Unmount()
		m.Again() // the store and name keys open through the second as well
		if got, errno := readAll(m.Path("a")); errno != 0 || string(got) != "a" {
			t.Errorf("after a remount: %q, %s", got, errnoName(errno))
		}
		m.Unmount()
	})
}
