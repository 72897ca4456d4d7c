package soak

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// worker is one kind of load. All its methods are called from one goroutine at
// a time.
type worker interface {
	name() string
	every() time.Duration // a step begins no sooner after the one before
	setup() error         // on a fresh, empty mount
	begin() error         // before the steps of a mount's life, after verify
	step() error          // some work; errAway if the key service was away
	end(killed bool)      // after the steps: leaves nothing open on the mount
	verify() error        // on another mount, by another process: compares with the model
	last() error          // once, in the end, after verify: what takes longer
}

// runner drives a worker and counts.
type runner struct {
	worker
	steps, away, checks int
}

// soak is a run.
type soak struct {
	t       *testing.T
	home    *rig.Home
	kms     *kmsserver.Server
	arn     map[string]string
	store   string
	m       *rig.Mount
	flags   []string
	addr    string // of the metrics
	rnd     *rand.Rand
	runners []*runner
	faults  *faults
	sampler *sampler
	began   time.Time
	length  time.Duration
	lives   []*life
}

// life is the time from a mount to its end.
type life struct {
	Number   int     `json:"number"`
	Began    float64 `json:"began_s"` // since the run began
	Seconds  float64 `json:"seconds"`
	End      string  `json:"end"` // "killed" or "unmounted"
	MountS   float64 `json:"mount_s"`
	VerifyS  float64 `json:"verify_s"`
	FsckS    float64 `json:"fsck_s,omitempty"`
	stopping atomic.Bool
	killed   atomic.Bool
}

// defaultLength is short enough for every run of the tests.
const defaultLength = 15 * time.Second

func soakLength(t *testing.T) time.Duration {
	t.Helper()
	v := os.Getenv("SOAK")
	if v == "" {
		return defaultLength
	}
	d, err := time.ParseDuration(v)
	if err != nil || d <= 0 {
		t.Fatalf("SOAK=%s: %v", v, err)
	}
	return d
}

// TestSoak is the run.
func TestSoak(t *testing.T) {
	s := newSoak(t, soakLength(t))
	s.setUp()
	s.began = time.Now()
	for n := 0; n < 3 || time.Since(s.began) < s.length; n++ {
		s.live(n, s.lifeLength(n), n%2 == 0)
		if t.Failed() {
			for _, r := range s.runners {
				r.end(false)
			}
			t.Logf("the mount's log:\n%s", s.log())
			s.report()
			return
		}
	}
	s.finish()
	s.report()
}

// lifeLength lets every third mount live long enough for a trend to show, and
// the others end soon.
func (s *soak) lifeLength(n int) time.Duration {
	if n%3 == 2 {
		return max(s.length/5, 5*time.Second)
	}
	return max(s.length/40, 1500*time.Millisecond)
}

func newSoak(t *testing.T, length time.Duration) *soak {
	rig.Need(t, "root", "fuse", "postgres", "sqlite3", "stdbuf", "git", "tar")
	server := kmsserver.StartT(t, kmsserver.Options{})
	s := &soak{t: t, kms: server, arn: map[string]string{}, length: length, rnd: rand.New(rand.NewPCG(4, uint64(length)))}
	s.home = rig.NewHome(t, server.Env(kmsserver.DefaultPrincipal())...)
	// PostgreSQL's user comes by on its way to the mount.
	if err := os.Chmod(filepath.Dir(s.home.Dir), 0o711); err != nil {
		t.Fatal(err)
	}
	s.store = filepath.Join(t.TempDir(), "S")
	s.addr = freeAddress(t)
	s.flags = []string{"--allow-other", "--metrics", s.addr}
	s.init()
	return s
}

