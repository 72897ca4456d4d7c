package fusefs

import (
	"context"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// layout is a way to lay a store out that the kernel must not notice.
type layout struct {
	placement envelope.Placement
	names     classify.NameMode
}

func (l layout) String() string { return l.placement.String() + "," + string(l.names) }

var layouts = []layout{
	{envelope.Prefix, classify.NamesEncrypted},
	{envelope.Prefix, classify.NamesPlain},
	{envelope.Xattr, classify.NamesEncrypted},
	{envelope.Xattr, classify.NamesPlain},
	{envelope.Sidecar, classify.NamesEncrypted},
	{envelope.Sidecar, classify.NamesPlain},
}

// testStore is a store with the keyring that opens it.
type testStore struct {
	dir     string
	keys    *keyring.Keyring
	wrapper keywrap.Provider // what to use in place of keys, or nil
}

func newStore(t *testing.T, l layout) *testStore {
	t.Helper()
	policy := classify.Single("general", "keyring:general")
	class := policy.Classes["general"]
	class.Names = l.names
	policy.Classes["general"] = class
	return newStoreOf(t, l.placement, policy)
}

func newStoreOf(t *testing.T, placement envelope.Placement, policy *classify.Policy) *testStore {
	t.Helper()
	s := &testStore{dir: filepath.Join(t.TempDir(), "store"), keys: keyring.NewMemory()}
	for _, class := range policy.Classes {
		for _, key := range class.Keys {
			must(t, s.keys.CreateKey(key[len("keyring:"):]))
		}
	}
	_, err := cryptfs.Init(context.Background(), cryptfs.InitConfig{
		Store: s.dir, Policy: policy, Placement: placement, HeaderSize: envelope.DefaultHeader,
		Suite: dare.AES256GCM, Provider: s.provider(),
	})
	must(t, err)
	return s
}

func (s *testStore) provider() keywrap.Provider {
	if s.wrapper != nil {
		return s.wrapper
	}
	return s.keys
}

func (s *testStore) open(t *testing.T) *cryptfs.Volume {
	t.Helper()
	info, err := cryptfs.Inspect(s.dir)
	must(t, err)
	v, err := cryptfs.Open(context.Background(), cryptfs.Config{
		Store: s.dir, Provider: s.provider(), Keys: info.Keys, Log: slog.New(slog.DiscardHandler),
	})
	must(t, err)
	return v
}

func (s *testStore) close(t *testing.T, v *cryptfs.Volume) {
	t.Helper()
	if err := v.Close(); err != nil {
		t.Errorf("close the volume: %v", err)
	}
}
