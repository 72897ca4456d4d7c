package cryptfs

import (
	"fmt"
	"maps"
	"sync"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
	"github.com/kmsfs/kmsfs/fs/journal"
)

// inodeState is what the volume remembers of a store file that nobody has open.
// What it knows nothing of is on the disk as it is.
type inodeState struct {
	chunkfile.State        // of its bytes; Durable may be unknown
	epoch           uint32 // in which it was let go of; void after that
	meta            bool   // its attributes may not be on the disk
	apart           bool   // its header elsewhere may not be
}

// nothing reports whether there is nothing to remember.
func (s *inodeState) nothing() bool {
	return !s.Unsynced && s.Logged == 0 && s.CutIn == 0 && !s.meta && !s.apart
}

// unsettled is what a checkpoint settles beside the journal's own records.
type unsettled struct {
	mu     sync.Mutex
	inodes map[inoKey]inodeState
	lost   map[inoKey]error       // why an fsync of a file failed: it never succeeds again
	heads  map[inoKey]uint32      // epoch in which a header was last logged
	fresh  map[*Node]struct{}     // directories whose record may not be on the disk
	doomed map[envelope.ID]doomed // sidecars to be removed once their files' cut is durable

	broken  map[envelope.ID][]journal.Entry // files that recovery could not finish yet, with their records
	epochs  []uint32                        // that it was about
	mending sync.Mutex                      // held by mend, before all other locks

	// dooming is held while sidecars are removed or spared. It comes before
	// Volume.ns and mu.
	dooming sync.Mutex
}

// doomed is a sidecar that its file does not need any more.
type doomed struct{ n, home *Node }

func newUnsettled() *unsettled {
	return &unsettled{
		inodes: map[inoKey]inodeState{}, lost: map[inoKey]error{}, heads: map[inoKey]uint32{}, fresh: map[*Node]struct{}{},
		doomed: map[envelope.ID]doomed{}, broken: map[envelope.ID][]journal.Entry{},
	}
}

// touched remembers that an inode's attributes were changed.
func (v *Volume) touched(k inoKey) {
	epoch, _ := v.journal.Epoch() // 0 if none can begin: until the next checkpoint
	v.loose.mu.Lock()
	defer v.loose.mu.Unlock()
	s, ok := v.loose.inodes[k]
	if !ok {
		s.Durable = unknown
	}
	s.epoch, s.meta = epoch, true
	v.loose.inodes[k] = s
}

// unknown says that all of a store file is durable, as far as its bytes go.
const unknown = -1

// leave remembers the state of a file that nobody has open any more.
func (v *Volume) leave(f *openFile) {
	state := f.cf.State()
	epoch, _ := v.journal.Epoch() // 0 if there is none and none can begin: until the next checkpoint
	if !state.Unsynced {          // the disk or the journal has it
		state.Durable, state.Promised = unknown, 0
	}
	if state.Logged <= v.journal.Durable() {
		state.Logged = 0
	}
	if state.CutIn < v.journal.Oldest() {
		state.CutIn = 0
	}
	v.loose.mu.Lock()
	defer v.loose.mu.Unlock()
	s := v.loose.inodes[f.n.key]
	s.State, s.epoch, s.apart = state, epoch, f.isApart()
	v.keep(f.n.key, s)
}

// keep remembers an inode's state, if there is anything to it. loose.mu is held.
func (v *Volume) keep(k inoKey, s inodeState) {
	if s.nothing() {
		delete(v.loose.inodes, k)
	} else {
		v.loose.inodes[k] = s
	}
}

// lose remembers that an fsync of a file failed: whoever opens it next must not
// be told that what was to be synced is.
func (v *Volume) lose(f *openFile) {
	if err := f.cf.Lost(); err != nil {
		v.loose.mu.Lock()
		defer v.loose.mu.Unlock()
		v.loose.lost[f.n.key] = err
	}
}

func (v *Volume) lostSync(k inoKey) error {
	v.loose.mu.Lock()
	defer v.loose.mu.Unlock()
	return v.loose.lost[k]
}

// resume returns the state of a store file of this size that is opened again.
// Of an empty one nothing is known to be durable.
func (v *Volume) resume(k inoKey, size int64) chunkfile.State {
	if v.journal == nil || size == 0 {
		return chunkfile.State{Unsynced: true}
	}
	v.loose.mu.Lock()
	s, ok := v.loose.inodes[k]
	v.loose.mu.Unlock()
	if !ok || s.Durable == unknown {
		s.Durable, s.Promised = size, size
	} else if epoch, err := v.journal.Epoch(); err != nil || s.epoch != epoch {
		s.Durable = size // a checkpoint may be making it durable just now
	}
	return s.State
}

// takeApart reports whether the header elsewhere of a file that is opened again
// has to be made durable with it, which its owner does from now on.
func (v *Volume) takeApart(k inoKey) bool {
	v.loose.mu.Lock()
	defer v.loose.mu.Unlock()
	s, ok := v.loose.inodes[k]
	if !ok || !s.apart {
		return false
	}
	s.apart = false
	v.loose.inodes[k] = s
	return true
}

// takeMeta reports whether an inode's attributes have to be made durable, which
// the caller does.
func (v *Volume) takeMeta(k inoKey) bool {
	v.loose.mu.Lock()
	defer v.loose.mu.Unlock()
	s := v.loose.inodes[k]
	if !s.meta {
		return false
	}
	s.meta = false
	v.keep(k, s)
	return true
}

// Settle has the journal on the disk and does in place what it has, as happens
// every few seconds anyway. The error is that of the journal.
func (v *Volume) Settle() error {
	v.settleAll()
	return v.journal.Err()
}

