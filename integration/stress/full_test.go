package stress

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// A file of the full disk's test is pages of 4 KiB, each with one version, or
// zeros where it has none.
const pageSize = 4096

func pageOf(who string, page, version int) []byte {
	line := fmt.Sprintf("%s %d %d;", who, page, version)
	return []byte(strings.Repeat(line, pageSize/len(line)+1)[:pageSize])
}

// crammed is a file, and what may be in it.
type crammed struct {
	path  string
	pages []allowed
	most  int // pages that it has at most, as long as the server lives
	f     *os.File
}

// allowed are the versions that a page may have: one after an fsync that
// succeeded, more after writes since. -1 is a page that is zeros, or past the
// end.
type allowed []int

// crammer works on a disk that is full most of the time.
type crammer struct {
	t     *testing.T
	dir   string
	rnd   *rand.Rand
	files []*crammed
	next  int
	full  int // how often the disk was
}

// refused reports whether a call failed, for want of space.
func (c *crammer) refused(what string, err error) bool {
	if err == nil {
		return false
	}
	if !errors.Is(err, unix.ENOSPC) {
		c.t.Errorf("%s: %v, want ENOSPC", what, err)
	}
	c.full++
	return true
}

func (c *crammer) step() {
	n := c.rnd.IntN(20)
	if len(c.files) < 3 || n == 0 {
		c.create()
		return
	}
	i := c.rnd.IntN(len(c.files))
	f := c.files[i]
	switch {
	case n < 9:
		c.write(f, c.rnd.IntN(20), 1+c.rnd.IntN(60))
	case n < 12:
		c.write(f, f.most, 1+c.rnd.IntN(100))
	case n < 16:
		c.sync(f)
	case n < 17:
		c.cut(f)
	case n < 18 && len(c.files) > 10:
		c.files = append(c.files[:i], c.files[i+1:]...)
		if err := errors.Join(os.Remove(f.path), ignoreFull(f.f.Close())); err != nil {
			c.t.Errorf("remove: %v", err)
		}
	default:
		to := fmt.Sprintf("%s-%d", f.path, c.next)
		c.next++
		if !c.refused("rename", os.Rename(f.path, to)) {
			f.path = to
		}
	}
}

func ignoreFull(err error) error {
	if errors.Is(err, unix.ENOSPC) {
		return nil
	}
	return err
}

func (c *crammer) create() {
	c.next++
	path := filepath.Join(c.dir, fmt.Sprint(c.next))
	f, err := os.Create(path)
	if c.refused("create", err) {
		return
	}
	c.files = append(c.files, &crammed{path: path, f: f})
}

func (c *crammer) write(f *crammed, at, pages int) {
	var data []byte
	c.next++
	for page := at; page < at+pages; page++ {
		for len(f.pages) <= page {
			f.pages = append(f.pages, allowed{-1})
		}
		f.pages[page] = append(f.pages[page], c.next)
		data = append(data, pageOf(c.dir, page, c.next)...)
	}
	f.most = max(f.most, at+pages)
	_, err := f.f.WriteAt(data, int64(at)*pageSize)
	c.refused("write", err)
}

func (c *crammer) sync(f *crammed) {
	if c.refused("fsync", f.f.Sync()) {
		return
	}
	for i, versions := range f.pages { // now it is what a read gives
		got := make([]byte, pageSize)
		n, err := f.f.ReadAt(got, int64(i)*pageSize)
		if n < pageSize && n > 0 {
			c.t.Errorf("page %d of %s: %d bytes, %v", i, f.path, n, err)
		}
		f.pages[i] = allowed{c.version(f, i, got[:n], versions)}
	}
	f.pages = f.pages[:f.most]
}

// version returns which of the versions a page has.
func (c *crammer) version(f *crammed, page int, got []byte, versions allowed) int {
	for _, v := range versions {
		if v == -1 && allZero(got) || v >= 0 && bytes.Equal(got, pageOf(c.dir, page, v)) {
			return v
		}
	}
	c.t.Errorf("page %d of %s: %.60q, want a version of %v", page, f.path, got, versions)
	return -1
}

func (c *crammer) cut(f *crammed) {
	pages := c.rnd.IntN(f.most + 1)
	if !c.refused("truncate", f.f.Truncate(int64(pages)*pageSize)) {
		f.most = pages
	}
	for i := pages; i < len(f.pages); i++ {
		f.pages[i] = append(f.pages[i], -1)
	}
}

// check reads every file by its name.
func (c *crammer) check(when string, alive bool) {
	c.t.Helper()
	entries, err := os.ReadDir(c.dir)
	if err != nil || len(entries) != len(c.files) {
		c.t.Errorf("%s: %d entries, want %d: %v", when, len(entries), len(c.files), err)
	}
	for _, f := range c.files {
		got, err := os.ReadFile(f.path)
		most := len(f.pages) * pageSize
		if alive {
			most = f.most * pageSize
		}
		if err != nil || len(got) > most {
			c.t.Errorf("%s: %d bytes, want at most %d: %v", when, len(got), most, err)
			continue
		}
		for i, versions := range f.pages {
			from := min(len(got), i*pageSize)
			c.version(f, i, got[from:min(len(got), from+pageSize)], versions)
		}
	}
}

// TestFullDiskAmidWork: the disk is full again and again while several work on
// it. What was fsynced is there, of the rest each page has a state that it had,
// and nothing else is wrong with the store (S-11, S-12, S-15).
func TestFullDiskAmidWork(t *testing.T) {
	for _, placement := range placements {
		t.Run(placement, func(t *testing.T) {
			t.Parallel()
			rig.Need(t, "root", "fuse")
			seed := seedOf(t)
			disk := t.TempDir()
			if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "mode=0700,size=20m"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(disk, 0); err != nil {
					t.Errorf("unmount of the test's disk: %v", err)
				}
			})
			h, store := rig.NewHome(t), filepath.Join(disk, "S")
			h.Run("init", "--placement", placement, "--chunk-size", "4KiB", store)
			log := filepath.Join(t.TempDir(), "log")
			m := h.Mount(store, "--log-file", log)
			cramFull(t, m, log, seed)
			if b, err := os.ReadFile(log); t.Failed() && err == nil {
				t.Logf("the server's log ends: %s", b[max(0, len(b)-6000):])
			}
		})
	}
}

func cramFull(t *testing.T, m *rig.Mount, log string, seed uint64) {
	const workers = 4
	crammers := make([]*crammer, workers)
	var wg sync.WaitGroup
	for w := range crammers {
		c := &crammer{t: t, dir: m.Path(fmt.Sprint(w)), rnd: rand.New(rand.NewPCG(seed, uint64(w)))}
		if err := os.Mkdir(c.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		crammers[w] = c
		wg.Go(func() {
			for range opsOf(300, 5000) {
				c.step()
			}
		})
	}
	wg.Wait()
	full := 0
	for _, c := range crammers {
		c.check("full", true)
		for _, f := range c.files {
			if err := ignoreFull(f.f.Close()); err != nil {
				t.Errorf("close: %v", err)
			}
		}
		full += c.full
	}
	if full == 0 {
		t.Error("the disk was never full")
	}
	m.Unmount()
	m.Again("--log-file", log)
	for _, c := range crammers {
		c.check("after a remount", false)
		if err := os.RemoveAll(c.dir); err != nil {
			t.Error(err)
		}
	}
	var err error
	for range 50 { // room is free a moment after the removal
		if err = os.WriteFile(m.Path("again"), make([]byte, 5<<20), 0o644); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		t.Errorf("with room again: %v", err)
	}
	clean(t, m)
}
