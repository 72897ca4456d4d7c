package cryptfs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/classify"
)

// jobTree makes what jobs must keep below a directory: sizes around chunks, holes,
// hard links across directories, links long and short, attributes, odd names,
// modes and times.
func jobTree(t *testing.T, v *Volume, top *Node) {
	t.Helper()
	ctx, c := t.Context(), Caller{Umask: 0o22}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	mkdir := func(d *Node, name string) *Node {
		n, _, err := v.Mkdir(ctx, d, name, 0o755, c)
		must(err)
		return n
	}
	put := func(d *Node, name string, size int, hole int64) *Node {
		n, h, _, err := v.Create(ctx, d, name, unix.O_RDWR, 0o640, c)
		must(err)
		defer h.Release()
		data := make([]byte, size)
		rand.NewChaCha8([32]byte{byte(size), byte(len(name))}).Read(data)
		if size > 0 {
			_, err = h.WriteAt(data, hole, false)
			must(err)
		}
		if hole > 0 {
			must(h.Truncate(3*hole + int64(size)))
		}
		must(h.Flush())
		return n
	}
	a := mkdir(top, "a")
	b := mkdir(a, strings.Repeat("b", 255))
	for _, size := range []int{0, 1, 4096, 4097, 20000} {
		put(a, fmt.Sprintf("size %d", size), size, 0)
	}
	put(b, strings.Repeat("n", 255), 100, 0)
	put(b, "sparse", 5000, 1<<20)
	n := put(top, "linked", 9000, 0)
	_, err := v.Link(ctx, n, top, "linked too")
	must(err)
	_, err = v.Link(ctx, n, b, "and far away")
	must(err)
	must(v.Setxattr(ctx, n, "user.color", []byte("blue"), 0, c))
	must(v.Setxattr(ctx, a, "user.of.dir", []byte("yes"), 0, c))
	for name, target := range map[string]string{"short": "../x", "long": strings.Repeat("t/", 2000)} {
		_, _, err := v.Symlink(ctx, a, name, target, c)
		must(err)
	}
	_, _, err = v.Mknod(ctx, b, "fifo", unix.S_IFIFO|0o600, 0, c)
	must(err)
	mode := uint32(0o500)
	_, err = v.Setattr(ctx, b, SetAttr{Mode: &mode})
	must(err)
	stamp(t, v, top, 1)
}

// stamp gives everything a time of its own.
func stamp(t *testing.T, v *Volume, d *Node, n int64) int64 {
	t.Helper()
	each(t, v, d, func(name string, c *Node, a Attr) {
		if c.IsDir() {
			n = stamp(t, v, c, n)
		}
		n++
		ts := Time{1_000_000_000 + n, uint32(n * 1001)}
		if _, err := v.Setattr(t.Context(), c, SetAttr{Atime: &ts, Mtime: &ts}); err != nil {
			t.Fatal(err)
		}
	})
	return n
}

