package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
)

// kmsd runs the program's own entry point and returns exit code and output.
func kmsd(args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = run(context.Background(), args, strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

var readyForm = regexp.MustCompile(`^kmsd: ready url=(http://127\.0\.0\.1:[0-9]+) admin=(http://127\.0\.0\.1:[0-9]+) region=us-east-1 account=[0-9]{12}$`)

// serve runs the server until the function it returns is called.
func serve(t *testing.T, args ...string) (url, adminURL string, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	var errs bytes.Buffer
	ended := make(chan int, 1)
	go func() {
		code := run(ctx, args, strings.NewReader(""), w, &errs)
		w.Close()
		ended <- code
	}()
	line, err := bufio.NewReader(r).ReadString('\n')
	m := readyForm.FindStringSubmatch(strings.TrimSpace(line))
	if err != nil || m == nil {
		cancel()
		t.Fatalf("ready line %q (%v), exit code %d: %s", line, err, <-ended, errs.String())
	}
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if code := <-ended; code != exitOK {
			t.Errorf("exit code %d: %s", code, errs.String())
		}
	}
	t.Cleanup(stop)
	return m[1], m[2], stop
}

// awsCLI returns a function that runs the aws command line against the server.
func awsCLI(t *testing.T, url string, p kmsserver.Principal) func(args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath("aws")
	if err != nil {
		if os.Getenv("CI") == "true" || os.Getenv("REQUIRE_KMS") == "1" {
			t.Fatal("missing: the aws command line")
		}
		t.Skip("missing: the aws command line")
	}
	env := append(os.Environ(), kmsserver.Env(url, kmsserver.DefaultRegion, p)...)
	env = append(env, "AWS_MAX_ATTEMPTS=1", "AWS_PAGER=", "AWS_DEFAULT_OUTPUT=text")
	return func(args ...string) (string, error) {
		cmd := exec.Command(path, append([]string{"kms"}, args...)...)
		cmd.Env = env
		out, err := cmd.CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
}

// TestAWSCommandLine is a session as an administrator types it.
func TestAWSCommandLine(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "calls.jsonl")
	portFile := filepath.Join(dir, "port")
	url, adminURL, _ := serve(t, "--log", log, "--port-file", portFile)
	if port, err := os.ReadFile(portFile); err != nil || !strings.HasSuffix(url, ":"+strings.TrimSpace(string(port))) {
		t.Errorf("port file %q, %v; URL %s", port, err, url)
	}
	aws := awsCLI(t, url, kmsserver.DefaultPrincipal())
	ok := func(args ...string) string {
		t.Helper()
		out, err := aws(args...)
		if err != nil {
			t.Fatalf("aws kms %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return out
	}
	fails := func(want string, args ...string) {
		t.Helper()
		if out, err := aws(args...); err == nil || !strings.Contains(out, want) {
			t.Errorf("aws kms %s: %v\n%s\nwant %q", strings.Join(args, " "), err, out, want)
		}
	}
	arn := ok("create-key", "--description", "patients", "--query", "KeyMetadata.Arn")
	ok("create-alias", "--alias-name", "alias/phi", "--target-key-id", arn)
	blob, err := base64.StdEncoding.DecodeString(ok("generate-data-key-without-plaintext", "--key-id", "alias/phi",
		"--key-spec", "AES_256", "--encryption-context", "kmsfs:class=phi", "--query", "CiphertextBlob"))
	if err != nil || len(blob) != 184 {
		t.Fatalf("blob of %d bytes, %v", len(blob), err)
	}
	file := filepath.Join(dir, "blob")
	if err := os.WriteFile(file, blob, 0o600); err != nil {
		t.Fatal(err)
	}
	decrypt := []string{"decrypt", "--ciphertext-blob", "fileb://" + file, "--encryption-context", "kmsfs:class=phi", "--query", "KeyId"}
	if got := ok(decrypt...); got != arn {
		t.Errorf("decrypt: key %s, want %s", got, arn)
	}
	fails("InvalidCiphertextException", "decrypt", "--ciphertext-blob", "fileb://"+file)
	ok("rotate-key-on-demand", "--key-id", arn)
	if got := ok("list-key-rotations", "--key-id", arn, "--query", "Rotations[].RotationType"); got != "ON_DEMAND" {
		t.Errorf("rotations = %s", got)
	}
	ok(decrypt...)
	fails("DryRunOperation", append(decrypt, "--dry-run")...)
	ok("disable-key", "--key-id", arn)
	fails("(DisabledException)", decrypt...)
	if code, _, errs := kmsd("ctl", "--url", adminURL, "fault", "outage", "unavailable"); code != exitOK {
		t.Errorf("ctl: %s", errs)
	}
	fails("(ServiceUnavailableException)", decrypt...)

	var last kmsserver.Call
	text, err := os.ReadFile(log)
	lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	if err != nil || json.Unmarshal(lines[len(lines)-1], &last) != nil || last.EventName != "Decrypt" || last.Injected != "outage" || last.KeyID != arn {
		t.Errorf("last line of the log: %+v, %v", last, err)
	}
}

// TestControl drives every ctl subcommand.
func TestControl(t *testing.T) {
	url, adminURL, _ := serve(t)
	ok := func(args ...string) string {
		t.Helper()
		code, out, errs := kmsd(append([]string{"ctl", "--url", url}, args...)...)
		if code != exitOK || errs != "" {
			t.Errorf("%v: exit code %d: %s", args, code, errs)
		}
		return out
	}
	var made struct{ ARN string }
	if err := json.Unmarshal([]byte(ok("key", "create", `{"alias":"alias/a"}`)), &made); err != nil || !strings.HasPrefix(made.ARN, "arn:") {
		t.Fatalf("key create: %+v, %v", made, err)
	}
	ok("key", "expire-material", made.ARN)
	ok("key", "restore-material", "alias/a")
	ok("key", "policy", "alias/a", `{"Statement":{"Effect":"Allow","Principal":"*","Action":"*","Resource":"*"}}`)
	ok("principal", "add", `{"access_key_id":"AKIABOB","secret_access_key":"s","arn":"arn:aws:iam::111122223333:user/bob"}`)
	ok("principal", "expire", "AKIABOB")
	if out := ok("principal", "list"); !strings.Contains(out, `"expired": true`) {
		t.Errorf("principal list = %s", out)
	}
	ok("principal", "renew", "AKIABOB")
	ok("fault", "set", `{"latency_ms":5,"rules":[{"error":"ThrottlingException"}]}`)
	if out := ok("fault", "add", `{"error":"KMSInternalException"}`); !strings.Contains(out, `"id": 2`) {
		t.Errorf("fault add = %s", out)
	}
	ok("fault", "remove", "2")
	if out := ok("fault", "list"); !strings.Contains(out, "ThrottlingException") || strings.Contains(out, "KMSInternalException") {
		t.Errorf("fault list = %s", out)
	}
	ok("fault", "outage", "refuse")
	if code, _, errs := kmsd("ctl", "--url", url, "status"); code != exitError || !strings.Contains(errs, "connection refused") {
		t.Errorf("endpoint during refuse: %d %s", code, errs)
	}
	if code, out, errs := kmsd("ctl", "--url", adminURL, "status"); code != exitOK || !strings.Contains(out, "refuse") {
		t.Errorf("admin listener during refuse: %d %s %s", code, out, errs)
	}
	if code, _, errs := kmsd("ctl", "--url", adminURL, "fault", "clear"); code != exitOK {
		t.Errorf("fault clear: %s", errs)
	}
	ok("advance", "168h")
	ok("calls", "list")
	if out := ok("calls", "count"); out != "" {
		t.Errorf("calls count without calls = %s", out)
	}
	ok("calls", "reset")
	ok("status")
}

func TestStateAndConfig(t *testing.T) {
	dir := t.TempDir()
	state, config := filepath.Join(dir, "state"), filepath.Join(dir, "config")
	text := `{"account":"444455556666","keys":[{"alias":"alias/phi"}],"faults":{"rate_limit":1000},
		"principals":[{"access_key_id":"AKIAALICE","secret_access_key":"s","arn":"arn:aws:iam::444455556666:user/alice"}]}`
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second run finds the key of the first
		url, _, stop := serve(t, "--config", config, "--state", state)
		_, out, _ := kmsd("ctl", "--url", url, "status")
		if !strings.Contains(out, `"keys": 1`) || !strings.Contains(out, "444455556666") {
			t.Errorf("status = %s", out)
		}
		stop()
	}
	if err := os.WriteFile(config, []byte(`{"acount":"444455556666"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := kmsd("--config", config); code != exitError || !strings.Contains(errs, "acount") {
		t.Errorf("misspelt configuration: %d %s", code, errs)
	}
}

func TestExitCodes(t *testing.T) {
	t.Setenv("KMSD_URL", "")
	for args, want := range map[string]int{
		"--help": exitOK, "ctl --help": exitOK, "ctl fault": exitOK, "env --url http://127.0.0.1:1": exitOK,
		"--nope": exitUsage, "nonsense": exitUsage, "ctl nonsense": exitUsage, "ctl fault nonsense": exitUsage,
		"ctl fault set": exitUsage, "ctl status": exitUsage, "env": exitUsage,
		"--listen 0.0.0.0:0": exitError, "--admin-listen [::]:0": exitError, "--config /nonexistent": exitError,
		"ctl --url http://127.0.0.1:1 status": exitError, "ctl --url http://127.0.0.1:1 advance soon": exitError,
	} {
		code, _, errs := kmsd(strings.Fields(args)...)
		if code != want || (want != exitOK) != strings.HasPrefix(errs, "kmsd: error: ") {
			t.Errorf("kmsd %s: exit code %d, want %d: %s", args, code, want, errs)
		}
	}
	if _, out, _ := kmsd("env", "--url", "http://127.0.0.1:1"); !strings.Contains(out, "export AWS_ENDPOINT_URL_KMS='http://127.0.0.1:1'\n") {
		t.Errorf("env = %s", out)
	}
}
