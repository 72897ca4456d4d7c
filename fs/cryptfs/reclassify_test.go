package cryptfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/classify"
)

// jobStore is a store with a tree in /top.
func jobStore(t *testing.T, dir string, prov keywrap.Provider) map[string]jobEntry {
	t.Helper()
	v := mustOpenJob(t, dir, prov)
	defer func() { _ = v.Close() }()
	top, _, err := v.Mkdir(t.Context(), v.Root(), "top", 0o750, Caller{})
	if err != nil {
		t.Fatal(err)
	}
	jobTree(t, v, top)
	if err := v.Setxattr(t.Context(), top, "user.of.top", []byte("yes"), 0, Caller{}); err != nil {
		t.Fatal(err)
	}
	stamp(t, v, v.Root(), 1000)
	return noAtime(readJobTree(t, v, v.Root(), ""))
}

func reclassify(t *testing.T, v *Volume, path, class string) *ReclassifyReport {
	t.Helper()
	r, err := v.Reclassify(t.Context(), ReclassifyConfig{Path: path, Class: class, JobConfig: JobConfig{Concurrent: 1}})
	if err != nil {
		t.Fatalf("%v: %+v", err, r)
	}
	return r
}

// below cuts a tree to what is in one directory.
func below(tree map[string]jobEntry, dir string) map[string]jobEntry {
	out := map[string]jobEntry{}
	for p, e := range tree {
		if strings.HasPrefix(p, dir+"/") {
			e.links = ""
			out[p] = e
		}
	}
	return out
}

// wantState compares a tree that has, as a whole, the old class or the new one.
func wantState(t *testing.T, what string, v *Volume, want map[string]jobEntry) (class string) {
	t.Helper()
	got := readJobTree(t, v, v.Root(), "")
	class = got["top"].class
	sameTree(t, what, got, want, class == "phi", "")
	sameTree(t, what, below(got, "top"), below(want, "top"), class == "phi", class)
	return class
}

// TestReclassifyCrash looks at the store as a crash at every step leaves it: the
// tree has its old class as a whole, or the new one, and the next call ends the
// job. F-52 F-53
func TestReclassifyCrash(t *testing.T) {
	eachJobStore(t, func(t *testing.T, dir string, prov keywrap.Provider) {
		want := jobStore(t, dir, prov)
		snaps := newSnapshots(t, dir)
		v, err := openJob(t, dir, prov, snaps.step)
		if err != nil {
			t.Fatal(err)
		}
		rep := reclassify(t, v, "/top", "phi")
		if rep.From != "general" || !rep.Changed || !rep.Rule || rep.Files != 10 || rep.Directories != 3 || rep.Others != 3 || len(rep.Broken) != 0 {
			t.Errorf("report %+v", rep)
		}
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		v = mustOpenJob(t, dir, prov)
		if class := wantState(t, "after", v, want); class != "phi" {
			t.Errorf("class %s", class)
		}
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		fsckClean(t, "after", dir, prov, true)
		seen := map[string]int{}
		for _, s := range snaps.made {
			seen[reclassifyFrom(t, s, prov, want)]++
		}
		if seen["general"] < 20/snaps.every || seen["phi"] < 5/snaps.every {
			t.Errorf("crashes by class: %v", seen)
		}
	})
}

