package lease

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// Lease is the right to write a store. It is renewed in the background.
type Lease struct {
	a    *acquirer
	stop chan struct{}
	loop sync.WaitGroup

	mu     sync.Mutex // one renewal at a time
	rec    record
	file   *backing.File // the lease that this owner made, whatever has the name now; nil: there was no room
	ended  bool
	warned string // the last trouble that was logged

	epoch   time.Time    // what seen counts from
	seen    atomic.Int64 // nanoseconds since epoch at which the lease was last fresh, 0: never
	renewed atomic.Int64 // uptime when the lease was last seen to be ours
	lost    atomic.Pointer[error]
}

// Err returns ErrLost once the lease is lost, else nil.
func (l *Lease) Err() error {
	if p := l.lost.Load(); p != nil {
		return *p
	}
	return nil
}

// Held is to be asked before the store is changed: nil, or ErrLost. It costs next
// to nothing, unless the machine slept or the disk did not answer for two
// intervals: then the lease is looked at, before anything else is written.
func (l *Lease) Held() error {
	if err := l.Err(); err != nil {
		return err
	}
	if l.fresh() {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.fresh() && !l.ended {
		l.renew()
	}
	return l.Err()
}

// glance is how long an answer holds: the clock that counts sleep costs a system
// call, and a write takes many answers. What is written within it after a sleep
// is what was under way when the machine fell asleep.
const glance = 2 * time.Millisecond

func (l *Lease) fresh() bool {
	now := time.Since(l.epoch) // does not count sleep
	if seen := l.seen.Load(); seen != 0 && now-time.Duration(seen) < glance {
		return true
	}
	fresh := time.Duration(uptime()-l.renewed.Load()) < 2*l.a.Interval
	if fresh {
		l.seen.Store(int64(now))
	}
	return fresh
}

// Release removes the lease, if it is still ours. The caller still holds the
// store's lock.
func (l *Lease) Release() error {
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return nil
	}
	l.ended = true
	l.mu.Unlock()
	close(l.stop)
	l.loop.Wait()
	var err error
	if l.Err() == nil && l.named() == nil {
		_, err = l.a.moveAway(l.rec.encode(l.a.Key))
	}
	if l.a.Key != nil {
		l.a.Key.Wipe()
	}
	if l.file != nil {
		err = errors.Join(err, l.file.Close())
	}
	return err
}

func (l *Lease) renewLoop() {
	t := time.NewTicker(l.a.Interval)
	defer t.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-t.C:
		}
		l.mu.Lock()
		if !l.ended {
			l.renew()
		}
		l.mu.Unlock()
		if l.Err() != nil {
			return
		}
	}
}

// renew counts a heartbeat, and looks whether the lease is still ours. Another's
// is in another file, so that writing first does no harm.
func (l *Lease) renew() {
	l.rec.beat++
	var err error
	if l.file == nil {
		if err = l.create(l.claim); errors.Is(err, unix.EEXIST) {
			err = l.named()
		}
	} else {
		err = l.beat()
	}
	if l.a.Renewed != nil {
		l.a.Renewed(err)
	}
	switch {
	case err == nil:
		l.renewed.Store(uptime())
		l.warned = ""
	case errors.Is(err, ErrLost):
		l.lose(err)
	case l.a.remote && !l.fresh():
		l.lose(fmt.Errorf("%w: it could not be renewed: %w", ErrLost, err))
	default:
		if !l.a.remote { // a full or failing local disk: nobody else is at it
			l.renewed.Store(uptime())
		}
		l.warn(notRenewed, err)
	}
}

const notRenewed = "the store's lease cannot be written"

func (l *Lease) beat() error {
	err := l.file.WriteAt(l.rec.encode(l.a.Key), 0)
	if err == nil && l.a.remote {
		err = l.file.Datasync()
	}
	if nerr := l.named(); nerr != nil {
		return l.rename(nerr)
	}
	return err
}

func (l *Lease) warn(text string, err error) {
	if now := text + err.Error(); now != l.warned {
		l.warned = now
		l.a.Log.Warn(text, "err", err)
	}
}

func (l *Lease) lose(err error) {
	if l.lost.CompareAndSwap(nil, &err) {
		l.a.Log.Error("the store's lease is lost: nothing more is written", "audit", true, "err", err)
		if l.a.Lost != nil {
			l.a.Lost(err)
		}
	}
}

// What may have the lease's name, if not our lease.
var (
	errAbsent  = errors.New("lease: it is gone")
	errGarbled = errors.New("lease: it is neither whole nor authentic")
)

// named returns nil if the file of the lease's name has our token.
func (l *Lease) named() error {
	b, err := l.a.read(FileName)
	if err != nil {
		return err
	}
	if b == nil {
		return errAbsent
	}
	r, ok := parse(b, l.a.Key)
	switch {
	case !ok:
		return errGarbled
	case r.token != l.rec.token:
		return fmt.Errorf("%w: host %q, process %d", ErrLost, r.host, r.process.pid)
	}
	return nil
}

// rename gives our lease its name back where it lost that to nobody.
func (l *Lease) rename(why error) error {
	switch {
	case errors.Is(why, errAbsent):
		// Someone who wants the lease has moved it aside and will see that it is
		// alive, or died before: then it has a name. Without one it was removed, as a
		// new owner does, who may be done already.
		switch err := l.file.Link(l.a.Dir, FileName); {
		case errors.Is(err, unix.EEXIST):
			return l.named()
		case err != nil:
			return fmt.Errorf("%w: it was removed", ErrLost)
		}
		return l.named()
	case errors.Is(why, errGarbled):
		// No owner leaves such a file. To stop would serve whoever made it.
		l.warn("the store's lease was overwritten, and is written anew", why)
		return l.create(func(tmp string) error { return l.a.Dir.Rename(tmp, l.a.Dir, FileName, 0) })
	}
	return why
}

// claim gives a temporary the lease's name, if nothing has it: else EEXIST.
func (l *Lease) claim(tmp string) error {
	dir := l.a.Dir
	err := dir.Link(tmp, dir, FileName)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		err = dir.Rename(tmp, dir, FileName, unix.RENAME_NOREPLACE) // a file system without hard links
	}
	if errors.Is(err, unix.EEXIST) && l.named() == nil {
		return nil // a request to a file server may be done twice
	}
	return err
}

// create writes our lease into a new file, to which name gives its name. After a
// crash of the machine nobody needs it, so that only a file server is waited for.
func (l *Lease) create(name func(tmp string) error) error {
	tmp := backing.TempName()
	f, err := l.a.Dir.Open(tmp, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	err = f.WriteAt(l.rec.encode(l.a.Key), 0)
	if err == nil && l.a.remote {
		err = f.Sync()
	}
	if err == nil {
		err = name(tmp)
	}
	_ = l.a.Dir.Unlink(tmp) // not there any more after a rename
	if err != nil {
		return errors.Join(fmt.Errorf("lease: %w", err), f.Close())
	}
	if l.file != nil {
		_ = l.file.Close() // of no name; nothing in it counts
	}
	l.file = f
	return nil
}
