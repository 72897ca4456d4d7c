//go:build pkcs11

package hsm

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
)

// TestRewrap takes a store from the keyring to the token, to AWS KMS, and back
// the same way. At each stop the old key is dropped from the policy, and taken
// out of reach, before everything is read.
func TestRewrap(t *testing.T) {
	server := kmsserver.StartT(t, kmsserver.Options{})
	arn, err := server.CreateKey(kmsserver.KeyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	u := newUser(t, server.Env(kmsserver.DefaultPrincipal())...)
	u.Env = append(u.Env, "KMSFS_KEYRING="+filepath.Join(u.Dir, "keyring.json"), "KMSFS_KNOWN_STORES="+filepath.Join(u.Dir, "known-stores"))
	u.keygen("phi", "01")
	hsmKey := tokenURI + "phi"
	const keyringKey = "keyring:general"
	dir := filepath.Join(t.TempDir(), "store")
	u.Run("init", dir)
	m := u.Mount(dir)
	files := map[string]string{}
	put := func(name string) {
		files[name] = strings.Repeat("contents of "+name+" ", 500)
		m.Put(name, []byte(files[name]))
	}
	for i := range 5 {
		put(fmt.Sprintf("made under the keyring %d", i))
	}
	m.Unmount()
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	apply := func(keys, retired string) {
		t.Helper()
		text := "version: 1\ndefault: general\nclasses:\n  general: { keys: [\"" + keys + "\"]"
		if retired != "" {
			text += ", retired: [\"" + retired + "\"]"
		}
		write(t, policy, text+" }\n")
		u.Run("policy", "apply", dir, policy)
	}
	old := keyringKey
	for _, stop := range []string{hsmKey, arn, hsmKey, keyringKey} {
		apply(stop, old)
		u.Run("rewrap", dir)
		apply(stop, "")
		u.without(old, func() {
			m.Again()
			for name, want := range files {
				wantFile(t, m.Path(name), want)
				if got := u.key(m.Path(name)); got != stop {
					t.Errorf("%s is under %s, want %s", name, got, stop)
				}
			}
			put("made at " + strings.NewReplacer("/", "_", ":", "_").Replace(stop))
			m.Unmount()
		})
		u.Run("fsck", dir)
		old = stop
	}
}

// without runs f with the key service of a key configured away.
func (u *user) without(key string, f func()) {
	env := u.Env
	defer func() { u.Env = env }()
	switch {
	case strings.HasPrefix(key, "keyring:"):
		u.Env = append(env[:len(env):len(env)], "KMSFS_KEYRING=/no/such/keyring.json")
	case strings.HasPrefix(key, "pkcs11:"):
		u.Env = append(env[:len(env):len(env)], "KMSFS_PKCS11_MODULE=/no/such/module.so")
	default:
		u.Env = append(env[:len(env):len(env)], "AWS_ENDPOINT_URL_KMS=http://127.0.0.1:1", "AWS_ENDPOINT_URL=http://127.0.0.1:1")
	}
	f()
}
