package lease

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// FileName is the lease's name in the directory of Config.
const FileName = "lease"

const (
	// DefaultInterval is how often a lease is renewed.
	DefaultInterval = 10 * time.Second
	maxInterval     = time.Minute // of an owner; a longer one is watched no longer
	patience        = 3           // intervals without a heartbeat after which an owner is dead
	maxTries        = 100         // how often an acquirer begins again because others come and go
)

// Config says whose lease it is. The caller holds the store's lock, if the file
// system has locks.
type Config struct {
	Dir   *backing.Dir // the store's .kmsfs
	Store []byte       // the store id
	Key   *keymem.Key  // of the MAC, 32 bytes; copied. nil: the lease is not signed

	Interval time.Duration // of renewals, 0: DefaultInterval
	Identity *Identity     // nil: ThisMachine
	Log      *slog.Logger  // nil: nothing is logged
	// Lost is called once, with ErrLost, when the lease is another's. It must not
	// wait for anything that a call of Held may hold.
	Lost func(error)

	// Renewed is called after each renewal, with what it failed with. It must not
	// wait for anything that a call of Held may hold. nil: nobody is told.
	Renewed func(error)

	shared *bool // tests: whether other machines may be at the file system
}

// acquirer is an attempt to get a lease, or to know that there is no owner.
type acquirer struct {
	Config
	machine, boot [32]byte
	remote        bool // other machines may be at the file system
}

func newAcquirer(c Config) (*acquirer, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Interval <= 0 {
		c.Interval = DefaultInterval
	}
	if c.Identity == nil {
		id := ThisMachine()
		c.Identity = &id
	}
	a := &acquirer{Config: c}
	a.machine, a.boot = c.Identity.hashes(c.Store)
	if c.shared != nil {
		a.remote = *c.shared
		return a, nil
	}
	st, err := c.Dir.Statfs()
	a.remote = !localTypes[int64(st.Type)]
	return a, err
}

// Acquire takes the lease, and renews it until Release. It returns at once,
// unless there is one of another machine: that it watches for up to three and a
// half intervals, or until ctx ends. Errors: ErrHeld; those of the file system.
func Acquire(ctx context.Context, c Config) (*Lease, error) {
	a, err := newAcquirer(c)
	if err != nil {
		return nil, err
	}
	if err := a.clear(ctx, true); err != nil {
		return nil, err
	}
	for range maxTries {
		l, err := a.link()
		if !errors.Is(err, unix.EEXIST) {
			return l, err
		}
		if err := a.clear(ctx, true); err != nil {
			return nil, err
		}
	}
	return nil, ErrHeld
}

// Check returns ErrHeld if somebody alive has the lease, after watching it as
// Acquire does. It changes nothing.
func Check(ctx context.Context, c Config) error {
	a, err := newAcquirer(c)
	if err != nil {
		return err
	}
	return a.clear(ctx, false)
}

// read returns the lease's bytes, nil if there is none. What is no regular file
// of a lease's size is some bytes that are no lease.
func (a *acquirer) read(name string) ([]byte, error) {
	b, err := a.Dir.ReadFile(name, recordLen)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, nil
	case errors.Is(err, backing.ErrTooBig), errors.Is(err, unix.ELOOP), errors.Is(err, unix.EISDIR), errors.Is(err, unix.ESPIPE):
		return []byte{}, nil
	case err != nil:
		return nil, fmt.Errorf("lease: %w", err)
	}
	return append([]byte{}, b...), nil
}

// clear returns when there is no lease, or only a dead owner's, which it removes
// if it is to.
func (a *acquirer) clear(ctx context.Context, remove bool) error {
	for range maxTries {
		b, err := a.read(FileName)
		if err != nil || b == nil {
			return err
		}
		r, whole := parse(b, a.Key)
		watched := !a.dead(&r, whole)
		if watched {
			absent, err := a.watch(ctx, b, &r, whole)
			if err != nil {
				return err
			}
			if absent {
				continue
			}
		}
		if !remove {
			return nil
		}
		moved, err := a.moveAway(b)
		if err != nil {
			return err
		}
		if moved {
			a.tell(&r, whole, watched)
			return nil
		}
	}
	return ErrHeld
}

