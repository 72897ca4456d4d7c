package faultsweep

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

var full = os.Getenv("FAULT_FULL") != ""

var placements = []envelope.Placement{envelope.Prefix, envelope.Xattr, envelope.Sidecar}

// eachPlacement runs a test on a prepared store of each placement.
func eachPlacement(t *testing.T, f func(t *testing.T, r *rig)) {
	for _, p := range placements {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			f(t, newRig(t, p))
		})
	}
}

// rig makes copies of a prepared store, in memory.
type rig struct {
	placement envelope.Placement
	dir       string
	provider  keywrap.Provider
	keyring   *keyring.Keyring
	base      string // closed
	crashed   string // as a killed process left it
	n         int
}

func newRig(t *testing.T, p envelope.Placement) *rig {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "kmsfs-faultsweep-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	k := keyring.NewMemory()
	for _, name := range []string{"general", "phi", "spare"} {
		if err := k.CreateKey(name); err != nil {
			t.Fatal(err)
		}
	}
	r := &rig{placement: p, dir: dir, provider: keywrap.Mux{Keyring: k}, keyring: k, base: filepath.Join(dir, "base")}
	pol := classify.Single("general", "keyring:general")
	c := pol.Classes["general"]
	c.Names, c.ChunkSize = classify.NamesEncrypted, chunk
	pol.Classes["general"] = c
	c.Keys = []string{"keyring:phi"}
	pol.Classes["phi"] = c
	_, err = cryptfs.Init(t.Context(), cryptfs.InitConfig{
		Store: r.base, Policy: pol, Placement: p, HeaderSize: 1024, Suite: dare.AES256GCM, Provider: r.provider,
	})
	if err != nil {
		t.Fatal(err)
	}
	s := r.must(t, r.base, nil)
	s.all(t, prepared)
	s.close(t)
	r.crashed = filepath.Join(dir, "crashed")
	live := r.clone(t, r.base)
	s = r.must(t, live, nil)
	s.all(t, unfinished)
	copyTree(t, live, r.crashed) // with the volume open
	s.release()
	s.close(t)
	return r
}

// clone copies a store.
func (r *rig) clone(t testing.TB, from string) string {
	t.Helper()
	r.n++
	to := filepath.Join(r.dir, fmt.Sprint("store", r.n))
	copyTree(t, from, to)
	return to
}

func (r *rig) config(store string, tap *failing) cryptfs.Config {
	c := cryptfs.Config{Store: store, Provider: r.provider, Pool: -1, Log: slog.New(slog.DiscardHandler)}
	if info, err := cryptfs.Inspect(store); err == nil {
		c.Keys = info.Keys // a policy may have changed them
	}
	if os.Getenv("FAULT_LOG") != "" {
		c.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	if tap != nil {
		c.Tap = tap
	}
	return c
}

// session is an open volume and what a program has of it.
type session struct {
	r     *rig
	v     *cryptfs.Volume
	tap   *failing
	held  map[string]*cryptfs.Handle
	refs  []*cryptfs.Node
	temp  *cryptfs.Node // of O_TMPFILE
	links bool          // hold link counts against names: a job's old tree may have some for a while
}

func (r *rig) open(store string, tap *failing) (*session, error) {
	v, err := cryptfs.Open(context.Background(), r.config(store, tap))
	if err != nil {
		return nil, err
	}
	return &session{r: r, v: v, tap: tap, held: map[string]*cryptfs.Handle{}}, nil
}

func (r *rig) must(t testing.TB, store string, tap *failing) *session {
	t.Helper()
	s, err := r.open(store, tap)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *session) all(t testing.TB, steps []step) {
	t.Helper()
	for _, x := range steps {
		if err := x.do(s); err != nil {
			t.Fatalf("%s: %v", x.name, err)
		}
	}
}

// release lets go of handles and nodes.
func (s *session) release() {
	for name, h := range s.held {
		h.Release()
		delete(s.held, name)
	}
	for _, n := range s.refs {
		s.v.Forget(n, 1)
	}
	s.refs, s.temp = nil, nil
}

func (s *session) close(t testing.TB) {
	t.Helper()
	s.release()
	if err := s.v.Close(); err != nil {
		t.Fatal(err)
	}
}

// node looks a path up.
func (s *session) node(p string) (*cryptfs.Node, error) {
	n := s.v.Root()
	if p == "." {
		return n, nil
	}
	for name := range strings.SplitSeq(p, "/") {
		child, _, err := s.v.Lookup(context.Background(), n, name)
		if err != nil {
			return nil, err
		}
		s.refs = append(s.refs, child)
		n = child
	}
	return n, nil
}

func (s *session) parent(p string) (*cryptfs.Node, string, error) {
	dir, name := split(p)
	n, err := s.node(dir)
	return n, name, err
}

// handle opens a file, or takes the handle that is open.
func (s *session) handle(p string, flags int) (*cryptfs.Handle, error) {
	if h := s.held[p]; h != nil {
		return h, nil
	}
	n, err := s.node(p)
	if err != nil {
		return nil, err
	}
	h, err := s.v.Open(context.Background(), n, flags, false)
	if err == nil {
		s.held[p] = h
	}
	return h, err
}

// errnoOf returns what a program gets: see fusefs/errno.go. An error that is
// taken for damage has none.
func errnoOf(err error) unix.Errno {
	if fault.Of(err) != fault.None {
		return 0
	}
	var e unix.Errno
	if !errors.As(err, &e) {
		return unix.EIO
	}
	return e
}

// fsck checks a store: nothing is damaged, what an error left is mended, and
// then there is nothing.
func (r *rig) fsck(store string) error {
	for _, repair := range []bool{true, false} {
		report, err := cryptfs.Fsck(context.Background(), cryptfs.FsckConfig{Config: r.config(store, nil), Repair: repair})
		if err != nil {
			return fmt.Errorf("fsck: %w", err)
		}
		for _, p := range report.Problems {
			if p.Class == "policy" || p.Class == "pending" { // a classification, or a job, that its user has to finish
				continue
			}
			if !repair || !p.Mended || report.Damaged() {
				return fmt.Errorf("fsck (repair %v): %s: %s (%s, mended %v)", repair, p.Path, p.What, p.Class, p.Mended)
			}
		}
	}
	return nil
}

// descriptors returns what this process has open in a store.
func descriptors(store string) (out []string) {
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, e := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && (to == store || strings.HasPrefix(to, store+"/")) {
			out = append(out, to)
		}
	}
	return out
}

// noise is n bytes that are no zeros.
func noise(n int, seed byte) []byte {
	out := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(out) // never fails
	for i := range out {
		out[i] |= 1
	}
	return out
}

var _ backing.Tap = (*failing)(nil)
