package cryptfs

import (
	"slices"
	"testing"
)

// TestWhereabouts: what is noted while the store is walked over, and after, is
// found beside what the walk has seen; what has grown out of all proportion is
// forgotten, and walked for again.
func TestWhereabouts(t *testing.T) {
	var w whereabouts
	dir := func(ino uint64) *Node { return &Node{key: inoKey{ino: ino}} }
	w.note(dir(5), dir(1))
	if got := w.of(5); got != nil {
		t.Errorf("before anybody asked: %v", got)
	}
	w.on = true
	w.learned([]sighting{{9, 1}, {5, 1}})
	w.note(dir(5), dir(2))
	w.learned([]sighting{{5, 3}, {5, 1}})
	w.sort()
	w.whole, w.limit = true, len(w.sorted)+maxPlaces
	w.note(dir(5), dir(4))
	w.note(dir(5), dir(3))
	if got := w.of(5); !slices.Equal(got, []uint64{1, 2, 3, 4}) {
		t.Errorf("inode 5 is in %v, want 1 to 4", got)
	}
	if got := w.of(6); got != nil {
		t.Errorf("an inode that was never seen is in %v", got)
	}
	for i := range uint64(2 * maxFresh) {
		w.note(dir(100+i), dir(1))
	}
	if got := w.of(100 + 2*maxFresh - 1); !slices.Equal(got, []uint64{1}) || len(w.fresh) > maxFresh {
		t.Errorf("last of many: in %v, with %d left to sort", got, len(w.fresh))
	}
	w.limit = 10
	for i := range uint64(2 * maxFresh) {
		w.note(dir(100_000+i), dir(1))
	}
	if w.on || w.whole || len(w.sorted) > 0 {
		t.Errorf("beyond the limit: on %v, whole %v, %d places", w.on, w.whole, len(w.sorted))
	}
}
