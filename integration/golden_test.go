package integration

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

var goldenWrite = flag.Bool("golden-stores", false, "make the golden stores that are not there yet, and the keyring of all if there is none")

const (
	goldenDir     = "testdata/stores"
	goldenKeyring = goldenDir + "/keyring.json"
	goldenMax     = 100 << 10 // bytes of an archive
	goldenGrowing = "growing" // a file that was being written when its mount died
)

// goldenStore says what a golden store is. A change of the format adds stores;
// those that are there stay what they are.
type goldenStore struct {
	name, placement, names, suite string
	unclean                       bool // its journal is live
}

var goldenStores = []goldenStore{
	{name: "header-encrypted", placement: "header", names: "encrypted"},
	{name: "header-plain", placement: "header", names: "plain"},
	{name: "xattr-encrypted", placement: "xattr", names: "encrypted"},
	{name: "xattr-plain", placement: "xattr", names: "plain", suite: "chacha20-poly1305"},
	{name: "sidecar-encrypted", placement: "sidecar", names: "encrypted", suite: "chacha20-poly1305"},
	{name: "sidecar-plain", placement: "sidecar", names: "plain"},
	{name: "unclean", placement: "header", names: "encrypted", unclean: true},
	// With a second copy of the store record.
	{name: "header-copied", placement: "header", names: "encrypted"},
	{name: "unclean-xattr", placement: "xattr", names: "plain", unclean: true},
	{name: "unclean-sidecar", placement: "sidecar", names: "encrypted", unclean: true},
}

func (g goldenStore) archive() string  { return filepath.Join(goldenDir, g.name+".tar.gz") }
func (g goldenStore) manifest() string { return filepath.Join(goldenDir, g.name+".json") }

// goldenEntry is an entry as a manifest has it.
type goldenEntry struct {
	Mode   string            `json:"mode"` // octal, with the type
	UID    uint32            `json:"uid,omitempty"`
	GID    uint32            `json:"gid,omitempty"`
	Size   int64             `json:"size,omitempty"`
	Mtime  int64             `json:"mtime"` // ns
	SHA256 string            `json:"sha256,omitempty"`
	Target string            `json:"target,omitempty"`
	Links  []string          `json:"links,omitempty"`
	Xattrs map[string][]byte `json:"xattrs,omitempty"`
}

func goldenManifest(t tree) map[string]goldenEntry {
	out := map[string]goldenEntry{}
	for name, e := range t {
		g := goldenEntry{Mode: fmt.Sprintf("%o", e.mode), UID: e.uid, GID: e.gid, Size: e.size, Mtime: e.mtime, Target: e.target}
		if e.mode&unix.S_IFMT == unix.S_IFREG {
			g.SHA256 = hex.EncodeToString(e.sum[:])
		}
		if strings.Contains(e.links, "\x00") {
			g.Links = strings.Split(e.links, "\x00")
		}
		for name, value := range e.xattrs {
			if g.Xattrs == nil {
				g.Xattrs = map[string][]byte{}
			}
			g.Xattrs[name] = []byte(value)
		}
		out[name] = g
	}
	return out
}

// goldenHome returns a user with the keyring of the golden stores.
func goldenHome(t *testing.T) *rig.Home {
	t.Helper()
	rig.Need(t, "root", "fuse", "setfattr")
	h := rig.NewHome(t)
	b, err := os.ReadFile(goldenKeyring)
	if err != nil {
		t.Fatal(err)
	}
	keyring := filepath.Join(h.Dir, "golden.json")
	if err := os.WriteFile(keyring, b, 0o600); err != nil {
		t.Fatal(err)
	}
	h.Env = append(h.Env, "KMSFS_KEYRING="+keyring)
	return h
}

// TestGoldenStores reads stores that were made when their format was: by
// mounts for reading and for writing, and by the commands that need no mount.
func TestGoldenStores(t *testing.T) {
	t.Parallel()
	for _, g := range goldenStores {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			h, store := goldenHome(t), filepath.Join(t.TempDir(), "S")
			goldenUnpack(t, g.archive(), store)
			var want map[string]goldenEntry
			b, err := os.ReadFile(g.manifest())
			if err == nil {
				err = json.Unmarshal(b, &want)
			}
			if err != nil || len(want) < 20 {
				t.Fatalf("%s: %d entries, %v", g.manifest(), len(want), err)
			}
			if !g.unclean {
				h.Run("fsck", "--trust", store)
			}
			goldenSalvage(t, h, store, want)
			goldenReadOnly(t, h, g, store, want)
			goldenWritten(t, h, store, want)
		})
	}
}

