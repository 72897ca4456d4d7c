package powercut

import (
	"math/rand/v2"
	"testing"
)

// reopened are sequences in which a file is opened again with something of it in
// the journal only; each step opens the file and closes it.
var reopened = [][]step{
	{ // cut, and long after it appended to: the cut must not be done once more
		{Op: "create", Path: "new", Len: 20_000, Seed: 1},
		{Op: "truncate", Path: "new", Off: 2 * chunk},
		{Op: "write", Path: "new", Off: 2 * chunk, Len: 300_000, Seed: 2, Sync: true},
		{Op: "fsyncdir", Path: "."},
	},
	{ // synced by another descriptor than the one that wrote
		{Op: "write", Path: "foo", Off: 3000, Len: 3000, Seed: 1},
		{Op: "fsync", Path: "foo"},
	},
	{
		{Op: "write", Path: "A/bar", Off: 5000, Len: 7000, Seed: 1},
		{Op: "settle"},
		{Op: "fsync", Path: "bar"},
	},
	{ // cut to nothing with its header elsewhere, which then goes
		{Op: "rewrite", Path: "foo"},
		{Op: "checkpoint"},
		{Op: "fsync", Path: "foo"},
	},
}

func TestReopened(t *testing.T) {
	for _, p := range placements {
		t.Run(p.String(), func(t *testing.T) {
			r := newRig(t, p, prepared)
			for i, s := range reopened {
				h, o := r.record(s, nil)
				if _, err := r.cutEverywhere(h, o, rand.New(rand.NewPCG(uint64(i), 5)), 40); err != nil {
					t.Errorf("%v\n%v", s, err)
				}
			}
		})
	}
}
