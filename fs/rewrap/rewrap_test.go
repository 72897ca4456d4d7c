package rewrap_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
	"github.com/kmsfs/kmsfs/fs/lease"
	"github.com/kmsfs/kmsfs/fs/placement"
	"github.com/kmsfs/kmsfs/fs/record"
	"github.com/kmsfs/kmsfs/fs/rewrap"
)

const oldKey, newKey, otherKey = "keyring:old", "keyring:new", "keyring:other"

var everyPlace = []envelope.Placement{envelope.Prefix, envelope.Xattr, envelope.Sidecar}

// rig is a store with files, made under oldKey.
type rig struct {
	t    *testing.T
	dir  string
	ring *keyring.Keyring
	keys map[string][]string
}

func newRig(t *testing.T, p envelope.Placement, shared bool, files int) *rig {
	t.Helper()
	r := &rig{t: t, dir: filepath.Join(t.TempDir(), "store"), ring: keyring.NewMemory()}
	for _, key := range []string{oldKey, newKey, otherKey} {
		if err := r.ring.CreateKey(strings.TrimPrefix(key, "keyring:")); err != nil {
			t.Fatal(err)
		}
	}
	pol := classify.Single("general", oldKey)
	c := pol.Classes["general"]
	c.Shared = shared
	pol.Classes["general"] = c
	info, err := cryptfs.Init(t.Context(), cryptfs.InitConfig{Store: r.dir, Policy: pol, Placement: p, HeaderSize: 1024, Suite: dare.AES256GCM, Provider: r.ring})
	if err != nil {
		t.Fatal(err)
	}
	r.keys = info.Keys
	v := r.open()
	for i := range files {
		r.put(v, fmt.Sprintf("f%d", i), fmt.Sprintf("contents %d", i))
	}
	r.put(v, "empty", "")
	r.close(v)
	return r
}

func (r *rig) open() *cryptfs.Volume {
	r.t.Helper()
	v, err := cryptfs.Open(r.t.Context(), cryptfs.Config{Store: r.dir, Provider: r.ring, Keys: r.keys})
	if err != nil {
		r.t.Fatal(err)
	}
	return v
}

func (r *rig) close(v *cryptfs.Volume) {
	r.t.Helper()
	if err := v.Close(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) put(v *cryptfs.Volume, name, data string) {
	r.t.Helper()
	n, h, _, err := v.Create(r.t.Context(), v.Root(), name, 0o600, 0, cryptfs.Caller{Uid: uint32(os.Geteuid()), Gid: uint32(os.Getegid())})
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := h.WriteAt([]byte(data), 0, false); err != nil && data != "" {
		r.t.Fatal(err)
	}
	h.Release()
	v.Forget(n, 1)
}

func (r *rig) wantFiles(files int) {
	r.t.Helper()
	v := r.open()
	defer r.close(v)
	for i := range files {
		n, _, err := v.Lookup(r.t.Context(), v.Root(), fmt.Sprintf("f%d", i))
		if err != nil {
			r.t.Fatal(err)
		}
		h, err := v.Open(r.t.Context(), n, unix.O_RDONLY, false)
		if err != nil {
			r.t.Fatal(err)
		}
		b := make([]byte, 100)
		k, err := h.ReadAt(b, 0)
		if want := fmt.Sprintf("contents %d", i); err != nil || string(b[:k]) != want {
			r.t.Errorf("f%d: %q, %v, want %q", i, b[:k], err, want)
		}
		h.Release()
		v.Forget(n, 1)
	}
}

// policy gives the class other keys.
func (r *rig) policy(keys, retired []string) error {
	r.t.Helper()
	v := r.open()
	defer r.close(v)
	p := v.Info().Policy.Clone()
	c := p.Classes["general"]
	c.Keys, c.Retired = keys, retired
	p.Classes["general"] = c
	_, err := v.ApplyPolicy(r.t.Context(), p)
	if err == nil {
		r.keys = v.Info().Keys
	}
	return err
}

func (r *rig) store() *rewrap.Store {
	r.t.Helper()
	s, err := rewrap.Open(rewrap.Config{Path: r.dir, Keys: r.keys})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(s.Close)
	return s
}

func (r *rig) manager(s *rewrap.Store) *envelope.Manager {
	m := envelope.NewManager(r.ring, s.ID(), envelope.Options{PoolSize: -1})
	r.t.Cleanup(m.Close)
	return m
}

// run rewraps with the store locked.
func (r *rig) run(o rewrap.Options) *rewrap.Report {
	r.t.Helper()
	s := r.store()
	w, err := s.Lock(r.t.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		r.t.Fatal(err)
	}
	defer w.Close()
	report, err := s.Run(r.t.Context(), r.manager(s), w, o)
	if err != nil || len(report.Failed) > 0 {
		r.t.Fatalf("%+v, %v", report, err)
	}
	return report
}

func (r *rig) inventory() *rewrap.Inventory {
	r.t.Helper()
	inv, err := r.store().Inventory(r.t.Context(), nil)
	if err != nil {
		r.t.Fatal(err)
	}
	return inv
}

// TestRewrap takes a key out of a store: F-54.
func TestRewrap(t *testing.T) {
	for _, p := range everyPlace {
		for _, shared := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v shared=%v", p, shared), func(t *testing.T) { takeOut(t, p, shared) })
		}
	}
}

