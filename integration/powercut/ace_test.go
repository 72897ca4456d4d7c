package powercut

import (
	"math/rand/v2"
	"os"
	"strings"
	"testing"
)

var full = os.Getenv("CRASH_FULL") != ""

var longName = strings.Repeat("long-", 50)

// prepared is what is in each store, and durable, before a sequence.
var prepared = []step{
	{Op: "create", Path: "foo", Len: 10_000, Seed: 1},
	{Op: "setxattr", Path: "foo", Len: 20, Seed: 2},
	{Op: "mkdir", Path: "A"},
	{Op: "create", Path: "A/foo", Len: 100, Seed: 3},
	{Op: "create", Path: "A/bar", Len: 5000, Seed: 4},
	{Op: "link", Path: "A/bar", To: "bar"},
	{Op: "create", Path: "A/" + longName, Len: 4096, Seed: 5},
	{Op: "mkdir", Path: "B"},
	{Op: "mkdir", Path: "empty"},
	{Op: "create", Path: "nothing"},
}

// basic are the operations of which sequences are made: those of ACE.
var basic = []step{
	{Op: "create", Path: "new"},
	{Op: "create", Path: "A/new", Len: 6000},
	{Op: "create", Path: "B/" + longName, Len: 10},
	{Op: "write", Path: "foo", Off: 3000, Len: 3000},   // over chunks
	{Op: "write", Path: "foo", Off: 10_000, Len: 7000}, // append
	{Op: "write", Path: "A/foo", Off: 100, Len: 50},    // append within a chunk
	{Op: "write", Path: "foo", Off: 20_000, Len: 100},  // extend, with a hole
	{Op: "write", Path: "nothing", Len: 9000},          // of a file without a header
	{Op: "rewrite", Path: "foo", Len: 5000},            // open with O_TRUNC
	{Op: "truncate", Path: "foo", Off: 5000},
	{Op: "truncate", Path: "foo", Off: 0},
	{Op: "truncate", Path: "A/foo", Off: 9000}, // longer
	{Op: "rename", Path: "foo", To: "A/foo"},   // over another, in another directory
	{Op: "rename", Path: "foo", To: "B/moved"},
	{Op: "rename", Path: "A/foo", To: "A/zoo"},
	{Op: "rename", Path: "A/foo", To: "A/" + longName},
	{Op: "rename", Path: "A/" + longName, To: "B/short"},
	{Op: "rename", Path: "A", To: "B/A"}, // a directory
	{Op: "exchange", Path: "foo", To: "A/" + longName},
	{Op: "link", Path: "foo", To: "B/link"},
	{Op: "link", Path: "foo", To: "l" + longName},
	{Op: "unlink", Path: "foo"},
	{Op: "unlink", Path: "bar"}, // one of two names
	{Op: "unlink", Path: "A/" + longName},
	{Op: "mkdir", Path: "D"},
	{Op: "mkdir", Path: "B/" + longName},
	{Op: "rmdir", Path: "empty"},
	{Op: "symlink", Path: "B/sym", To: "../foo"},
	{Op: "setxattr", Path: "foo", Len: 30},
	{Op: "rmxattr", Path: "foo"},
	{Op: "chmod", Path: "foo", Off: 0o600},
	{Op: "allocate", Path: "foo", Off: 0, Len: 15_000},
	{Op: "punch", Path: "foo", Off: 1000, Len: 8000},
	{Op: "mmap", Path: "foo", Off: 4000, Len: 200},
	{Op: "mmap", Path: "foo", Off: 9000, Len: 900},
}

// parents are the directories whose names a step changes.
func (s step) parents() (out []string) {
	dir := func(p string) string {
		if i := strings.LastIndexByte(p, '/'); i >= 0 {
			return p[:i]
		}
		return "."
	}
	switch s.Op {
	case "create", "tmpfile", "mkdir", "symlink", "unlink", "rmdir":
		return []string{dir(s.Path)}
	case "link":
		return []string{dir(s.To)}
	case "rename", "exchange":
		if a, b := dir(s.Path), dir(s.To); a != b {
			return []string{a, b}
		}
		return []string{dir(s.Path)}
	}
	return nil
}

