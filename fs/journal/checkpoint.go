package journal

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"
)

// Want tells whether a checkpoint is due: the segment is over its size, or the
// epoch's first use long ago, or the last checkpoint failed.
func (l *Log) Want() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cur == 0 || l.recovering || l.closed || l.Err() != nil {
		return false
	}
	now := l.o.Now()
	return l.oldest != l.cur || l.end >= l.o.Segment ||
		!l.firstUse.IsZero() && (now.Sub(l.firstUse) >= l.o.Age || setBack(now, l.begun))
}

// maxBack is how far the clock may be behind an epoch's beginning: recovery
// looks for files that were changed since then, by their times, with some slack.
const maxBack = 2 * time.Minute

// setBack reports whether the clock was set back since an epoch began. The
// readings' monotonic parts do not show that.
func setBack(now, begun time.Time) bool { return now.Round(0).Before(begun.Round(0).Add(-maxBack)) }

// Checkpoint ends the current epoch. It makes its records durable, begins the
// next, waits for each Direct that began before, and calls settle, which must
// put in place what is pending of older epochs, or append it anew, and then
// sync, which must make everything in the store durable, syncfs(2). Then the
// old epoch is done. If the current one was not used and Age is not over, there
// is nothing to do.
//
// An error of settle leaves both epochs live, and the next Checkpoint begins by
// finishing the old one (settle is then called for it, and if the current was
// used once more for that). An error of sync aborts the log: what the kernel
// could not write it drops. settle must not call Checkpoint, Recovered, Close
// or Throttle. One Checkpoint runs at a time; others wait.
func (l *Log) Checkpoint(settle, sync func() error) (err error) {
	l.checkpoint.Lock()
	defer l.checkpoint.Unlock()
	defer func() { l.pressure.release(err != nil) }()
	l.mu.Lock()
	unfinished, err := l.unfinished()
	l.mu.Unlock()
	if err != nil {
		return err
	}
	if unfinished {
		if err := l.finish(settle, sync); err != nil {
			return err
		}
	}
	l.mu.Lock()
	idle := l.cur == 0 || l.firstUse.IsZero() && l.o.Now().Sub(l.begun) < l.o.Age
	l.mu.Unlock()
	if idle {
		return nil
	}
	if err := l.advance(); err != nil {
		return err
	}
	return l.finish(settle, sync)
}

// unfinished tells whether the last checkpoint failed between its epochs.
// l.mu is held.
func (l *Log) unfinished() (bool, error) {
	if l.closed {
		return false, ErrClosed
	}
	if l.recovering {
		return false, ErrRecovering
	}
	return l.cur != l.oldest, l.Err()
}

// advance begins the next epoch while the current one stays live. l.checkpoint
// is held, so nobody else begins one.
func (l *Log) advance() error {
	l.mu.Lock()
	cur, lsn, since := l.cur, l.lsn, l.since
	l.mu.Unlock()
	if now := l.o.Now(); now.Round(0).Before(since.Round(0)) {
		since = now // or what is changed from now on would look older than both epochs
	}
	if cur == math.MaxUint32 {
		return ErrEpochs
	}
	// The segment that the header goes to is of the epoch before: that it is
	// done must be on the disk first.
	if err := l.Commit(lsn); err != nil {
		return err
	}
	now := l.o.Now()
	mac, err := l.writeHeader(newHeader(cur+1, cur, now, since))
	if err != nil {
		return err
	}
	// Most of what came meanwhile, while others can append.
	l.mu.Lock()
	lsn = l.lsn
	l.mu.Unlock()
	if err := l.Commit(lsn); err != nil {
		return err
	}
	// No record of the new epoch may outlive one of the old.
	l.sync.Lock()
	defer l.sync.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lsn > l.Durable() {
		if err := l.datasync(l.files[cur%2], l.lsn); err != nil {
			return err
		}
	}
	l.turnTo(cur+1, mac, now)
	return nil
}

