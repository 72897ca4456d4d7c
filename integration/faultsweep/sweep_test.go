package faultsweep

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

var errnos = []unix.Errno{unix.EIO, unix.EDQUOT, unix.ENOSPC}

// TestSweep fails each call of each path.
func TestSweep(t *testing.T) {
	eachPlacement(t, func(t *testing.T, r *rig) {
		runs := 0
		for _, p := range paths {
			if only := os.Getenv("FAULT_PATH"); only != "" && only != p.name {
				continue
			}
			states := r.states(t, p)
			for _, f := range r.faults(t, p) {
				runs++
				store := r.clone(t, r.base)
				what := fmt.Sprintf("%s, %s", p.name, f)
				if err := watched(t, what, func() error { return r.run(store, p, f, states) }); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				_ = os.RemoveAll(store)
			}
		}
		t.Logf("%d paths, %d runs", len(paths), runs)
	})
}

// states are those that a path goes through when nothing fails.
func (r *rig) states(t *testing.T, p path) []tree {
	t.Helper()
	store := r.clone(t, r.base)
	defer func() { _ = os.RemoveAll(store) }()
	s := r.must(t, store, nil)
	var out []tree
	for i := range len(p.steps) + 1 {
		if i > 0 {
			if err := p.steps[i-1].do(s); err != nil {
				t.Fatalf("%s: %s: %v", p.name, p.steps[i-1].name, err)
			}
		}
		now, err := read(s.v)
		if err != nil {
			t.Fatalf("%s: %v", p.name, err)
		}
		out = append(out, now)
	}
	s.close(t)
	return out
}

// faults are the ones to try on a path: see the package comment.
func (r *rig) faults(t *testing.T, p path) []failure {
	t.Helper()
	salt := slices.IndexFunc(paths, func(q path) bool { return q.name == p.name }) + int(r.placement)
	return ofPaths.spread(func(h how) int { return r.count(t, p, h) }, salt)
}

// count returns how many calls a path makes that may fail in this way.
func (r *rig) count(t *testing.T, p path, h how) int {
	t.Helper()
	tap := newFailing()
	store := r.clone(t, r.base)
	defer func() { _ = os.RemoveAll(store) }()
	s := r.must(t, store, tap)
	tap.arm(failure{how: h, n: 1 << 30})
	s.all(t, p.steps)
	s.close(t)
	return tap.count()
}

// thin is how many of each kind of failure there are, of which one is tried
// without FAULT_FULL.
type thin map[how]int

var (
	// Each second call fails on one placement, with one errno.
	ofPaths = thin{once: 2 * len(placements), onward: 25, changes: 16, short: 8, kind: 12}
	ofJobs  = thin{once: 12 * len(placements), onward: 60, changes: 40, short: 8, kind: 12}
)

// spread makes failures of counted calls; salt varies which are left out.
func (every thin) spread(count func(h how) int, salt int) (out []failure) {
	for _, h := range []how{once, onward, changes, short, kind} {
		n := len(kinds)
		if h != kind {
			n = count(h)
		}
		for i := range n {
			for e, errno := range errnos {
				if full || (i+salt)%every[h] == 0 && (i/every[h]+salt)%len(errnos) == e {
					out = append(out, failure{h, i + 1, errno})
				}
			}
		}
	}
	return out
}

// watched is a run that must end.
func watched(t *testing.T, what string, run func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- run() }()
	select {
	case err := <-done:
		return err
	case <-time.After(5 * time.Minute):
		b := make([]byte, 1<<20)
		t.Fatalf("%s: it hangs\n%s", what, b[:runtime.Stack(b, true)])
		return nil
	}
}

// outcome is what a program was told so far: the tree is in one of the states
// from lo to hi.
type outcome struct {
	p      path
	f      failure
	states []tree
	lo, hi int
	told   []string
}

func (o *outcome) may() []tree { return o.states[o.lo : o.hi+1] }

// left are the states that the store may be in when the volume is gone.
func (o *outcome) left() []tree {
	may := o.may()
	if o.p.half != nil && o.f.dead() && o.hi > o.lo {
		may = append(slices.Clone(may), o.p.half(o.states[o.lo], o.states[o.hi]))
	}
	return may
}

func (o *outcome) note(x step, err error) {
	o.told = append(o.told, fmt.Sprintf("%s: %v", x.name, err))
}

// wrap says what led to an error.
func (o *outcome) wrap(err error, tap *failing) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w\n\tafter %s\n\tfailed calls: %s", err, strings.Join(o.told, "\n\t      "), strings.Join(tap.failed(), ", "))
}

