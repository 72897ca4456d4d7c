package salvage

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
	"github.com/kmsfs/kmsfs/fs/journal"
)

const testChunk = dare.MinChunk

// sealed returns n plaintext bytes and their slots.
func sealed(t *testing.T, codec *dare.Codec, n int) (plain, slots []byte) {
	t.Helper()
	for i := range n {
		plain = append(plain, byte(i%251)+1)
	}
	for i := 0; i*testChunk < n; i++ {
		end := min(n, (i+1)*testChunk)
		var err error
		if slots, err = codec.Seal(slots, plain[i*testChunk:end], int64(i), end == n); err != nil {
			t.Fatal(err)
		}
	}
	return plain, slots
}

// F-4, F-8, F-9, F-11
func TestCopy(t *testing.T) {
	codec, err := dare.New(keymem.Take(bytes.Repeat([]byte{7}, 32)), dare.AES256GCM, testChunk)
	if err != nil {
		t.Fatal(err)
	}
	defer codec.Wipe()
	plain, slots := sealed(t, codec, 3*testChunk+100)
	_, even := sealed(t, codec, 3*testChunk)
	const slot = testChunk + dare.Overhead
	zeroed := func(from, to int) []byte { b := bytes.Clone(plain); clear(b[from:to]); return b }
	edit := func(f func(b []byte)) []byte { b := bytes.Clone(slots); f(b); return b }
	for _, c := range []struct {
		name                string
		slots, want         []byte
		sparse              bool
		ops                 []journal.Op
		zeros               []Range
		truncated, trailing bool
	}{
		{name: "whole", slots: slots, want: plain},
		{name: "flipped", slots: edit(func(b []byte) { b[slot+20] ^= 1 }), want: zeroed(testChunk, 2*testChunk), zeros: []Range{{testChunk, testChunk}}},
		{name: "two flipped", slots: edit(func(b []byte) { b[20] ^= 1; b[slot+20] ^= 1 }), want: zeroed(0, 2*testChunk), zeros: []Range{{0, 2 * testChunk}}},
		{name: "last flipped", slots: edit(func(b []byte) { b[len(b)-1] ^= 1 }), want: zeroed(3*testChunk, len(plain)), zeros: []Range{{3 * testChunk, 100}}, truncated: true},
		{name: "zeros in a dense file", slots: edit(func(b []byte) { clear(b[slot : 2*slot]) }), want: zeroed(testChunk, 2*testChunk), zeros: []Range{{testChunk, testChunk}}},
		{name: "hole", sparse: true, slots: edit(func(b []byte) { clear(b[slot : 2*slot]) }), want: zeroed(testChunk, 2*testChunk)},
		{name: "cut at a chunk", slots: slots[:2*slot], want: plain[:2*testChunk], truncated: true},
		{name: "cut in a chunk", slots: slots[:slot+1032], want: zeroed(testChunk, len(plain))[:testChunk+1000], zeros: []Range{{testChunk, 1000}}, truncated: true},
		{name: "cut in a package header", slots: slots[:slot+5], want: plain[:testChunk], truncated: true},
		{name: "added to a short chunk", slots: append(bytes.Clone(slots), 1, 2, 3), want: plain, trailing: true},
		{name: "added to a full chunk", slots: append(bytes.Clone(even), make([]byte, 2000)...), want: plain[:3*testChunk], trailing: true},
		{name: "a few bytes added to a full chunk", slots: append(bytes.Clone(even), 1, 2, 3), want: plain[:3*testChunk], trailing: true},
		{name: "swapped", slots: slices.Concat(slots[slot:2*slot], slots[:slot], slots[2*slot:]), want: zeroed(0, 2*testChunk), zeros: []Range{{0, 2 * testChunk}}},
		{name: "in the journal", slots: edit(func(b []byte) { clear(b[slot:]) }), want: plain, ops: []journal.Op{{Kind: journal.OpWrite, Off: slot, Data: slots[slot:]}}},
		{name: "nothing", want: []byte{}, truncated: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, err := backing.OpenRoot(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer dir.Close()
			out, err := dir.Open("out", os.O_RDWR|os.O_CREATE, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			b := &body{
				Header: &envelope.Header{Fixed: envelope.Fixed{ChunkSize: testChunk, Sparse: c.sparse}}, codec: codec,
				geo: dare.Geometry{ChunkSize: testChunk}, view: chunkfile.Look(at(c.slots), int64(len(c.slots)), c.ops),
			}
			o, err := b.copy(context.Background(), out)
			if err != nil {
				t.Fatal(err)
			}
			got, err := dir.ReadFile("out", 1<<20)
			if err != nil || !bytes.Equal(got, c.want) {
				t.Errorf("got %d bytes, %v, want %d others", len(got), err, len(c.want))
			}
			if o.truncated != c.truncated || o.trailing != c.trailing || !slices.Equal(o.zeroed, c.zeros) {
				t.Errorf("got %+v, want truncated %v, trailing %v, zeros %v", o, c.truncated, c.trailing, c.zeros)
			}
			if whole := len(c.zeros) == 0 && !c.truncated && !c.trailing; whole != (o.cause == nil) && len(o.zeroed) > 0 {
				t.Errorf("cause: got %v", o.cause)
			}
		})
	}
}

// at is a store file in memory.
type at []byte

func (b at) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(b)) {
		return 0, nil
	}
	return copy(p, b[off:]), nil
}

