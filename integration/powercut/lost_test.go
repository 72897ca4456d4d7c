package powercut

import (
	"testing"
)

// lost are sequences of more than two steps in which an fsync could get lost.
var lost = []struct {
	name  string
	steps []step
}{
	{"changed and moved into a new directory", []step{
		{Op: "mkdir", Path: "D"},
		{Op: "write", Path: "foo", Off: 3000, Len: 3000, Seed: 51},
		{Op: "rename", Path: "foo", To: "D/foo"},
	}},
	{"appended, moved into a new directory", []step{
		{Op: "mkdir", Path: "D"},
		{Op: "write", Path: "foo", Off: 10_000, Len: 600_000, Seed: 51},
		{Op: "settle"}, // lets go of the file
		{Op: "rename", Path: "foo", To: "D/foo"},
	}},
	{"held and synced after a close, then moved", []step{
		{Op: "write", Path: "foo", Off: 10_000, Len: 600_000, Seed: 51},
		{Op: "settle"}, // lets go of the file
		{Op: "hold", Path: "foo"},
		{Op: "fsync", Path: "foo"},
		{Op: "mkdir", Path: "D"},
		{Op: "rename", Path: "foo", To: "D/foo"},
		{Op: "let", Path: "foo"},
	}},
	{"cut to nothing with something in the journal, and written again", []step{
		{Op: "hold", Path: "foo"},
		{Op: "write", Path: "foo", Off: 0, Len: 9000, Seed: 51, Sync: true},
		{Op: "truncate", Path: "foo", Off: 0},
		{Op: "write", Path: "foo", Off: 0, Len: 5000, Seed: 52},
		{Op: "let", Path: "foo"},
	}},
	{"cut to nothing and moved", []step{
		{Op: "truncate", Path: "foo", Off: 0},
		{Op: "rename", Path: "foo", To: "B/foo"},
		{Op: "fsyncdir", Path: "."}, {Op: "fsyncdir", Path: "B"},
	}},
	{"linked into a new directory while unsynced", []step{
		{Op: "write", Path: "foo", Off: 10_000, Len: 600_000, Seed: 51},
		{Op: "settle"}, // lets go of the file
		{Op: "mkdir", Path: "D"},
		{Op: "link", Path: "foo", To: "D/foo"},
		{Op: "fsync", Path: "foo"},
		{Op: "unlink", Path: "foo"},
	}},
	{"cut, and long after it appended to: the cut must not be done once more", []step{
		{Op: "create", Path: "new", Len: 20_000, Seed: 51},
		{Op: "truncate", Path: "new", Off: 2 * chunk},
		{Op: "write", Path: "new", Off: 2 * chunk, Len: 600_000, Seed: 52, Sync: true},
		{Op: "fsyncdir", Path: "."},
	}},
	{"synced by another descriptor than the one that wrote", []step{
		{Op: "write", Path: "foo", Off: 3000, Len: 3000, Seed: 51},
		{Op: "fsync", Path: "foo"},
	}},
	{"synced under another name when the file was let go of", []step{
		{Op: "write", Path: "A/bar", Off: 5000, Len: 7000, Seed: 51},
		{Op: "settle"},
		{Op: "fsync", Path: "bar"},
	}},
	{"cut to nothing with its header elsewhere, which then goes", []step{
		{Op: "rewrite", Path: "foo"},
		{Op: "checkpoint"},
		{Op: "fsync", Path: "foo"},
	}},
	{"with a hole, and then without the name that it was opened by", []step{
		{Op: "write", Path: "A/bar", Off: 20_000, Len: 4096, Seed: 51}, // its header says that it has holes now
		{Op: "rename", Path: "A/foo", To: "A/bar"},                     // bar, which nobody has looked up, is left
		{Op: "checkpoint"},
		{Op: "create", Path: "empty/x", Len: 100, Seed: 52, Sync: true}, // an epoch later the journal has it no more
		{Op: "checkpoint"},
		{Op: "create", Path: "empty/y", Len: 100, Seed: 53, Sync: true},
		{Op: "checkpoint"},
	}},
	{"written across its end", []step{
		{Op: "create", Path: "new", Len: 4097, Seed: 51},
		{Op: "fsyncdir", Path: "."},
		{Op: "write", Path: "new", Off: 2048, Len: 20_000, Seed: 52},
	}},
}

// TestLost tries the broad cuts at each event of these, and others.
func TestLost(t *testing.T) {
	for _, p := range placements {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, layout{placement: p}, prepared)
			states := 0
			for i, l := range lost {
				h, o := r.record(l.steps, nil)
				pr := newProver(r, uint64(i), 2)
				err := pr.cutBroadly(h, o, 30)
				if err == nil {
					err = pr.cutEverywhere(h, o, 5)
				}
				if err != nil {
					t.Errorf("%s: %v", l.name, err)
				}
				states += pr.states
			}
			t.Logf("%d sequences, %d states", len(lost), states)
		})
	}
}