// reclassifyFrom goes on from a crash, which is followed by another in the
// recovery. It returns the class that the crash left.
func reclassifyFrom(t *testing.T, dir string, prov keywrap.Provider, want map[string]jobEntry) (class string) {
	t.Helper()
	what := filepath.Base(dir)
	n := 0
	v, err := openJob(t, dir, prov, func(string) error {
		if n++; n == 2 {
			return errStep
		}
		return nil
	})
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	v = mustOpenJob(t, dir, prov)
	class = wantState(t, what+", recovered", v, want)
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	fsckClean(t, what+", recovered", dir, prov, class == "phi")
	v = mustOpenJob(t, dir, prov)
	reclassify(t, v, "/top", "phi")
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	v = mustOpenJob(t, dir, prov)
	if class := wantState(t, what+", done", v, want); class != "phi" {
		t.Errorf("%s: class %s at last", what, class)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	fsckClean(t, what+", done", dir, prov, true)
	return class
}

// TestReclassifyStepFails lets each step fail once, as a full disk would.
func TestReclassifyStepFails(t *testing.T) {
	eachJobStore(t, func(t *testing.T, dir string, prov keywrap.Provider) {
		want := jobStore(t, dir, prov)
		done := 0
		for at := 1; done == 0; at++ {
			class := []string{"phi", "general"}[at%2]
			n, failed := 0, false
			v, err := openJob(t, dir, prov, func(string) error {
				if n++; n == at {
					failed = true
					return unix.ENOSPC
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			_, err = v.Reclassify(t.Context(), ReclassifyConfig{Path: "/top", Class: class, JobConfig: JobConfig{Concurrent: 1}})
			if err != nil && !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("step %d: %v", at, err)
			}
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
			v = mustOpenJob(t, dir, prov)
			got := readJobTree(t, v, v.Root(), "")
			sameTree(t, fmt.Sprint("step ", at), got, want, false, "")
			reclassify(t, v, "/top", class)
			_ = v.Close()
			v = mustOpenJob(t, dir, prov)
			got = readJobTree(t, v, v.Root(), "")
			sameTree(t, fmt.Sprint("after step ", at), below(got, "top"), below(want, "top"), false, class)
			_ = v.Close()
			fsckClean(t, fmt.Sprint("after step ", at), dir, prov, true)
			if !failed || t.Failed() {
				done = at
			} else if !strings.HasSuffix(t.Name(), "/sidecar/encrypted") {
				at += 4
			}
		}
		if done < 20 {
			t.Errorf("only %d steps", done)
		}
	})
}

// TestReclassifyGoesOn: what an interrupted run has copied is used; what changed
// since then is copied again, and what was removed is not there.
func TestReclassifyGoesOn(t *testing.T) {
	for _, p := range everyPlace {
		t.Run(p.String(), func(t *testing.T) { reclassifyGoesOn(t, p) })
	}
}

func reclassifyGoesOn(t *testing.T, p envelope.Placement) {
	dir, prov, _ := testStore(t, p, classify.NamesEncrypted)
	want := jobStore(t, dir, prov)
	v := mustOpenJob(t, dir, prov)
	stop := errors.New("stop")
	n := 0
	_, err := v.Reclassify(t.Context(), ReclassifyConfig{Path: "/top", Class: "phi", JobConfig: JobConfig{Concurrent: 1, Wait: func(context.Context) error {
		if n++; n > 8 {
			return stop
		}
		return nil
	}}})
	if err == nil {
		t.Fatal("no error")
	}
	if _, err := v.Reclassify(t.Context(), ReclassifyConfig{Path: "/", Class: "phi"}); !errors.Is(err, ErrFixed) {
		t.Errorf("the root: %v", err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	v = mustOpenJob(t, dir, prov)
	at := func(path string) (*Node, *Node) {
		d := v.Root()
		var n *Node
		for _, name := range strings.Split(path, "/") {
			if n != nil {
				d = n
			}
			if n, _, err = v.Lookup(t.Context(), d, name); err != nil {
				t.Fatal(err)
			}
		}
		return d, n
	}
	a, _ := at("top/a/size 1")
	if _, _, _, err := v.Create(t.Context(), a, "new", unix.O_RDWR, 0o600, Caller{}); !errors.Is(err, ErrClassMismatch) {
		t.Errorf("a new file while the class changes: %v, want ErrClassMismatch", err)
	}
	if err := v.Unlink(t.Context(), a, "size 4097"); err != nil {
		t.Fatal(err)
	}
	delete(want, "top/a/size 4097")
	_, n2 := at("top/a/size 20000")
	mode := uint32(0o444)
	if _, err := v.Setattr(t.Context(), n2, SetAttr{Mode: &mode}); err != nil {
		t.Fatal(err)
	}
	if err := v.Setxattr(t.Context(), n2, "user.late", []byte("yes"), 0, Caller{}); err != nil {
		t.Fatal(err)
	}
	_ = v.Close()
	v = mustOpenJob(t, dir, prov)
	want = noAtime(readJobTree(t, v, v.Root(), ""))
	_ = v.Close()
	v = mustOpenJob(t, dir, prov)
	rep := reclassify(t, v, "top", "phi")
	if rep.Kept < 4 || rep.Rule {
		t.Errorf("%+v, want some kept, and no rule", rep)
	}
	_ = v.Close()
	v = mustOpenJob(t, dir, prov)
	if class := wantState(t, "after", v, want); class != "phi" {
		t.Errorf("class %s", class)
	}
	_ = v.Close()
	fsckClean(t, "after", dir, prov, true)
}

// TestReclassifyRules: a rule below the directory keeps its class, and its files
// get new keys of that class; hard links between the two become two files, as do
// those that lead out of the tree. S-51
func TestReclassifyRules(t *testing.T) {
	dir, prov, _ := testStore(t, envelope.Sidecar, classify.NamesEncrypted)
	v := mustOpenJob(t, dir, prov)
	top, _, err := v.Mkdir(t.Context(), v.Root(), "patients", 0o755, Caller{})
	if err != nil {
		t.Fatal(err)
	}
	jobTree(t, v, top)
	want := noAtime(readJobTree(t, v, v.Root(), ""))
	pol := v.Info().Policy
	if pol, err = pol.WithRule("/patients", "general"); err == nil {
		pol, err = pol.WithRule("/patients/a", "phi")
	}
	if err == nil {
		_, err = v.ApplyPolicy(t.Context(), pol)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := v.Mkdir(t.Context(), top, "x", 0o700, Caller{}); !errors.Is(err, ErrClassMismatch) {
		t.Fatalf("after policy apply: %v, want ErrClassMismatch", err)
	}
	rep := reclassify(t, v, "/patients", "general")
	if rep.Rule || !rep.Changed || rep.From != "phi" || len(rep.Broken) != 1 || !strings.HasPrefix(rep.Broken[0], "/patients/") {
		t.Errorf("%+v", rep)
	}
	_ = v.Close()
	v = mustOpenJob(t, dir, prov)
	got := readJobTree(t, v, v.Root(), "")
	sameTree(t, "below the rule", below(got, "patients/a"), below(want, "patients/a"), true, "phi")
	for _, p := range []string{"patients/linked", "patients/linked too", "patients/a"} {
		if got[p].class != map[bool]string{true: "phi", false: "general"}[p == "patients/a"] || got[p].what != want[p].what {
			t.Errorf("%s: %+v", p, got[p])
		}
	}
	if got["patients/linked"].links != "patients/linked|patients/linked too" {
		t.Errorf("links %q", got["patients/linked"].links)
	}
	_ = v.Close()
	fsckClean(t, "after", dir, prov, true)
}

// TestReclassifyOutside: a file with a name outside the tree becomes two.
func TestReclassifyOutside(t *testing.T) {
	for _, p := range everyPlace {
		dir, prov, _ := testStore(t, p, classify.NamesEncrypted)
		jobStore(t, dir, prov)
		v := mustOpenJob(t, dir, prov)
		top, _, err := v.Lookup(t.Context(), v.Root(), "top")
		if err != nil {
			t.Fatal(err)
		}
		n, _, err := v.Lookup(t.Context(), top, "linked")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.Link(t.Context(), n, v.Root(), "outside"); err != nil {
			t.Fatal(err)
		}
		_ = v.Close()
		v = mustOpenJob(t, dir, prov)
		rep := reclassify(t, v, "/top", "phi")
		if len(rep.Broken) != 1 {
			t.Errorf("%v: broken %q", p, rep.Broken)
		}
		_ = v.Close()
		v = mustOpenJob(t, dir, prov)
		got := readJobTree(t, v, v.Root(), "")
		if got["outside"].class != "general" || got["outside"].links != "" || got["top/linked"].class != "phi" {
			t.Errorf("%v: outside %+v, inside %+v", p, got["outside"], got["top/linked"])
		}
		if g, w := got["top/linked"].what, got["outside"].what; g != w {
			t.Errorf("%v: inside\n%s\noutside\n%s", p, g, w)
		}
		_ = v.Close()
		fsckClean(t, p.String(), dir, prov, true)
	}
}

// TestReclassifyRefusals: what is refused changes nothing.
func TestReclassifyRefusals(t *testing.T) {
	dir, prov, _ := testStore(t, envelope.Prefix, classify.NamesPlain)
	want := jobStore(t, dir, prov)
	v := mustOpenJob(t, dir, prov)
	defer func() { _ = v.Close() }()
	rules := len(v.Info().Policy.Directories)
	for name, tt := range map[string]struct {
		path, class string
		want        error
	}{
		"root":          {"/", "phi", ErrFixed},
		"unknown class": {"/top", "none", ErrNoClass},
		"no directory":  {"/top/linked", "phi", unix.ENOTDIR},
		"not there":     {"/none", "phi", unix.ENOENT},
	} {
		if _, err := v.Reclassify(t.Context(), ReclassifyConfig{Path: tt.path, Class: tt.class}); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
	if rep := reclassify(t, v, "/top", "general"); rep.Changed {
		t.Errorf("the class that it has: %+v", rep)
	}
	at := filepath.Join(dir, "top", "a", "size 20000")
	b, err := os.ReadFile(at)
	if err != nil {
		t.Fatal(err)
	}
	bad := slices.Clone(b)
	bad[2000] ^= 1
	if err := os.WriteFile(at, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	rep, err := v.Reclassify(t.Context(), ReclassifyConfig{Path: "/top", Class: "phi"})
	if !errors.Is(err, ErrIncomplete) || len(rep.Failures) != 1 || rep.Failures[0].Path != "/top/a/size 20000" {
		t.Errorf("a damaged file: %v, %+v", err, rep)
	}
	if err := os.WriteFile(at, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if rep := reclassify(t, v, "/top", "general"); rep.Changed != true || !rep.Rule {
		t.Errorf("back again: %+v", rep)
	}
	_ = v.Close()
	v = mustOpenJob(t, dir, prov)
	got := readJobTree(t, v, v.Root(), "")
	delete(got, "top/a/size 20000") // its times are the test's
	delete(want, "top/a/size 20000")
	sameTree(t, "at last", got, want, false, "general")
	if got := len(v.Info().Policy.Directories); got != rules+1 {
		t.Errorf("%d rules, want %d", got, rules+1)
	}
	_ = v.Close()
	fsckClean(t, "at last", dir, prov, true)
}

// TestReclassifyOtherJob: one that is unfinished elsewhere is told by its path.
func TestReclassifyOtherJob(t *testing.T) {
	dir, prov, _ := testStore(t, envelope.Prefix, classify.NamesEncrypted)
	jobStore(t, dir, prov)
	v := mustOpenJob(t, dir, prov)
	defer func() { _ = v.Close() }()
	if _, _, err := v.Mkdir(t.Context(), v.Root(), "other", 0o755, Caller{}); err != nil {
		t.Fatal(err)
	}
	stop := errors.New("stop")
	_, err := v.Reclassify(t.Context(), ReclassifyConfig{Path: "/top/a", Class: "phi", JobConfig: JobConfig{Progress: func(JobProgress) {}, Wait: func(ctx context.Context) error {
		return errors.Join(stop, unix.ENOSPC)
	}}})
	if !errors.Is(err, stop) {
		t.Fatal(err)
	}
	if _, err := v.Reclassify(t.Context(), ReclassifyConfig{Path: "/other", Class: "phi"}); !errors.Is(err, ErrOtherJob) || !strings.Contains(err.Error(), "/top/a") {
		t.Errorf("%v, want ErrOtherJob with the path", err)
	}
	reclassify(t, v, "/top/a", "phi")
	reclassify(t, v, "/other", "phi")
}