func takeOut(t *testing.T, p envelope.Placement, shared bool) {
	const files = 150
	r := newRig(t, p, shared, files)
	if err := r.policy([]string{newKey}, nil); !errors.Is(err, cryptfs.ErrKeyInUse) {
		t.Errorf("dropping a key in use: %v, want %v", err, cryptfs.ErrKeyInUse)
	}
	if err := r.policy([]string{newKey}, []string{oldKey}); err != nil {
		t.Fatal(err)
	}
	before := r.inventory()
	k := before.Key(oldKey)
	if k.Sole.Files != files || k.Several.Files != 0 || before.Files.Files != files || k.Classes["general"].Sole.Files != files || len(k.Materials) != 1 || k.Sole.Bytes != before.Files.Bytes || k.Sole.Bytes == 0 {
		t.Errorf("before: %+v of %+v", k, before.Files)
	}
	if v := before.Verdict(k, false); v.Deletable || len(v.Reasons) != 1 {
		t.Errorf("the key that all files need: %+v", v)
	}
	paths, problems, err := r.store().DependsOn(t.Context(), oldKey)
	if err != nil || len(paths) != files || len(problems) != 0 || !slices.IsSorted(paths) {
		t.Errorf("%d paths, %v, %v", len(paths), problems, err)
	}
	if report := r.run(rewrap.Options{DryRun: true}); report.Todo != files || report.Rewrapped != 0 {
		t.Errorf("dry run: %+v", report)
	}
	if report := r.run(rewrap.Options{Class: "general", From: otherKey}); report.Todo != 0 {
		t.Errorf("from a key that no file has: %+v", report)
	}
	times := r.times()
	if report := r.run(rewrap.Options{}); report.Seen != files || report.Rewrapped != files || report.Left != 0 {
		t.Errorf("rewrap: %+v", report)
	}
	if after := r.times(); !slices.Equal(after, times) {
		t.Error("rewrap changed the files' times")
	}
	if report := r.run(rewrap.Options{}); report.Todo != 0 || report.Rewrapped != 0 {
		t.Errorf("once more: %+v", report)
	}
	after := r.inventory()
	if k := after.Key(oldKey); k.Needed() || !after.Verdict(k, false).Deletable {
		t.Errorf("after: %+v, %+v", k, after.Verdict(k, false))
	}
	if k := after.Key(newKey); k.Sole.Files != files || after.Verdict(k, false).Deletable {
		t.Errorf("the new key: %+v", k)
	}
	if err := r.ring.ScheduleDeletion("old", 7); err != nil {
		t.Fatal(err)
	}
	r.wantFiles(files)
	if err := r.policy([]string{newKey}, nil); err != nil {
		t.Errorf("dropping the key: %v", err)
	}
	r.wantFiles(files)
}

