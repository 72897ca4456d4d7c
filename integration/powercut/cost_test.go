package powercut

import (
	"testing"

	"github.com/kmsfs/kmsfs/crypto/envelope"
)

// TestFsyncsOfAMount counts what an fsync costs on the store's disk, over a real
// mount: one sync, as a file that is not encrypted. In placement sidecar a new
// file has a second one, and that one's name. More than goes through the journal
// at once (512 KiB) needs the file's own as well, and one before for a file of an earlier
// epoch.
func TestFsyncsOfAMount(t *testing.T) {
	for _, p := range placements {
		t.Run(p.String(), func(t *testing.T) {
			r := newRig(t, layout{placement: p}, prepared)
			rec := newRecorder(r.disk)
			store, remove := r.folder()
			defer remove()
			if err := r.disk.build(store); err != nil {
				t.Fatal(err)
			}
			s, err := r.mount(store, rec)
			if err != nil {
				t.Fatal(err)
			}
			defer s.unmount()
			o, n := r.model.clone(), uint64(100)
			do := func(x step) int {
				n++
				x.Seed = n
				before := rec.at()
				s.do(x, o)
				return rec.syncs(before)
			}
			do(step{Op: "create", Path: "first", Len: 10, Sync: true}) // begins an epoch
			made := 1
			if p == envelope.Sidecar {
				made = 3
			}
			name := "new"
			for what, c := range map[string]struct {
				want int
				step func() step
			}{
				"overwrite":        {1, func() step { return step{Op: "write", Path: "foo", Off: 3000, Len: 3000, Sync: true} }},
				"append":           {1, func() step { return step{Op: "write", Path: "foo", Off: o.size("foo"), Len: 3000, Sync: true} }},
				"append much":      {1, func() step { return step{Op: "write", Path: "A/foo", Off: o.size("A/foo"), Len: 500_000, Sync: true} }},
				"append more":      {3, func() step { return step{Op: "write", Path: "A/bar", Off: o.size("A/bar"), Len: 900_000, Sync: true} }},
				"append much more": {2, func() step { return step{Op: "write", Path: "first", Off: o.size("first"), Len: 900_000, Sync: true} }},
				"create":           {made, func() step { name += "+"; return step{Op: "create", Path: name, Len: 9000, Sync: true} }},
			} {
				got := []int{do(c.step()), do(c.step()), do(c.step())}
				t.Logf("%s: %v syncs", what, got)
				if min(got[0], got[1], got[2]) > c.want { // a checkpoint may come between
					t.Errorf("%s and fsync: %v syncs, want %d", what, got, c.want)
				}
			}
		})
	}
}

func (o *oracle) size(path string) int64 { return int64(len(last(o.find(path).data))) }

// syncs counts those after a place in the record.
func (r *recorder) syncs(from int) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.events[from:] {
		if k := r.events[from+i].kind; k == fsync || k == datasync || k == syncfs {
			n++
		}
	}
	return n
}
