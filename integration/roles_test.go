package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	awscreds "github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// rolesBench is a store with the classes general (default) and phi (in
// /patients, with a second recipient), and a file in each. Its keys have the
// policy that kmsfs doctor --policy prints, to the letter, of one role at a time.
type rolesBench struct {
	t                      *testing.T
	kms                    *kmsserver.Server
	admin                  *rig.Home
	store, id              string
	general, phi, recovery string // key ARNs
	fresh                  string // after retire
	before                 map[string]string
}

// ingestARN is the writer's principal, given with --principal; the others are
// the roles that kmsfs doctor names by itself.
const ingestARN = "arn:aws:iam::111122223333:user/ingest"

func newRolesBench(t *testing.T) *rolesBench {
	t.Helper()
	rig.Need(t, "root", "fuse")
	b := &rolesBench{t: t, kms: kmsserver.StartT(t, kmsserver.Options{}), store: filepath.Join(t.TempDir(), "store"), before: map[string]string{}}
	for alias, arn := range map[string]*string{"alias/general": &b.general, "alias/phi": &b.phi, "alias/recovery": &b.recovery} {
		var err error
		if *arn, err = b.kms.CreateKey(kmsserver.KeyOptions{Alias: alias}); err != nil {
			t.Fatal(err)
		}
		out, err := admin(b.kms).GetKeyPolicy(context.Background(), &kms.GetKeyPolicyInput{KeyId: arn})
		if err != nil {
			t.Fatal(err)
		}
		b.before[*arn] = *out.Policy
	}
	b.admin = rig.NewHome(t, b.kms.Env(kmsserver.DefaultPrincipal())...)
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	put(t, policy, []byte(`
version: 1
default: general
classes:
  general: { keys: ["alias/general"], cache: 0s }
  phi: { keys: ["alias/phi", "alias/recovery"], cache: 0s }
directories: { /patients: phi }
`))
	var made struct{ ID string }
	if err := json.Unmarshal([]byte(b.admin.Run("init", "--json", "--policy", policy, b.store)), &made); err != nil || len(made.ID) != 32 {
		t.Fatalf("init: %q, %v", made.ID, err)
	}
	b.id = made.ID
	m := b.admin.Mount(b.store)
	wantErrno(t, "mkdir", os.Mkdir(m.Path("patients"), 0o755), 0)
	m.Put("memo", []byte("a memo"))
	m.Put("patients/record", []byte("a record"))
	m.Unmount()
	return b
}

// principal is who has the role: a session of the IAM role that kmsfs doctor
// names where it is given none, and a user for the writer.
func (b *rolesBench) principal(role string) kmsserver.Principal {
	p := kmsserver.Principal{AccessKeyID: "ASIA" + strings.ToUpper(role), SecretAccessKey: "secret of " + role, SessionToken: "session",
		ARN: "arn:aws:sts::111122223333:assumed-role/kmsfs-" + role + "/test"}
	if role == "writer" {
		p.ARN, p.SessionToken = ingestARN, ""
	}
	return p
}

// text is what kmsfs doctor --policy prints for a key.
func (b *rolesBench) text(role, key string) string {
	b.t.Helper()
	args := []string{"doctor", "--policy", role, "--for", key}
	if role == "writer" {
		args = append(args, "--principal", ingestARN)
	}
	return b.admin.Run(append(args, b.store)...)
}

// load gives every key the policy of a role, and nothing else. It returns the
// role's user.
func (b *rolesBench) load(role string) *rig.Home {
	b.t.Helper()
	for _, key := range b.keys() {
		if err := b.kms.SetPolicy(key, b.text(role, key)); err != nil {
			b.t.Fatalf("%s on %s: %v", role, key, err)
		}
	}
	if err := b.kms.AddPrincipal(b.principal(role)); err != nil {
		b.t.Fatal(err)
	}
	h := rig.NewHome(b.t, b.kms.Env(b.principal(role))...)
	h.Run("known-stores", "accept", "--yes", b.store)
	return h
}

