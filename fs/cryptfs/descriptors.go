package cryptfs

import (
	"container/list"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// descriptorLimit is how many descriptors the process may have, as far as they
// are worth dividing up.
func descriptorLimit() int {
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) != nil {
		return 1024
	}
	return int(min(lim.Cur, 1<<20))
}

// descriptors bounds the descriptors of open files: a process may have fewer of
// them than its clients have files open. The one that was used longest ago is
// closed for another.
type descriptors struct {
	openers chan struct{} // one for each who opens a file and waits for its key
	ghosts  int64         // most that there may be
	waiting atomic.Int64

	mu    sync.Mutex // before diskFile.mu
	room  *sync.Cond
	max   int
	open  int        // of those in files, or about to be
	files *list.List // of *diskFile with a descriptor, in a clock's order
}

func (d *descriptors) init(limit int) {
	d.openers = make(chan struct{}, max(limit/8, 4))
	d.ghosts = int64(min(maxGhosts, limit/16))
	d.max = max(limit*3/8, 8)
	d.room = sync.NewCond(&d.mu)
	d.files = list.New()
}

// opening bounds those who have a descriptor that is no file's yet. It is called
// with nothing locked; the caller calls the result when it is done.
func (d *descriptors) opening() (done func()) {
	d.openers <- struct{}{}
	return func() { <-d.openers }
}

// reserve makes room for one descriptor more, which counts from now on. With
// wait it waits for one that is in use: whoever has one in use waits neither here
// nor for somebody who does. Where there is nothing to wait for, as with nothing
// but removed files, there may be more than max.
func (d *descriptors) reserve(wait bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.waiting.Add(1) // before looking, so that whoever is in the way tells
	defer d.waiting.Add(-1)
	for d.open >= d.max {
		took, busy := d.take()
		if !took && busy && wait {
			d.room.Wait()
		} else if !took {
			break
		}
	}
	d.open++
}

// take closes the descriptor of a file that has not used it for long; busy says
// that some cannot be closed just now.
func (d *descriptors) take() (took, busy bool) {
	for range 2 * d.files.Len() { // each gets a second chance
		e := d.files.Front()
		took, inUse := e.Value.(*diskFile).give()
		if took {
			d.files.Remove(e)
			d.open--
			return true, false
		}
		busy = busy || inUse
		d.files.MoveToBack(e)
	}
	return false, busy
}

// unreserve is for whoever reserved and did not open.
func (d *descriptors) unreserve() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open--
	d.room.Broadcast()
}

// tell wakes those who wait for a descriptor that is in use.
func (d *descriptors) tell() {
	if d.waiting.Load() > 0 {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.room.Broadcast()
	}
}