func (r *rig) run(store string, p path, f failure, states []tree) error {
	tap := newFailing()
	if f.how == filled {
		tap.fill = balloon(store)
	}
	s, err := r.open(store, tap)
	if err != nil {
		return err
	}
	o := &outcome{p: p, f: f, states: states}
	tap.arm(f)
	s.links = true
	err = errors.Join(r.steps(s, o), s.settled(o))
	s.release()
	if cerr := s.v.Close(); cerr != nil {
		o.note(step{name: "unmount"}, cerr)
		err = errors.Join(err, rightErrno(cerr, f))
	}
	tap.disarm()
	if fds := descriptors(store); len(fds) > 0 {
		err = errors.Join(err, fmt.Errorf("still open: %v", fds))
	}
	if err == nil {
		err = r.after(store, o.left(), f.dead())
	}
	return o.wrap(err, tap)
}

// steps does a path until a step fails for good.
func (r *rig) steps(s *session, o *outcome) error {
	for i, x := range o.p.steps {
		err := x.do(s)
		o.note(x, err)
		if err == nil {
			if err := told(s, x); err != nil {
				return err
			}
			o.lo, o.hi = i+1, i+1
			continue
		}
		o.hi = i + 1
		if len(s.tap.failed()) == 0 {
			return fmt.Errorf("%s: %w without a reason", x.name, err)
		}
		if err := rightErrno(err, o.f); err != nil {
			return fmt.Errorf("%s: %w", x.name, err)
		}
		if o.f.how == filled {
			if err := s.check(o.may(), false); err != nil {
				return fmt.Errorf("on the full disk: %w", err)
			}
			s.tap.disarm() // somebody makes room
		}
		if !s.tap.over() {
			return nil
		}
		if more, err := s.retry(x, o); err != nil || !more {
			return err
		}
		o.lo = i + 1
	}
	return nil
}

// retry does a step again that failed for a reason which is gone. It answers
// whether the path can go on.
func (s *session) retry(x step, o *outcome) (bool, error) {
	if err := s.check(o.may(), false); err != nil {
		return false, fmt.Errorf("after the failure: %w", err)
	}
	err := x.do(s)
	o.note(x, err)
	done := s.check(o.states[o.hi:o.hi+1], false) == nil // before the failure was told
	switch {
	case err == nil:
		return true, told(s, x)
	case s.v.Status().Condition.State == cryptfs.StateHalted || s.syncFailed():
		if e := errnoOf(err); e != unix.EIO && e != o.f.errno {
			return false, fmt.Errorf("%s after a failed sync: %w", x.name, err)
		}
		return false, nil
	case done && slices.Contains([]unix.Errno{unix.EEXIST, unix.ENOENT, unix.ENODATA}, errnoOf(err)):
		return true, nil
	}
	return false, fmt.Errorf("%s, again: %w", x.name, err)
}

func (s *session) syncFailed() bool {
	for _, what := range s.tap.failed() {
		if strings.Contains(what, "sync") {
			return true
		}
	}
	return false
}

// told holds a success against what the disk has said. S-61
func told(s *session, x step) error {
	if what := s.tap.forgotten(); x.syncs && what != "" {
		return fmt.Errorf("%s succeeds after a failed %s", x.name, what)
	}
	return nil
}

// settled looks at the volume after the last step.
func (s *session) settled(o *outcome) error {
	if c := s.v.Status().Condition; c.State == cryptfs.StateDamaged || c.Damage.Count > 0 {
		return fmt.Errorf("the disk's error is taken for damage: %+v", c.Damage)
	}
	if !s.tap.over() {
		return nil
	}
	return s.check(o.may(), false)
}

// check reads the volume's tree.
func (s *session) check(may []tree, dead bool) error {
	got, err := read(s.v)
	if err != nil {
		return fmt.Errorf("reading: %w", err)
	}
	if err := between(got, may, dead); err != nil {
		return err
	}
	if s.links {
		return got.links()
	}
	return nil
}

// rightErrno says whether a program may get err.
func rightErrno(err error, f failure) error {
	if e := errnoOf(err); e != f.errno && e != unix.EIO {
		return fmt.Errorf("%w: not %s", err, unix.ErrnoName(f.errno))
	}
	return nil
}

// after opens the store on a sound disk, and uses it. dead says that the process
// before could not even take back what it had begun.
func (r *rig) after(store string, may []tree, dead bool) error {
	s, err := r.open(store, nil)
	if err != nil {
		return fmt.Errorf("the next mount: %w", err)
	}
	if err = s.check(may, dead); err == nil {
		err = s.use()
	}
	s.release()
	if cerr := s.v.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("the next mount: %w", err)
	}
	return r.fsck(store)
}

// use does what programs do.
func (s *session) use() error {
	const moved = "B/moved after all"
	for _, x := range []step{
		create("used"), write("used", 0, 5000, 90), fsync("used"), write("used", 2000, 5000, 91), fsync("used"), closing("used"), rename("used", moved, 0),
		mkdir("used"), unlink(moved), rmdir("used"), fsyncdir("."),
	} {
		if err := x.do(s); err != nil {
			return fmt.Errorf("using it: %s: %w", x.name, err)
		}
	}
	return nil
}
