package keymem

import (
	"sync"
	"syscall"
)

const (
	slotSize   = MaxLen
	regionSize = 64 << 10 // bytes locked at a time; 1,024 slots
	// madvDontDump keeps the pages out of core dumps (madvise(2)).
	madvDontDump = 16
)

// arena hands out fixed-size slots of locked memory. Regions are never
// unmapped: a stale slice can read zeros, never fault.
type arena struct {
	mu       sync.Mutex
	free     [][]byte
	unlocked bool
	live     int
}

var keys arena

func (a *arena) get() []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.free) == 0 {
		a.grow()
	}
	s := a.free[len(a.free)-1]
	a.free = a.free[:len(a.free)-1]
	a.live++
	return s
}

func (a *arena) put(s []byte) {
	clear(s)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.free = append(a.free, s)
	a.live--
}

func (a *arena) grow() {
	region, err := syscall.Mmap(-1, 0, regionSize, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil { // address space used up: the heap is the honest fallback
		region = make([]byte, regionSize)
		a.unlocked = true
	} else {
		if syscall.Mlock(region) != nil {
			a.unlocked = true
		}
		_ = syscall.Madvise(region, madvDontDump) // best effort: core dumps are off as well
	}
	for off := 0; off+slotSize <= len(region); off += slotSize {
		a.free = append(a.free, region[off:off+slotSize:off+slotSize])
	}
}