// init makes a store with two classes: the databases' and git's keys are always
// to be had, sooner or later; phi's key service goes away, and its keys are not
// kept.
func (s *soak) init() {
	policy := "version: 1\ndefault: general\nclasses:\n"
	for _, c := range [][2]string{{"general", "5m"}, {"phi", "0s"}} {
		arn, err := s.kms.CreateKey(kmsserver.KeyOptions{})
		if err != nil {
			s.t.Fatal(err)
		}
		s.arn[c[0]] = arn
		policy += fmt.Sprintf("  %s: { keys: [%q], cache: %s }\n", c[0], arn, c[1])
	}
	policy += "directories:\n  /files: phi\n  /trees: phi\n"
	file := filepath.Join(s.t.TempDir(), "policy.yaml")
	if err := os.WriteFile(file, []byte(policy), 0o600); err != nil {
		s.t.Fatal(err)
	}
	placement := os.Getenv("SOAK_PLACEMENT")
	if placement == "" {
		placement = "header"
	}
	s.home.Run("init", "--policy", file, "--placement", placement, s.store)
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// setUp mounts for the first time and lets every worker prepare.
func (s *soak) setUp() {
	t := s.t
	s.m = s.home.Mount(s.store, s.flags...)
	if err := errors.Join(os.Chmod(filepath.Dir(s.m.Dir), 0o755), os.Chmod(s.m.Dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	path := func(name string) string {
		dir := s.m.Path(name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	s.faults = &faults{kms: s.kms, phi: s.arn["phi"], every: max(s.length/120, time.Second), hangs: s.length > 5*time.Minute, rnd: rand.New(rand.NewPCG(5, 5))}
	for _, w := range []worker{
		newSQLite(path("sqlite-wal"), "wal", 11), newSQLite(path("sqlite-delete"), "delete", 12),
		newPostgres(t, filepath.Join(s.m.Dir, "postgres")),
		newTrees(t, path("trees"), s.faults, 13), newGit(s.home, path("git"), 14),
		newFiles(path("files"), s.faults, 15), newFiles(path("warm"), nil, 16),
	} {
		s.runners = append(s.runners, &runner{worker: w})
	}
	for _, r := range s.runners {
		if err := r.setup(); err != nil {
			t.Fatalf("%s: set up: %v", r.name(), err)
		}
	}
	for _, r := range s.runners {
		if err := r.begin(); err != nil {
			t.Fatalf("%s: %v", r.name(), err)
		}
	}
	s.sampler = newSampler(s)
}

// live lets everybody work for a while, ends the mount, mounts again, and
// compares.
func (s *soak) live(n int, length time.Duration, kill bool) {
	l := &life{Number: n, Began: time.Since(s.began).Seconds(), End: "unmounted"}
	if kill {
		l.End = "killed"
	}
	s.lives = append(s.lives, l)
	var background, work sync.WaitGroup
	background.Go(func() { s.sampler.run(l) })
	background.Go(func() { s.faults.run(l) })
	for _, r := range s.runners {
		work.Go(func() { s.work(r, l) })
	}
	start := time.Now()
	for time.Since(start) < length && !s.t.Failed() {
		time.Sleep(50 * time.Millisecond)
	}
	if kill && !s.t.Failed() {
		l.killed.Store(true)
		s.m.Die()
	}
	l.stopping.Store(true)
	work.Wait()
	background.Wait()
	l.Seconds = time.Since(start).Seconds()
	for _, r := range s.runners {
		r.end(kill)
	}
	if s.t.Failed() {
		return
	}
	s.remount(l, kill)
}

// work drives one worker through a mount's life, at its pace.
func (s *soak) work(r *runner, l *life) {
	for !l.stopping.Load() {
		start := time.Now()
		err := r.step()
		switch {
		case err == nil:
			r.steps++
		case l.killed.Load():
			return // the end that is meant
		case s.faults != nil && isAway(err):
			r.away++
		default:
			s.t.Errorf("%s, step %d of life %d: %v", r.name(), r.steps, l.Number, err)
			return
		}
		for time.Since(start) < r.every() && !l.stopping.Load() {
			time.Sleep(min(20*time.Millisecond, r.every()))
		}
	}
}

// remount ends the mount, if it was not killed, looks at the store now and
// then, mounts, and lets everybody compare.
func (s *soak) remount(l *life, killed bool) {
	if killed {
		s.m.Detach()
	} else {
		s.m.Unmount()
	}
	if left, err := os.ReadDir(s.m.Dir); err != nil || len(left) > 0 {
		s.t.Errorf("below the mount there is %v (%v)", left, err)
	}
	if !killed || l.Number%4 == 0 { // or else the next mount has to clear up
		l.FsckS = s.fsck(killed)
	}
	start := time.Now()
	s.m.Again(s.flags...)
	l.MountS = time.Since(start).Seconds()
	start = time.Now()
	var wg sync.WaitGroup
	for _, r := range s.runners {
		wg.Go(func() {
			if err := r.verify(); err != nil {
				s.t.Errorf("%s, after life %d, which was %s: %v", r.name(), l.Number, l.End, err)
				return
			}
			r.checks++
			if err := r.begin(); err != nil {
				s.t.Errorf("%s: %v", r.name(), err)
			}
		})
	}
	wg.Wait()
	l.VerifyS = time.Since(start).Seconds()
	s.kms.ResetCalls() // the server keeps them in memory
}

// fsck requires a store without a fault; after a crash it first finishes what
// is unfinished, which is none.
func (s *soak) fsck(crashed bool) float64 {
	start := time.Now()
	if crashed {
		if r := s.home.Try("fsck", "--repair", s.store); r.Code != 0 {
			s.t.Errorf("fsck --repair: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
	}
	if r := s.home.Try("fsck", s.store); r.Code != 0 {
		s.t.Errorf("fsck: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	return time.Since(start).Seconds()
}

// finish ends the last mount and looks at everything once more.
func (s *soak) finish() {
	for _, r := range s.runners {
		if err := r.last(); err != nil {
			s.t.Errorf("%s, in the end: %v", r.name(), err)
		}
		r.end(false)
	}
	s.m.Unmount()
	s.fsck(false)
	for _, complaint := range s.sampler.trend(s.lives, s.length) {
		s.t.Error(complaint)
	}
}

// log returns the end of the mounts' log.
func (s *soak) log() string {
	logs, _ := filepath.Glob(filepath.Join(s.home.Dir, ".state/kmsfs/*.log"))
	var out strings.Builder
	for _, name := range logs {
		b, _ := os.ReadFile(name)
		out.Write(b[max(0, len(b)-20_000):])
	}
	return out.String()
}
