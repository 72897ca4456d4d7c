package powercut

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
	"github.com/kmsfs/kmsfs/fs/fusefs"
	"github.com/kmsfs/kmsfs/fs/journal"
)

var placements = []envelope.Placement{envelope.Prefix, envelope.Xattr, envelope.Sidecar}

// rig makes stores of one placement, in memory.
type rig struct {
	t        testing.TB
	dir      string // on a file system in memory
	provider keywrap.Provider
	keys     map[string][]string
	base     string // a store to start with
	model    *oracle
	disk     *disk // what base is
	client   *client
	n        int
}

// newRig makes a store with some files in it, whose steps the oracle knows.
func newRig(t testing.TB, p envelope.Placement, prepare []step) *rig {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "kmsfs-powercut-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	k := keyring.NewMemory()
	if err := k.CreateKey("general"); err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dir: dir, provider: keywrap.Mux{Keyring: k}, base: filepath.Join(dir, "base"), client: newClient(t)}
	pol := classify.Single("general", "keyring:general")
	c := pol.Classes["general"]
	c.Names, c.ChunkSize = classify.NamesEncrypted, chunk
	pol.Classes["general"] = c
	info, err := cryptfs.Init(t.Context(), cryptfs.InitConfig{
		Store: r.base, Policy: pol, Placement: p, HeaderSize: 1024, Suite: dare.AES256GCM, Provider: r.provider,
	})
	if err != nil {
		t.Fatal(err)
	}
	r.keys, r.model = info.Keys, newOracle()
	if err := os.Mkdir(filepath.Join(dir, "mnt"), 0o755); err != nil {
		t.Fatal(err)
	}
	s := r.mount(r.base, nil)
	for _, x := range prepare {
		s.do(x, r.model)
	}
	s.unmount()
	if r.disk, err = loadDisk(r.base); err != nil {
		t.Fatal(err)
	}
	for _, x := range r.model.all {
		x.rebase()
	}
	r.model.now, r.model.from, r.model.ends = 0, []int{0}, []int{0}
	return r
}

// rebase makes the last state the durable beginning.
func (x *object) rebase() {
	x.mode, x.xattr = []at[uint32]{{0, last(x.mode)}}, []at[string]{{0, last(x.xattr)}}
	if x.data != nil {
		x.data = []at[[]byte]{{0, last(x.data)}}
	}
	if x.entries != nil {
		x.entries = []at[map[string]*object]{{0, last(x.entries)}}
	}
	x.synced, x.removed = nil, nil
}

// clone copies an oracle whose time is 0.
func (o *oracle) clone() *oracle {
	c := &oracle{next: o.next, from: []int{0}, ends: []int{0}}
	to := map[*object]*object{}
	for _, x := range o.all {
		y := *x
		y.data, y.mode, y.xattr = x.data[:len(x.data):len(x.data)], x.mode[:1:1], x.xattr[:1:1]
		to[x] = &y
		c.all = append(c.all, &y)
	}
	for _, y := range c.all {
		if y.entries == nil {
			continue
		}
		m := map[string]*object{}
		for name, x := range last(y.entries) {
			m[name] = to[x]
		}
		y.entries = []at[map[string]*object]{{0, m}}
	}
	c.root = to[o.root]
	return c
}

func (r *rig) config(store string, tap backing.Tap) cryptfs.Config {
	return cryptfs.Config{
		Store: store, Provider: r.provider, Keys: r.keys, Tap: tap, Pool: -1,
		Log: slog.New(slog.DiscardHandler), Journal: journal.Options{},
	}
}

// session is a mount that programs use.
type session struct {
	r      *rig
	volume *cryptfs.Volume
	server *fusefs.Server
	mnt    string
	tap    *recorder
}

func (r *rig) mount(store string, tap *recorder) *session {
	r.t.Helper()
	c := r.config(store, nil)
	if tap != nil {
		c.Tap = tap
	}
	v, err := cryptfs.Open(context.Background(), c)
	if err != nil {
		r.t.Fatal(err)
	}
	mnt := filepath.Join(r.dir, "mnt")
	s, err := fusefs.Mount(v, mnt, fusefs.Options{Log: c.Log})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = s.Unmount() }) // if the test ended early
	return &session{r, v, s, mnt, tap}
}

func (s *session) unmount() {
	s.r.t.Helper()
	if err := s.server.Unmount(); err != nil {
		s.r.t.Fatal(err)
	}
	s.server.Wait()
	if err := s.volume.Close(); err != nil {
		s.r.t.Fatal(err)
	}
}

// do does a step, in the mount and in the oracle.
func (s *session) do(x step, o *oracle) {
	s.r.t.Helper()
	pos := func() int {
		if s.tap == nil {
			return 0
		}
		return s.tap.at()
	}
	o.begin(pos())
	var err error
	switch x.Op {
	case "settle":
		err = s.volume.Settle()
	case "checkpoint":
		err = s.volume.Checkpoint()
	default:
		if err = s.r.client.do(s.mnt, x); err == nil {
			o.do(x)
		}
	}
	if err != nil {
		s.r.t.Fatalf("%s: %v", x, err)
	}
	o.end(pos())
}

