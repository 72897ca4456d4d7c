package soak

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// git commits changes to a repository, which is packed and checked now and
// then. A commit that git has answered is durable: it is told to sync all that
// it writes, and the names are in the store before it ends.
type git struct {
	home  *rig.Home
	dir   string
	rnd   *rand.Rand
	repo  int // number of the repository
	n     int // commits in it
	acked string
}

const (
	gitFiles   = 30
	gitCommits = 250 // in a repository, before another one
)

func newGit(home *rig.Home, dir string, seed uint64) *git {
	return &git{home: home, dir: dir, rnd: rand.New(rand.NewPCG(seed, 1))}
}

func (w *git) name() string         { return "git" }
func (w *git) every() time.Duration { return 1500 * time.Millisecond }
func (w *git) path() string         { return filepath.Join(w.dir, fmt.Sprintf("r%d", w.repo)) }

func (w *git) git(args ...string) (string, error) {
	env := []string{
		"env", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com",
		"git", "-C", w.path(), "-c", "core.fsync=all", "-c", "core.fsyncMethod=fsync", "-c", "gc.auto=0",
	}
	r := w.home.Exec(nil, env[0], append(env[1:], args...)...)
	if r.Code != 0 {
		return "", fmt.Errorf("git %s: exit %d: %s%s", strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout), nil
}

func (w *git) setup() error {
	w.n, w.acked = 0, ""
	if err := os.Mkdir(w.path(), 0o755); err != nil {
		return err
	}
	_, err := w.git("init", "-q", "-b", "main")
	return err
}

func (w *git) begin() error { return nil }

func (w *git) step() error {
	for range 3 {
		name := filepath.Join(w.path(), fmt.Sprintf("d%d", w.rnd.IntN(4)), fmt.Sprintf("f%d", w.rnd.IntN(gitFiles)))
		text := strings.Repeat(fmt.Sprintf("line of commit %d\n", w.n), w.rnd.IntN(2000))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	for _, args := range [][]string{{"add", "-A"}, {"commit", "-q", "--allow-empty", "-m", fmt.Sprintf("commit %d", w.n)}} {
		if _, err := w.git(args...); err != nil {
			return err
		}
	}
	head, err := w.git("rev-parse", "HEAD")
	if err != nil {
		return err
	}
	w.acked = head
	w.n++
	switch {
	case w.n%gitCommits == 0:
		return w.another()
	case w.n%20 == 0:
		if _, err := w.git("gc", "-q", "--prune=now"); err != nil {
			return err
		}
		return w.fsck()
	}
	return nil
}

// another begins another repository and removes this one.
func (w *git) another() error {
	old := w.path()
	w.repo++
	if err := w.setup(); err != nil {
		return err
	}
	return os.RemoveAll(old)
}

func (w *git) fsck() error {
	_, err := w.git("fsck", "--full", "--strict")
	return err
}

func (w *git) end(bool) {}

func (w *git) verify() error {
	// What an owner does after a crash: git leaves its locks.
	for _, pattern := range []string{".git/*.lock", ".git/refs/heads/*.lock", ".git/gc.pid*", ".git/objects/info/*.lock"} {
		locks, err := filepath.Glob(filepath.Join(w.path(), pattern))
		if err != nil {
			return err
		}
		for _, l := range locks {
			if err := os.Remove(l); err != nil {
				return err
			}
		}
	}
	if w.acked == "" { // a repository that was being made, or has nothing yet
		if err := os.RemoveAll(w.dir); err != nil {
			return err
		}
		if err := os.Mkdir(w.dir, 0o755); err != nil {
			return err
		}
		return w.setup()
	}
	if err := w.fsck(); err != nil {
		return err
	}
	if _, err := w.git("merge-base", "--is-ancestor", w.acked, "HEAD"); err != nil {
		return fmt.Errorf("commit %s, which git had answered: %w", w.acked, err)
	}
	_, err := w.git("reset", "-q", "--hard")
	return err
}

func (w *git) last() error { return w.fsck() }