// restore gives the keys their first policies back.
func (b *rolesBench) restore() {
	b.t.Helper()
	for key, policy := range b.before {
		if err := b.kms.SetPolicy(key, policy); err != nil {
			b.t.Fatal(err)
		}
	}
}

func (b *rolesBench) keys() []string {
	keys := []string{b.general, b.phi, b.recovery}
	if b.fresh != "" {
		keys = append(keys, b.fresh)
	}
	return keys
}

// retire puts a fresh key in the place of phi's, which is retired.
func (b *rolesBench) retire() {
	b.t.Helper()
	var err error
	if b.fresh, err = b.kms.CreateKey(kmsserver.KeyOptions{Alias: "alias/fresh"}); err != nil {
		b.t.Fatal(err)
	}
	b.before[b.fresh] = b.before[b.phi]
	policy := filepath.Join(b.t.TempDir(), "policy.yaml")
	if err := os.WriteFile(policy, []byte(`
version: 1
default: general
classes:
  general: { keys: ["alias/general"], cache: 0s }
  phi: { keys: ["alias/fresh", "alias/recovery"], retired: ["alias/phi"], cache: 0s }
directories: { /patients: phi }
`), 0o600); err != nil {
		b.t.Fatal(err)
	}
	b.admin.Run("policy", "apply", b.store, policy)
}

func (b *rolesBench) client(role string) *kms.Client {
	p := b.principal(role)
	return kms.New(kms.Options{Region: b.kms.Region(), BaseEndpoint: aws.String(b.kms.URL()), RetryMaxAttempts: 1,
		Credentials: awscreds.NewStaticCredentialsProvider(p.AccessKeyID, p.SecretAccessKey, p.SessionToken)})
}

// wantDoctor runs kmsfs doctor and requires its exit code.
func (b *rolesBench) wantDoctor(h *rig.Home, role string, code int) {
	b.t.Helper()
	if r := h.Try("doctor", "--role", role, b.store); r.Code != code {
		b.t.Errorf("kmsfs doctor --role %s: exit %d, want %d\n%s%s", role, r.Code, code, r.Stdout, r.Stderr)
	}
}

// TestRoleReader: mounts, lists and reads; makes nothing.
func TestRoleReader(t *testing.T) {
	t.Parallel()
	b := newRolesBench(t)
	h := b.load("reader")
	m := h.Mount(b.store)
	if names := strings.Fields(h.Sh(`ls "$1" "$1"/patients`, m.Dir)); !slices.Contains(names, "memo") || !slices.Contains(names, "record") {
		t.Errorf("ls: %q", names)
	}
	for name, want := range map[string]string{"memo": "a memo", "patients/record": "a record"} {
		if got, errno := readAll(m.Path(name)); errno != 0 || string(got) != want {
			t.Errorf("%s: %q, %s", name, got, errnoName(errno))
		}
		eventually(t, "O_TRUNC of "+name, func() error { return os.WriteFile(m.Path(name), []byte("x"), 0o644) }, unix.EACCES)
	}
	for _, dir := range []string{"", "patients"} {
		wantErrno(t, "create in /"+dir, os.WriteFile(m.Path(dir, "new"), []byte("x"), 0o644), unix.EACCES)
	}
	m.Unmount()
	b.wantDoctor(h, "reader", 0)
	b.wantDoctor(h, "user", 10)
	b.wantDoctor(h, "writer", 10)
}

