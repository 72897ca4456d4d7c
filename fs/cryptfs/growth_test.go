package cryptfs

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/classify"
)

// callCounter counts the system calls on a store.
type callCounter struct {
	mu sync.Mutex
	n  int
}

func (c *callCounter) Do(_ *backing.Op, do func() error) error {
	c.mu.Lock()
	c.n++
	c.mu.Unlock()
	return do()
}

// least returns the fewest calls that one of several runs of f took: a
// checkpoint may come in between.
func (c *callCounter) least(f func()) int {
	least := 0
	for i := range 5 {
		c.mu.Lock()
		before := c.n
		c.mu.Unlock()
		f()
		c.mu.Lock()
		if took := c.n - before; i == 0 || took < least {
			least = took
		}
		c.mu.Unlock()
	}
	return least
}

// TestCostOfLargeDirectories: what is done with one file takes as many system
// calls in a directory of thousands as in one of ten.
func TestCostOfLargeDirectories(t *testing.T) {
	for _, p := range everyPlace {
		t.Run(p.String(), func(t *testing.T) {
			dir, prov, info := testStore(t, p, classify.NamesEncrypted)
			calls := &callCounter{}
			v, err := Open(t.Context(), Config{Store: dir, Provider: prov, Keys: info.Keys, Tap: calls})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := v.Close(); err != nil {
					t.Error(err)
				}
			}()
			few, many := costs(t, v, calls, 10), costs(t, v, calls, 3000)
			for _, what := range slices.Sorted(maps.Keys(few)) {
				if few[what] == 0 || many[what] != few[what] {
					t.Errorf("%s: %d calls among 10 files, %d among 3,000", what, few[what], many[what])
				}
			}
		})
	}
}

// costs returns how many system calls it takes to do something with a file of a
// directory of so many.
func costs(t *testing.T, v *Volume, calls *callCounter, files int) map[string]int {
	t.Helper()
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir, _, err := v.Mkdir(ctx, v.Root(), fmt.Sprint(files), 0o755, Caller{})
	must(err)
	defer v.Forget(dir, 1)
	for i := range files {
		n, _, err := v.Mknod(ctx, dir, fmt.Sprintf("old%d", i), unix.S_IFREG|0o644, 0, Caller{})
		must(err)
		v.Forget(n, 1)
	}
	next := 0
	name := func() string { next++; return fmt.Sprint("new", next) }
	create := func() {
		n, h, _, err := v.Create(ctx, dir, name(), unix.O_RDWR, 0o644, Caller{})
		must(err)
		_, err = h.WriteAt([]byte("contents"), 0, false)
		must(err)
		must(h.Flush())
		h.Release()
		v.Forget(n, 1)
	}
	lookup := func(name string) *Node {
		n, _, err := v.Lookup(ctx, dir, name)
		must(err)
		return n
	}
	read := func() {
		n := lookup("new3")
		h, err := v.Open(ctx, n, unix.O_RDONLY, false)
		must(err)
		_, err = h.ReadAt(make([]byte, 8), 0)
		must(err)
		h.Release()
		v.Forget(n, 1)
	}
	return map[string]int{
		"create":  calls.least(create),
		"look up": calls.least(func() { v.Forget(lookup("old7"), 1) }),
		"read":    calls.least(read),
		"rename":  calls.least(func() { must(v.Rename(ctx, dir, fmt.Sprint("new", next), dir, name(), 0)) }),
		"remove":  calls.least(func() { create(); must(v.Unlink(ctx, dir, fmt.Sprint("new", next))) }),
	}
}

// TestEmptyFilesAreSettled: what is remembered of files that were made and stayed
// empty, of which the journal has nothing, goes with a checkpoint, which their
// number brings about.
func TestEmptyFilesAreSettled(t *testing.T) {
	t.Parallel() // an epoch lasts 20 s at least
	dir, prov, _ := testStore(t, everyPlace[0], classify.NamesEncrypted)
	v := openStore(t, dir, prov)
	loose := func() int {
		v.loose.mu.Lock()
		defer v.loose.mu.Unlock()
		return len(v.loose.inodes)
	}
	for i := range 20 {
		n, h, _, err := v.Create(t.Context(), v.Root(), fmt.Sprint(i), unix.O_WRONLY, 0o644, Caller{})
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Flush(); err != nil {
			t.Fatal(err)
		}
		h.Release()
		v.Forget(n, 1)
	}
	if loose() == 0 {
		t.Skip("nothing is remembered of empty files")
	}
	epoch, err := v.journal.Epoch()
	if err != nil {
		t.Fatal(err)
	}
	v.loose.mu.Lock()
	for i := range maxLoose + 1 {
		v.loose.inodes[inoKey{ino: uint64(i), born: -1}] = inodeState{epoch: epoch, meta: true}
	}
	v.loose.mu.Unlock()
	for range 3000 {
		if loose() == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("%d files are remembered, and no checkpoint comes", loose())
}
