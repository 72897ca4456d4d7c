package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// doctor runs kmsfs doctor --json.
func doctor(h *rig.Home, args ...string) rig.Result {
	h.T.Helper()
	return h.Try(append([]string{"doctor", "--json"}, args...)...)
}

// wantFinding requires a finding of a level about subject ("" is any) that has
// all of words in its text or remedy; errors and warnings say what to do.
func wantFinding(t *testing.T, r rig.Result, check, subject, level string, words ...string) {
	t.Helper()
	f := findingOf(t, r, check, subject)
	if f.Level != level {
		t.Errorf("%s %s: got %+v, want %s\n%s", check, subject, f, level, r.Stdout)
		return
	}
	if (level == "error" || level == "warning") && f.Remedy == "" {
		t.Errorf("%s has no remedy: %+v", check, f)
	}
	for _, w := range words {
		if !strings.Contains(f.Text+"\n"+f.Remedy, w) {
			t.Errorf("%s: %+v does not have %q", check, f, w)
		}
	}
}

// levels returns the checks that have a finding of the level.
func levels(t *testing.T, r rig.Result, level string) []string {
	t.Helper()
	var out []string
	for _, f := range findingsOf(t, r) {
		if f.Level == level {
			out = append(out, f.Check)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// wantOnly requires exactly the given checks among the errors and warnings.
func wantOnly(t *testing.T, r rig.Result, checks ...string) {
	t.Helper()
	got := append(levels(t, r, "error"), levels(t, r, "warning")...)
	slices.Sort(got)
	slices.Sort(checks)
	if !slices.Equal(slices.Compact(got), checks) {
		t.Errorf("errors and warnings from %q, want %q\n%s", got, checks, r.Stdout)
	}
}

// doctorStore is a store with one class under a key of a KMS of its own.
func doctorStore(t *testing.T) (s *kmsStore, key string) {
	t.Helper()
	s = newKMSStore(t, envelope.Prefix, []string{"phi"}, map[string]kmsClass{"phi": {}})
	return s, s.arn["phi"]
}

// TestDoctorClean: where nothing is wrong, nothing is found wrong, with every
// check at work.
func TestDoctorClean(t *testing.T) {
	t.Parallel()
	s, key := doctorStore(t)
	if _, err := admin(s.kms).EnableKeyRotation(context.Background(), &kms.EnableKeyRotationInput{KeyId: &key}); err != nil {
		t.Fatal(err)
	}
	s.kms.ResetCalls()
	r := doctor(s.h, s.dir)
	wantOnly(t, r)
	if r.Code != 0 || r.Stderr != "" {
		t.Errorf("exit %d: %s", r.Code, r.Stderr)
	}
	for _, check := range []string{"store.mounts", "store.record", "store.known", "fuse.device", "fuse.helper", "fuse.allow-other", "kernel.version",
		"memory.locked", "memory.swap", "memory.core", "clock.synchronised", "store.filesystem", "store.space", "store.inodes", "store.writable", "store.xattrs",
		"store.case", "clock.store", "store.writing", "store.jobs", "aws.credentials", "aws.region", "aws.endpoint", "clock.service", "key.state", "key.rotation",
		"class.mount", "class.list", "class.read", "class.create", "class.rewrap"} {
		if f := findingOf(t, r, check, ""); f.Level != "ok" && f.Level != "info" {
			t.Errorf("%s: %+v", check, f)
		}
	}
	wantFinding(t, r, "key.rotation", key, "ok", "automatic rotation is on")
	wantFinding(t, r, "clock.service", "us-east-1", "ok", "agree")
	if strings.Contains(r.Stdout, kmsserver.DefaultPrincipal().SecretAccessKey) {
		t.Error("the secret access key shows")
	}
	if n := s.kms.Count("Decrypt"); n < 3 {
		t.Errorf("%d questions about Decrypt, want one for each purpose", n)
	}
	for _, c := range s.kms.Calls() {
		if (c.EventName == "Decrypt" || c.EventName == "GenerateDataKey" || c.EventName == "Encrypt" || c.EventName == "ReEncrypt") && c.ErrorCode != "DryRunOperationException" {
			t.Errorf("%s was called for good: %q", c.EventName, c.ErrorCode)
		}
	}
	text := s.h.Run("doctor", s.dir)
	for _, want := range []string{"ok       fuse.device", "-> ", "0 errors, 0 warnings", key} {
		if !strings.Contains(text, want) {
			t.Errorf("the table does not have %q:\n%s", want, text)
		}
	}
	none := doctor(rig.NewHome(t)) // no store, no keyring, no AWS
	if none.Code != 0 {
		t.Errorf("without a store: exit %d\n%s", none.Code, none.Stdout)
	}
	wantFinding(t, none, "keyring.file", "", "info", "there is none")
	wantFinding(t, none, "aws.credentials", "", "info")
}

// TestDoctorKeyring: each state of the keyring file and its keys.
func TestDoctorKeyring(t *testing.T) {
	t.Parallel()
	h, store := rig.NewHome(t), filepath.Join(t.TempDir(), "store")
	h.Run("init", store)
	ring := filepath.Join(h.Dir, ".config/kmsfs/keyring.json")
	wantOnly(t, doctor(h, store))
	h.Run("keyring", "disable", "general")
	r := doctor(h, store)
	wantFinding(t, r, "key.state", "keyring:general", "error", "disabled", "kmsfs keyring enable general")
	wantFinding(t, r, "class.read", "phi", "")
	wantFinding(t, r, "class.read", "general", "error", "disabled")
	h.Run("keyring", "schedule-deletion", "--days", "9", "general")
	day := time.Now().AddDate(0, 0, 9).UTC().Format("2006-01-")
	wantFinding(t, doctor(h, store), "key.state", "keyring:general", "error", "pending deletion on "+day[:5], "kmsfs keyring cancel-deletion general")
	h.Run("keyring", "cancel-deletion", "general")
	h.Run("keyring", "enable", "general")

	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Chmod(ring, 0o644))
	wantFinding(t, doctor(h, store), "keyring.file", "", "error", "group or others", "chmod 600")
	must(os.Chmod(ring, 0o600))
	must(os.Rename(ring, ring+".away"))
	r = doctor(h, store)
	wantFinding(t, r, "keyring.file", ring, "error", "no such file", "--keyring")
	wantOnly(t, r, "keyring.file")
	must(os.WriteFile(ring, []byte("{"), 0o600))
	wantFinding(t, doctor(h, store), "keyring.file", ring, "error", "not a keyring file", "backup")
	must(os.Remove(ring))
	h.Run("keyring", "create", "another")
	wantFinding(t, doctor(h, store), "key.state", "keyring:general", "error", "not found", "right keyring file")
	must(os.Rename(ring+".away", ring))

	pass, wrong := filepath.Join(h.Dir, "pass"), filepath.Join(h.Dir, "wrong")
	must(os.WriteFile(pass, []byte("correct horse\n"), 0o600))
	must(os.WriteFile(wrong, []byte("battery staple\n"), 0o600))
	h.Run("keyring", "passphrase", "--new-passphrase-file", pass)
	r = doctor(h, store)
	wantFinding(t, r, "keyring.file", ring, "warning", "was not given", "--passphrase-file")
	wantOnly(t, r, "keyring.file")
	wantFinding(t, doctor(h, "--passphrase-file", wrong, store), "keyring.file", ring, "error", "wrong passphrase")
	r = doctor(h, "--passphrase-file", pass, store)
	wantFinding(t, r, "keyring.file", ring, "ok", "passphrase")
	wantOnly(t, r)
	if strings.Contains(r.Stdout, "correct horse") {
		t.Error("the passphrase shows")
	}
}

// TestDoctorKMSKeys: each state of a key at the service.
func TestDoctorKMSKeys(t *testing.T) {
	t.Parallel()
	s, key := doctorStore(t)
	c := admin(s.kms)
	do := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	everything := []string{"class.create", "class.list", "class.mount", "class.read", "key.state"}
	wantFinding(t, doctor(s.h, s.dir), "key.rotation", key, "info", "aws kms enable-key-rotation")
	do(c.DisableKey(context.Background(), &kms.DisableKeyInput{KeyId: &key}))
	r := doctor(s.h, s.dir)
	wantFinding(t, r, "key.state", key, "error", "disabled", "aws kms enable-key --key-id "+key)
	wantOnly(t, r, everything...)
	do(c.ScheduleKeyDeletion(context.Background(), &kms.ScheduleKeyDeletionInput{KeyId: &key, PendingWindowInDays: aws.Int32(7)}))
	r = doctor(s.h, s.dir)
	wantFinding(t, r, "key.state", key, "error", "pending deletion on "+time.Now().UTC().AddDate(0, 0, 7).Format(time.DateOnly), "cancel-key-deletion")
	wantOnly(t, r, everything...)
	do(c.CancelKeyDeletion(context.Background(), &kms.CancelKeyDeletionInput{KeyId: &key}))
	do(c.EnableKey(context.Background(), &kms.EnableKeyInput{KeyId: &key}))
	wantOnly(t, doctor(s.h, s.dir))
	do(nil, s.kms.SetMaterialExpired(key, true))
	wantFinding(t, doctor(s.h, s.dir), "class.read", "phi", "error", "expired")
	do(nil, s.kms.SetMaterialExpired(key, false))
	do(c.ScheduleKeyDeletion(context.Background(), &kms.ScheduleKeyDeletionInput{KeyId: &key, PendingWindowInDays: aws.Int32(7)}))
	do(nil, s.kms.Advance(8*24*time.Hour))
	r = doctor(s.h, s.dir)
	wantFinding(t, r, "key.state", key, "error", "not found", "account and Region")
	wantOnly(t, r, everything...)
}

// TestDoctorDenied: each operation denied by itself shows where it is needed.
func TestDoctorDenied(t *testing.T) {
	t.Parallel()
	s, key := doctorStore(t)
	for _, tc := range []struct {
		op, purpose   string
		check, level  string
		asReader      string
		remedyMention string
	}{
		{"GenerateDataKey", "data", "class.create", "warning", "info", "kms:GenerateDataKey"},
		{"Decrypt", "data", "class.read", "warning", "error", "kms:Decrypt"},
		{"Decrypt", "names", "class.list", "error", "error", "kms:Decrypt"},
		{"Decrypt", "store", "class.mount", "error", "error", "kms:Decrypt"},
		{"ReEncrypt", "data", "class.rewrap", "info", "info", "kms:ReEncryptFrom"},
		{"DescribeKey", "", "key.state", "info", "info", "kms:DescribeKey"},
	} {
		rule := kmsserver.Fault{Operations: []string{tc.op}, Error: "AccessDeniedException"}
		if tc.purpose != "" {
			rule.Context = map[string]string{"kmsfs:purpose": tc.purpose}
		}
		s.faults(kmsserver.Faults{Rules: []kmsserver.Fault{rule}})
		r := doctor(s.h, s.dir)
		wantFinding(t, r, tc.check, "", tc.level, tc.remedyMention)
		if n := len(levels(t, r, "error")) + len(levels(t, r, "warning")); n > 1 || (n == 0) != (tc.level == "info") {
			t.Errorf("%s for %s: %d errors and warnings\n%s", tc.op, tc.purpose, n, r.Stdout)
		}
		r = doctor(s.h, "--role", "reader", s.dir)
		wantFinding(t, r, tc.check, "", tc.asReader)
		if (r.Code == 10) != (tc.asReader == "error") {
			t.Errorf("as a reader without %s for %s: exit %d", tc.op, tc.purpose, r.Code)
		}
	}
	s.faults(kmsserver.Faults{Rules: []kmsserver.Fault{{Key: key, Error: "ThrottlingException"}}})
	wantFinding(t, doctor(s.h, "--timeout", "1s", s.dir), "class.read", "phi", "error", "throttle")
}

// TestDoctorSecondRecipient: a recovery key that this host may not use is no
// fault, one that is lost is.
func TestDoctorSecondRecipient(t *testing.T) {
	t.Parallel()
	server := kmsserver.StartT(t, kmsserver.Options{})
	var keys []string
	for range 2 {
		arn, err := server.CreateKey(kmsserver.KeyOptions{})
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, arn)
	}
	s := newKMSStoreAt(t, server, envelope.Prefix, []string{"phi"}, map[string]kmsClass{"phi": {keys: keys}})
	s.faults(kmsserver.Faults{Rules: []kmsserver.Fault{{Key: keys[1], Operations: []string{"Decrypt", "DescribeKey"}, Error: "AccessDeniedException"}}})
	r := doctor(s.h, s.dir)
	wantOnly(t, r)
	wantFinding(t, r, "class.read", "phi", "info", "works with "+keys[0])
	if _, err := admin(server).DisableKey(context.Background(), &kms.DisableKeyInput{KeyId: &keys[1]}); err != nil {
		t.Fatal(err)
	}
	s.faults(kmsserver.Faults{})
	r = doctor(s.h, s.dir)
	wantFinding(t, r, "class.read", "phi", "warning", "works with "+keys[0])
	wantFinding(t, r, "class.create", "phi", "error", "disabled")
	wantFinding(t, r, "key.state", keys[1], "error", "disabled")
}

// TestDoctorCredentials: none, refused, expired, about to expire.
func TestDoctorCredentials(t *testing.T) {
	t.Parallel()
	s, _ := doctorStore(t)
	with := func(env ...string) *rig.Home {
		h := *s.h
		h.Env = append(slices.Clone(s.h.Env), env...)
		return &h
	}
	r := doctor(with("AWS_ACCESS_KEY_ID=", "AWS_SECRET_ACCESS_KEY="), s.dir)
	wantFinding(t, r, "aws.credentials", "", "error", "aws sso login")
	wantOnly(t, r, "aws.credentials")
	for what, env := range map[string]string{"unknown": "AWS_ACCESS_KEY_ID=AKIANOBODY0000000000", "wrong secret": "AWS_SECRET_ACCESS_KEY=wrong-and-secret-all-the-same"} {
		s.kms.ResetCalls()
		r = doctor(with(env), s.dir)
		wantFinding(t, r, "aws.credentials", "", "ok")
		wantOnly(t, r, "aws.credentials")
		if !strings.Contains(r.Stdout, "the service refuses them") || strings.Contains(r.Stdout, "wrong-and-secret") {
			t.Errorf("%s: %s", what, r.Stdout)
		}
		if n := s.kms.Count(""); n > 2 { // and the one without a signature
			t.Errorf("%s: %d calls with credentials that are refused", what, n)
		}
	}
	if err := s.kms.SetExpired(kmsserver.DefaultPrincipal().AccessKeyID, true); err != nil {
		t.Fatal(err)
	}
	r = doctor(s.h, s.dir)
	wantOnly(t, r, "aws.credentials")
	if !strings.Contains(r.Stdout, "expired") {
		t.Errorf("expired credentials: %s", r.Stdout)
	}
	if err := s.kms.SetExpired(kmsserver.DefaultPrincipal().AccessKeyID, false); err != nil {
		t.Fatal(err)
	}
	p := kmsserver.DefaultPrincipal()
	config := filepath.Join(t.TempDir(), "config")
	until := func(d time.Duration) rig.Result {
		answer, err := json.Marshal(map[string]any{"Version": 1, "AccessKeyId": p.AccessKeyID, "SecretAccessKey": p.SecretAccessKey,
			"Expiration": time.Now().Add(d).UTC().Format(time.RFC3339)})
		if err != nil {
			t.Fatal(err)
		}
		put(t, config+".json", answer)
		put(t, config, []byte("[default]\ncredential_process = cat "+config+".json\n"))
		return doctor(with("AWS_ACCESS_KEY_ID=", "AWS_SECRET_ACCESS_KEY=", "AWS_CONFIG_FILE="+config), s.dir)
	}
	wantFinding(t, until(time.Hour), "aws.credentials", p.AccessKeyID, "ok", "ProcessProvider", "valid until")
	wantFinding(t, until(5*time.Minute), "aws.credentials", p.AccessKeyID, "warning", "valid until")
	wantFinding(t, until(-time.Hour), "aws.credentials", "", "error", "expired")
}

// TestDoctorService: not there, hanging, not HTTP; the time it takes is bounded.
func TestDoctorService(t *testing.T) {
	t.Parallel()
	s, _ := doctorStore(t)
	for _, outage := range []kmsserver.Outage{kmsserver.OutageRefuse, kmsserver.OutageHang, kmsserver.OutageReset} {
		s.faults(kmsserver.Faults{Outage: outage})
		start := time.Now()
		r := doctor(s.h, "--timeout", "1s", s.dir)
		wantFinding(t, r, "aws.endpoint", "", "error", "network")
		wantOnly(t, r, "aws.endpoint")
		if took := time.Since(start); took > 30*time.Second { // 1 s for each round of checks
			t.Errorf("%s: took %v", outage, took)
		}
	}
	s.faults(kmsserver.Faults{})
	r := doctor(s.h, "--endpoint-url", "https://kms.invalid", "--timeout", "2s", s.dir)
	wantFinding(t, r, "aws.endpoint", "", "error", "kms.invalid")
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = log.New(io.Discard, "", 0) // it is refused, on purpose
	secure.StartTLS()
	t.Cleanup(secure.Close)
	wantFinding(t, doctor(s.h, "--endpoint-url", secure.URL, "--timeout", "2s", s.dir), "aws.endpoint", "", "error", "certificate")
	for _, bad := range []string{"1ms", "2h"} {
		if r := s.h.Try("doctor", "--timeout", bad, s.dir); r.Code != 2 {
			t.Errorf("--timeout %s: exit %d", bad, r.Code)
		}
	}
}

// TestDoctorClock: the service's clock is some minutes off this machine's.
func TestDoctorClock(t *testing.T) {
	t.Parallel()
	s, _ := doctorStore(t)
	target, err := url.Parse(s.kms.URL())
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		shift time.Duration
		level string
		word  string
	}{{10 * time.Minute, "error", "behind"}, {-10 * time.Minute, "error", "ahead of"}, {4 * time.Minute, "warning", "4m"}, {-20 * time.Second, "ok", "20s ahead of"}} {
		proxy := &httputil.ReverseProxy{
			Rewrite: func(p *httputil.ProxyRequest) { // the signature covers Host, which stays
				p.Out.URL.Scheme, p.Out.URL.Host = target.Scheme, target.Host
				p.Out.Host = p.In.Host
			},
			ModifyResponse: func(r *http.Response) error {
				r.Header.Set("Date", time.Now().Add(tc.shift).UTC().Format(http.TimeFormat))
				return nil
			},
		}
		server := httptest.NewServer(proxy)
		r := doctor(s.h, "--endpoint-url", server.URL, s.dir)
		server.Close()
		f := findingOf(t, r, "clock.service", "")
		if f.Level != tc.level || !strings.Contains(f.Text, tc.word) && tc.level != "ok" {
			t.Errorf("%v: %+v, want %s, %q", tc.shift, f, tc.level, tc.word)
		}
		if tc.level == "error" && !strings.Contains(f.Remedy, "timedatectl") {
			t.Errorf("%v: %+v", tc.shift, f)
		}
	}
}

