package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// placements are where a store's headers can live. What holds for one must hold
// for all.
var placements = []envelope.Placement{envelope.Prefix, envelope.Xattr, envelope.Sidecar}

func eachPlacement(t *testing.T, f func(t *testing.T, p envelope.Placement)) {
	t.Parallel()
	for _, p := range placements {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			f(t, p)
		})
	}
}

const (
	threatChunk = 4096
	threatSlot  = threatChunk + 32
	threatSize  = 5*threatChunk + 1234 // six chunks
	headerSize  = envelope.DefaultHeader
	headerAttr  = "user.kmsfs.header"
	dirAttr     = "user.kmsfs.dir"
)

// threatPolicy has two classes under one key, so that what keeps them apart is
// the class in the encryption context alone.
const threatPolicy = `
version: 1
default: general
classes:
  general: { keys: ["keyring:general"], chunk_size: 4KiB }
  other:   { keys: ["keyring:general"], chunk_size: 4KiB }
  phi:     { keys: ["keyring:phi"], chunk_size: 4KiB }
  open:    { keys: ["keyring:general"], chunk_size: 4KiB, names: plain }
directories:
  /other: other
  /patients: phi
  /open: open
`

// victimStore is a real store and what somebody who can write it knows: not the
// keys, but, being generous, which store file is which plaintext file.
type victimStore struct {
	t       *testing.T
	h       *rig.Home
	dir     string
	place   envelope.Placement
	entries map[string]string // plaintext path -> path in the store
	plain   map[string][]byte
}

