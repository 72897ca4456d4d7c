package powercut

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
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

// layout is a kind of store.
type layout struct {
	placement envelope.Placement
	plain     bool // names are not encrypted
}

func (l layout) String() string {
	if l.plain {
		return l.placement.String() + ",plain"
	}
	return l.placement.String()
}

// rig makes stores of one layout, in memory.
type rig struct {
	t        testing.TB
	dir      string // on a file system in memory
	provider keywrap.Provider
	keys     map[string][]string
	model    *oracle
	disk     *disk // a store to start with
	client   *client
	others   bool // other users reach the mount
	n        int
}

// newRig makes a store with some files in it, whose steps the oracle knows.
func newRig(t testing.TB, l layout, prepare []step) *rig {
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
	base := filepath.Join(dir, "base")
	r := &rig{t: t, dir: dir, provider: keywrap.Mux{Keyring: k}, client: newClient(t)}
	pol := classify.Single("general", "keyring:general")
	c := pol.Classes["general"]
	c.Names, c.ChunkSize = classify.NamesEncrypted, chunk
	if l.plain {
		c.Names = classify.NamesPlain
	}
	pol.Classes["general"] = c
	info, err := cryptfs.Init(t.Context(), cryptfs.InitConfig{
		Store: base, Policy: pol, Placement: l.placement, HeaderSize: 1024, Suite: dare.AES256GCM, Provider: r.provider,
	})
	if err != nil {
		t.Fatal(err)
	}
	r.keys, r.model = info.Keys, newOracle()
	if err := os.Mkdir(filepath.Join(dir, "mnt"), 0o755); err != nil {
		t.Fatal(err)
	}
	s, err := r.mount(base, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range prepare {
		s.do(x, r.model)
	}
	s.unmount()
	if r.disk, err = loadDisk(base); err != nil {
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
	x.synced, x.datasynced, x.removed = nil, nil, nil
	x.poked, x.partly = false, nil
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

// mount opens a store and mounts it. The error is of opening it.
func (r *rig) mount(store string, tap *recorder) (*session, error) {
	r.t.Helper()
	c := r.config(store, roomy{})
	if tap != nil {
		c.Tap = tap
	}
	v, err := cryptfs.Open(context.Background(), c)
	if err != nil {
		return nil, err
	}
	mnt := filepath.Join(r.dir, "mnt")
	s, err := fusefs.Mount(v, mnt, fusefs.Options{Log: c.Log, AllowOther: r.others})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = s.Unmount() }) // if the test ended early
	return &session{r, v, s, mnt, tap}, nil
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

// pos is how much is recorded by now.
func (s *session) pos() int {
	if s.tap == nil {
		return 0
	}
	return s.tap.at()
}

// do does a step, in the mount and in the oracle.
func (s *session) do(x step, o *oracle) {
	s.r.t.Helper()
	o.begin(s.pos())
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
	o.end(s.pos())
}

// folder makes an empty directory for a store.
func (r *rig) folder() (path string, remove func()) {
	r.t.Helper()
	r.n++
	path = filepath.Join(r.dir, fmt.Sprint("store", r.n))
	if err := os.Mkdir(path, 0o700); err != nil {
		r.t.Fatal(err)
	}
	return path, func() { _ = os.RemoveAll(path) }
}

// record does the steps on a copy of the base, and tells what happened.
func (r *rig) record(steps []step, bug func(*recorder)) (*history, *oracle) {
	r.t.Helper()
	o := r.model.clone()
	h, _, err := r.recordOn(r.disk, o, func(*oracle) []step { return steps }, bug)
	if err != nil {
		r.t.Fatal(err)
	}
	return h, o
}

// recordOn does steps on a store that is made of d. Without an oracle it mounts
// what a crash left: then what was found is what the oracle begins with.
func (r *rig) recordOn(d *disk, o *oracle, steps func(*oracle) []step, bug func(*recorder)) (*history, *oracle, error) {
	r.t.Helper()
	store, remove := r.folder()
	defer remove()
	if err := d.build(store); err != nil {
		return nil, nil, err
	}
	d, err := loadDisk(store)
	if err != nil {
		return nil, nil, err
	}
	rec := newRecorder(d)
	if bug != nil {
		bug(rec)
	}
	s, err := r.mount(store, rec)
	if err != nil {
		return nil, nil, fmt.Errorf("open: %w", err)
	}
	first := 0
	if o == nil {
		root, err := walk(s.volume)
		if err != nil {
			s.unmount()
			return nil, nil, err
		}
		first, o = rec.at(), oracleOf(root)
	}
	from := rec.at()
	for _, x := range steps(o.clone()) {
		if x.Op == "remount" {
			s.unmount()
			if s, err = r.mount(store, rec); err != nil {
				return nil, nil, fmt.Errorf("open again: %w", err)
			}
			continue
		}
		s.do(x, o)
	}
	to := rec.at()
	s.unmount()
	return &history{base: d, events: rec.events, first: first, from: from, to: to}, o, nil
}

// roomy is a disk that takes no space ahead of need, which costs time in memory.
type roomy struct{}

func (roomy) Do(op *backing.Op, do func() error) error {
	if op.Call == "fallocate" && op.Flags&unix.FALLOC_FL_PUNCH_HOLE == 0 {
		return nil
	}
	return do()
}

// look opens a state as a store, with whatever recovery that takes, and returns
// what is in it, and how much tap had seen when it was open.
func (r *rig) look(store string, tap *recorder) (root *found, opened int, err error) {
	v, err := cryptfs.Open(context.Background(), r.config(store, tap))
	if err != nil {
		return nil, 0, fmt.Errorf("open: %w", err)
	}
	opened = tap.at()
	root, err = walk(v)
	if cerr := v.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("close: %w", cerr)
	}
	return root, opened, err
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

// repair has fsck clear what a crash left: nothing in the store is damaged, and
// when it has nothing more to mend, nothing is left that a look finds.
func (r *rig) repair(store string, tap backing.Tap) error {
	var report *cryptfs.FsckReport
	for _, repair := range []bool{true, true, false} {
		var err error
		report, err = cryptfs.Fsck(context.Background(), cryptfs.FsckConfig{Config: r.config(store, tap), Repair: repair})
		if err != nil {
			return fmt.Errorf("fsck: %w", err)
		}
		if len(report.Problems) == 0 {
			return nil
		}
		if report.Damaged() {
			break
		}
	}
	p := report.Problems[0]
	return fmt.Errorf("fsck: %s: %s (%s, mended %v)", p.Path, p.What, p.Class, p.Mended)
}