// TestRoleWriter: makes, writes, renames and lists; reads nothing, not even what
// it wrote.
func TestRoleWriter(t *testing.T) {
	t.Parallel()
	b := newRolesBench(t)
	h := b.load("writer")
	for _, flags := range [][]string{nil, {"--write-only"}} {
		m := h.Mount(b.store, flags...)
		what := fmt.Sprint("mounted with ", flags, ": ")
		mine := m.Path("patients", "mine")
		wantErrno(t, what+"create", os.WriteFile(mine, []byte("by the writer"), 0o644), 0)
		wantErrno(t, what+"create in the other class", os.WriteFile(m.Path("upload"), []byte("by the writer"), 0o644), 0)
		wantErrno(t, what+"rename", os.Rename(mine, mine+"2"), 0)
		for _, name := range []string{"memo", "patients/record", "upload", "patients/mine2"} {
			eventually(t, what+"read "+name, func() error { return canRead(m.Path(name)) }, unix.EACCES)
		}
		wantErrno(t, what+"append", appendTo(m.Path("patients/record"), "x"), unix.EACCES)
		if names := strings.Fields(h.Sh(`ls "$1" "$1"/patients`, m.Dir)); !slices.Contains(names, "mine2") || !slices.Contains(names, "record") {
			t.Errorf("%sls: %q", what, names)
		}
		m.Unmount()
	}
	b.wantDoctor(h, "writer", 0)
	b.wantDoctor(h, "reader", 10)
	b.restore()
	m := b.admin.Mount(b.store)
	for name, want := range map[string]string{"memo": "a memo", "patients/record": "a record", "upload": "by the writer", "patients/mine2": "by the writer"} {
		if got, errno := readAll(m.Path(name)); errno != 0 || string(got) != want {
			t.Errorf("the administrator reads %s: %q, %s", name, got, errnoName(errno))
		}
	}
	m.Unmount()
}

// TestRoleUser: reads and writes.
func TestRoleUser(t *testing.T) {
	t.Parallel()
	b := newRolesBench(t)
	h := b.load("user")
	m := h.Mount(b.store)
	for _, name := range []string{"new", "patients/new"} {
		m.Put(name, []byte("by the user"))
		wantErrno(t, "append to "+name, appendTo(m.Path(name), ", twice"), 0)
		if got, errno := readAll(m.Path(name)); errno != 0 || string(got) != "by the user, twice" {
			t.Errorf("%s: %q, %s", name, got, errnoName(errno))
		}
	}
	m.Unmount()
	b.wantDoctor(h, "user", 0)
	b.wantDoctor(h, "reader", 0)
	b.wantDoctor(h, "rewrapper", 10)
}

// TestRoleNames: lists, and neither reads nor makes.
func TestRoleNames(t *testing.T) {
	t.Parallel()
	b := newRolesBench(t)
	h := b.load("names")
	m := h.Mount(b.store)
	if got := strings.TrimSpace(h.Sh(`ls "$1"/patients`, m.Dir)); got != "record" {
		t.Errorf("ls: %q", got)
	}
	wantErrno(t, "read", canRead(m.Path("patients/record")), unix.EACCES)
	wantErrno(t, "create", os.WriteFile(m.Path("patients/new"), []byte("x"), 0o644), unix.EACCES)
	m.Unmount()
	b.wantDoctor(h, "names", 0)
	b.wantDoctor(h, "reader", 10)
}

// wantNoAccess: no command that needs a data key works.
func (b *rolesBench) wantNoAccess(h *rig.Home, role string) {
	b.t.Helper()
	dir := b.t.TempDir()
	for _, args := range [][]string{{"mount", b.store, dir}, {"ls", b.store}, {"cat", b.store, "memo"}, {"cat", b.store, "patients/record"}, {"fsck", b.store}} {
		if r := h.Try(args...); r.Code != 5 {
			b.t.Errorf("%s: kmsfs %s: exit %d, want 5\n%s%s", role, args[0], r.Code, r.Stdout, r.Stderr)
		}
	}
}