// opens reports whether the step has a file open, which it can sync.
func (s step) opens() bool {
	switch s.Op {
	case "create", "tmpfile", "write", "rewrite", "truncate", "setxattr", "rmxattr", "chmod", "allocate", "punch", "zero", "mmap":
		return true
	}
	return false
}

// withSync adds what makes a step durable. It is nil if the step has no file to
// sync, and changes no name.
func (s step) withSync() []step {
	s.Sync = s.opens()
	out := []step{s}
	for _, d := range s.parents() {
		out = append(out, step{Op: "fsyncdir", Path: d})
	}
	return out
}

// valid tells whether the oracle can do the step.
func (o *oracle) valid(s step) bool {
	has := func(p string) (x *object, parent bool) {
		d := o.root
		parts := strings.Split(p, "/")
		for _, part := range parts[:len(parts)-1] {
			if d = last(d.entries)[part]; d == nil || d.entries == nil {
				return nil, false
			}
		}
		return last(d.entries)[parts[len(parts)-1]], true
	}
	x, parent := has(s.Path)
	if s.Path == "." || s.Path == "" {
		x, parent = o.root, true
	}
	switch s.Op {
	case "create", "tmpfile", "mkdir", "symlink":
		return x == nil && parent
	case "settle", "checkpoint", "remount", "let":
		return true
	}
	if x == nil {
		return false
	}
	y, parent := has(s.To)
	switch s.Op {
	case "link":
		return x.entries == nil && y == nil && parent
	case "rename":
		inside := x.entries != nil && strings.HasPrefix(s.To+"/", s.Path+"/")
		return parent && x != y && !inside && (y == nil || y.entries == nil && x.entries == nil)
	case "exchange":
		return x != y && y != nil && x.entries == nil && y.entries == nil
	case "rmdir":
		return x.entries != nil && len(last(x.entries)) == 0
	case "fsyncdir":
		return x.entries != nil
	case "unlink":
		return x.entries == nil
	case "rmxattr":
		return x.data != nil && last(x.xattr) != ""
	case "mmap":
		return x.data != nil && int64(len(last(x.data))) >= s.Off+s.Len
	}
	return x.data != nil
}

// sequences are all of length one and two; the first step with and without a
// sync. That of the last one is always made: a cut before it is one without.
func sequences(o *oracle) (out [][]step) {
	for i, a := range basic {
		a.Seed = uint64(100 + i)
		out = append(out, a.withSync())
		for j, b := range basic {
			b.Seed = uint64(200 + j)
			for _, first := range [][]step{{a}, a.withSync()} {
				s := append(append([]step{}, first...), b.withSync()...)
				if o.possible(s) {
					out = append(out, s)
				}
			}
		}
	}
	return out
}

func (o *oracle) possible(steps []step) bool {
	c := o.clone()
	for _, s := range steps {
		if !c.valid(s) {
			return false
		}
		c.begin(0)
		c.do(s)
		c.end(0)
	}
	return true
}

// TestSequences cuts the power in every sequence of one and two operations: on
// one of the placements each, another one in each run, or on all with CRASH_FULL,
// in any order. S-57 S-58 S-59
func TestSequences(t *testing.T) {
	turn, _ := seed(t)
	for place, p := range placements {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, layout{placement: p}, prepared)
			all := sequences(r.model)
			order := rand.New(rand.NewPCG(turn, 5)).Perm(len(all))
			done, states, at := 0, 0, newProgress(t)
			for n, i := range order {
				if at.over(limit(t)) {
					break
				}
				if !full && (n+place)%len(placements) != 0 {
					continue
				}
				h, o := r.record(all[i], nil)
				prover := newProver(r, turn+uint64(i), 4)
				prover.seldom = 20
				err := prover.cutEverywhere(h, o, perSequence)
				done, states = done+1, states+prover.states
				if err != nil {
					t.Fatalf("CRASH_SEED=%d: %v\n%v", turn, all[i], err)
				}
				at.tell(done, len(all), states)
			}
			t.Logf("CRASH_SEED=%d: %d of %d sequences, %d states", turn, done, len(all), states)
		})
	}
}
