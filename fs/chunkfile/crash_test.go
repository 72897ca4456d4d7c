package chunkfile_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
)

// prefixes are the parts of a write that reach the file when the process dies
// in it: bytes, and whole pages of the file, as the kernel copies them.
func prefixes(r *rand.Rand) []func(off int64, n int) int {
	random := r.Int64()
	page := func(off int64, n int) int {
		first := int(4096 - off%4096)
		if n <= first {
			return n
		}
		return min(n, first+int(random%int64((n-first)/4096+1))*4096)
	}
	return []func(off int64, n int) int{
		func(int64, int) int { return 0 },
		func(_ int64, n int) int { return min(n, 1) },
		func(_ int64, n int) int { return int(random % int64(n+1)) },
		page,
		func(_ int64, n int) int { return n - 1 },
	}
}

// history is what a file may hold after a crash: its contents at the last fsync
// and after each operation since.
type history [][]byte

// admits says why got is no state that a crash may leave. Every chunk is one
// that the file had, lengthened by zeros if the file was being lengthened.
func (h history) admits(got []byte, chunk int) error {
	least, most := len(h[0]), 0
	for _, s := range h {
		least, most = min(least, len(s)), max(most, len(s))
	}
	if len(got) < least || len(got) > most {
		return fmt.Errorf("size %d, want %d to %d", len(got), least, most)
	}
	for at := 0; at < len(got); at += chunk {
		c := got[at:min(at+chunk, len(got))]
		ok := false
		for _, s := range h {
			old := s[min(at, len(s)):min(at+chunk, len(s))]
			ok = ok || bytes.Equal(c, resize(bytes.Clone(old), int64(len(c)))) && len(old) <= len(c)
		}
		if !ok {
			return fmt.Errorf("chunk at %d (%d bytes) is none that was there", at, len(c))
		}
	}
	return nil
}

// run performs operations until one fails, and keeps the history.
func (s *stored) run(ops []op) (history, error) {
	h := history{nil}
	for i, o := range ops {
		now := h[len(h)-1]
		if o.kind == "allocate" { // zeros first, then a larger size
			keep := o
			keep.mode |= unix.FALLOC_FL_KEEP_SIZE
			h = append(h, keep.model(now))
		}
		h = append(h, o.model(now))
		var err error
		switch o.kind {
		case "reopen":
			if err = s.close(); err == nil {
				err = s.open()
			}
		default:
			err = o.do(s.f)
		}
		if s.dead {
			err = errPower
		}
		if err != nil {
			return h, fmt.Errorf("step %d, %v: %w", i, o, err)
		}
		if o.kind == "fsync" {
			h = h[len(h)-1:]
		}
	}
	return h, nil
}

// TestCrash kills the process in every change that a series of operations makes
// on the disk, and looks at what recovery makes of it. (F-30, F-32 to F-35)
func TestCrash(t *testing.T) {
	seed := startSeed(t)
	for _, base := range bases {
		t.Run(fmt.Sprintf("base=%d", base), func(t *testing.T) {
			t.Parallel()
			for run := range rounds(6) {
				r := newRand(seed, run, base)
				crashEverywhere(t, r, randomOps(r, 14, 4096, []int64{300, 30_000}[run%2]), base)
			}
		})
	}
}

// TestCrashAppending is TestCrash for what most files see: appends, small and
// large, with an fsync now and then.
func TestCrashAppending(t *testing.T) {
	seed := startSeed(t)
	for _, base := range bases {
		r := newRand(seed, 0, base)
		var ops []op
		for range 12 {
			o := op{kind: []string{"append", "append", "append", "fsync", "flush"}[r.IntN(5)], fill: byte(r.IntN(250)) + 1, size: 1 + r.Int64N(6000)}
			if r.IntN(4) == 0 {
				o.size *= 5
			}
			ops = append(ops, o)
		}
		crashEverywhere(t, r, ops, base)
	}
}

func crashEverywhere(t *testing.T, r *rand.Rand, ops []op, base dare.CipherOff) {
	const chunk = 4096
	whole := newStored(t, chunk, base)
	h, err := whole.run(ops)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := contents(whole.f); err != nil || !bytes.Equal(got, h[len(h)-1]) {
		t.Fatalf("without a crash: %v", err)
	}
	for _, kill := range steps(r, whole.steps) {
		for k, prefix := range prefixes(r) {
			s := newStored(t, chunk, base)
			s.kill, s.prefix = kill, prefix
			h, err := s.run(ops)
			if !s.dead || !errors.Is(err, errPower) {
				t.Fatalf("killed in step %d: %v", kill, err)
			}
			if rerr := s.survive(r, h); rerr != nil {
				t.Fatalf("base %d, kill %d, prefix %d: %v: %v", base, kill, k, err, rerr)
			}
		}
	}
}

// survive recovers, after crashes of the recovery itself, and checks the result.
func (s *stored) survive(r *rand.Rand, h history) error {
	for range r.IntN(3) {
		s.dead, s.steps = false, 0
		s.kill, s.prefix = 1+r.IntN(6), prefixes(r)[r.IntN(5)]
		if err := s.recover(); err != nil && !s.dead {
			return fmt.Errorf("recovery: %w", err)
		}
		if !s.dead {
			break
		}
	}
	s.dead, s.kill = false, 0
	if err := s.recover(); err != nil {
		return fmt.Errorf("recovery: %w", err)
	}
	got, err := contents(s.f)
	if err != nil {
		return err
	}
	if err := h.admits(got, s.own.geo.ChunkSize); err != nil {
		return err
	}
	// It is a file like any other: it can be written and opened again.
	want := append(got, "more"...)
	if _, err := s.f.WriteAt([]byte("more"), int64(len(got))); err != nil {
		return err
	}
	if err := s.close(); err != nil {
		return err
	}
	if err := s.open(); err != nil {
		return err
	}
	if got, err = contents(s.f); err != nil || !bytes.Equal(got, want) {
		return fmt.Errorf("after another write: %d bytes, %w", len(got), err)
	}
	return nil
}
