package faultsweep

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
	"github.com/kmsfs/kmsfs/fs/rewrap"
)

// job is something that is done to a whole store, and leaves the plaintext tree
// as it is.
type job struct {
	name    string
	crashed bool   // it is done to the store that a killed process left
	prepare []step // on a sound disk
	do      func(r *rig, store string, tap *failing, f failure) error
	again   bool // a next call has to finish it
}

var jobs = []job{
	{name: "mount after a crash", crashed: true, do: mount},
	{name: "mount", do: mount},
	{name: "fsck --repair after a crash", crashed: true, do: repair},
	{name: "rekey", do: rekey, again: true},
	{name: "rekey after a crash", crashed: true, do: rekey, again: true},
	{name: "reclassify", do: reclassify, again: true},
	{name: "rewrap", prepare: []step{applyPolicy()}, do: rewrapping, again: true},
}

// mount opens a volume, looks at it if the disk is sound again, and closes it.
func mount(r *rig, store string, tap *failing, f failure) error {
	tap.arm(f)
	s, err := r.open(store, tap)
	if err != nil {
		return err
	}
	if tap.over() {
		_, err = read(s.v) // what could not be finished is now
	}
	return errors.Join(err, s.v.Close())
}

func repair(r *rig, store string, tap *failing, f failure) error {
	tap.arm(f)
	_, err := cryptfs.Fsck(context.Background(), cryptfs.FsckConfig{Config: r.config(store, tap), Repair: true})
	return err
}

func rekey(r *rig, store string, tap *failing, f failure) error {
	s, err := r.open(store, tap)
	if err != nil {
		return err
	}
	tap.arm(f)
	report, err := s.v.Rekey(context.Background(), cryptfs.RekeyConfig{Selection: "all", JobConfig: cryptfs.JobConfig{Concurrent: 1}})
	if report != nil {
		err = errors.Join(err, failures(report.Failures))
	}
	return errors.Join(err, s.v.Close())
}

func reclassify(r *rig, store string, tap *failing, f failure) error {
	s, err := r.open(store, tap)
	if err != nil {
		return err
	}
	tap.arm(f)
	report, err := s.v.Reclassify(context.Background(), cryptfs.ReclassifyConfig{Path: "/A", Class: "phi", JobConfig: cryptfs.JobConfig{Concurrent: 1}})
	if report != nil {
		err = errors.Join(err, failures(report.Failures))
	}
	return errors.Join(err, s.v.Close())
}

// failures is EIO if there are any: reports have no errno.
func failures(all []cryptfs.JobFailure) error {
	if len(all) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %v", unix.EIO, all)
}

// rewrapping gives every header a recipient under the second key.
func rewrapping(r *rig, store string, tap *failing, f failure) error {
	tap.arm(f)
	info, err := cryptfs.Inspect(store)
	if err != nil {
		return err
	}
	s, err := rewrap.Open(rewrap.Config{Path: store, Keys: info.Keys, Tap: tap})
	if err != nil {
		return err
	}
	defer s.Close()
	m := envelope.NewManager(r.provider, s.ID(), envelope.Options{PoolSize: -1})
	defer m.Close()
	w, err := s.Lock(context.Background(), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer w.Close()
	report, err := s.Run(context.Background(), m, w, rewrap.Options{Workers: 1})
	if err == nil && (report.Left > 0 || len(report.Failed) > 0) {
		err = fmt.Errorf("%w: %v", unix.EIO, report.Failed)
	}
	return err
}

// TestSweepJobs fails each call of mounting, checking, rekeying, reclassifying and
// rewrapping.
func TestSweepJobs(t *testing.T) {
	eachPlacement(t, func(t *testing.T, r *rig) {
		runs := 0
		for i, j := range jobs {
			if only := os.Getenv("FAULT_PATH"); only != "" && only != j.name {
				continue
			}
			store := r.before(t, j)
			s := r.must(t, r.clone(t, store), nil) // as it is, or as a sound mount finishes it
			want, err := read(s.v)
			if err != nil {
				t.Fatal(err)
			}
			s.close(t)
			count := func(h how) int {
				tap := newFailing()
				if err := j.do(r, r.clone(t, store), tap, failure{how: h, n: 1 << 30}); err != nil {
					t.Fatalf("%s: %v", j.name, err)
				}
				return tap.count()
			}
			for _, f := range ofJobs.spread(count, i+int(r.placement)) {
				runs++
				copied := r.clone(t, store)
				what := fmt.Sprintf("%s, %s", j.name, f)
				if err := watched(t, what, func() error { return r.runJob(copied, j, f, want) }); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				_ = os.RemoveAll(copied)
			}
		}
		t.Logf("%d jobs, %d runs", len(jobs), runs)
	})
}

// before returns the store that a job begins with.
func (r *rig) before(t *testing.T, j job) string {
	t.Helper()
	from := r.base
	if j.crashed {
		from = r.crashed
	}
	store := r.clone(t, from)
	if len(j.prepare) > 0 {
		s := r.must(t, store, nil)
		s.all(t, j.prepare)
		s.close(t)
	}
	return store
}

func (r *rig) runJob(store string, j job, f failure, want tree) error {
	tap := newFailing()
	o := &outcome{f: f}
	err := j.do(r, store, tap, f)
	tap.disarm()
	o.note(step{name: j.name}, err)
	if err != nil {
		if len(tap.failed()) == 0 {
			return fmt.Errorf("%w without a reason", err)
		}
		if k := fault.Of(err); j.again || k != fault.Integrity && k != fault.BadFormat {
			err = nil // a job's report tells people, and has no errno
		}
	}
	if fds := descriptors(store); len(fds) > 0 {
		err = errors.Join(err, fmt.Errorf("still open: %v", fds))
	}
	if err == nil && j.again { // on a sound disk it comes to its end
		err = j.do(r, store, newFailing(), failure{how: once, n: 1 << 30})
	}
	if err == nil {
		err = r.after(store, []tree{want}, f.dead())
	}
	return o.wrap(err, tap)
}