// TestDoctorKnownStores: only keys that this machine trusts are called.
func TestDoctorKnownStores(t *testing.T) {
	t.Parallel()
	s, key := doctorStore(t)
	stranger := rig.NewHome(t, s.kms.Env(kmsserver.DefaultPrincipal())...)
	quiet := func(what string, r rig.Result) {
		t.Helper()
		if n := s.kms.Count(""); n != 0 {
			t.Errorf("%s: %d calls of the service", what, n)
		}
		if f := findingOf(t, r, "key.state", ""); f.Level != "" {
			t.Errorf("%s: %+v", what, f)
		}
		s.kms.ResetCalls()
	}
	s.kms.ResetCalls()
	r := doctor(stranger, s.dir)
	wantFinding(t, r, "store.known", s.dir, "warning", "new to this machine", "kmsfs known-stores accept")
	quiet("a new store", r)
	r = doctor(stranger, "--trust", s.dir)
	wantFinding(t, r, "key.state", key, "ok")
	if out := stranger.Run("known-stores", "list"); strings.Contains(out, s.dir) {
		t.Errorf("--trust noted the store: %s", out)
	}
	s.kms.ResetCalls()

	known := filepath.Join(s.h.Dir, ".config/kmsfs/known-stores")
	text, err := os.ReadFile(known)
	if err != nil {
		t.Fatal(err)
	}
	rewrite := func(old, new string) {
		t.Helper()
		changed := bytes.ReplaceAll(text, []byte(old), []byte(new))
		if bytes.Equal(changed, text) {
			t.Fatalf("no %q in %s", old, text)
		}
		if err := os.WriteFile(known, changed, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rewrite(key, "keyring:other")
	for _, args := range [][]string{{s.dir}, {"--trust", s.dir}} {
		r = doctor(s.h, args...)
		wantFinding(t, r, "store.known", s.dir, "error", "keys changed", "keyring:other", key, "kmsfs known-stores accept")
		quiet("changed keys", r)
	}
	rewrite(s.storeID(), strings.Repeat("ab", 16))
	r = doctor(s.h, s.dir)
	wantFinding(t, r, "store.known", s.dir, "error", "another store was here")
	quiet("a swapped store", r)
	rewrite("kmsfs known-stores 1", "kmsfs known-stores 7")
	wantFinding(t, doctor(s.h, s.dir), "store.known", s.dir, "error", "line 1")
	if err := os.Chmod(known, 0o666); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, doctor(s.h, s.dir), "store.known", s.dir, "error", "written by others", "chmod 600")
}