// TestRoleAuditor: sees every key's state, and can use none.
func TestRoleAuditor(t *testing.T) {
	t.Parallel()
	b := newRolesBench(t)
	h := b.load("auditor")
	b.wantNoAccess(h, "auditor")
	b.wantDoctor(h, "auditor", 0)
	b.wantDoctor(h, "reader", 10)
	inventory := h.Run("keys", "--json", b.store)
	for _, key := range b.keys() {
		if !strings.Contains(inventory, key) {
			t.Errorf("the inventory lacks %s:\n%s", key, inventory)
		}
	}
	r := h.Try("doctor", "--json", "--role", "auditor", b.store)
	for _, key := range b.keys() {
		if f := findingOf(t, r, "key.state", key); f.Level != "ok" || f.Text != "enabled" {
			t.Errorf("%s: %+v", key, f)
		}
		if f := findingOf(t, r, "key.rotation", key); f.Level == "" {
			t.Errorf("%s: no word about rotation", key)
		}
	}
}

// TestRoleRewrapper: takes files off a retired key, and sees no data key and no
// name.
func TestRoleRewrapper(t *testing.T) {
	t.Parallel()
	b := newRolesBench(t)
	b.retire()
	h := b.load("rewrapper")
	b.wantNoAccess(h, "rewrapper")
	b.wantDoctor(h, "rewrapper", 0)
	b.wantDoctor(h, "names", 10)
	b.wantDoctor(h, "reader", 10)
	b.kms.ResetCalls()
	h.Run("rewrap", b.store)
	if b.kms.Count("ReEncrypt") == 0 {
		t.Error("nothing was re-encrypted")
	}
	for _, c := range b.kms.Calls() {
		if c.EventName != "ReEncrypt" && c.EventName != "DescribeKey" || c.ErrorCode != "" {
			t.Errorf("rewrap calls %s: %q", c.EventName, c.ErrorCode)
		}
	}
	b.wantNoAccess(h, "rewrapper")
	b.restore()
	if _, err := admin(b.kms).DisableKey(context.Background(), &kms.DisableKeyInput{KeyId: &b.phi}); err != nil {
		t.Fatal(err)
	}
	m := b.admin.Mount(b.store)
	for name, want := range map[string]string{"memo": "a memo", "patients/record": "a record"} {
		if got, errno := readAll(m.Path(name)); errno != 0 || string(got) != want {
			t.Errorf("%s without the retired key: %q, %s", name, got, errnoName(errno))
		}
	}
	var info fileInfo
	if err := json.Unmarshal([]byte(b.admin.Run("info", "--json", m.Path("patients/record"))), &info); err != nil || !slices.Equal(info.Keys, []string{b.fresh, b.recovery}) {
		t.Errorf("recipients %q, %v", info.Keys, err)
	}
	m.Unmount()
}

