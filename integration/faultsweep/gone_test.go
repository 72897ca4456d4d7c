package faultsweep

import (
	"errors"
	"maps"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// TestDiskTakesNothing: a disk that takes no more writes is noticed even if nobody
// writes, what is there can be read, and the next volume is whole.
func TestDiskTakesNothing(t *testing.T) {
	eachPlacement(t, func(t *testing.T, r *rig) {
		store := r.clone(t, r.base)
		defer func() { _ = os.RemoveAll(store) }()
		tap := newFailing()
		c := r.config(store, tap)
		c.LeaseInterval = 20 * time.Millisecond
		v, err := cryptfs.Open(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		s := &session{r: r, v: v, tap: tap, held: map[string]*cryptfs.Handle{}}
		s.all(t, []step{write("foo", 3000, 3000, 70), fsync("foo")})
		want, err := read(v)
		if err != nil {
			t.Fatal(err)
		}
		tap.arm(failure{changes, 1, unix.EIO})
		for end := time.Now().Add(time.Minute); v.Status().Condition.State != cryptfs.StateHalted; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("it is not noticed")
			}
		}
		if h := v.Status().Condition.Halt; h == nil || h.Reason != cryptfs.HaltDisk {
			t.Errorf("halt: got %+v, want %s", h, cryptfs.HaltDisk)
		}
		for _, x := range []step{write("foo", 0, 10, 71), fsync("foo"), mkdir("D"), unlink("bar"), rename("foo", "B/foo", 0), setxattr("foo", 5, 72), checkpoint()} {
			if err := x.do(s); !errors.Is(err, unix.EIO) {
				t.Errorf("%s: got %v, want EIO", x.name, err)
			}
		}
		inMemory, e := maps.Clone(want), want["./foo"] // of the write that failed
		e.data = append(noise(10, 71), e.data[10:]...)
		inMemory["./foo"] = e
		if got, err := read(v); err != nil {
			t.Errorf("reading: %v", err)
		} else if err := between(got, []tree{want, inMemory}, false); err != nil {
			t.Error(err)
		}
		s.release()
		_ = v.Close() // it has told
		tap.disarm()
		if fds := descriptors(store); len(fds) > 0 {
			t.Errorf("still open: %v", fds)
		}
		if err := r.after(store, []tree{want}, false); err != nil {
			t.Error(err)
		}
	})
}