func goldenSalvage(t *testing.T, h *rig.Home, store string, want map[string]goldenEntry) {
	t.Helper()
	before, out := readTree(t, store), filepath.Join(t.TempDir(), "out")
	h.Run("salvage", "--trust", store, out)
	goldenCompare(t, "salvaged", out, want, ".")
	mustEqual(t, "the store", readTree(t, store), before)
}

func goldenReadOnly(t *testing.T, h *rig.Home, g goldenStore, store string, want map[string]goldenEntry) {
	t.Helper()
	before := readTree(t, store)
	m := h.Mount(store, "--read-only", "--trust")
	if !g.unclean {
		goldenCompare(t, "read-only", m.Dir, want)
	}
	for name, e := range want { // sizes and times are not those of the journal
		if e.SHA256 == "" {
			continue // not a file: a pipe would wait for ever
		}
		if sum, _, err := readContents(m.Path(name)); err != nil || hex.EncodeToString(sum[:]) != e.SHA256 {
			t.Errorf("read-only: %q: got %x, %v, want %s", name, sum, err, e.SHA256)
		}
	}
	m.Unmount()
	mustEqual(t, "the store", readTree(t, store), before)
}

// goldenWritten mounts the store for writing, changes it and checks it.
func goldenWritten(t *testing.T, h *rig.Home, store string, want map[string]goldenEntry) {
	t.Helper()
	m := h.Mount(store, "--trust")
	goldenCompare(t, "mounted", m.Dir, want)
	m.Put("phi/new", []byte("new"))
	h.Sh(`printf x | dd of="$1" bs=1 seek=5000 conv=notrunc status=none; echo y >>"$1"`, m.Path("phi/chunks"))
	m.Unmount()
	if got := h.Run("cat", store, "/phi/new"); got != "new" {
		t.Errorf("new file: got %q", got)
	}
	if got := h.Run("fsck", store); !strings.Contains(got, " 0 problems") {
		t.Errorf("fsck: got %s, want nothing found", got)
	}
	// Whatever program made it, its record has a second copy by now. F-71
	h.Run("fsck", "--quick", store)
	h.Sh(`rm -r "$1"/.kmsfs/store "$1"/.kmsfs/classes`, store)
	h.Run("fsck", "--repair", store)
	if got := h.Run("fsck", store); !strings.Contains(got, " 0 problems") {
		t.Errorf("fsck after a repair: got %s, want nothing found", got)
	}
}

// goldenCompare compares a directory with a manifest without some names.
func goldenCompare(t *testing.T, what, dir string, want map[string]goldenEntry, without ...string) {
	t.Helper()
	got := goldenManifest(readTree(t, dir))
	for name, e := range got {
		w, ok := want[name]
		if !ok {
			t.Errorf("%s: %q is new", what, name)
		} else if !slices.Contains(without, name) && !reflect.DeepEqual(e, w) {
			t.Errorf("%s: %q: got %+v, want %+v", what, name, e, w)
		}
	}
	for name := range want {
		if _, ok := got[name]; !ok {
			t.Errorf("%s: %q is missing", what, name)
		}
	}
}