// tell logs whose lease was taken over. That of a crash on this machine is no news.
func (a *acquirer) tell(r *record, whole, watched bool) {
	switch {
	case !whole:
		a.Log.Warn("the store's lease was neither whole nor authentic and was taken over", "audit", true)
	case watched:
		a.Log.Warn("the lease of an owner that shows no sign of life was taken over", "audit", true, "host", r.host, "pid", r.process.pid)
	default:
		a.Log.Info("the lease of an owner that ended without notice was taken over", "pid", r.process.pid)
	}
}

// dead reports what is certain without watching.
func (a *acquirer) dead(r *record, whole bool) bool {
	switch {
	case !whole:
		return !a.remote // the caller has the lock
	case r.boot == a.boot:
		return !a.remote || r.process.gone()
	default:
		return r.machine == a.machine && !a.remote
	}
}

// watch waits to see a lease change: absent if it is released meanwhile, ErrHeld
// if it lives, nil if it does not.
func (a *acquirer) watch(ctx context.Context, was []byte, r *record, whole bool) (absent bool, err error) {
	interval := a.Interval
	if whole {
		interval = max(interval, min(r.interval, maxInterval))
	}
	wait := patience*interval + interval/2
	poll := max(min(interval/8, time.Second), time.Millisecond)
	a.Log.Warn("the store has a lease of another machine; waiting to see whether its owner is alive",
		"host", r.host, "pid", r.process.pid, "wait", wait.String())
	timer := time.NewTicker(poll)
	defer timer.Stop()
	for begun, last := time.Now(), time.Now(); time.Since(begun) < wait; {
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-timer.C:
		}
		now, err := a.read(FileName)
		if err != nil {
			return false, err
		}
		if now == nil {
			return true, nil
		}
		if !bytes.Equal(now, was) {
			return false, a.held(now)
		}
		// A file system that did not answer did not take heartbeats either.
		if time.Since(last) > interval/2 {
			begun = time.Now()
		}
		last = time.Now()
	}
	return false, nil
}

// held describes the owner of a lease.
func (a *acquirer) held(b []byte) error {
	r, ok := parse(b, a.Key)
	if !ok {
		return fmt.Errorf("%w: its lease is not one of this store's, but changes", ErrHeld)
	}
	return fmt.Errorf("%w: host %q, process %d, since %s", ErrHeld, r.host, r.process.pid, time.Unix(r.begun, 0).UTC().Format(time.RFC3339))
}

// moveAway removes the lease if it still has the bytes that were judged. Another
// may have put its own there meanwhile: that one is put back.
func (a *acquirer) moveAway(judged []byte) (bool, error) {
	aside := backing.TempName()
	err := a.Dir.Rename(FileName, a.Dir, aside, 0)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("lease: %w", err)
	}
	b, err := a.read(aside)
	if err != nil {
		return false, errors.Join(err, a.Dir.Rename(aside, a.Dir, FileName, 0))
	}
	if bytes.Equal(b, judged) {
		return true, a.unlink(aside)
	}
	// Its owner may have put it back itself, or another taken it: theirs stays.
	if err := a.Dir.Link(aside, a.Dir, FileName); err != nil && !errors.Is(err, unix.EEXIST) {
		return false, errors.Join(err, a.Dir.Rename(aside, a.Dir, FileName, 0))
	}
	return false, a.unlink(aside)
}

// unlink removes what may be no file, if somebody made something else of it.
func (a *acquirer) unlink(name string) error {
	err := a.Dir.Unlink(name)
	switch {
	case errors.Is(err, unix.EISDIR):
		return nil // a directory with whatever is in it stays aside; fsck reports it
	case errors.Is(err, unix.ENOENT):
		return nil // a file server that did the request twice says so the second time
	}
	return err
}

// link makes a lease of our own; EEXIST if there is one.
func (a *acquirer) link() (*Lease, error) {
	l := &Lease{a: a, epoch: time.Now(), rec: record{
		interval: a.Interval, machine: a.machine, boot: a.boot, process: thisProcess(),
		begun: time.Now().Unix(), host: a.Identity.Host,
	}, stop: make(chan struct{})}
	_, _ = rand.Read(l.rec.token[:])
	if a.Key != nil {
		a.Key = a.Key.Clone()
	}
	err := l.create(l.claim)
	if !a.remote && (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)) {
		// The lock is held and nobody else is here; people want to make room.
		l.warn(notRenewed, err)
		err = nil
	}
	if err != nil {
		if a.Key != nil {
			a.Key.Wipe()
		}
		return nil, err
	}
	l.renewed.Store(uptime())
	l.loop.Go(l.renewLoop)
	return l, nil
}