// TestPolicyText: what is printed where, and what is refused.
func TestPolicyText(t *testing.T) {
	t.Parallel()
	b := newRolesBench(t)
	r := b.admin.Try("doctor", "--policy", "reader", "--class", "phi", b.store)
	if r.Code != 0 || strings.Contains(r.Stdout, `"general"`) || !strings.Contains(r.Stderr, "--policy names --class general") ||
		!strings.Contains(r.Stderr, "role/kmsfs-reader") || !strings.Contains(r.Stderr, b.recovery+" makes no data keys") {
		t.Errorf("reader of phi: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	dec := json.NewDecoder(strings.NewReader(r.Stdout))
	n := 0
	for ; dec.More(); n++ {
		var doc struct{ Statement []any }
		if err := dec.Decode(&doc); err != nil || len(doc.Statement) == 0 {
			t.Fatalf("document %d: %v\n%s", n, err, r.Stdout)
		}
	}
	if n != 2 {
		t.Errorf("%d documents, want one for each key of phi", n)
	}
	var all struct {
		Role, Store string
		Policies    []struct {
			Key     string
			Classes []string
			Policy  json.RawMessage
		}
	}
	if err := json.Unmarshal([]byte(b.admin.Run("doctor", "--policy", "reader", "--json", b.store)), &all); err != nil || all.Store != b.id || len(all.Policies) != 3 {
		t.Errorf("--json: %+v, %v", all, err)
	}
}

// TestPolicyRefused: what is no role, principal, class or key, a store that this
// machine does not know, and keys without policies.
func TestPolicyRefused(t *testing.T) {
	t.Parallel()
	b := newRolesBench(t)
	for _, tc := range []struct {
		code int
		args []string
	}{
		{2, []string{"--policy", "root", b.store}},
		{2, []string{"--policy", "reader"}},
		{2, []string{"--policy", "reader", "--principal", "*", b.store}},
		{2, []string{"--policy", "reader", "--class", "none", b.store}},
		{2, []string{"--policy", "reader", "--class", "general", "--for", b.phi, b.store}},
		{2, []string{"--class", "phi", b.store}},
		{2, []string{"--role", "root", b.store}},
		{3, []string{"--policy", "reader", t.TempDir()}},
	} {
		if r := b.admin.Try(append([]string{"doctor"}, tc.args...)...); r.Code != tc.code || r.Stdout != "" {
			t.Errorf("doctor %q: exit %d, want %d: %s%s", tc.args, r.Code, tc.code, r.Stdout, r.Stderr)
		}
	}
	stranger := rig.NewHome(t)
	if r := stranger.Try("doctor", "--policy", "reader", b.store); r.Code != 7 {
		t.Errorf("a store that is new here: exit %d, want 7: %s", r.Code, r.Stderr)
	}
	if got, want := stranger.Run("doctor", "--policy", "reader", "--for", b.phi, "--trust", b.store), b.text("reader", b.phi); got != want {
		t.Errorf("another machine prints %s, want %s", got, want)
	}
	ring := filepath.Join(t.TempDir(), "ring")
	stranger.Run("init", ring)
	r := stranger.Try("doctor", "--policy", "reader", ring)
	if r.Code != 1 || r.Stdout != "" || !strings.Contains(r.Stderr, "keyring:general has no key policy") {
		t.Errorf("a store under the keyring: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// finding is one line of kmsfs doctor --json.
type finding struct{ Check, Level, Subject, Text, Remedy string }

// findingsOf parses what kmsfs doctor --json printed.
func findingsOf(t *testing.T, r rig.Result) []finding {
	t.Helper()
	var out struct {
		Findings         []finding
		Errors, Warnings int
	}
	if err := json.Unmarshal([]byte(r.Stdout), &out); err != nil {
		t.Fatalf("exit %d: %v\n%s%s", r.Code, err, r.Stdout, r.Stderr)
	}
	if (r.Code == 10) != (out.Errors > 0) || r.Code != 0 && r.Code != 10 {
		t.Errorf("exit %d with %d errors", r.Code, out.Errors)
	}
	return out.Findings
}

// findingOf returns the finding of a check about a subject ("" is any), the zero
// one if there is none.
func findingOf(t *testing.T, r rig.Result, check, subject string) finding {
	t.Helper()
	for _, f := range findingsOf(t, r) {
		if f.Check == check && (subject == "" || f.Subject == subject) {
			return f
		}
	}
	return finding{}
}

// TestRoleRetiredKey: a key that the class retired only opens what is there.
func TestRoleRetiredKey(t *testing.T) {
	t.Parallel()
	b := newRolesBench(t)
	b.retire()
	h := b.load("user")
	if text := b.text("user", b.phi); strings.Contains(text, "GenerateDataKey") || strings.Contains(text, "Encrypt\"") || !strings.Contains(text, "kms:Decrypt") {
		t.Errorf("the retired key may: %s", text)
	}
	if text := b.text("rewrapper", b.phi); strings.Contains(text, "ReEncryptTo") || !strings.Contains(text, "ReEncryptFrom") {
		t.Errorf("the retired key may, for a rewrapper: %s", text)
	}
	b.wantDoctor(h, "user", 0)
	m := h.Mount(b.store)
	m.Put("patients/new", []byte("under the fresh key"))
	for name, want := range map[string]string{"patients/record": "a record", "patients/new": "under the fresh key"} {
		if got, errno := readAll(m.Path(name)); errno != 0 || string(got) != want {
			t.Errorf("%s: %q, %s", name, got, errnoName(errno))
		}
	}
	m.Unmount()
}