// times returns the mtimes of the tree's files.
func (r *rig) times() (out []time.Time) {
	r.t.Helper()
	err := filepath.WalkDir(r.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && !strings.Contains(path, "/.kmsfs") {
			var i fs.FileInfo
			if i, err = d.Info(); err == nil {
				out = append(out, i.ModTime())
			}
		}
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return out
}

// TestRecipients adds a recipient and takes it away again.
func TestRecipients(t *testing.T) {
	r := newRig(t, envelope.Prefix, false, 20)
	if err := r.policy([]string{oldKey, newKey}, nil); err != nil {
		t.Fatal(err)
	}
	r.run(rewrap.Options{To: newKey})
	if k := r.inventory().Key(newKey); k.Several.Files != 20 || k.Sole.Files != 0 {
		t.Errorf("added: %+v", k)
	}
	if err := r.policy([]string{newKey, otherKey}, []string{oldKey}); err != nil {
		t.Fatal(err)
	}
	r.run(rewrap.Options{From: oldKey, To: otherKey})
	inv := r.inventory()
	if inv.Key(oldKey).Needed() || inv.Key(otherKey).Several.Files != 20 || inv.Key(newKey).Several.Files != 20 {
		t.Errorf("replaced: %+v %+v", inv.Key(oldKey), inv.Key(otherKey))
	}
	if err := r.policy([]string{newKey}, []string{oldKey, otherKey}); err != nil {
		t.Fatal(err)
	}
	r.run(rewrap.Options{})
	inv = r.inventory()
	if inv.Key(otherKey).Needed() || inv.Key(newKey).Sole.Files != 20 {
		t.Errorf("taken away: %+v", inv.Key(otherKey))
	}
	s := r.store()
	_, err := s.Run(t.Context(), nil, nil, rewrap.Options{To: oldKey})
	if !errors.Is(err, rewrap.ErrKey) {
		t.Errorf("to a retired key: %v, want %v", err, rewrap.ErrKey)
	}
	if _, err = s.Run(t.Context(), nil, nil, rewrap.Options{Class: "none"}); !errors.Is(err, rewrap.ErrPath) {
		t.Errorf("no such class: %v", err)
	}
	r.wantFiles(20)
}

// torn is a Writer that tears the header of each file of a batch and then is
// killed.
type torn struct {
	*rewrap.Locked
	r    *rig
	swap func() // exchanges two of the files
}

var errKilled = errors.New("killed")

// TestCrash: a header that a crash tore in the middle is whole again after the
// next mount, or the next rewrap, wherever the file is by then: F-55.
func TestCrash(t *testing.T) {
	for _, p := range everyPlace {
		for _, by := range []string{"mount", "rewrap"} {
			t.Run(p.String()+" "+by, func(t *testing.T) { crash(t, p, by) })
		}
	}
}

func crash(t *testing.T, p envelope.Placement, by string) {
	r := newRig(t, p, false, 10)
	if err := r.policy([]string{newKey}, []string{oldKey}); err != nil {
		t.Fatal(err)
	}
	s := r.store()
	lock, err := s.Lock(t.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w := &torn{Locked: lock, r: r}
	if _, err := s.Run(t.Context(), r.manager(s), w, rewrap.Options{}); !errors.Is(err, errKilled) {
		t.Fatalf("Run: %v, want %v", err, errKilled)
	}
	lock.Close()
	if inv := r.inventory(); !inv.Unfinished || inv.Verdict(inv.Key(oldKey), false).Deletable {
		t.Errorf("a batch that is not done: %+v", inv)
	}
	if by == "rewrap" {
		r.run(rewrap.Options{})
	} else {
		r.close(r.open())
	}
	w.swap()
	r.wantFiles(10)
	if inv := r.inventory(); inv.Unfinished || inv.Key(oldKey).Needed() || len(inv.Problems) > 0 {
		t.Errorf("afterwards: %+v", inv)
	}
}

func (w *torn) Write(_ context.Context, files []record.Rewrapped) ([]error, error) {
	root, err := backing.OpenRoot(w.r.dir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = root.Close() }()
	meta, err := root.OpenDir(record.MetaDir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = meta.Close() }()
	if err := meta.WriteNew("kept", record.EncodeRewrap(files), 0o600, true); err != nil {
		return nil, err
	}
	inv, err := w.r.store().Inventory(w.r.t.Context(), nil)
	if err != nil {
		return nil, err
	}
	place := placement.New(placementOf(root, inv), 1024)
	for _, f := range files {
		disk, err := root.Open(f.Path, unix.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		h, err := envelope.Parse(f.Block)
		if err == nil {
			block := bytes.Clone(f.Block)
			copy(block[100:], bytes.Repeat([]byte{0xee}, 200)) // half of the recipients
			err = place.Rewrite(disk, []*backing.Dir{root}, h.File, block)
		}
		_ = disk.Close()
		if err != nil {
			return nil, err
		}
	}
	// Renamed after the batch was written, before the crash.
	w.swap = func() {
		if err := os.Rename(filepath.Join(w.r.dir, files[0].Path), filepath.Join(w.r.dir, "x")); err != nil {
			w.r.t.Error(err)
		}
		if err := os.Rename(filepath.Join(w.r.dir, files[1].Path), filepath.Join(w.r.dir, files[0].Path)); err != nil {
			w.r.t.Error(err)
		}
		if err := os.Rename(filepath.Join(w.r.dir, "x"), filepath.Join(w.r.dir, files[1].Path)); err != nil {
			w.r.t.Error(err)
		}
	}
	w.swap()
	return nil, errors.Join(errKilled, meta.Rename("kept", meta, record.RewrapFile, 0))
}

// placementOf finds out where the headers are from what is in the directory.
func placementOf(root *backing.Dir, _ *rewrap.Inventory) envelope.Placement {
	p := envelope.Prefix
	_ = root.Each(func(e backing.Entry) bool {
		if strings.HasPrefix(e.Name, envelope.SidecarPrefix) {
			p = envelope.Sidecar
		} else if _, err := root.Attrs(e.Name).Get(envelope.XattrName); err == nil && p == envelope.Prefix {
			p = envelope.Xattr
		}
		return true
	})
	return p
}

// TestLocked: a store that is in use is left alone.
func TestLocked(t *testing.T) {
	r := newRig(t, envelope.Prefix, false, 1)
	v := r.open()
	if _, err := r.store().Lock(t.Context(), slog.New(slog.DiscardHandler)); !errors.Is(err, rewrap.ErrLocked) {
		t.Errorf("Lock: %v, want %v", err, rewrap.ErrLocked)
	}
	r.close(v)
	r.elsewhere()
	if _, err := rewrap.Open(rewrap.Config{Path: r.dir, Keys: map[string][]string{"general": {newKey}}}); !errors.Is(err, rewrap.ErrKeysChanged) {
		t.Errorf("other keys: %v, want %v", err, rewrap.ErrKeysChanged)
	}
	used, err := r.store().LastUsed()
	if err != nil || time.Since(used[oldKey]) > time.Hour { // F-56
		t.Errorf("last used: %v, %v", used, err)
	}
}

// elsewhere has another machine at the store, which the lock does not reach.
func (r *rig) elsewhere() {
	r.t.Helper()
	meta, err := backing.OpenRoot(filepath.Join(r.dir, record.MetaDir))
	if err != nil {
		r.t.Fatal(err)
	}
	defer meta.Close()
	id := r.store().ID()
	other, err := lease.Acquire(r.t.Context(), lease.Config{Dir: meta, Store: id[:], Interval: 50 * time.Millisecond,
		Identity: &lease.Identity{Machine: "other", Boot: "other", Host: "other"}})
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.store().Lock(r.t.Context(), slog.New(slog.DiscardHandler)); !errors.Is(err, lease.ErrHeld) {
		r.t.Errorf("Lock beside another machine: got %v, want ErrHeld", err)
	}
	if err := other.Release(); err != nil {
		r.t.Fatal(err)
	}
	w, err := r.store().Lock(r.t.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		r.t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(r.dir, record.MetaDir, lease.FileName)); err != nil {
		r.t.Errorf("a rewrap has no lease: %v", err)
	}
	w.Close()
}

// TestProblems: a header that cannot be read makes no key deletable.
func TestProblems(t *testing.T) {
	r := newRig(t, envelope.Prefix, false, 3)
	paths, _, err := r.store().DependsOn(t.Context(), oldKey)
	if err != nil || len(paths) != 3 {
		t.Fatalf("%q, %v", paths, err)
	}
	f, err := os.OpenFile(filepath.Join(r.dir, paths[0]), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt([]byte("rubbish"), 88)
	if cerr := f.Close(); err != nil || cerr != nil {
		t.Fatal(err, cerr)
	}
	inv := r.inventory()
	if len(inv.Problems) != 1 || inv.Problems[0].Path != paths[0] || inv.Files.Files != 2 {
		t.Errorf("%+v", inv)
	}
	if err := r.policy([]string{newKey}, []string{oldKey}); err != nil {
		t.Fatal(err)
	}
	s := r.store()
	w, err := s.Lock(t.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	report, err := s.Run(t.Context(), r.manager(s), w, rewrap.Options{})
	if err != nil || report.Rewrapped != 2 || report.Left != 1 || len(report.Failed) != 1 {
		t.Errorf("%+v, %v", report, err)
	}
	inv = r.inventory()
	if v := inv.Verdict(inv.Key(oldKey), false); v.Deletable {
		t.Errorf("with a file that cannot be looked at: %+v", v)
	}
}

// TestReplace: only the recipients come from the other block.
func TestReplace(t *testing.T) {
	r := newRig(t, envelope.Prefix, false, 2)
	paths, _, err := r.store().DependsOn(t.Context(), oldKey)
	if err != nil {
		t.Fatal(err)
	}
	block := func(i int) []byte {
		b, err := os.ReadFile(filepath.Join(r.dir, paths[i]))
		if err != nil {
			t.Fatal(err)
		}
		return b[:1024]
	}
	a, b := block(0), block(1)
	if got, err := rewrap.Replace(a, a); err != nil || !bytes.Equal(got, a) {
		t.Errorf("with itself: %v", err)
	}
	if _, err := rewrap.Replace(a, b); !errors.Is(err, rewrap.ErrChanged) {
		t.Errorf("another file's: %v, want %v", err, rewrap.ErrChanged)
	}
	for _, at := range []string{"", "/x", "../x", "a/../b", "a//b", ".kmsfs/store", "a/.kmsfs.dir", "a\x00b"} {
		root, err := backing.OpenRoot(r.dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := rewrap.OpenDir(root, at); !errors.Is(err, rewrap.ErrPath) {
			t.Errorf("OpenDir(%q): %v, want %v", at, err, rewrap.ErrPath)
		}
		_ = root.Close()
	}
}
