package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// kmsStore is a store under keys of a KMS of its own.
type kmsStore struct {
	victimStore
	kms *kmsserver.Server
	arn map[string]string // class -> key ARN
}

// kmsClass is a class of a test policy. keys are aliases or ARNs; without any
// the class gets a fresh key.
type kmsClass struct {
	keys    []string
	cache   string
	options string // further ones, in YAML's flow style: "data_keys: shared"
}

// newKMSStore makes a store with the given classes; the first is the default,
// the others have a directory of their name at the top.
func newKMSStore(t *testing.T, p envelope.Placement, names []string, classes map[string]kmsClass) *kmsStore {
	t.Helper()
	return newKMSStoreAt(t, kmsserver.StartT(t, kmsserver.Options{}), p, names, classes)
}

func newKMSStoreAt(t *testing.T, server *kmsserver.Server, p envelope.Placement, names []string, classes map[string]kmsClass) *kmsStore {
	t.Helper()
	rig.Need(t, "root", "fuse")
	s := &kmsStore{kms: server, arn: map[string]string{}}
	s.victimStore = victimStore{
		t: t, h: rig.NewHome(t, server.Env(kmsserver.DefaultPrincipal())...), dir: filepath.Join(t.TempDir(), "S"),
		place: p, entries: map[string]string{}, plain: map[string][]byte{},
	}
	policy := "version: 1\ndefault: " + names[0] + "\nclasses:\n"
	rules := ""
	for i, name := range names {
		c := classes[name]
		if len(c.keys) == 0 {
			arn, err := server.CreateKey(kmsserver.KeyOptions{})
			if err != nil {
				t.Fatal(err)
			}
			c.keys, s.arn[name] = []string{arn}, arn
		}
		if c.cache == "" {
			c.cache = "5m"
		}
		keys, err := json.Marshal(c.keys)
		if err != nil {
			t.Fatal(err)
		}
		if c.options != "" {
			c.options = ", " + c.options
		}
		policy += fmt.Sprintf("  %s: { keys: %s, cache: %s, chunk_size: 4KiB%s }\n", name, keys, c.cache, c.options)
		if i > 0 {
			rules += fmt.Sprintf("  /%s: %s\n", name, name)
		}
	}
	if rules != "" {
		policy += "directories:\n" + rules
	}
	file := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(file, []byte(policy), 0o600); err != nil {
		t.Fatal(err)
	}
	s.h.Run("init", "--policy", file, "--placement", p.String(), s.dir)
	return s
}

// mount mounts and makes the classes' directories, and forgets the calls.
func (s *kmsStore) mount(dirs ...string) *rig.Mount {
	s.t.Helper()
	m := s.h.Mount(s.dir)
	for _, d := range dirs {
		if err := os.MkdirAll(m.Path(d), 0o755); err != nil {
			s.t.Fatal(err)
		}
	}
	s.kms.ResetCalls()
	return m
}

// again unmounts and mounts with cold caches, and forgets the calls.
func (s *kmsStore) again(m *rig.Mount) {
	s.t.Helper()
	m.Unmount()
	m.Again()
	s.kms.ResetCalls()
}

// calls returns what was called since the last look, by operation.
func (s *kmsStore) calls() map[string]int {
	out := map[string]int{}
	for _, c := range s.kms.Calls() {
		out[c.EventName]++
	}
	s.kms.ResetCalls()
	return out
}

// contextIDs returns the ids in the encryption contexts of an operation's calls.
func (s *kmsStore) contextIDs(op string) map[string]bool {
	out := map[string]bool{}
	for _, c := range s.kms.Calls() {
		if c.EventName == op {
			out[c.EncryptionContext["kmsfs:id"]] = true
		}
	}
	return out
}

func (s *kmsStore) wantCalls(what string, want map[string]int) {
	s.t.Helper()
	got := s.calls()
	for _, op := range []string{"GenerateDataKey", "Decrypt", "Encrypt", "ReEncrypt", "DescribeKey"} {
		if got[op] != want[op] {
			s.t.Errorf("%s: %d calls of %s, want %d (%v)", what, got[op], op, want[op], got)
		}
	}
}

func (s *kmsStore) faults(f kmsserver.Faults) {
	s.t.Helper()
	if err := s.kms.SetFaults(f); err != nil {
		s.t.Fatal(err)
	}
}

// fileInfo is what kmsfs info --json tells of a file on a mount.
type fileInfo struct {
	Class string
	ID    string
	Keys  []string
}

func (s *kmsStore) info(path string) fileInfo {
	s.t.Helper()
	var i fileInfo
	if err := json.Unmarshal([]byte(s.h.Run("info", "--json", path)), &i); err != nil {
		s.t.Fatal(err)
	}
	return i
}

// storeID reads the store's id from the known-stores file.
func (s *kmsStore) storeID() string {
	s.t.Helper()
	b := s.read(s.recordPath())
	_, rest, ok := strings.Cut(string(b), `"id":"`)
	if !ok || len(rest) < 32 {
		s.t.Fatalf("store record: %.200s", b)
	}
	return rest[:32]
}
