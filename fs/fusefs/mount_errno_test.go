package fusefs

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/classify"
)

// newTwoClassStore has the class phi, whose key is asked for at every open, in
// /phi, and general elsewhere.
func newTwoClassStore(t *testing.T) *testStore {
	t.Helper()
	policy := classify.Single("general", "keyring:general")
	phi := policy.Classes["general"]
	phi.Keys, phi.Cache = []string{"keyring:phi"}, 0
	policy.Classes["phi"] = phi
	policy.Directories["/phi"] = "phi"
	return newStoreOf(t, envelope.Prefix, policy)
}

// requireLine returns the log line that has every one of words.
func (l *logLines) requireLine(t *testing.T, words ...string) {
	t.Helper()
	for line := range strings.Lines(l.String()) {
		found := true
		for _, word := range words {
			found = found && strings.Contains(line, word)
		}
		if found {
			return
		}
	}
	t.Errorf("no log line has all of %q:\n%s", words, l)
}

// S-1 S-9 S-42
func TestKeyErrors(t *testing.T) {
	m := mountStore(t, newTwoClassStore(t), Options{})
	must(t, os.Mkdir(m.path("phi"), 0o700))
	file := m.path("phi", "secret-plan")
	must(t, os.WriteFile(file, []byte("x"), 0o600))
	keys := m.store.keys

	must(t, keys.Disable("phi"))
	// An open file keeps its key, and the kernel releases one after close has
	// returned.
	var err error
	for range 100 {
		if _, err = os.ReadFile(file); err != nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if !errors.Is(err, unix.ENOKEY) {
		t.Errorf("key disabled: got %v, want ENOKEY", err)
	}
	m.log.requireLine(t, "op=open", "errno=ENOKEY", "key=keyring:phi", "hint=")
	if _, err := os.Stat(file); err != nil {
		t.Errorf("stat needs a key: %v", err)
	}
	if list, err := os.ReadDir(m.path("phi")); err != nil || len(list) != 1 {
		t.Errorf("listing needs a data key: %v, %v", list, err)
	}
	must(t, os.WriteFile(m.path("general-still-works"), []byte("x"), 0o600))

	must(t, keys.Enable("phi"))
	must(t, keys.ScheduleDeletion("phi", 7))
	time.Sleep(1100 * time.Millisecond) // failures are remembered for a second
	if _, err := os.ReadFile(file); !errors.Is(err, unix.EKEYREVOKED) {
		t.Errorf("key pending deletion: got %v, want EKEYREVOKED", err)
	}
	must(t, keys.CancelDeletion("phi"))
	must(t, keys.Enable("phi"))
	time.Sleep(1100 * time.Millisecond)
	if got, err := os.ReadFile(file); err != nil || string(got) != "x" {
		t.Errorf("key enabled again: %q, %v", got, err)
	}
	if log := m.log.String(); strings.Contains(log, "secret-plan") {
		t.Errorf("the log has a plaintext name:\n%s", log)
	}
}

// S-24 S-25
func TestClassBoundary(t *testing.T) {
	m := mountStore(t, newTwoClassStore(t), Options{})
	must(t, os.Mkdir(m.path("phi"), 0o700))
	must(t, os.WriteFile(m.path("file"), []byte("x"), 0o600))
	if err := os.Rename(m.path("file"), m.path("phi", "file")); !errors.Is(err, unix.EXDEV) {
		t.Errorf("rename: got %v, want EXDEV", err)
	}
	if err := os.Link(m.path("file"), m.path("phi", "file")); !errors.Is(err, unix.EXDEV) {
		t.Errorf("link: got %v, want EXDEV", err)
	}
	if log := m.log.String(); log != "" {
		t.Errorf("an everyday answer is logged:\n%s", log)
	}
	if err := os.Rename(m.path("phi"), m.path("elsewhere")); !errors.Is(err, unix.EBUSY) {
		t.Errorf("rename of a directory with a rule: got %v, want EBUSY", err)
	}
	m.log.requireLine(t, "op=rename", "errno=EBUSY")
}

// S-1 S-10
func TestForgedChunk(t *testing.T) {
	m := mountStore(t, newStore(t, layouts[0]), Options{})
	file := m.path("secret-plan")
	must(t, os.WriteFile(file, bytes.Repeat([]byte("x"), 100_000), 0o600))
	m.unmount(t)
	flipByte(t, m.store.dir, 100_000)
	m = mountStore(t, m.store, Options{})
	file = m.path("secret-plan")
	if _, err := os.ReadFile(file); !errors.Is(err, unix.EIO) {
		t.Errorf("got %v, want EIO", err)
	}
	m.log.requireLine(t, "level=ERROR", "op=read", "errno=EIO", "kind=integrity", "audit=true")
	if strings.Contains(m.log.String(), "secret-plan") {
		t.Errorf("the log has a plaintext name:\n%s", m.log)
	}
	if st, err := os.Stat(file); err != nil || st.Size() != 100_000 {
		t.Errorf("stat: %v, %v", st, err)
	}
}

// flipByte changes a byte in the middle of the store's only file that has at
// least size bytes.
func flipByte(t *testing.T, store string, size int64) {
	t.Helper()
	flipped := 0
	must(t, filepath.WalkDir(store, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil || int64(len(text)) < size {
			return err
		}
		text[len(text)/2] ^= 1
		flipped++
		return os.WriteFile(path, text, 0o600)
	}))
	if flipped != 1 {
		t.Fatalf("%d files of %d bytes, want 1", flipped, size)
	}
}

// stuckProvider is a key service that does not answer for files of class phi
// until stuck is closed.
type stuckProvider struct {
	keywrap.Provider
	called chan struct{}
	stuck  chan struct{}
}

func (p *stuckProvider) Decrypt(ctx context.Context, w keywrap.Wrapped, ec keywrap.Context) (*keymem.Key, error) {
	if ec.Class == "phi" && ec.Purpose == keywrap.PurposeData {
		select {
		case p.called <- struct{}{}:
		default:
		}
		<-p.stuck
	}
	return p.Provider.Decrypt(ctx, w, ec)
}

// TestKillWhileTheKeyServiceHangs: a process that waits for the key service
// can be killed, though not by the first signal that comes along.
//
// S-43
func TestKillWhileTheKeyServiceHangs(t *testing.T) {
	s := newTwoClassStore(t)
	p := &stuckProvider{Provider: s.keys, called: make(chan struct{}, 1), stuck: make(chan struct{})}
	s.wrapper = p
	m := mountStore(t, s, Options{})
	must(t, os.Mkdir(m.path("phi"), 0o700))
	file := m.path("phi", "file")
	must(t, os.WriteFile(file, []byte("x"), 0o600))
	m.remount(t)
	cmd := helper(0, 0, "append", file)
	must(t, cmd.Start())
	<-p.called
	must(t, cmd.Process.Kill())
	if err := cmd.Wait(); err == nil {
		t.Error("the process ended well")
	}
	close(p.stuck)
	if got, err := os.ReadFile(file); err != nil || string(got) != "x" {
		t.Errorf("after the service came back: %q, %v", got, err)
	}
}
