package cryptfs

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/journal"
)

// Condition is what a volume has seen of its store since it was opened. It gets
// worse only: nothing mends itself, and whoever mends the store opens it anew.
type Condition struct {
	State  string `json:"state"` // one of the State constants, the worst that holds
	Damage Damage `json:"damage"`
	Halt   *Halt  `json:"halt,omitempty"` // why nothing more is written
}

// The states of a Condition.
const (
	StateSound   = "sound"
	StateDamaged = "damaged" // something failed authentication: reading that fails, the rest goes on
	StateHalted  = "halted"  // nothing more is written; what is there can be read
)

// Damage counts failures of authentication.
type Damage struct {
	Count  uint64          `json:"count"`
	First  *time.Time      `json:"first,omitempty"`
	Last   *time.Time      `json:"last,omitempty"`
	Recent []DamagedObject `json:"recent,omitempty"` // the last that failed, the newest last
}

// DamagedObject is a file, directory or symlink of the store. Its name may be
// plaintext and is not told: find(1) STORE -inum finds it.
type DamagedObject struct {
	Ino   uint64    `json:"ino"`             // in the store
	File  string    `json:"file,omitempty"`  // its id, if it has one and that is known
	Class string    `json:"class,omitempty"` // of the directory that it is in
	Kind  string    `json:"kind"`            // of fault
	Error string    `json:"error"`
	Count uint64    `json:"count"` // of such failures in a row
	Last  time.Time `json:"last"`
}

// Halt says why a volume takes no changes any more.
type Halt struct {
	Time   time.Time `json:"time"`
	Reason string    `json:"reason"` // one of the Halt constants
	Error  string    `json:"error"`
}

// The reasons of a Halt.
const (
	HaltJournal = "journal" // the journal cannot be written
	HaltLease   = "lease"   // another machine may have taken the store over
	HaltDisk    = "disk"    // the store's disk fails, is read-only, or was taken away
)

const maxDamaged = 16 // objects in Damage.Recent

// note counts integrity failures on their way out, and remembers them for
// Status and Health. n is the object that failed.
func (v *Volume) note(n *Node, err error) error {
	if !isDamage(err) {
		return err
	}
	v.counters.integrity.Add(1)
	class := ""
	about := (*FileError)(nil)
	if errors.As(err, &about) {
		class = about.Class
	}
	v.failed(class, err)
	o := DamagedObject{Ino: n.key.ino, Class: class, Kind: fault.Of(err).String(), Error: err.Error(), Count: 1, Last: time.Now()}
	if about != nil && !about.File.IsZero() {
		o.File = about.File.String()
	}
	s := &v.health
	s.mu.Lock()
	defer s.mu.Unlock()
	s.damage.add(o)
	return err
}

func (d *Damage) add(o DamagedObject) {
	d.Count++
	if d.First == nil {
		d.First = &o.Last
	}
	d.Last = &o.Last
	for i, had := range d.Recent { // a reader asks several times
		if had.Ino == o.Ino && had.Error == o.Error {
			o.Count += had.Count
			d.Recent = slices.Delete(d.Recent, i, i+1)
			break
		}
	}
	if len(d.Recent) == maxDamaged {
		d.Recent = slices.Delete(d.Recent, 0, 1)
	}
	d.Recent = append(d.Recent, o)
}

func isDamage(err error) bool {
	k := fault.Of(err)
	return k == fault.Integrity || k == fault.BadFormat
}

// halted remembers why nothing more is written, the first reason only.
func (v *Volume) halted(reason string, err error) {
	s := &v.health
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.halt == nil {
		s.halt = &Halt{Time: time.Now(), Reason: reason, Error: err.Error()}
	}
}

// checkJournal halts a volume whose journal cannot be written. The journal of a
// lost lease is stopped as well, which is not its own failure.
func (v *Volume) checkJournal() {
	if v.journal == nil || v.held() != nil {
		return
	}
	if err := v.journal.Err(); errors.Is(err, journal.ErrAborted) {
		v.halted(HaltJournal, err)
	}
}

// lostDisk halts a volume whose disk takes nothing any more. What fails then
// fails with errno.
func (v *Volume) lostDisk(errno unix.Errno, why string) {
	err := fmt.Errorf("%w: %s: %w", ErrHalted, why, errno)
	if v.gone.CompareAndSwap(nil, &err) {
		v.log.Error("nothing more is written", "audit", true, "error", err)
		v.halted(HaltDisk, err)
	}
}

// watchDisk notices a file system that was made read-only, by somebody or, after
// an error, by the kernel.
func (v *Volume) watchDisk() {
	if st, err := v.root.Statfs(); err == nil && st.Flags&unix.ST_RDONLY != 0 {
		v.lostDisk(unix.EROFS, "the store's file system is read-only")
	}
}

// deadAfter is how many renewals of the lease in a row have to fail for the disk
// to count as lost.
const deadAfter = 2

// unrenewed is told of each renewal of the lease: of all that is written it comes
// regularly. Only what does not pass counts: not a full disk, nor a busy one.
func (v *Volume) unrenewed(err error) {
	errno, dead := unix.Errno(0), false
	if errors.As(err, &errno) {
		dead = slices.Contains([]unix.Errno{unix.EIO, unix.EROFS, unix.ENXIO, unix.ENODEV, unix.ESHUTDOWN, unix.EUCLEAN}, errno)
	}
	if !dead {
		v.unrenew.Store(0)
	} else if v.unrenew.Add(1) >= deadAfter {
		v.lostDisk(errno, "the store's disk takes nothing")
	}
}

func (v *Volume) condition() Condition {
	v.checkJournal()
	s := &v.health
	s.mu.Lock()
	defer s.mu.Unlock()
	c := Condition{State: StateSound, Damage: s.damage, Halt: s.halt}
	c.Damage.Recent = slices.Clone(s.damage.Recent)
	switch {
	case s.halt != nil:
		c.State = StateHalted
	case s.damage.Count > 0:
		c.State = StateDamaged
	}
	return c
}