// Checkpoint makes everything that was done so far durable in its place, and
// empties the journal of it.
func (v *Volume) Checkpoint() error {
	fresh := map[*Node]struct{}{}
	gone := map[envelope.ID]doomed{}
	err := v.journal.Checkpoint(func() error {
		v.loose.mu.Lock()
		maps.Copy(fresh, v.loose.fresh)
		maps.Copy(gone, v.loose.doomed)
		broken := maps.Clone(v.loose.broken)
		v.loose.mu.Unlock()
		for _, entries := range broken {
			for _, e := range entries {
				if _, err := v.journal.Append(e); err != nil {
					return err
				}
			}
		}
		for _, f := range v.openFiles() {
			if err := f.cf.Settle(); err != nil {
				return fmt.Errorf("file %d: %w", f.n.key.ino, err)
			}
		}
		return v.journal.Err()
	}, v.root.SyncFS)
	if err != nil {
		return err
	}
	v.settled(fresh)
	for id, d := range gone {
		v.removeDoomed(id, d)
	}
	return nil
}

// maxLoose bounds the store files that are remembered for a checkpoint to settle:
// about 10 MiB. Files that are made and stay empty fill no journal, so that it
// asks for none.
const maxLoose = 100_000

// muchLoose reports whether a checkpoint is due for the sake of memory.
func (v *Volume) muchLoose() bool {
	v.loose.mu.Lock()
	defer v.loose.mu.Unlock()
	return len(v.loose.inodes) > maxLoose
}

// settled forgets what a checkpoint has made durable.
func (v *Volume) settled(fresh map[*Node]struct{}) {
	oldest := v.journal.Oldest()
	v.loose.mu.Lock()
	for k, s := range v.loose.inodes {
		if s.epoch < oldest {
			delete(v.loose.inodes, k)
		}
	}
	for k, epoch := range v.loose.heads {
		if epoch < oldest {
			delete(v.loose.heads, k)
		}
	}
	v.loose.mu.Unlock()
	for n := range fresh {
		v.firm(n)
	}
}

// firm notes that a directory's record is on the disk.
func (v *Volume) firm(n *Node) {
	n.mu.Lock()
	n.dir.fresh, n.dir.unsure = false, false
	n.mu.Unlock()
	v.loose.mu.Lock()
	_, held := v.loose.fresh[n]
	delete(v.loose.fresh, n)
	v.loose.mu.Unlock()
	if held {
		v.Forget(n, 1)
	}
}

// settleAll has the journal on the disk, does in place what is pending, and lets
// go of files that waited only for that.
func (v *Volume) settleAll() {
	if err := v.journal.Commit(v.journal.Last()); err != nil {
		v.log.Error("journal", "error", err, "audit", true)
		return
	}
	for _, f := range v.openFiles() {
		if f.cf.Pending() == 0 {
			continue
		}
		if err := f.cf.Apply(); err != nil {
			v.log.Error("what is in the journal could not be done in place yet", "ino", f.n.key.ino, "error", err)
		}
	}
	v.finishIdle()
}

// finishIdle closes files that have no handle and nothing pending.
func (v *Volume) finishIdle() {
	for _, f := range v.openFiles() {
		if !f.idle.Load() || f.cf.Pending() > 0 {
			continue
		}
		f.n.opening.Lock()
		if f.n.openFile() == f && f.n.handles == 0 {
			if err := f.finish(); err != nil {
				v.log.Error("close failed", "ino", f.n.key.ino, "error", err)
			}
		}
		f.n.opening.Unlock()
	}
}

// doom has a sidecar removed once it is durable that its file is empty: before,
// the file could turn out to be what it was, without its header.
func (v *Volume) doom(n, home *Node, id envelope.ID) {
	if v.place.Sidecar(id[:]) == "" {
		return
	}
	v.loose.dooming.Lock()
	defer v.loose.dooming.Unlock()
	v.reprieve(id)
	v.nodes.hold(n)
	v.nodes.hold(home)
	v.loose.mu.Lock()
	defer v.loose.mu.Unlock()
	v.loose.doomed[id] = doomed{n, home}
}

// spare keeps a sidecar that is needed again.
func (v *Volume) spare(id envelope.ID) {
	v.loose.dooming.Lock()
	defer v.loose.dooming.Unlock()
	v.reprieve(id)
}

// reprieve takes a sidecar off the list. dooming is held.
func (v *Volume) reprieve(id envelope.ID) {
	v.loose.mu.Lock()
	d, ok := v.loose.doomed[id]
	delete(v.loose.doomed, id)
	v.loose.mu.Unlock()
	if ok {
		v.Forget(d.n, 1)
		if d.home != nil {
			v.Forget(d.home, 1)
		}
	}
}

// headed remembers that the header of a file was logged.
func (v *Volume) headed(k inoKey, epoch uint32) {
	v.loose.mu.Lock()
	defer v.loose.mu.Unlock()
	v.loose.heads[k] = epoch
}

// headLogged reports whether the journal would bring a header back.
func (v *Volume) headLogged(k inoKey) bool {
	v.loose.mu.Lock()
	defer v.loose.mu.Unlock()
	_, ok := v.loose.heads[k]
	return ok
}

// removeDoomed removes a sidecar unless its file needs it again.
func (v *Volume) removeDoomed(id envelope.ID, d doomed) {
	v.loose.dooming.Lock()
	defer v.loose.dooming.Unlock()
	v.loose.mu.Lock()
	_, still := v.loose.doomed[id]
	v.loose.mu.Unlock()
	if still {
		v.removeSidecars(d.n, d.home, id)
		v.reprieve(id)
	}
}