// newVictim makes a store with the program, writes files of threatSize through
// a mount, and unmounts.
func newVictim(t *testing.T, p envelope.Placement, files ...string) *victimStore {
	t.Helper()
	rig.Need(t, "root", "fuse")
	h := rig.NewHome(t)
	// A key of the attacker's own that this machine could use.
	h.Run("keyring", "create", "attacker")
	s := &victimStore{
		t: t, h: h, dir: filepath.Join(t.TempDir(), "S"), place: p,
		entries: map[string]string{}, plain: map[string][]byte{},
	}
	s.init()
	m := h.Mount(s.dir)
	for _, d := range []string{"other", "patients", "open", "sub"} {
		if err := os.Mkdir(m.Path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for i, name := range files {
		if err := os.MkdirAll(filepath.Dir(m.Path(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		data := make([]byte, threatSize)
		rand.NewChaCha8([32]byte{byte(i), byte(i >> 8), 7}).Read(data)
		if strings.HasPrefix(filepath.Base(name), "small") {
			data = data[:300]
		}
		m.Put(name, data)
		s.plain[name] = data
	}
	inos := map[uint64]string{}
	for _, name := range append(slices.Clone(files), "other", "patients", "open", "sub") {
		inos[inode(t, m.Path(name))] = name
	}
	m.Unmount()
	s.locate(inos)
	return s
}

func (s *victimStore) init() {
	s.t.Helper()
	policy := filepath.Join(s.t.TempDir(), "policy.yaml")
	if err := os.WriteFile(policy, []byte(threatPolicy), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.h.Run("init", "--policy", policy, "--placement", s.place.String(), s.dir)
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return st.Ino
}

// locate finds the store files by inode number, which a mount shows as it is.
func (s *victimStore) locate(inos map[uint64]string) {
	s.t.Helper()
	err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		own := strings.HasPrefix(d.Name(), ".kmsfs") && !strings.HasPrefix(d.Name(), ".kmsfs.l.")
		if err != nil || own && !d.IsDir() {
			return err
		}
		if name, ok := inos[inode(s.t, path)]; ok {
			rel, err := filepath.Rel(s.dir, path)
			if err != nil {
				return err
			}
			s.entries[name] = rel
		}
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	if len(s.entries) != len(inos) {
		s.t.Fatalf("%d of %d files found in the store", len(s.entries), len(inos))
	}
}

// copy returns the same store at another place.
func (s *victimStore) copy(t *testing.T) *victimStore {
	t.Helper()
	c := *s
	c.t, c.dir = t, filepath.Join(t.TempDir(), "S")
	s.h.Sh(`cp -a "$1" "$2"`, s.dir, c.dir)
	return &c
}

// path returns the store file of a plaintext file.
func (s *victimStore) path(name string) string {
	s.t.Helper()
	rel, ok := s.entries[name]
	if !ok {
		s.t.Fatalf("no store file of %s", name)
	}
	return filepath.Join(s.dir, rel)
}

func (s *victimStore) read(path string) []byte {
	s.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// write replaces a file's bytes in place; its attributes stay.
func (s *victimStore) write(path string, b []byte) {
	s.t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

func (s *victimStore) body(name string) []byte       { s.t.Helper(); return s.read(s.path(name)) }
func (s *victimStore) setBody(name string, b []byte) { s.t.Helper(); s.write(s.path(name), b) }
func (s *victimStore) base() int                     { return int(s.place.Base(headerSize)) }

// slot returns where chunk i lies in a body.
func (s *victimStore) slot(b []byte, i int) []byte {
	from := s.base() + i*threatSlot
	return b[from:min(len(b), from+threatSlot)]
}

func (s *victimStore) sidecar(name string) string {
	s.t.Helper()
	id := envelope.ID(s.body(name)[:16])
	return filepath.Join(filepath.Dir(s.path(name)), ".kmsfs.h."+id.String())
}

// header returns the header block, wherever it lives.
func (s *victimStore) header(name string) []byte {
	s.t.Helper()
	switch s.place {
	case envelope.Xattr:
		return s.attr(s.path(name), headerAttr)
	case envelope.Sidecar:
		return s.read(s.sidecar(name))
	default:
		return s.body(name)[:headerSize]
	}
}

func (s *victimStore) setHeader(name string, b []byte) {
	s.t.Helper()
	switch s.place {
	case envelope.Xattr:
		s.setAttr(s.path(name), headerAttr, b)
	case envelope.Sidecar:
		s.write(s.sidecar(name), b)
	default:
		s.setBody(name, append(bytes.Clone(b), s.body(name)[headerSize:]...))
	}
}

func (s *victimStore) attr(path, name string) []byte {
	s.t.Helper()
	b := make([]byte, 64<<10)
	n, err := unix.Lgetxattr(path, name, b)
	if err != nil {
		s.t.Fatalf("%s of %s: %v", name, path, err)
	}
	return b[:n]
}

func (s *victimStore) setAttr(path, name string, b []byte) {
	s.t.Helper()
	if err := unix.Lsetxattr(path, name, b, 0); err != nil {
		s.t.Fatalf("%s of %s: %v", name, path, err)
	}
}

// removeHeader takes the header away: zeros where it is a part of the file.
func (s *victimStore) removeHeader(name string) {
	s.t.Helper()
	var err error
	switch s.place {
	case envelope.Xattr:
		err = unix.Lremovexattr(s.path(name), headerAttr)
	case envelope.Sidecar:
		err = os.Remove(s.sidecar(name))
	default:
		s.setHeader(name, make([]byte, headerSize))
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// put makes a whole store file: header, and chunks without what stands before
// them.
func (s *victimStore) put(name string, header, chunks []byte) {
	s.t.Helper()
	switch s.place {
	case envelope.Xattr:
		s.setBody(name, chunks)
		s.setHeader(name, header)
	case envelope.Sidecar:
		s.setBody(name, append(bytes.Clone(header[32:48]), chunks...))
		s.setHeader(name, header)
	default:
		s.setBody(name, append(bytes.Clone(header), chunks...))
	}
}

// take returns what put takes.
func (s *victimStore) take(name string) (header, chunks []byte) {
	s.t.Helper()
	return s.header(name), s.body(name)[s.base():]
}

// stored returns all that the store has of a file, to see whether it changed.
func (s *victimStore) stored(name string) []byte {
	s.t.Helper()
	out := s.body(name)
	switch s.place {
	case envelope.Xattr:
		b := make([]byte, headerSize)
		if n, err := unix.Lgetxattr(s.path(name), headerAttr, b); err == nil {
			out = append(out, b[:n]...)
		}
	case envelope.Sidecar:
		if len(out) >= 16 {
			if b, err := os.ReadFile(s.sidecar(name)); err == nil {
				out = append(out, b...)
			}
		}
	}
	return out
}

// provider opens the user's keyring in this process.
func (s *victimStore) provider() keywrap.Provider {
	s.t.Helper()
	k, err := keyring.Open(filepath.Join(s.h.Dir, ".config/kmsfs/keyring.json"), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = k.Close() })
	return keywrap.Mux{Keyring: k}
}

// open opens the store in this process, read-only, for what would take too long
// through mounts.
func (s *victimStore) open() *cryptfs.Volume { s.t.Helper(); return s.openFor(true) }

func (s *victimStore) openFor(reading bool) *cryptfs.Volume {
	s.t.Helper()
	info, err := cryptfs.Inspect(s.dir)
	if err != nil {
		s.t.Fatal(err)
	}
	v, err := cryptfs.Open(context.Background(), cryptfs.Config{Store: s.dir, Provider: s.provider(), Keys: info.Keys, ReadOnly: reading})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = v.Close() })
	return v
}

// cat reads a whole file of an open volume.
func cat(v *cryptfs.Volume, path string) ([]byte, error) {
	ctx, n := context.Background(), v.Root()
	for name := range strings.SplitSeq(path, "/") {
		next, _, err := v.Lookup(ctx, n, name)
		if n != v.Root() {
			v.Forget(n, 1)
		}
		if err != nil {
			return nil, err
		}
		n = next
	}
	defer v.Forget(n, 1)
	h, err := v.Open(ctx, n, unix.O_RDONLY, false)
	if err != nil {
		return nil, err
	}
	defer h.Release()
	var out []byte
	buf := make([]byte, 64<<10)
	for {
		k, err := h.ReadAt(buf, int64(len(out)))
		if err != nil || k == 0 {
			return out, err
		}
		out = append(out, buf[:k]...)
	}
}

// readAll reads a file with system calls and returns the first errno. The Go
// runtime interrupts its own calls, and like the os package this begins again:
// a mount that waits long for a key service answers EINTR.
func readAll(path string) ([]byte, unix.Errno) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	for err == unix.EINTR {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, errnoOf(err)
	}
	defer func() { _ = unix.Close(fd) }()
	var out []byte
	buf := make([]byte, 128<<10)
	for {
		n, err := unix.Read(fd, buf)
		if err != nil {
			return out, errnoOf(err)
		}
		if n == 0 {
			return out, 0
		}
		out = append(out, buf[:n]...)
	}
}

// errnoOf returns the number; what is no errno is one that no test wants.
func errnoOf(err error) unix.Errno {
	if err == nil {
		return 0
	}
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	return 4095
}

// fsckReport is what scripts read of kmsfs fsck --json.
type fsckReport struct {
	Files    uint64
	Problems []struct{ Path, What, Kind string }
}

// fsck checks the store with the program and wants its exit code.
func (s *victimStore) fsck(want int) *fsckReport {
	s.t.Helper()
	return fsck(s.t, s.h, s.dir, want)
}

// fsck wants the exit code, -1 for any.
func fsck(t *testing.T, h *rig.Home, store string, want int) *fsckReport {
	t.Helper()
	res := h.Try("fsck", "--json", store)
	if res.Code != want && want >= 0 {
		t.Errorf("fsck: exit %d, want %d\n%s%s", res.Code, want, res.Stdout, res.Stderr)
	}
	r := &fsckReport{}
	if err := json.Unmarshal([]byte(res.Stdout), r); err != nil {
		t.Fatalf("fsck: %v in %q %s", err, res.Stdout, res.Stderr)
	}
	return r
}

// has reports whether fsck found a problem of that kind with exactly that file.
func (r *fsckReport) has(rel, kind string) bool {
	for _, p := range r.Problems {
		if p.Path == rel && p.Kind == kind {
			return true
		}
	}
	return false
}

// kind returns the kind of the first problem that fsck found with a file, or in
// a directory; "" if there is none.
func (r *fsckReport) kind(rel string) string {
	for _, p := range r.Problems {
		if p.Kind == "duplicate" { // a note: both copies are whole
			continue
		}
		if p.Path == rel || strings.HasPrefix(p.Path, rel+"/") {
			return p.Kind
		}
	}
	return ""
}

func errnoName(e unix.Errno) string {
	if e == 0 {
		return "success"
	}
	return fmt.Sprintf("%s (%d)", unix.ErrnoName(e), int(e))
}
