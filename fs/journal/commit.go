package journal

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Commit makes records up to an LSN durable. One fdatasync serves all callers
// that wait at its beginning; there is none if the records are durable.
// After a failed one the log is aborted.
func (l *Log) Commit(upTo LSN) error {
	if err := l.Err(); err != nil {
		return err
	}
	if l.Durable() >= upTo {
		return nil
	}
	l.sync.Lock()
	defer l.sync.Unlock()
	if err := l.Err(); err != nil {
		return err
	}
	if l.Durable() >= upTo {
		return nil // by the one that this one waited for
	}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return ErrClosed
	}
	f, lsn := l.files[l.cur%2], l.lsn
	l.mu.Unlock()
	if l.Durable() >= lsn {
		return nil // there is no record upTo
	}
	return l.datasync(f, lsn)
}

// datasync makes the records up to lsn, which is the last in f, durable; those
// of epochs before are. l.sync is held.
func (l *Log) datasync(f file, lsn LSN) error {
	if err := l.Err(); err != nil {
		return err
	}
	l.syncs.Add(1)
	if err := f.Datasync(); err != nil {
		return l.abort(err)
	}
	l.durable.Store(uint64(lsn))
	return nil
}

// Durable returns the greatest LSN that is durable, with all before it.
func (l *Log) Durable() LSN { return LSN(l.durable.Load()) }

// Syncs returns how many fdatasyncs of segments there were.
func (l *Log) Syncs() uint64 { return l.syncs.Load() }

// Err returns why the log is stopped, or nil: an ErrAborted, or the error of
// Options.Held.
func (l *Log) Err() error {
	if err := l.failed.Load(); err != nil {
		return *err
	}
	if l.o.Held == nil {
		return nil
	}
	if err := l.o.Held(); err != nil {
		return l.stop(err)
	}
	return nil
}

// abort stops the log and returns why it is stopped, which may be an earlier
// reason. The cause is told as text only: callers get EIO, whatever it was.
func (l *Log) abort(cause error) error {
	err := fmt.Errorf("%w: %w: %v", ErrAborted, unix.EIO, cause)
	return l.stop(err)
}

// stop lets nothing more be written. It returns the first reason.
func (l *Log) stop(err error) error {
	if l.failed.CompareAndSwap(nil, &err) {
		l.pressure.release(true)
	}
	return *l.failed.Load()
}