func each(t *testing.T, v *Volume, d *Node, f func(name string, n *Node, a Attr)) {
	t.Helper()
	dh, err := v.OpenDir(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	defer dh.Close()
	for _, e := range dh.Entries()[2:] {
		n, a, err := v.Lookup(t.Context(), d, e.Name)
		if err != nil {
			t.Fatalf("%s: %v", e.Name, err)
		}
		f(e.Name, n, a)
		v.Forget(n, 1)
	}
}

// jobEntry is what is compared of a file.
type jobEntry struct {
	what, id, class, links string
	atime                  Time // of files
}

// noAtime leaves access times out, where the test's own copies change them.
func noAtime(tree map[string]jobEntry) map[string]jobEntry {
	for p, e := range tree {
		e.atime = Time{}
		tree[p] = e
	}
	return tree
}

// readJobTree reads everything below a directory.
func readJobTree(t *testing.T, v *Volume, d *Node, at string) map[string]jobEntry {
	t.Helper()
	out, inodes := map[string]jobEntry{}, map[uint64][]string{}
	var read func(d *Node, at string)
	read = func(d *Node, at string) {
		each(t, v, d, func(name string, n *Node, a Attr) {
			p := path.Join(at, name)
			e := jobEntry{what: describe(t, v, n, a), class: virtualAttr(v, n, classAttr)}
			if n.typ == unix.S_IFREG {
				e.atime = a.Atime
				e.id = virtualAttr(v, n, idAttr)
				if a.Nlink > 1 {
					inodes[a.Ino] = append(inodes[a.Ino], p)
				}
			}
			out[p] = e
			if n.IsDir() {
				read(n, p)
			}
		})
	}
	read(d, at)
	for _, names := range inodes {
		slices.Sort(names)
		for _, p := range names {
			e := out[p]
			e.links = strings.Join(names, "|")
			out[p] = e
		}
	}
	return out
}

func virtualAttr(v *Volume, n *Node, name string) string {
	b, err := v.Getxattr(context.Background(), n, name)
	if err != nil {
		return "-"
	}
	return string(b)
}

func describe(t *testing.T, v *Volume, n *Node, a Attr) string {
	t.Helper()
	ctx := t.Context()
	s := fmt.Sprintf("mode %o uid %d gid %d mtime %v", a.Mode, a.Uid, a.Gid, a.Mtime)
	switch n.typ {
	case unix.S_IFREG:
		h, err := v.Open(ctx, n, unix.O_RDONLY, false)
		if err != nil {
			t.Fatal(err)
		}
		data := make([]byte, a.Size+1)
		k, err := h.ReadAt(data, 0)
		if err != nil {
			t.Fatal(err)
		}
		hole, _ := h.Seek(0, unix.SEEK_DATA)
		h.Release()
		s += fmt.Sprintf(" size %d hole %v sum %x", a.Size, hole > 0, sha256.Sum256(data[:k]))
	case unix.S_IFLNK:
		target, err := v.Readlink(n)
		if err != nil {
			t.Fatal(err)
		}
		s += " target " + target
	}
	names, err := v.Listxattr(ctx, n)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	for _, name := range names {
		value, err := v.Getxattr(ctx, n, name)
		if err != nil {
			t.Fatal(err)
		}
		s += fmt.Sprintf(" %s=%q", name, value)
	}
	return s
}

// sameTree compares two trees; newIDs wants every file to have another id, and
// class that class, unless it is "".
func sameTree(t *testing.T, what string, got, want map[string]jobEntry, newIDs bool, class string) {
	t.Helper()
	for _, p := range slices.Sorted(maps.Keys(want)) {
		g, ok := got[p]
		w := want[p]
		short := p[:min(len(p), 40)]
		switch {
		case !ok:
			t.Errorf("%s: %s is gone", what, short)
		case g.what != w.what:
			t.Errorf("%s: %s is\n%s\nwant\n%s", what, short, g.what, w.what)
		case w.atime != (Time{}) && g.atime != w.atime:
			t.Errorf("%s: %s was read at %v, want %v", what, short, g.atime, w.atime)
		case g.links != w.links:
			t.Errorf("%s: %s is one file with %q, want %q", what, short, g.links, w.links)
		case newIDs && w.id != "" && g.id == w.id:
			t.Errorf("%s: %s still has its old key", what, short)
		case class != "" && w.class != "-" && g.class != class:
			t.Errorf("%s: %s has class %s, want %s", what, short, g.class, class)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%s: %d entries, want %d", what, len(got), len(want))
	}
}

func copyStore(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
}

// openJob opens a store with a function that sees every step of a job, and of
// the recovery of one.
func openJob(t *testing.T, dir string, prov keywrap.Provider, onStep func(string) error) (*Volume, error) {
	t.Helper()
	info, err := Inspect(dir)
	if err != nil {
		t.Fatal(err)
	}
	return Open(t.Context(), Config{Store: dir, Provider: prov, Keys: info.Keys, onStep: onStep})
}

func mustOpenJob(t *testing.T, dir string, prov keywrap.Provider) *Volume {
	t.Helper()
	v, err := openJob(t, dir, prov, nil)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// fsckClean wants nothing found, and nothing left of a job if done says so.
func fsckClean(t *testing.T, what, dir string, prov keywrap.Provider, done bool) {
	t.Helper()
	info, err := Inspect(dir)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Fsck(t.Context(), FsckConfig{Config: Config{Store: dir, Provider: prov, Keys: info.Keys}})
	if err != nil {
		t.Fatalf("%s: fsck: %v", what, err)
	}
	for _, p := range r.Problems {
		if done || p.Class != classPending && p.Class != classPolicy {
			t.Errorf("%s: fsck: %+v", what, p)
		}
	}
	if !done {
		return
	}
	for _, name := range []string{rekeyDir, reclassifyDir} {
		if _, err := os.Stat(filepath.Join(dir, metaDir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %s is left: %v", what, name, err)
		}
	}
}

// snapshots is a hook that copies the store at every step, as a crash there
// would leave it: at each where most can go wrong, with sidecars and encrypted
// names, else at every fifth.
type snapshots struct {
	t     *testing.T
	dir   string
	base  string
	every int
	steps int
	made  []string
}

func newSnapshots(t *testing.T, dir string) *snapshots {
	s := &snapshots{t: t, dir: dir, base: t.TempDir(), every: 5}
	if strings.HasSuffix(t.Name(), "/sidecar/encrypted") {
		s.every = 1
	}
	return s
}

func (s *snapshots) step(what string) error {
	if s.steps++; s.steps%s.every != 0 {
		return nil
	}
	to := filepath.Join(s.base, fmt.Sprintf("%03d %s", s.steps, what))
	copyStore(s.t, s.dir, to)
	s.made = append(s.made, to)
	return nil
}

func eachJobStore(t *testing.T, f func(t *testing.T, dir string, prov keywrap.Provider)) {
	for _, p := range everyPlace {
		for _, names := range []classify.NameMode{classify.NamesEncrypted, classify.NamesPlain} {
			t.Run(p.String()+"/"+string(names), func(t *testing.T) {
				dir, prov, _ := testStore(t, p, names)
				f(t, dir, prov)
			})
		}
	}
}

func rekeyAll(t *testing.T, v *Volume) *RekeyReport {
	t.Helper()
	r, err := v.Rekey(t.Context(), RekeyConfig{JobConfig: JobConfig{Concurrent: 1}})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Failures) > 0 {
		t.Fatalf("failures: %+v", r.Failures)
	}
	return r
}

// TestRekeyCrash looks at the store as a crash at every step leaves it: all is
// there after the next open, and the next rekey ends with a new key for every
// file. F-50 F-51
func TestRekeyCrash(t *testing.T) {
	eachJobStore(t, func(t *testing.T, dir string, prov keywrap.Provider) {
		v := mustOpenJob(t, dir, prov)
		jobTree(t, v, v.Root())
		want := noAtime(readJobTree(t, v, v.Root(), ""))
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		snaps := newSnapshots(t, dir)
		v, err := openJob(t, dir, prov, snaps.step)
		if err != nil {
			t.Fatal(err)
		}
		rep := rekeyAll(t, v)
		if rep.Rekeyed != 7 || rep.Done != 0 || rep.Resumed {
			t.Errorf("report %+v, want 7 files", rep)
		}
		sameTree(t, "after", readJobTree(t, v, v.Root(), ""), want, true, "")
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		fsckClean(t, "after", dir, prov, true)
		for _, s := range snaps.made {
			rekeyFrom(t, s, prov, want)
		}
		if snaps.steps < 30 {
			t.Errorf("only %d steps", snaps.steps)
		}
	})
}

// rekeyFrom goes on from a crash, which is followed by another in the recovery.
func rekeyFrom(t *testing.T, dir string, prov keywrap.Provider, want map[string]jobEntry) {
	t.Helper()
	what := filepath.Base(dir)
	n := 0
	if v, err := openJob(t, dir, prov, func(string) error {
		if n++; n == 2 {
			return errStep
		}
		return nil
	}); err == nil {
		_ = v.Close()
	} else if !errors.Is(err, errStep) {
		t.Fatalf("%s: %v", what, err)
	}
	v := mustOpenJob(t, dir, prov)
	sameTree(t, what+", recovered", readJobTree(t, v, v.Root(), ""), want, false, "")
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	fsckClean(t, what+", recovered", dir, prov, false)
	v = mustOpenJob(t, dir, prov)
	rekeyAll(t, v)
	sameTree(t, what+", done", readJobTree(t, v, v.Root(), ""), want, true, "")
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	fsckClean(t, what+", done", dir, prov, true)
}

// TestRekeyStepFails lets each step fail once, as a full disk would: nothing is
// lost, and the same call ends the job.
func TestRekeyStepFails(t *testing.T) {
	eachJobStore(t, func(t *testing.T, dir string, prov keywrap.Provider) {
		v := mustOpenJob(t, dir, prov)
		jobTree(t, v, v.Root())
		want := readJobTree(t, v, v.Root(), "")
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		done := 0
		for at := 1; done == 0; at++ {
			n, failed := 0, false
			v, err := openJob(t, dir, prov, func(string) error {
				if n++; n == at {
					failed = true
					return unix.ENOSPC
				}
				return nil
			})
			if err != nil {
				if !failed {
					t.Fatal(err)
				}
				continue
			}
			if _, err := v.Rekey(t.Context(), RekeyConfig{
				JobConfig: JobConfig{Concurrent: 1}, Selection: fmt.Sprint(at), Restart: true,
			}); err != nil && !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("step %d: %v", at, err)
			}
			if !failed {
				done = at
			}
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
			v = mustOpenJob(t, dir, prov)
			sameTree(t, fmt.Sprint("step ", at), readJobTree(t, v, v.Root(), ""), want, false, "")
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
		}
		v = mustOpenJob(t, dir, prov)
		rekeyAll(t, v)
		sameTree(t, "at last", readJobTree(t, v, v.Root(), ""), want, true, "")
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		fsckClean(t, "at last", dir, prov, true)
		if done < 20 {
			t.Errorf("only %d steps", done)
		}
	})
}

// TestRekeyGoesOn: what an interrupted job has done is not done again, also when
// it was killed between two files. F-49
func TestRekeyGoesOn(t *testing.T) {
	dir, prov, _ := testStore(t, envelope.Prefix, classify.NamesEncrypted)
	v := mustOpenJob(t, dir, prov)
	for i := range 50 {
		_, h, _, err := v.Create(t.Context(), v.Root(), fmt.Sprint(i), unix.O_RDWR, 0o600, Caller{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.WriteAt([]byte("x"), 0, false); err != nil {
			t.Fatal(err)
		}
		h.Release()
	}
	stop := errors.New("stop")
	n := 0
	rep, err := v.Rekey(t.Context(), RekeyConfig{JobConfig: JobConfig{Concurrent: 1, Wait: func(context.Context) error {
		if n++; n > 20 {
			return stop
		}
		return nil
	}}})
	if !errors.Is(err, stop) || rep.Rekeyed != 20 {
		t.Fatalf("%+v, %v; want 20 files and the error", rep, err)
	}
	before := readJobTree(t, v, v.Root(), "")
	if _, err := v.Rekey(t.Context(), RekeyConfig{Selection: "other"}); !errors.Is(err, ErrOtherJob) {
		t.Errorf("another selection: %v, want ErrOtherJob", err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	v = mustOpenJob(t, dir, prov)
	rep = rekeyAll(t, v)
	if rep.Rekeyed != 30 || rep.Done != 20 || !rep.Resumed {
		t.Errorf("%+v, want 30 rekeyed and 20 done before", rep)
	}
	same := 0
	for p, e := range readJobTree(t, v, v.Root(), "") {
		if e.id == before[p].id {
			same++
		}
	}
	if same != 20 {
		t.Errorf("%d files were left alone, want 20", same)
	}
	if rep = rekeyAll(t, v); rep.Rekeyed != 50 || rep.Resumed {
		t.Errorf("a new job: %+v, want 50 files", rep)
	}
	_ = v.Close()
}

// TestRekeySelection: by class, by path and by age.
func TestRekeySelection(t *testing.T) {
	dir, prov, _ := testStore(t, envelope.Prefix, classify.NamesEncrypted)
	v := mustOpenJob(t, dir, prov)
	defer func() { _ = v.Close() }()
	jobTree(t, v, v.Root())
	pat, _, err := v.Mkdir(t.Context(), v.Root(), "patients", 0o755, Caller{})
	if err != nil {
		t.Fatal(err)
	}
	jobTree(t, v, pat)
	young := time.Now().Add(time.Hour)
	for name, tt := range map[string]struct {
		c             RekeyConfig
		rekeyed, left uint64
	}{
		"class":      {RekeyConfig{Class: "phi"}, 7, 0},
		"directory":  {RekeyConfig{Paths: []string{"/patients/a", "patients/linked"}}, 7, 0},
		"one file":   {RekeyConfig{Paths: []string{"/a/size 1"}}, 1, 0},
		"both roots": {RekeyConfig{Paths: []string{"/"}}, 14, 0},
		"old":        {RekeyConfig{OlderThan: young}, 14, 0},
		"none old":   {RekeyConfig{OlderThan: time.Now().Add(-time.Hour)}, 0, 14},
	} {
		rep, err := v.Rekey(t.Context(), tt.c)
		if err != nil || rep.Rekeyed != tt.rekeyed || rep.Younger != tt.left {
			t.Errorf("%s: %+v, %v; want %d rekeyed, %d left", name, rep, err, tt.rekeyed, tt.left)
		}
	}
	if _, err := v.Rekey(t.Context(), RekeyConfig{Class: "none"}); !errors.Is(err, ErrNoClass) {
		t.Errorf("unknown class: %v", err)
	}
	if _, err := v.Rekey(t.Context(), RekeyConfig{Paths: []string{"/a/none"}}); !errors.Is(err, unix.ENOENT) {
		t.Errorf("unknown path: %v", err)
	}
}

// TestRekeyDamaged: a file that fails authentication stays as it is, is told, and
// keeps the job unfinished.
func TestRekeyDamaged(t *testing.T) {
	dir, prov, _ := testStore(t, envelope.Prefix, classify.NamesPlain)
	v := mustOpenJob(t, dir, prov)
	defer func() { _ = v.Close() }()
	jobTree(t, v, v.Root())
	at := filepath.Join(dir, "a", "size 20000")
	b, err := os.ReadFile(at)
	if err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(b)
	bad[1024+100] ^= 1
	if err := os.WriteFile(at, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	rep, err := v.Rekey(t.Context(), RekeyConfig{})
	if err != nil || rep.Rekeyed != 6 || len(rep.Failures) != 1 || rep.Failures[0].Path != "/a/size 20000" || rep.Failures[0].Kind != fault.Integrity {
		t.Errorf("%+v, %v", rep, err)
	}
	if got, err := os.ReadFile(at); err != nil || !bytes.Equal(got, bad) {
		t.Errorf("the damaged file was changed: %v", err)
	}
	if err := os.WriteFile(at, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if rep := rekeyAll(t, v); rep.Rekeyed != 1 || rep.Done != 6 || !rep.Resumed {
		t.Errorf("after it was restored: %+v", rep)
	}
}

// TestRekeyForgedJob: a job record that somebody else wrote is refused. F-48
func TestRekeyForgedJob(t *testing.T) {
	dir, prov, _ := testStore(t, envelope.Prefix, classify.NamesPlain)
	v := mustOpenJob(t, dir, prov)
	defer func() { _ = v.Close() }()
	jobTree(t, v, v.Root())
	stop := errors.New("stop")
	_, err := v.Rekey(t.Context(), RekeyConfig{JobConfig: JobConfig{Wait: func(context.Context) error { return stop }}})
	if !errors.Is(err, stop) {
		t.Fatal(err)
	}
	at := filepath.Join(dir, metaDir, rekeyDir, jobFile)
	b, err := os.ReadFile(at)
	if err != nil {
		t.Fatal(err)
	}
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 1
		if err := os.WriteFile(at, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := v.Rekey(t.Context(), RekeyConfig{}); !errors.Is(err, ErrJob) {
			t.Fatalf("byte %d changed: %v, want ErrJob", i, err)
		}
	}
}
