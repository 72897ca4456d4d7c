package powercut

import (
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/envelope"
)

// bugs are mistakes that a store could make, and sequences that show them.
var bugs = []struct {
	name      string
	placement envelope.Placement
	steps     []step
	plant     func(r *recorder)
}{
	{
		"the journal is not synced", envelope.Prefix,
		[]step{{Op: "write", Path: "foo", Off: 3000, Len: 3000, Seed: 51, Sync: true}},
		func(r *recorder) { r.skip = func(e *event) bool { return e.kind == datasync } },
	},
	{
		"a new file is not synced", envelope.Prefix,
		[]step{{Op: "create", Path: "new", Len: 9000, Seed: 51, Sync: true}, {Op: "fsyncdir", Path: "."}},
		func(r *recorder) { r.skip = func(e *event) bool { return e.kind == fsync && !r.isDir[e.ino] } },
	},
	{
		"a directory is not synced", envelope.Prefix,
		[]step{{Op: "create", Path: "new", Len: 10, Seed: 51, Sync: true}, {Op: "fsyncdir", Path: "."}},
		func(r *recorder) { r.skip = func(e *event) bool { return e.kind == fsync && r.isDir[e.ino] } },
	},
	{
		"a file is renamed before its sidecar is there", envelope.Sidecar,
		[]step{{Op: "rename", Path: "foo", To: "B/moved"}, {Op: "fsyncdir", Path: "."}, {Op: "fsyncdir", Path: "B"}},
		func(r *recorder) {
			r.late = func(e *event) bool { return e.kind == linkTo && strings.HasPrefix(e.name, ".kmsfs.h.") }
		},
	},
	{
		"a sidecar's name is not synced", envelope.Sidecar,
		[]step{{Op: "create", Path: "new"}, {Op: "fsyncdir", Path: "."}, {Op: "write", Path: "new", Len: 100, Seed: 51, Sync: true}},
		func(r *recorder) {
			synced := 0
			r.skip = func(e *event) bool {
				if e.kind == fsync && r.isDir[e.ino] && e.ino == r.root {
					synced++
					return synced > 1
				}
				return false
			}
		},
	},
	{
		"a long name comes after what has it", envelope.Prefix,
		[]step{{Op: "rename", Path: "foo", To: longName}, {Op: "fsyncdir", Path: "."}},
		func(r *recorder) {
			r.late = func(e *event) bool { return e.kind == linkTo && strings.HasPrefix(e.name, ".kmsfs.n.") }
		},
	},
	{
		"a sidecar goes before its file has moved", envelope.Sidecar,
		[]step{{Op: "rename", Path: "foo", To: "B/moved"}, {Op: "fsyncdir", Path: "."}, {Op: "fsyncdir", Path: "B"}},
		func(r *recorder) {
			r.late = func(e *event) bool { return e.kind == rename && !strings.HasPrefix(e.name, ".kmsfs.") }
			r.until = func(e *event) bool { return e.kind == unlink && strings.HasPrefix(e.name, ".kmsfs.h.") }
		},
	},
	{
		"an epoch is done before the store is synced", envelope.Prefix,
		[]step{
			{Op: "write", Path: "foo", Off: 3000, Len: 3000, Seed: 51, Sync: true}, {Op: "checkpoint"},
			{Op: "write", Path: "A/foo", Len: 50, Seed: 52, Sync: true},
		},
		func(r *recorder) { r.skip = func(e *event) bool { return e.kind == syncfs } },
	},
	{
		"a header is changed in place without the journal", envelope.Prefix,
		[]step{{Op: "punch", Path: "foo", Off: 0, Len: 8192, Sync: true}, {Op: "settle"}},
		func(r *recorder) {
			r.skip = func(e *event) bool { return e.kind == write && len(e.data) == headerRecord }
		},
	},
}

// headerRecord is the length of a journal record that replaces a header: head,
// what it is about, one operation, the block.
const headerRecord = 40 + 56 + 17 + 1024

// TestPlantedBugs makes sure that the proof sees what it is there for.
func TestPlantedBugs(t *testing.T) {
	for _, b := range bugs {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, layout{placement: b.placement}, prepared)
			h, o := r.record(b.steps, nil) // what is right passes
			if err := newProver(r, 1, 1).cutEverywhere(h, o, 30); err != nil {
				t.Fatalf("without the bug: %v", err)
			}
			for i := range uint64(20) {
				h, o := r.record(b.steps, b.plant)
				if err := newProver(r, i, 2).cutEverywhere(h, o, 60); err != nil {
					t.Logf("caught: %.400s", lastLine(err.Error()))
					return
				}
			}
			h, _ = r.record(b.steps, b.plant)
			t.Errorf("not caught in\n%s", h.describe(cut{at: len(h.events)}))
		})
	}
}

func lastLine(s string) string { return s[strings.LastIndexByte(s, '\n')+1:] }
