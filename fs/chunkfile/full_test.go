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

// fullRun performs operations on a disk that is full for a while, and follows
// what the file must hold.
type fullRun struct {
	*stored
	want   []byte  // what it holds
	past   history // what it held since the last fsync
	failed int     // operations that failed
}

// do performs one operation. A failure leaves size and contents as they were,
// but for chunks in the operation's own range.
func (s *fullRun) do(o op) error {
	after := o.model(s.want)
	keep := o
	keep.mode |= unix.FALLOC_FL_KEEP_SIZE
	taken := resize(bytes.Clone(after), int64(min(len(after), len(s.want)))) // back, after a failure
	s.past = append(s.past, keep.model(s.want), after, taken)
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
		return errPower
	}
	if err == nil {
		s.want = after
		if o.kind == "fsync" {
			s.past = history{after}
		}
		return s.check()
	}
	if s.fail == 0 || !errors.Is(err, unix.ENOSPC) {
		return err
	}
	s.failed++
	if s.f.Size() != int64(len(s.want)) {
		return fmt.Errorf("size = %d after a failure (%w), want %d", s.f.Size(), err, len(s.want))
	}
	got, err := contents(s.f)
	if err != nil {
		return err
	}
	allowed := history{s.want}
	if o.kind == "write" || o.kind == "allocate" {
		allowed = append(allowed, resize(after, int64(len(s.want))))
	}
	if err := allowed.admits(got, s.own.geo.ChunkSize); err != nil {
		return fmt.Errorf("after a failure: %w", err)
	}
	s.want = got
	s.past = append(s.past, got)
	return nil
}

func (s *fullRun) check() error {
	got, err := contents(s.f)
	if err == nil && !bytes.Equal(got, s.want) {
		err = fmt.Errorf("%d bytes, want %d; they differ from byte %d on", len(got), len(s.want), firstDiff(got, s.want))
	}
	return err
}

// TestFull lets every change on the disk fail for want of space: that one, or
// all from it on for some operations. Nothing that was there goes, and once
// there is space all is as if nothing had been.
func TestFull(t *testing.T) {
	seed := startSeed(t)
	for _, base := range bases {
		t.Run(fmt.Sprintf("base=%d", base), func(t *testing.T) {
			t.Parallel()
			failed := 0
			for run := range rounds(4) {
				r := newRand(seed, run, base)
				ops := randomOps(r, 14, 4096, []int64{300, 30_000}[run%2])
				whole := newStored(t, 4096, base)
				if _, err := whole.run(ops); err != nil {
					t.Fatal(err)
				}
				for _, step := range steps(r, whole.steps) {
					for mode := range 6 {
						s := &fullRun{stored: newStored(t, 4096, base), past: history{nil}}
						s.fail, s.lasts, s.spares = step, mode >= 2, mode%2 == 1
						s.own.tight = mode >= 4
						if err := s.through(ops); err != nil {
							t.Fatalf("base %d: full from step %d on, mode %d: %v", base, step, mode, err)
						}
						failed += s.failed
					}
				}
			}
			if failed == 0 {
				t.Error("nothing ever failed")
			}
		})
	}
}

// through performs all operations; there is space again two operations after
// the first one that failed.
func (s *fullRun) through(ops []op) error {
	for i, o := range ops {
		if err := s.do(o); err != nil {
			return fmt.Errorf("operation %d, %v: %w", i, o, err)
		}
		if s.failed > 0 && s.fail > 0 && (!s.lasts || i%3 == 0) {
			s.fail = 0
			if err := s.check(); err != nil {
				return fmt.Errorf("operation %d, %v, with space again: %w", i, o, err)
			}
		}
	}
	s.fail = 0
	if err := s.close(); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	if err := s.open(); err != nil {
		return fmt.Errorf("open again: %w", err)
	}
	return s.check()
}

// TestCrashWhenFull kills the process some steps after the disk was full first.
func TestCrashWhenFull(t *testing.T) {
	seed := startSeed(t)
	for _, base := range bases {
		t.Run(fmt.Sprintf("base=%d", base), func(t *testing.T) {
			t.Parallel()
			for run := range rounds(12) {
				r := newRand(seed, run, base)
				ops := randomOps(r, 14, 4096, []int64{300, 30_000}[run%2])
				whole := newStored(t, 4096, base)
				if _, err := whole.run(ops); err != nil {
					t.Fatal(err)
				}
				for _, step := range steps(r, whole.steps) {
					if err := crashWhenFull(t, r, ops, base, step); err != nil {
						t.Fatalf("base %d: full from step %d on: %v", base, step, err)
					}
				}
			}
		})
	}
}

func crashWhenFull(t *testing.T, r *rand.Rand, ops []op, base dare.CipherOff, step int) error {
	s := &fullRun{stored: newStored(t, 4096, base), past: history{nil}}
	s.fail, s.lasts, s.spares, s.own.tight = step, r.IntN(2) == 0, r.IntN(2) == 0, r.IntN(2) == 0
	s.kill, s.prefix = step+1+r.IntN(12), prefixes(r)[r.IntN(5)]
	err := s.through(ops)
	switch {
	case !s.dead && err != nil:
		return err
	case !s.dead: // it was over before the kill
		return nil
	}
	s.fail = 0
	if rerr := s.survive(r, s.past); rerr != nil {
		return fmt.Errorf("killed (%w): %w", err, rerr)
	}
	return nil
}
