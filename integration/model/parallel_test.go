package model

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// TestParallelModels has several workers change trees of their own on one
// mount, as TestModel does, while others fight over names in two directories.
func TestParallelModels(t *testing.T) {
	rig.Need(t, "root", "fuse")
	for _, placement := range []string{"header", "xattr", "sidecar"} {
		t.Run(placement, func(t *testing.T) {
			t.Parallel()
			seed, ops := modelRun(t)
			h := rig.NewHome(t)
			store := filepath.Join(t.TempDir(), "s")
			h.Run("init", "--placement", placement, store)
			mount := h.Mount(store)
			parallelModels(t, mount, seed, ops/5)
			mount.Unmount()
			h.Run("fsck", store)
		})
	}
}

func parallelModels(t *testing.T, mount *rig.Mount, seed uint64, ops int) {
	const owners, rivals = 6, 6
	models := make([]*model, owners)
	arena := newArena(t, mount.Dir)
	t.Run("at once", func(t *testing.T) { // ends when all of them have
		for w := range models {
			dir := mount.Path(fmt.Sprint("own", w))
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			models[w] = newModel(t, dir, seed+uint64(w))
			t.Run(fmt.Sprint("own", w), func(t *testing.T) {
				t.Parallel()
				models[w].t = t
				models[w].run(ops, nil)
			})
		}
		for w := range rivals {
			t.Run(fmt.Sprint("rival", w), func(t *testing.T) {
				t.Parallel()
				arena.fight(t, w, rand.New(rand.NewPCG(seed, uint64(w))), ops)
			})
		}
	})
	if t.Failed() {
		return
	}
	arena.settled(t)
	mount.Unmount()
	mount.Again()
	for _, m := range models {
		m.t = t
		m.compare(m.root, "")
	}
	arena.settled(t)
}

// arena is two directories in which everybody works with the same few names.
// Nobody knows what is there, but some things hold all the time: a file that
// can be read is whole, each call fails only for a reason that there may be, no
// name is listed twice, and tokens, which are exchanged and renamed to free
// names only, are neither lost nor made.
type arena struct {
	dir    string
	tokens int
	moving sync.RWMutex // held by who counts tokens
}

const arenaNames, arenaTokens = 6, 5