// TestGoldenStoresAreKept expects an archive and a manifest of each store and
// nothing else, and with -golden-stores makes what is not there.
func TestGoldenStoresAreKept(t *testing.T) {
	if *goldenWrite {
		goldenMakeAll(t)
	}
	want := []string{filepath.Base(goldenKeyring)}
	for _, g := range goldenStores {
		want = append(want, filepath.Base(g.archive()), filepath.Base(g.manifest()))
		if fi, err := os.Stat(g.archive()); err != nil || fi.Size() > goldenMax {
			t.Errorf("%s: %v, at most %d bytes: %v", g.name, fi, goldenMax, err)
		}
	}
	slices.Sort(want)
	entries, err := os.ReadDir(goldenDir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// goldenMakeAll makes the stores that are missing. One that is there is never
// made anew: that it still reads is what it is for.
func goldenMakeAll(t *testing.T) {
	if err := os.MkdirAll(goldenDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(goldenKeyring); errors.Is(err, os.ErrNotExist) {
		file := filepath.Join(t.TempDir(), "k.json")
		rig.NewHome(t).Run("keyring", "create", "--keyring", file, "general", "phi", "pci")
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		goldenNew(t, goldenKeyring, b)
	}
	made := 0
	for _, g := range goldenStores {
		_, err := os.Stat(g.archive())
		_, merr := os.Stat(g.manifest())
		if err == nil && merr == nil {
			continue
		}
		if err == nil || merr == nil {
			t.Fatalf("%s: only one of archive and manifest is there; take it from the version control", g.name)
		}
		goldenMake(t, g)
		made++
	}
	if made == 0 {
		t.Fatal("every golden store is there, and none is ever made anew: add a store under a new name to goldenStores")
	}
}

// goldenNew writes a file that is not there.
func goldenNew(t *testing.T, path string, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err == nil {
		_, err = io.Copy(f, bytes.NewReader(b))
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func goldenMake(t *testing.T, g goldenStore) {
	t.Helper()
	h, dir := goldenHome(t), t.TempDir()
	store, policy := filepath.Join(dir, "S"), filepath.Join(dir, "policy.yaml")
	put(t, policy, fmt.Appendf(nil, `version: 1
default: general
classes:
  general: { keys: ["keyring:general"], names: %[1]s, chunk_size: 8KiB }
  phi: { keys: ["keyring:phi", "keyring:general"], names: %[1]s, chunk_size: 4KiB }
  pci: { keys: ["keyring:pci"], names: %[1]s, chunk_size: 16KiB, data_keys: shared }
directories:
  /phi: phi
  /pci: pci
`, g.names))
	args := []string{"init", "--policy", policy, "--placement", g.placement}
	if g.suite != "" {
		args = append(args, "--suite", g.suite)
	}
	h.Run(append(args, store)...)
	m := h.Mount(store)
	goldenFill(t, h, m.Dir)
	want := readTree(t, m.Dir)
	if g.unclean {
		m.Unmount()
		m.Again()
		want = goldenLeave(t, h, m, store)
	} else {
		m.Unmount()
	}
	b, err := json.MarshalIndent(goldenManifest(want), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	goldenPack(t, store, g.archive())
	goldenNew(t, g.manifest(), append(b, '\n'))
}

// goldenFill makes the files of a golden store.
func goldenFill(t *testing.T, h *rig.Home, root string) {
	t.Helper()
	h.Sh(`cd "$1"; mkdir -p phi/sub/deep pci shared empty; chmod 2775 shared; chmod 0700 phi; chmod 1777 empty; mkfifo shared/fifo
		touch empty.txt phi/empty; ln -s phi/chunks link; ln -s "$(printf 'x%.0s' {1..3500})" phi/long-target; ln -s ../pci phi/sub/up`, root)
	for name, size := range map[string]int{
		"one": 1, "chunk+1": 8193, "phi/chunks": 3*4096 + 10, "phi/even": 2 * 4096, "phi/sub/deep/x": 300,
		"pci/card": 16385, "pci/card2": 20, "phi/" + strings.Repeat("n", 250): 17, "name with spaces and é": 5,
	} {
		put(t, filepath.Join(root, name), noise(size, uint64(size)))
	}
	h.Sh(`cd "$1"; ln phi/chunks phi/sub/again; ln one shared/another; chmod 0400 phi/even; chmod 4755 one; chown 1000:1001 pci/card
		printf head >phi/sparse; truncate -s 40000 phi/sparse; printf tail >>phi/sparse
		setfattr -n user.note -v 'a value' phi/chunks; setfattr -n user.bin -v 0x00ff00 one; setfattr -n user.dir -v yes pci`, root)
	setTimes(t, root)
}

// goldenLeave changes files and kills the mount, so that its journal is live:
// an overwrite and a cut that are not in place, and a new file. It returns what
// is there after a recovery.
func goldenLeave(t *testing.T, h *rig.Home, m *rig.Mount, store string) tree {
	t.Helper()
	f, err := os.Create(m.Path(goldenGrowing))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(noise(8192+100, 5)); err != nil {
		t.Fatal(err)
	}
	h.Sh(`printf changed | dd of="$1"/phi/chunks bs=1 seek=4090 conv=notrunc status=none; truncate -s 5000 "$1"/pci/card`, m.Dir)
	m.Die()
	_ = f.Close() // the mount is gone
	m.Detach()
	again := store + ".again"
	h.Sh(`cp -a "$1" "$2"`, store, again)
	r := h.Mount(again, "--trust")
	defer r.Unmount()
	return readTree(t, r.Dir)
}
