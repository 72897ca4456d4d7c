package fusefs

import (
	"sync"
	"testing"
)

func TestNodeTableCountsReferences(t *testing.T) {
	table := newNodeTable[string]()
	if _, ok := table.get(7); ok {
		t.Error("an empty table has node 7")
	}
	for range 3 {
		table.add(7, "seven")
	}
	table.add(7+tableShards, "same shard")
	if node, refs := table.forget(7, 2); node != "seven" || refs != 2 {
		t.Errorf("forget 2 of 3 = %q, %d", node, refs)
	}
	if node, ok := table.get(7); !ok || node != "seven" {
		t.Errorf("get after a partial forget = %q, %v", node, ok)
	}
	// A kernel that forgets too much must not take references of others.
	if _, refs := table.forget(7, 5); refs != 1 {
		t.Errorf("forget 5 of 1 gives %d back, want 1", refs)
	}
	if _, ok := table.get(7); ok {
		t.Error("node 7 is still known")
	}
	if _, refs := table.forget(7, 1); refs != 0 {
		t.Errorf("forget of an unknown node gives %d back, want 0", refs)
	}
	table.add(8, "eight")
	table.add(8, "eight")
	left := map[string]uint64{}
	table.drain(func(node string, refs uint64) { left[node] += refs })
	if len(left) != 2 || left["eight"] != 2 || left["same shard"] != 1 {
		t.Errorf("drain gave back %v", left)
	}
	table.drain(func(node string, refs uint64) { t.Errorf("second drain: %s %d", node, refs) })
}

// TestNodeTableOfOneIDAfterTheOther: the file is gone, its number is given to
// another one, and the kernel gives back what it has of the old one afterwards.
func TestNodeTableOfOneIDAfterTheOther(t *testing.T) {
	table := newNodeTable[string]()
	table.add(7, "old")
	table.add(7, "old")
	if old, refs := table.add(7, "new"); old != "old" || refs != 2 {
		t.Errorf("add of another node gives %q, %d back, want old, 2", old, refs)
	}
	if old, refs := table.add(7, "new"); refs != 0 {
		t.Errorf("add of the same node gives %q, %d back", old, refs)
	}
	if node, ok := table.get(7); !ok || node != "new" {
		t.Errorf("get = %q, %v", node, ok)
	}
	if _, refs := table.forget(7, 1); refs != 0 { // of the old one
		t.Errorf("the first forget gives %d back, want 0", refs)
	}
	if node, refs := table.forget(7, 3); node != "new" || refs != 2 {
		t.Errorf("the last forget gives %q, %d back, want new, 2", node, refs)
	}
	if _, ok := table.get(7); ok {
		t.Error("the id is still known")
	}
	table.add(7, "old")
	table.add(7, "new")
	table.forget(7, 1)
	left := map[string]uint64{}
	table.drain(func(node string, refs uint64) { left[node] += refs })
	if len(left) != 1 || left["new"] != 1 {
		t.Errorf("drain gave back %v", left)
	}
}

// TestNodeTableConcurrently: whatever the order of add and forget, every
// reference is given back exactly once.
func TestNodeTableConcurrently(t *testing.T) {
	const workers, rounds, ids = 8, 2000, 5
	table := newNodeTable[uint64]()
	var given [workers + 1][ids]uint64
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range rounds {
				id := uint64(i % ids)
				table.add(id, id)
				if node, ok := table.get(id); ok && node != id {
					t.Errorf("get(%d) = %d", id, node)
				}
				_, refs := table.forget(id, 1)
				given[w][id] += refs
			}
		})
	}
	wg.Wait()
	table.drain(func(node uint64, refs uint64) { given[workers][node] += refs })
	for id := range ids {
		var total uint64
		for w := range given {
			total += given[w][id]
		}
		if want := uint64(workers * rounds / ids); total != want {
			t.Errorf("node %d: %d references given back, want %d", id, total, want)
		}
	}
}

func TestHandleTable(t *testing.T) {
	table := newHandleTable[string]()
	a, b := table.add("a"), table.add("b")
	if a == b || a == 0 || b == 0 {
		t.Errorf("handle numbers %d and %d", a, b)
	}
	if h, ok := table.get(a); !ok || h != "a" {
		t.Errorf("get(a) = %q, %v", h, ok)
	}
	if h, ok := table.remove(a); !ok || h != "a" {
		t.Errorf("remove(a) = %q, %v", h, ok)
	}
	if _, ok := table.remove(a); ok {
		t.Error("a is removed twice")
	}
	if c := table.add("c"); c == a || c == b {
		t.Errorf("handle number %d is used again", c)
	}
	ended := map[string]bool{}
	table.drain(func(h string) { ended[h] = true })
	if len(ended) != 2 || !ended["b"] || !ended["c"] {
		t.Errorf("drain ended %v", ended)
	}
}