// finish brings the epoch before the current one to an end. l.checkpoint is held.
func (l *Log) finish(settle, sync func() error) error {
	l.drain()
	if err := settle(); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	if err := l.Err(); err != nil {
		return err
	}
	if err := sync(); err != nil {
		return l.abort(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.ready(); err != nil {
		return err
	}
	if err := l.put(appendDone(nil, l.cur-1)); err != nil {
		return err
	}
	l.oldest, l.since = l.cur, l.begun
	return nil
}

// drain waits for each Direct that may have begun under the epoch before.
func (l *Log) drain() {
	l.gate.Lock()
	defer l.gate.Unlock()
}

// lockAll takes every lock, in their order, and returns what lets go of them:
// nobody else is in the log meanwhile.
func (l *Log) lockAll() (unlock func()) {
	locks := []sync.Locker{&l.checkpoint, &l.gate, &l.sync, &l.mu}
	for _, k := range locks {
		k.Lock()
	}
	return func() {
		for _, k := range slices.Backward(locks) {
			k.Unlock()
		}
	}
}

// Recovered says that what Found told is done: in place and durable, with
// whatever recovery appended and wrote. Its epochs are done, on the disk, and
// the next use begins a new one. Without anything found it does nothing.
func (l *Log) Recovered() error {
	defer l.lockAll()()
	if err := l.ended(); err != nil || !l.recovering {
		return err
	}
	if err := l.markDone(); err != nil {
		return err
	}
	l.recovering = false
	return nil
}

// Resume says that recovery is over as far as it can be now. What Found told
// stays live until the next Checkpoint, whose settle appends anew what is still
// to be done.
func (l *Log) Resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.recovering = false
	l.use()
}

func (l *Log) ended() error {
	if l.closed {
		return ErrClosed
	}
	return l.Err()
}

// markDone makes it durable that all is done, up to the current epoch, after
// which none is. On a full disk, where there may be no room for a record, it
// begins an epoch instead, whose header says the same and goes over an old one.
// l.sync and l.mu are held.
func (l *Log) markDone() error {
	if err := l.put(appendDone(nil, l.cur)); err != nil {
		return l.begin()
	}
	if err := l.datasync(l.files[l.cur%2], l.lsn); err != nil {
		return err
	}
	l.cur, l.oldest = 0, 0
	return nil
}

// smallSegment is what a segment may keep at a clean end, in bytes.
const smallSegment = 16 << 10

// Close releases the files. clean says that everything is in place and durable
// (Checkpoint did that, or the caller): then all epochs are done, and the files
// are cut to a few KiB. Otherwise, or if the log is aborted or recovery was not
// over, the live epochs are left for the next Open to find. No other call may
// run or follow, except that those that follow fail with ErrClosed.
func (l *Log) Close(clean bool) error {
	defer l.lockAll()()
	if l.closed {
		return nil
	}
	l.closed = true
	var err error
	if clean && !l.recovering && l.cur != 0 {
		if err = l.Err(); err == nil {
			err = l.closeClean()
		}
	}
	l.release()
	l.pressure.release(true)
	return err
}

// closeClean says on the disk that all is done, in little room.
func (l *Log) closeClean() error {
	epoch := l.cur
	err := error(nil)
	if l.end > smallSegment {
		// A record would be at the end of a long chain. The header of one more
		// epoch says the same.
		if err = l.begin(); err == nil {
			epoch = l.cur
		}
	}
	if err == nil {
		err = l.markDone()
	}
	if err != nil || l.cur != 0 {
		return err
	}
	// What is cut off is done; if it stays, it only takes room.
	if f := l.files[epoch%2]; l.end < smallSegment {
		_ = f.Truncate(l.end)
	}
	_ = l.files[1-epoch%2].Truncate(headerLen)
	return nil
}

// release closes what is open.
func (l *Log) release() {
	closeAll(&l.files)
	if l.dir != nil {
		_ = l.dir.Close()
		l.dir = nil
	}
	l.key.Wipe()
}

// pressure is where writers wait that are far ahead of the checkpoints.
type pressure struct {
	mu     sync.Mutex
	turn   chan struct{} // closed when something changed
	failed int           // checkpoints
}

func (p *pressure) init() { p.turn = make(chan struct{}) }

func (p *pressure) release(failed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if failed {
		p.failed++
	}
	close(p.turn)
	p.turn = make(chan struct{})
}

func (p *pressure) state() (turn <-chan struct{}, failed int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.turn, p.failed
}

// Throttle waits while the segment is over twice its size, until a checkpoint
// succeeded, failed, or ctx is over. Whoever calls it holds no lock that a
// checkpoint needs.
func (l *Log) Throttle(ctx context.Context) {
	_, before := l.pressure.state()
	for {
		turn, failed := l.pressure.state()
		if failed != before || !l.swollen() {
			return
		}
		select {
		case <-turn:
		case <-ctx.Done():
			return
		}
	}
}

func (l *Log) swollen() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cur != 0 && !l.recovering && !l.closed && l.Err() == nil && l.end >= 2*l.o.Segment
}