// record does the steps on a copy of the base, and tells what happened.
func (r *rig) record(steps []step, bug func(*recorder)) (*history, *oracle) {
	r.t.Helper()
	store := filepath.Join(r.dir, "live")
	if out, err := exec.Command("cp", "-a", r.base, store).CombinedOutput(); err != nil {
		r.t.Fatalf("%v: %s", err, out)
	}
	defer func() { _ = os.RemoveAll(store) }()
	d, err := loadDisk(store)
	if err != nil {
		r.t.Fatal(err)
	}
	rec := newRecorder(d)
	if bug != nil {
		bug(rec)
	}
	o := r.model.clone()
	s := r.mount(store, rec)
	for _, x := range steps {
		s.do(x, o)
	}
	s.unmount()
	return &history{base: d, events: rec.events}, o
}

// look opens a state as a store, with whatever recovery that takes, and returns
// what is in it. tap sees the recovery; it may be nil.
func (r *rig) look(store string, tap backing.Tap) (*found, error) {
	v, err := cryptfs.Open(context.Background(), r.config(store, tap))
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	root, err := walk(v)
	if cerr := v.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("close: %w", cerr)
	}
	return root, err
}

func walk(v *cryptfs.Volume) (*found, error) {
	a, err := v.Getattr(v.Root())
	if err != nil {
		return nil, err
	}
	return visit(v, v.Root(), a)
}

func visit(v *cryptfs.Volume, n *cryptfs.Node, a cryptfs.Attr) (f *found, err error) {
	ctx := context.Background()
	f = &found{typ: a.Mode & unix.S_IFMT, mode: a.Mode & 0o7777, ino: a.Ino, nlink: a.Nlink}
	switch f.typ {
	case unix.S_IFLNK:
		f.target, err = v.Readlink(n)
		return f, err
	case unix.S_IFREG:
		if f.data, err = readAll(v, n, a.Size); err != nil {
			return nil, err
		}
	case unix.S_IFDIR:
		if err = f.list(v, n); err != nil {
			return nil, err
		}
	}
	names, err := v.Listxattr(ctx, n)
	for _, name := range names {
		if name == "user.k" {
			value, err := v.Getxattr(ctx, n, name)
			if err != nil {
				return nil, err
			}
			f.xattr = string(value)
		}
	}
	return f, err
}

func (f *found) list(v *cryptfs.Volume, n *cryptfs.Node) error {
	ctx := context.Background()
	d, err := v.OpenDir(ctx, n)
	if err != nil {
		return fmt.Errorf("directory: %w", err)
	}
	defer d.Close()
	f.entries = map[string]*found{}
	for _, e := range d.Entries() {
		if e.Name == "." || e.Name == ".." {
			continue
		}
		child, a, err := v.LookupEntry(ctx, n, e)
		if err != nil {
			return fmt.Errorf("%s: lookup: %w", short(e.Name), err)
		}
		f.entries[e.Name], err = visit(v, child, a)
		v.Forget(child, 1)
		if err != nil {
			return fmt.Errorf("%s: %w", short(e.Name), err)
		}
	}
	return nil
}

func readAll(v *cryptfs.Volume, n *cryptfs.Node, size int64) ([]byte, error) {
	h, err := v.Open(context.Background(), n, unix.O_RDONLY, false)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	defer h.Release()
	p := make([]byte, size+1)
	m, err := h.ReadAt(p, 0)
	if err == nil && int64(m) != size {
		err = fmt.Errorf("%d bytes of %d", m, size)
	}
	return bytes.Clone(p[:m]), err
}

// fsck checks a recovered store: nothing in it is damaged, what a crash may leave
// it clears, and then finds nothing.
func (r *rig) fsck(store string) error {
	for _, repair := range []bool{true, false} {
		report, err := cryptfs.Fsck(context.Background(), cryptfs.FsckConfig{Config: r.config(store, nil), Repair: repair})
		if err != nil {
			return fmt.Errorf("fsck: %w", err)
		}
		for _, p := range report.Problems {
			if !repair || !p.Mended || report.Damaged() {
				return fmt.Errorf("fsck (repair %v): %s: %s (%s, mended %v)", repair, p.Path, p.What, p.Class, p.Mended)
			}
		}
	}
	return nil
}

// try builds a state, recovers it, and holds it against the oracle.
func (r *rig) try(d *disk, v *view, tap func(*disk) backing.Tap) error {
	r.n++
	store := filepath.Join(r.dir, fmt.Sprint("state", r.n))
	if err := os.Mkdir(store, 0o700); err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(store) }()
	if err := d.build(store); err != nil {
		return err
	}
	var t backing.Tap
	if tap != nil {
		again, err := loadDisk(store)
		if err != nil {
			return err
		}
		t = tap(again)
	}
	root, err := r.look(store, t)
	if err != nil {
		return err
	}
	if err := v.check(root); err != nil {
		return err
	}
	return r.fsck(store)
}
