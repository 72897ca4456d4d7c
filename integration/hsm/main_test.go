//go:build pkcs11

package hsm

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// TestMain makes the rig build the program with PKCS#11.
func TestMain(m *testing.M) {
	for name, value := range map[string]string{"GOFLAGS": "-tags=pkcs11", "CGO_ENABLED": "1"} {
		if err := os.Setenv(name, value); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	code := m.Run()
	rig.Clean()
	os.Exit(code)
}

const (
	pin   = "4711-user-pin"
	label = "kmsfs test"
	// tokenURI is followed by the object's label.
	tokenURI = "pkcs11:token=kmsfs%20test;object="
)

// module finds SoftHSM2, or skips; where nothing may be missing, it fails.
func module(t *testing.T) string {
	t.Helper()
	rig.Need(t, "fuse", "softhsm2-util", "pkcs11-tool")
	for _, path := range []string{os.Getenv("SOFTHSM2_MODULE"), "/usr/lib/softhsm/libsofthsm2.so",
		"/usr/lib64/pkcs11/libsofthsm2.so", "/usr/local/lib/softhsm/libsofthsm2.so"} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("missing: libsofthsm2.so")
	}
	t.Skip("missing: libsofthsm2.so")
	return ""
}

// user is a user of kmsfs with a token.
type user struct {
	*rig.Home
	module  string
	tokens  string // directory that is the token
	pinFile string
}

func newUser(t *testing.T, env ...string) *user {
	t.Helper()
	u := &user{module: module(t)}
	dir := t.TempDir()
	u.tokens, u.pinFile = filepath.Join(dir, "tokens"), filepath.Join(dir, "pin")
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := os.Mkdir(u.tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, conf, "directories.tokendir = "+u.tokens+"\nobjectstore.backend = file\nlog.level = ERROR\n")
	write(t, u.pinFile, pin+"\n")
	u.Home = rig.NewHome(t, append(env, "SOFTHSM2_CONF="+conf, "KMSFS_PKCS11_MODULE="+u.module, "KMSFS_PKCS11_PIN_FILE="+u.pinFile)...)
	u.exec("softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", "12345678", "--pin", pin)
	return u
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (u *user) exec(name string, args ...string) {
	u.T.Helper()
	if r := u.Exec(nil, name, args...); r.Code != 0 {
		u.T.Fatalf("%s %s: exit %d: %s%s", name, strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
}

func (u *user) tool(args ...string) {
	u.T.Helper()
	u.exec("pkcs11-tool", append([]string{"--module", u.module, "--token-label", label, "--login", "--pin", pin}, args...)...)
}

// keygen makes a version of a key, as an administrator does.
func (u *user) keygen(object, id string) {
	u.T.Helper()
	u.tool("--keygen", "--key-type", "AES:32", "--label", object, "--id", id, "--sensitive")
}

// store makes a store under one key.
func (u *user) store(key string) string {
	u.T.Helper()
	dir := filepath.Join(u.T.TempDir(), "store")
	u.Run("init", "--key", key, dir)
	return dir
}

func wantFile(t *testing.T, path, want string) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || string(got) != want {
		t.Errorf("%s: got %.60q, %v, want %.60q", filepath.Base(path), got, err, want)
	}
}

// TestLayersWithTag holds what the build tag adds to the table of
// integration/layering_test.go.
func TestLayersWithTag(t *testing.T) {
	allowed := map[string][]string{
		"github.com/kmsfs/kmsfs/crypto/keywrap/pkcs11": {"C", "unsafe", "github.com/miekg/pkcs11"},
		"github.com/kmsfs/kmsfs/cmd/kmsfs":             {"github.com/kmsfs/kmsfs/crypto/keywrap/pkcs11"},
	}
	for pkg, want := range allowed {
		without, with := imports(t, "", pkg), imports(t, "pkcs11", pkg)
		for _, imp := range with {
			if !slices.Contains(without, imp) && !slices.Contains(want, imp) && strings.Contains(imp, ".") {
				t.Errorf("%s with the tag imports %s", pkg, imp)
			}
		}
		for _, imp := range want {
			if !slices.Contains(with, imp) || slices.Contains(without, imp) {
				t.Errorf("%s: import %s: with the tag %v, without %v", pkg, imp, slices.Contains(with, imp), slices.Contains(without, imp))
			}
		}
	}
}

func imports(t *testing.T, tags, pkg string) []string {
	t.Helper()
	cmd := exec.Command("go", "list", "-tags="+tags, "-json=Imports", pkg)
	cmd.Env = append(os.Environ(), "GOFLAGS=")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderr.String())
	}
	var p struct{ Imports []string }
	if err := json.Unmarshal(out, &p); err != nil || len(p.Imports) == 0 {
		t.Fatalf("%s: %v", out, err)
	}
	return p.Imports
}
