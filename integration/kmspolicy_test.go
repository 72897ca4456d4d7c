package integration

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	awscreds "github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	awserr "github.com/aws/smithy-go"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// policyPage is docs/kms.md: the policy of each role, as it stands there.
type policyPage map[string]json.RawMessage

var policyBlock = regexp.MustCompile("(?s)\n### Role: ([a-z ]+)\n.*?\n```json\n(.*?)\n```\n")

func readPolicyPage(t *testing.T) policyPage {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(repoRoot(t), "docs", "kms.md"))
	if err != nil {
		t.Fatal(err)
	}
	page := policyPage{}
	for _, m := range policyBlock.FindAllStringSubmatch(string(text), -1) {
		page[m[1]] = json.RawMessage(m[2])
	}
	if n := strings.Count(string(text), "```json"); n != len(page) || n != 7 {
		t.Fatalf("%d policies of %d JSON blocks, want 7", len(page), n)
	}
	return page
}

// merge returns the policy of a key of a class: the statements of the roles.
func (p policyPage) merge(t *testing.T, class string, roles ...string) json.RawMessage {
	t.Helper()
	out := struct {
		Version   string
		Statement []json.RawMessage
	}{Version: "2012-10-17"}
	for _, role := range roles {
		var one struct{ Statement []json.RawMessage }
		text := strings.ReplaceAll(string(p[role]), `"phi"`, `"`+class+`"`)
		if err := json.Unmarshal([]byte(text), &one); err != nil || len(one.Statement) == 0 {
			t.Fatalf("policy of %s: %d statements, %v", role, len(one.Statement), err)
		}
		out.Statement = append(out.Statement, one.Statement...)
	}
	b, err := json.Marshal(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// policyBench is a store whose keys have the page's policies, and a user for
// each role.
type policyBench struct {
	t      *testing.T
	server *kmsserver.Server
	phi    string // ARN
	store  string
}

func newPolicyBench(t *testing.T) *policyBench {
	t.Helper()
	rig.Need(t, "root", "fuse")
	page := readPolicyPage(t)
	b := &policyBench{t: t, server: kmsserver.StartT(t, kmsserver.Options{}), store: filepath.Join(t.TempDir(), "store")}
	for _, role := range []string{"reader", "user", "writer", "store-administrator", "key-administrator", "auditor"} {
		if err := b.server.AddPrincipal(b.principal(role)); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	b.phi, err = b.server.CreateKey(kmsserver.KeyOptions{Alias: "alias/phi",
		Policy: page.merge(t, "phi", "reader", "user", "writer only", "store administrator", "key administrator", "auditor")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = b.server.CreateKey(kmsserver.KeyOptions{Alias: "alias/general",
		Policy: page.merge(t, "general", "passing through", "store administrator")}); err != nil {
		t.Fatal(err)
	}
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	put(t, policy, []byte(`
version: 1
default: general
classes:
  general: { keys: ["alias/general"], cache: 0s }
  phi: { keys: ["alias/phi"], cache: 0s }
directories: { /patients: phi }
`))
	b.home("store-administrator").Run("init", "--policy", policy, b.store)
	return b
}

// principal is a session of a role, as STS gives them.
func (b *policyBench) principal(role string) kmsserver.Principal {
	return kmsserver.Principal{
		AccessKeyID: "ASIA" + strings.ToUpper(strings.ReplaceAll(role, "-", "")), SecretAccessKey: "secret of " + role, SessionToken: "session",
		ARN: "arn:aws:sts::111122223333:assumed-role/kmsfs-" + role + "/test",
	}
}

func (b *policyBench) home(role string) *rig.Home {
	b.t.Helper()
	return rig.NewHome(b.t, b.server.Env(b.principal(role))...)
}

func (b *policyBench) mount(role string) *rig.Mount {
	b.t.Helper()
	return b.home(role).Mount(b.store, "--trust")
}

// client is the SDK as a role uses it.
func (b *policyBench) client(role string) *kms.Client {
	p := b.principal(role)
	return kms.New(kms.Options{
		Region: b.server.Region(), BaseEndpoint: aws.String(b.server.URL()),
		Credentials: awscreds.NewStaticCredentialsProvider(p.AccessKeyID, p.SecretAccessKey, p.SessionToken),
	})
}

// as mounts the store for a role, lets f work, and unmounts.
func (b *policyBench) as(role string, f func(t *testing.T, m *rig.Mount)) {
	b.t.Helper()
	m := b.mount(role)
	f(b.t, m)
	m.Unmount()
}

func canRead(path string) error {
	_, err := os.ReadFile(path)
	return err
}

// appendTo writes at the end of a file that is there.
func appendTo(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

func TestPoliciesOfThePage(t *testing.T) {
	b := newPolicyBench(t)
	b.as("store-administrator", func(t *testing.T, m *rig.Mount) {
		wantErrno(t, "store administrator: mkdir", os.Mkdir(m.Path("patients"), 0o755), 0)
		wantErrno(t, "store administrator: mkdir below", os.Mkdir(m.Path("patients", "dir"), 0o755), 0)
		wantErrno(t, "store administrator: create", os.WriteFile(m.Path("patients", "file"), nil, 0o644), unix.EACCES)
	})
	b.as("user", func(t *testing.T, m *rig.Mount) {
		wantErrno(t, "user: create", os.WriteFile(m.Path("patients", "file"), []byte("by the user"), 0o644), 0)
		eventually(t, "user: in the other class", func() error { return os.WriteFile(m.Path("file"), nil, 0o644) }, unix.EACCES)
		wantErrno(t, "user: read", canRead(m.Path("patients", "file")), 0)
	})
	b.as("reader", func(t *testing.T, m *rig.Mount) {
		file := m.Path("patients", "file")
		wantErrno(t, "reader: read", canRead(file), 0)
		wantErrno(t, "reader: create", os.WriteFile(m.Path("patients", "new"), nil, 0o644), unix.EACCES)
		eventually(t, "reader: O_TRUNC", func() error { return os.WriteFile(file, nil, 0o644) }, unix.EACCES)
		wantErrno(t, "reader: append, as the page warns", appendTo(file, " and the reader"), 0)
	})
	b.as("writer", func(t *testing.T, m *rig.Mount) {
		file, mine := m.Path("patients", "file"), m.Path("patients", "mine")
		list, err := os.ReadDir(m.Path("patients"))
		if err != nil || len(list) != 2 {
			t.Errorf("writer: %v, %v", list, err)
		}
		wantErrno(t, "writer: read", canRead(file), unix.EACCES)
		wantErrno(t, "writer: append", appendTo(file, "x"), unix.EACCES)
		wantErrno(t, "writer: truncate a part", os.Truncate(file, 3), unix.EACCES)
		wantErrno(t, "writer: create", os.WriteFile(mine, []byte("by the writer"), 0o644), 0)
		eventually(t, "writer: read what was written", func() error { return canRead(mine) }, unix.EACCES)
		wantErrno(t, "writer: O_TRUNC", os.WriteFile(mine, []byte("again"), 0o644), 0)
		wantErrno(t, "writer: rename and remove", errors.Join(os.Rename(mine, mine+"2"), os.Remove(mine+"2"), os.WriteFile(mine, []byte("kept"), 0o644)), 0)
	})
	b.as("reader", func(t *testing.T, m *rig.Mount) {
		for name, want := range map[string]string{"file": "by the user and the reader", "mine": "kept"} {
			if got, err := os.ReadFile(m.Path("patients", name)); err != nil || string(got) != want {
				t.Errorf("%s: %q, %v, want %q", name, got, err, want)
			}
		}
	})
	for _, role := range []string{"key-administrator", "auditor"} {
		if r := b.home(role).Try("cat", "--trust", b.store, "patients/file"); r.Code != 5 {
			t.Errorf("%s: kmsfs cat: exit %d, %s", role, r.Code, r.Stderr)
		}
	}
}

// wantDenied requires AccessDeniedException, or success.
func wantDenied(t *testing.T, what string, err error, denied bool) {
	t.Helper()
	var api awserr.APIError
	isDenied := errors.As(err, &api) && api.ErrorCode() == "AccessDeniedException"
	if isDenied != denied || !denied && err != nil {
		t.Errorf("%s: got %v, want it denied: %v", what, err, denied)
	}
}

// keyAsk is something that a role asks of a key.
type keyAsk func(c *kms.Client, key *string) error

func askDataKey(ec map[string]string) keyAsk {
	return func(c *kms.Client, key *string) error {
		_, err := c.GenerateDataKey(context.Background(), &kms.GenerateDataKeyInput{KeyId: key, KeySpec: "AES_256", EncryptionContext: ec})
		return err
	}
}

func askContext(purpose string) map[string]string {
	return map[string]string{"kmsfs:store": "00", "kmsfs:class": "phi", "kmsfs:purpose": purpose, "kmsfs:id": "00"}
}

// keyAsks are what the program does not ask, or not in this way.
var keyAsks = map[string]keyAsk{
	"data key for a file":        askDataKey(askContext("data")),
	"data key for names":         askDataKey(askContext("names")),
	"data key without a context": askDataKey(nil),
	"DescribeKey": func(c *kms.Client, key *string) error {
		_, err := c.DescribeKey(context.Background(), &kms.DescribeKeyInput{KeyId: key})
		return err
	},
	"GetKeyPolicy": func(c *kms.Client, key *string) error {
		_, err := c.GetKeyPolicy(context.Background(), &kms.GetKeyPolicyInput{KeyId: key})
		return err
	},
	"RotateKeyOnDemand": func(c *kms.Client, key *string) error {
		_, err := c.RotateKeyOnDemand(context.Background(), &kms.RotateKeyOnDemandInput{KeyId: key})
		return err
	},
	"disable and enable": func(c *kms.Client, key *string) error {
		if _, err := c.DisableKey(context.Background(), &kms.DisableKeyInput{KeyId: key}); err != nil {
			return err
		}
		_, err := c.EnableKey(context.Background(), &kms.EnableKeyInput{KeyId: key})
		return err
	},
	"deletion and back": func(c *kms.Client, key *string) error {
		if _, err := c.ScheduleKeyDeletion(context.Background(), &kms.ScheduleKeyDeletionInput{KeyId: key}); err != nil {
			return err
		}
		_, cancel := c.CancelKeyDeletion(context.Background(), &kms.CancelKeyDeletionInput{KeyId: key})
		_, enable := c.EnableKey(context.Background(), &kms.EnableKeyInput{KeyId: key})
		return errors.Join(cancel, enable)
	},
}

func TestPoliciesOfThePageBySDK(t *testing.T) {
	b := newPolicyBench(t)
	for role, may := range map[string][]string{
		"reader":              {},
		"user":                {"data key for a file", "data key for names"},
		"writer":              {"data key for a file"},
		"store-administrator": {"data key for names", "DescribeKey"},
		"key-administrator":   {"DescribeKey", "GetKeyPolicy", "RotateKeyOnDemand", "disable and enable", "deletion and back"},
		"auditor":             {"DescribeKey", "GetKeyPolicy"},
	} {
		for what, ask := range keyAsks {
			wantDenied(t, role+": "+what, ask(b.client(role), &b.phi), !slices.Contains(may, what))
		}
	}
}

// TestCallsOfThePage counts the calls that docs/kms.md says each operation makes.
func TestCallsOfThePage(t *testing.T) {
	rig.Need(t, "root", "fuse")
	s := kmsserver.StartT(t, kmsserver.Options{})
	for _, alias := range []string{"alias/general", "alias/phi", "alias/recovery"} {
		if _, err := s.CreateKey(kmsserver.KeyOptions{Alias: alias}); err != nil {
			t.Fatal(err)
		}
	}
	h := rig.NewHome(t, s.Env(kmsserver.DefaultPrincipal())...)
	store, policy := filepath.Join(t.TempDir(), "store"), filepath.Join(t.TempDir(), "policy.yaml")
	put(t, policy, []byte(`
version: 1
default: general
classes:
  general: { keys: ["alias/general", "alias/recovery"] }
  phi: { keys: ["alias/phi"] }
`))
	var m *rig.Mount
	made := false // a file, after which keys are made ahead of need, in the background
	for _, step := range []struct {
		what                                        string
		do                                          func() error
		generate, encrypt, decrypt, reEncrypt, look int
	}{
		{"init", func() error { h.Run("init", "--policy", policy, store); return nil }, 3, 2, 0, 1, 3},
		{"mount", func() error { m = h.Mount(store); return nil }, 0, 0, 3, 0, 3},
		{"create", func() error { return os.WriteFile(m.Path("file"), []byte("x"), 0o644) }, 1, 1, 0, 0, 0},
		{"open again", func() error { return canRead(m.Path("file")) }, 0, 0, 0, 0, 0},
		{"O_TRUNC", func() error { return os.WriteFile(m.Path("file"), []byte("y"), 0o644) }, 1, 1, 0, 0, 0},
		{"write", func() error { return appendTo(m.Path("file"), "z") }, 0, 0, 0, 0, 0},
		{"names", func() error {
			_, lerr := os.ReadDir(m.Dir)
			return errors.Join(lerr, os.Rename(m.Path("file"), m.Path("moved")), os.Link(m.Path("moved"), m.Path("second")),
				os.Remove(m.Path("second")), os.Mkdir(m.Path("dir"), 0o755), os.Symlink("x", m.Path("link")), os.Chmod(m.Path("moved"), 0o600))
		}, 0, 0, 0, 0, 0},
		{"mount again", func() error { m.Unmount(); m.Again(); return nil }, 0, 0, 3, 0, 3},
		{"stat", func() error { _, err := os.Stat(m.Path("moved")); return err }, 0, 0, 0, 0, 0},
		{"open cold", func() error { return canRead(m.Path("moved")) }, 0, 0, 1, 0, 0},
		{"fsck", func() error { m.Unmount(); h.Run("fsck", store); return nil }, 0, 0, 5, 0, 0},
	} {
		made = made || step.what == "create"
		s.ResetCalls()
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		for op, want := range map[string]int{"GenerateDataKey": step.generate, "Encrypt": step.encrypt, "Decrypt": step.decrypt,
			"ReEncrypt": step.reEncrypt, "DescribeKey": step.look} {
			got := s.Count(op)
			ahead := op == "GenerateDataKey" || op == "Encrypt" // and keys ahead of need, once files follow each other
			if got != want && !(ahead && made && got > want) {
				t.Errorf("%s: %d calls of %s, want %d", step.what, got, op, want)
			}
		}
	}
}