func newArena(t *testing.T, mount string) *arena {
	a := &arena{dir: filepath.Join(mount, "arena"), tokens: arenaTokens}
	for _, d := range []string{"", "0", "1", "0/dir", "tmp"} {
		if err := os.Mkdir(filepath.Join(a.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for i := range a.tokens {
		if err := os.WriteFile(a.at("0", fmt.Sprint("token", i)), arenaText(fmt.Sprint("token", i)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

func (a *arena) at(parts ...string) string {
	return filepath.Join(append([]string{a.dir}, parts...)...)
}

// arenaText is what a file has in it; whoever reads it sees whether it is whole.
func arenaText(id string) []byte { return []byte(strings.Repeat(id+";", 1+len(id)*37%900)) }

func (a *arena) pick(rnd *rand.Rand) string {
	return a.at(fmt.Sprint(rnd.IntN(2)), fmt.Sprint("name", rnd.IntN(arenaNames)))
}

func (a *arena) fight(t *testing.T, worker int, rnd *rand.Rand, steps int) {
	may := func(what string, err error, allowed ...unix.Errno) {
		if err != nil && !slices.Contains(allowed, errno(err)) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for step := range steps {
		switch x, y := a.pick(rnd), a.pick(rnd); rnd.IntN(12) {
		case 0, 1: // a file comes whole
			id := fmt.Sprintf("%d.%d", worker, step)
			tmp := a.at("tmp", id)
			may("write", os.WriteFile(tmp, arenaText(id), 0o644))
			may("rename into place", unix.Rename(tmp, x), unix.EISDIR)
			_ = os.Remove(tmp) // where a directory was in the way
		case 2:
			may("rename", unix.Rename(x, y), unix.ENOENT, unix.EISDIR, unix.ENOTDIR, unix.ENOTEMPTY)
		case 3:
			may("exchange", unix.Renameat2(unix.AT_FDCWD, x, unix.AT_FDCWD, y, unix.RENAME_EXCHANGE), unix.ENOENT)
		case 4:
			may("link", unix.Link(x, y), unix.ENOENT, unix.EEXIST, unix.EPERM)
		case 5:
			may("unlink", unix.Unlink(x), unix.ENOENT, unix.EISDIR)
		case 6:
			may("mkdir", os.Mkdir(x, 0o755), unix.EEXIST)
		case 7:
			may("rmdir", unix.Rmdir(x), unix.ENOENT, unix.ENOTDIR)
		case 8:
			may("symlink", os.Symlink("nowhere", x), unix.EEXIST)
		case 9:
			may("setxattr", unix.Lsetxattr(x, "user.of", []byte(x), 0), unix.ENOENT, unix.EPERM, unix.ENOSPC)
		case 10:
			a.moveToken(rnd, may)
		case 11:
			a.look(t, x)
		}
	}
}

func (a *arena) moveToken(rnd *rand.Rand, may func(string, error, ...unix.Errno)) {
	a.moving.RLock()
	defer a.moving.RUnlock()
	token := func() string {
		return a.at([]string{"0", "1", "0/dir"}[rnd.IntN(3)], fmt.Sprint("token", rnd.IntN(arenaTokens)))
	}
	x, y := token(), token()
	if rnd.IntN(2) == 0 {
		may("exchange of tokens", unix.Renameat2(unix.AT_FDCWD, x, unix.AT_FDCWD, y, unix.RENAME_EXCHANGE), unix.ENOENT)
	} else {
		may("move of a token", unix.Renameat2(unix.AT_FDCWD, x, unix.AT_FDCWD, y, unix.RENAME_NOREPLACE), unix.ENOENT, unix.EEXIST)
	}
}

// look reads a file, and lists what is there.
func (a *arena) look(t *testing.T, path string) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == nil {
		f := os.NewFile(uintptr(fd), path)
		defer f.Close()
		if fi, serr := f.Stat(); serr == nil && fi.Mode().IsRegular() {
			buf := make([]byte, 20_000)
			n, _ := f.ReadAt(buf, 0)
			id, _, _ := strings.Cut(string(buf[:n]), ";")
			if string(buf[:n]) != string(arenaText(id)) {
				t.Errorf("a file of %d bytes is not whole: %.40q", n, buf[:n])
			}
		}
	} else if e := errno(err); e != unix.ENOENT && e != unix.ELOOP {
		t.Errorf("open: %v", err)
	}
	for _, d := range []string{"0", "1"} {
		entries, err := os.ReadDir(a.at(d))
		if err != nil {
			t.Errorf("readdir: %v", err)
		}
		seen := map[string]bool{}
		for _, e := range entries {
			if seen[e.Name()] {
				t.Errorf("%s is listed twice", e.Name())
			}
			seen[e.Name()] = true
		}
	}
	a.count(t)
}

// count wants all tokens to be there, and no two that are the same.
func (a *arena) count(t *testing.T) {
	a.moving.Lock()
	defer a.moving.Unlock()
	ids := map[string]bool{}
	for _, d := range []string{"0", "1", "0/dir"} {
		entries, err := os.ReadDir(a.at(d))
		if err != nil {
			t.Errorf("readdir: %v", err)
		}
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), "token") {
				continue
			}
			b, err := os.ReadFile(a.at(d, e.Name()))
			id, _, _ := strings.Cut(string(b), ";")
			if err != nil || string(b) != string(arenaText(id)) || ids[id] {
				t.Errorf("token %s: %.40q (twice: %v), %v", e.Name(), b, ids[id], err)
			}
			ids[id] = true
		}
	}
	if len(ids) != a.tokens {
		t.Errorf("%d tokens, want %d", len(ids), a.tokens)
	}
}

// settled checks what must hold when nobody is at work: what is listed is
// there, and a file has as many links as names.
func (a *arena) settled(t *testing.T) {
	t.Helper()
	a.count(t)
	names, links := map[uint64]int{}, map[uint64]int{}
	err := filepath.WalkDir(a.dir, func(path string, d os.DirEntry, err error) error {
		var st unix.Stat_t
		if err = errors.Join(err, unix.Lstat(path, &st)); err == nil && !d.IsDir() {
			names[st.Ino]++
			links[st.Ino] = int(st.Nlink)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	for ino, n := range names {
		if links[ino] != n {
			t.Errorf("inode %d has %d links and %d names", ino, links[ino], n)
		}
	}
}
