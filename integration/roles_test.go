package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
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

func (b *rolesBench) keys() []string { return []string{b.general, b.phi, b.recovery} }

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
	for _, flags := range [][]string{nil} {
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

// contextOf is an encryption context of a file, name key or store.
func contextOf(store, class, purpose string) map[string]string {
	return map[string]string{"kmsfs:store": store, "kmsfs:class": class, "kmsfs:purpose": purpose, "kmsfs:id": strings.Repeat("0f", 16)}
}

// rights is what the policy of a role allows on a key: operation, then purposes.
type rights map[string][]string

var everyPurpose = []string{"data", "names", "store"}

// expected is the whole of what each role may do, on the key that makes data
// keys and on a further recipient.
var expected = map[string]struct{ first, further rights }{
	"reader": {rights{"Decrypt": everyPurpose}, rights{"Decrypt": everyPurpose}},
	"writer": {rights{"GenerateDataKey": {"data"}, "Decrypt": {"names", "store"}}, rights{"Encrypt": {"data"}, "Decrypt": {"names", "store"}}},
	"user":   {rights{"GenerateDataKey": {"data"}, "Decrypt": everyPurpose}, rights{"Encrypt": {"data"}, "Decrypt": everyPurpose}},
	"names":  {rights{"Decrypt": {"names", "store"}}, rights{"Decrypt": {"names", "store"}}},
	"rewrapper": {rights{"ReEncrypt": everyPurpose, "DescribeKey": nil},
		rights{"ReEncrypt": everyPurpose, "DescribeKey": nil}},
	"auditor": {rights{"DescribeKey": nil, "GetKeyRotationStatus": nil, "ListKeyRotations": nil},
		rights{"DescribeKey": nil, "GetKeyRotationStatus": nil, "ListKeyRotations": nil}},
}

// sample is an encryption context with what was encrypted under it.
type sample struct {
	key   string
	ec    map[string]string
	class string // of the key
	ours  bool   // exactly what kmsfs sends for this key
	blob  []byte
}

func (s *sample) String() string { return fmt.Sprintf("%v under %s", s.ec, s.key) }

// samples are all combinations of own and foreign store, class and purpose, and
// contexts with a pair too many or too few.
func (b *rolesBench) samples() []*sample {
	b.t.Helper()
	var out []*sample
	for _, key := range b.keys() {
		class := "phi"
		if key == b.general {
			class = "general"
		}
		add := func(ec map[string]string, ours bool) {
			s := &sample{key: key, ec: ec, class: class, ours: ours}
			answer, err := admin(b.kms).Encrypt(context.Background(), &kms.EncryptInput{KeyId: &key, Plaintext: make([]byte, 32), EncryptionContext: ec})
			if err != nil {
				b.t.Fatal(err)
			}
			s.blob = answer.CiphertextBlob
			out = append(out, s)
		}
		for _, store := range []string{b.id, strings.Repeat("ab", 16)} {
			for _, c := range []string{"general", "phi", "other"} {
				for _, purpose := range append(slices.Clone(everyPurpose), "backup") {
					add(contextOf(store, c, purpose), store == b.id && c == class && purpose != "backup")
				}
			}
		}
		add(nil, false)
		for _, purpose := range everyPurpose {
			more := contextOf(b.id, class, purpose)
			more["kmsfs:path"] = "/x"
			add(more, false)
			for _, missing := range slices.Sorted(maps.Keys(contextOf(b.id, class, purpose))) {
				less := contextOf(b.id, class, purpose)
				delete(less, missing)
				add(less, false)
			}
		}
	}
	return out
}

// cryptoAsks are the operations with an encryption context.
var cryptoAsks = map[string]func(c *kms.Client, s *sample) error{
	"GenerateDataKey": func(c *kms.Client, s *sample) error {
		_, err := c.GenerateDataKey(context.Background(), &kms.GenerateDataKeyInput{KeyId: &s.key, KeySpec: "AES_256", EncryptionContext: s.ec})
		return err
	},
	"GenerateDataKeyWithoutPlaintext": func(c *kms.Client, s *sample) error {
		_, err := c.GenerateDataKeyWithoutPlaintext(context.Background(), &kms.GenerateDataKeyWithoutPlaintextInput{KeyId: &s.key, KeySpec: "AES_256", EncryptionContext: s.ec})
		return err
	},
	"Encrypt": func(c *kms.Client, s *sample) error {
		_, err := c.Encrypt(context.Background(), &kms.EncryptInput{KeyId: &s.key, Plaintext: make([]byte, 32), EncryptionContext: s.ec})
		return err
	},
	"Decrypt": func(c *kms.Client, s *sample) error {
		_, err := c.Decrypt(context.Background(), &kms.DecryptInput{KeyId: &s.key, CiphertextBlob: s.blob, EncryptionContext: s.ec})
		return err
	},
	"ReEncrypt": func(c *kms.Client, s *sample) error {
		_, err := c.ReEncrypt(context.Background(), &kms.ReEncryptInput{SourceKeyId: &s.key, CiphertextBlob: s.blob, SourceEncryptionContext: s.ec,
			DestinationKeyId: &s.key, DestinationEncryptionContext: s.ec})
		return err
	},
}

// keyOps are the operations about a key itself.
var keyOps = map[string]keyAsk{
	"DescribeKey":  keyAsks["DescribeKey"],
	"GetKeyPolicy": keyAsks["GetKeyPolicy"],
	"GetKeyRotationStatus": func(c *kms.Client, key *string) error {
		_, err := c.GetKeyRotationStatus(context.Background(), &kms.GetKeyRotationStatusInput{KeyId: key})
		return err
	},
	"ListKeyRotations": func(c *kms.Client, key *string) error {
		_, err := c.ListKeyRotations(context.Background(), &kms.ListKeyRotationsInput{KeyId: key})
		return err
	},
	"EnableKeyRotation": func(c *kms.Client, key *string) error {
		_, err := c.EnableKeyRotation(context.Background(), &kms.EnableKeyRotationInput{KeyId: key})
		return err
	},
	"RotateKeyOnDemand":   keyAsks["RotateKeyOnDemand"],
	"DisableKey":          keyAsks["disable and enable"],
	"ScheduleKeyDeletion": keyAsks["deletion and back"],
	"PutKeyPolicy": func(c *kms.Client, key *string) error {
		_, err := c.PutKeyPolicy(context.Background(), &kms.PutKeyPolicyInput{KeyId: key, Policy: aws.String("{}")})
		return err
	},
}

// TestRolesBySDK holds the policies against the table, call by call: what a role
// does not need is denied.
func TestRolesBySDK(t *testing.T) {
	t.Parallel()
	b := newRolesBench(t)
	samples := b.samples()
	for role, want := range expected {
		b.load(role)
		c := b.client(role)
		of := func(key string) rights {
			if key == b.recovery {
				return want.further
			}
			return want.first
		}
		allowed := 0
		for _, s := range samples {
			for op, ask := range cryptoAsks {
				may := s.ours && slices.Contains(of(s.key)[op], s.ec["kmsfs:purpose"])
				wantDenied(t, fmt.Sprintf("%s: %s with %s", role, op, s), ask(c, s), !may)
				if may {
					allowed++
				}
			}
		}
		for _, key := range b.keys() {
			for op, ask := range keyOps {
				_, may := of(key)[op]
				wantDenied(t, fmt.Sprintf("%s: %s of %s", role, op, key), ask(c, &key), !may)
				if may {
					allowed++
				}
			}
		}
		if allowed == 0 {
			t.Errorf("%s: nothing was allowed: the table is not tested", role)
		}
	}
}

// TestRoleRewrapperMovesContexts: KMS judges the two ends of a ReEncrypt apart,
// so that a rewrapper can give a data key another purpose, and together with
// somebody who opens names reads files. docs/kms.md says so.
func TestRoleRewrapperMovesContexts(t *testing.T) {
	t.Parallel()
	b := newRolesBench(t)
	data, names := contextOf(b.id, "phi", "data"), contextOf(b.id, "phi", "names")
	key, err := admin(b.kms).GenerateDataKey(context.Background(), &kms.GenerateDataKeyInput{KeyId: &b.phi, KeySpec: "AES_256", EncryptionContext: data})
	if err != nil {
		t.Fatal(err)
	}
	b.load("rewrapper")
	move := func(blob []byte, to string, ec map[string]string) ([]byte, error) {
		out, err := b.client("rewrapper").ReEncrypt(context.Background(), &kms.ReEncryptInput{SourceKeyId: &b.phi, CiphertextBlob: blob,
			SourceEncryptionContext: data, DestinationKeyId: &to, DestinationEncryptionContext: ec})
		if err != nil {
			return nil, err
		}
		return out.CiphertextBlob, nil
	}
	moved, err := move(key.CiphertextBlob, b.recovery, names)
	wantDenied(t, "to another purpose", err, false)
	_, err = move(key.CiphertextBlob, b.general, data)
	wantDenied(t, "to the key of another class", err, true)
	_, err = move(key.CiphertextBlob, b.phi, nil)
	wantDenied(t, "to no context", err, true)
	b.load("names")
	_, err = b.client("names").Decrypt(context.Background(), &kms.DecryptInput{KeyId: &b.recovery, CiphertextBlob: moved, EncryptionContext: names})
	wantDenied(t, "whoever opens names opens what was moved there", err, false)
	_, err = b.client("names").Decrypt(context.Background(), &kms.DecryptInput{KeyId: &b.phi, CiphertextBlob: key.CiphertextBlob, EncryptionContext: data})
	wantDenied(t, "and not what was not", err, true)
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
	r = stranger.Try("doctor", "--policy", "reader", ring)
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
	fresh, err := b.kms.CreateKey(kmsserver.KeyOptions{Alias: "alias/fresh"})
	if err != nil {
		t.Fatal(err)
	}
	b.before[fresh] = b.before[b.phi]
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	put(t, policy, []byte(`
version: 1
default: general
classes:
  general: { keys: ["alias/general"], cache: 0s }
  phi: { keys: ["alias/fresh", "alias/recovery"], retired: ["alias/phi"], cache: 0s }
directories: { /patients: phi }
`))
	b.admin.Run("policy", "apply", b.store, policy)
	h := b.load("user")
	if err := b.kms.SetPolicy(fresh, b.text("user", fresh)); err != nil {
		t.Fatal(err)
	}
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