func TestTake(t *testing.T) {
	o := &outDir{used: map[string]bool{}}
	long := strings.Repeat("x", 255)
	for _, c := range [][2]string{{"a", "a"}, {"a", "a~1"}, {"a", "a~2"}, {"a~1", "a~1~1"}, {long, long}, {long, long[:253] + "~1"}} {
		if got := o.take(c[0]); got != c[1] {
			t.Errorf("%.10q: got %q, want %q", c[0], got, c[1])
		}
	}
}

func TestLooksEncrypted(t *testing.T) {
	for s, want := range map[string]bool{
		"report.pdf": false, "": false, strings.Repeat("A", 43): true, strings.Repeat("A", 42): false, strings.Repeat("A", 42) + "B": false, strings.Repeat("=", 43): false,
	} {
		if got := looksEncrypted(s); got != want {
			t.Errorf("%q: got %v, want %v", s, got, want)
		}
	}
}

func TestVerdicts(t *testing.T) {
	for _, c := range []struct {
		p                Problem
		damaged, missing bool
	}{
		{Problem{State: Lost, Kind: fault.Integrity}, true, false},
		{Problem{State: Lost, Kind: fault.KeyDenied}, false, true},
		{Problem{State: Lost}, true, false},
		{Problem{State: Bare}, false, false},
		{Problem{State: Bare, Kind: fault.Integrity}, true, false},
	} {
		r := &Report{Problems: []Problem{c.p}}
		if r.Damaged() != c.damaged || r.KeysMissing() != c.missing {
			t.Errorf("%+v: got %v, %v", c.p, r.Damaged(), r.KeysMissing())
		}
	}
}

// TestCancelled: an end by the user leaves no part of a file.
func TestCancelled(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "x"), []byte("no header"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(context.Background(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	out := filepath.Join(t.TempDir(), "out")
	if _, err := s.Write(ctx, Config{Out: out}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if list, err := os.ReadDir(out); err != nil || len(list) > 0 {
		t.Errorf("got %v, %v", list, err)
	}
	rep, err := s.Write(context.Background(), Config{Out: out})
	if err != nil || len(rep.Problems) != 1 || rep.Problems[0].State != Lost {
		t.Errorf("got %+v, %v", rep, err)
	}
	for _, bad := range []string{dir, filepath.Join(dir, "sub"), filepath.Join(dir, "x")} {
		if _, err := s.Write(context.Background(), Config{Out: bad}); !errors.Is(err, ErrInside) {
			t.Errorf("%s: got %v", bad, err)
		}
	}
}
