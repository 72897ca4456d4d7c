package cryptfs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/journal"
	"github.com/kmsfs/kmsfs/fs/lease"
	"github.com/kmsfs/kmsfs/fs/placement"
	"github.com/kmsfs/kmsfs/fs/record"
)

// flushAfter is how long written bytes may stay in memory only.
const flushAfter = 5 * time.Second

// Volume is an open store. Its methods are safe for concurrent use.
type Volume struct {
	conf   Config
	path   string
	log    *slog.Logger
	root   *backing.Dir
	meta   *backing.Dir
	lock   *backing.File // nil if read-only
	lease  *lease.Lease  // nil if read-only
	layout *record.Layout
	keys   *envelope.Manager
	place  placement.Place
	isRoot bool // the process is root, and gives new files to their callers

	// ns orders changes of the tree's shape: renames and classifications take
	// it, whatever uses the place of a node shares it.
	ns      sync.RWMutex
	rec     *record.Store
	policy  *classify.Policy
	classes map[string]*class
	moves   uint64 // of directories, by renames

	nodes     nodeTable
	identKey  *keymem.Key
	dirs      dirCache
	sharing   sharing
	rewraps   rewraps
	journal   *journal.Log // nil if read-only
	lost      error        // why the record was read from its second copy; nil: it was not
	lastEpoch uint32       // the journal's newest when the volume was opened
	found     *found       // what the journal of a read-only volume has
	loose     *unsettled
	births    atomic.Uint32
	jobs      *jobKeys // nil if read-only

	files struct {
		sync.Mutex
		open map[*openFile]struct{}
		idle atomic.Int64 // of them, those without a handle
	}
	descr    descriptors
	ghosts   atomic.Int64
	space    spaceWatch
	counters counters
	health   healthState
	follower follower
	stop     chan struct{}
	stopped  sync.WaitGroup
	closed   atomic.Bool
	gone     atomic.Pointer[error] // why the disk takes nothing any more
	unrenew  atomic.Int32          // renewals of the lease that failed, in a row
}

// Open opens a store: it checks the record against c.Keys before any key
// service is called and against its MAC after, locks the store, and finishes
// what a crash left open. A process that serves others sets its umask to 0 first:
// new files get the mode that their Caller asks for, less the process's umask.
func Open(ctx context.Context, c Config) (*Volume, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	path, err := filepath.Abs(c.Store)
	if err != nil {
		return nil, err
	}
	v := &Volume{conf: c, path: path, log: c.Log, isRoot: os.Geteuid() == 0, stop: make(chan struct{}), loose: newUnsettled()}
	v.files.open = map[*openFile]struct{}{}
	v.descr.init(descriptorLimit())
	v.births.Store(rand.Uint32())
	if c.ReadOnly && c.Recover {
		recoverFirst(ctx, c)
	}
	if err := v.setUp(ctx); err != nil {
		v.release()
		return nil, err
	}
	return v, nil
}

func (v *Volume) setUp(ctx context.Context) error {
	var err error
	if v.root, err = backing.OpenRootTapped(v.conf.Store, v.conf.Tap); err != nil {
		return err
	}
	if err := v.readRecords(); err != nil {
		return err
	}
	if !sameKeys(v.conf.Keys, v.rec.Body.Keys) {
		return ErrKeysChanged
	}
	if err := v.openMeta(); err != nil {
		return err
	}
	if err := v.lockStore(); err != nil {
		return err
	}
	v.adoptRecord(v.rec, v.layout)
	v.keys = envelope.NewManager(v.conf.Provider, v.layout.ID, envelope.Options{
		Log: v.log, SameKey: v.conf.SameKey, PoolSize: v.conf.Pool,
		Observe: v.conf.Observe, Call: v.noteCall, Background: v.conf.Background,
	})
	if !v.conf.ReadOnly {
		v.openRewraps()
	}
	storeKey, err := v.openEither(func() (*envelope.FileKey, error) { return v.openClasses(ctx) })
	if err != nil {
		return err
	}
	defer storeKey.Wipe()
	if err := v.takeLease(ctx, storeKey); err != nil {
		return err
	}
	if !v.conf.ReadOnly { // finish a batch that a crash left
		if err := v.rewraps.batch.Recover(v.log); err != nil {
			return err
		}
		if !v.conf.mend {
			v.keepCopy()
		}
	}
	if err := v.openIdentities(storeKey); err != nil {
		return err
	}
	if err := v.openRootNode(); err != nil {
		return err
	}
	v.warm(ctx)
	if v.conf.ReadOnly {
		return v.readJournal(ctx, storeKey)
	}
	return v.openJournal(ctx, storeKey)
}

// adoptRecord makes the volume that of a record.
func (v *Volume) adoptRecord(rec *record.Store, l *record.Layout) {
	v.rec, v.layout, v.policy = rec, l, l.Policy
	v.place = placement.New(l.Placement, l.HeaderSize)
}

// lockPatience is how long an owner of the store may take to let go: one that
// ends just now, or a child it was starting, which has its descriptors until it
// runs its own program.
const lockPatience = time.Second

// lockStore makes sure that no other process changes the store. A read-only
// volume works beside one, and on a disk that takes no lock.
func (v *Volume) lockStore() error {
	if v.conf.ReadOnly && !v.conf.Alone {
		return nil
	}
	lock, err := v.meta.Lock(lockFile)
	for end := time.Now().Add(lockPatience); errors.Is(err, backing.ErrLocked) && time.Now().Before(end); {
		time.Sleep(lockPatience / 20)
		lock, err = v.meta.Lock(lockFile)
	}
	switch {
	case errors.Is(err, backing.ErrLocked):
		return ErrLocked
	case v.conf.ReadOnly && (errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES)):
		return nil
	}
	v.lock = lock
	return err
}

func (v *Volume) openClasses(ctx context.Context) (*envelope.FileKey, error) {
	v.classes = map[string]*class{}
	for _, name := range v.policy.Names() {
		v.classes[name] = newClass(name, v.policy.Classes[name], v.rec.Active(name), v.rec.Body.Keys[name], v.layout.Placement, v.layout.HeaderSize)
	}
	storeKey, err := openRecord(ctx, v.keys, v.rec, v.layout, v.classes)
	if err != nil {
		return nil, err
	}
	for name, c := range v.classes {
		headers, err := nameHeaders(v.meta, v.rec, v.layout, name)
		if err != nil {
			storeKey.Wipe()
			return nil, err
		}
		c.header, c.spare = headers[0], headers[len(headers)-1]
	}
	return storeKey, nil
}

func (v *Volume) openJournal(ctx context.Context, storeKey *envelope.FileKey) error {
	key, err := subKey(storeKey, journalKeyInfo)
	if err != nil {
		return err
	}
	o := v.conf.Journal
	o.Held = v.held
	log, found, err := journal.Open(v.meta, key, o)
	key.Wipe()
	if err != nil {
		return err
	}
	v.journal, v.lastEpoch = log, log.LastEpoch()
	if err := v.recover(ctx, found); err != nil {
		return err
	}
	if err := v.recoverJobs(ctx, storeKey); err != nil {
		return err
	}
	v.stopped.Go(v.flushLoop)
	v.stopped.Go(v.checkpointLoop)
	return nil
}

// warm unwraps every class's name key now, side by side, so that listing needs
// no key service later. A class that cannot be used is a warning: the others
// work, and it is tried again when it is needed.
func (v *Volume) warm(ctx context.Context) {
	var wg sync.WaitGroup
	for _, c := range v.classes {
		wg.Go(func() {
			if _, err := v.names(ctx, c); err != nil {
				v.log.Warn("class is not usable now", "class", c.name, "error", err)
			}
		})
	}
	wg.Wait()
}

// flushLoop writes out, in the background, what applications leave in memory,
// and has it on the disk not much later.
func (v *Volume) flushLoop() {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for n := 0; ; n++ {
		select {
		case <-v.stop:
			return
		case <-t.C:
			v.watchDisk()
			v.flushOlder(flushAfter)
			if n%int(flushAfter/time.Second) == 0 && v.anyPending() {
				v.settleAll()
			}
		}
	}
}

func (v *Volume) anyPending() bool {
	return slices.ContainsFunc(v.openFiles(), func(f *openFile) bool { return f.cf.Pending() > 0 || f.idle.Load() })
}

// checkpointLoop empties the journal when it is full or old.
func (v *Volume) checkpointLoop() {
	t := time.NewTicker(200 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-v.stop:
			return
		case <-t.C:
			v.checkJournal()
			if !v.journal.Want() && !v.muchLoose() {
				continue
			}
			if err := v.Checkpoint(); err != nil {
				v.log.Error("journal: checkpoint", "error", err, "audit", true)
			}
		}
	}
}

func (v *Volume) flushOlder(age time.Duration) {
	limit := time.Now().Add(-age)
	for _, f := range v.openFiles() {
		if since, dirty := f.cf.Dirty(); dirty && time.Unix(since.Unix()).Before(limit) {
			f.cf.FlushLater()
		}
	}
}

func (v *Volume) openFiles() []*openFile {
	v.files.Lock()
	defer v.files.Unlock()
	out := make([]*openFile, 0, len(v.files.open))
	for f := range v.files.open {
		out = append(out, f)
	}
	return out
}

// Close writes out what is in memory, wipes every key and unlocks the store. It
// returns the first failure to write. Handles must not be used after it.
func (v *Volume) Close() error {
	if v.closed.Swap(true) {
		return nil
	}
	close(v.stop)
	v.stopped.Wait()
	if v.journal != nil {
		for _, f := range v.openFiles() {
			f.cf.FlushLater()
		}
		v.settleAll() // with one sync for all
	}
	var first error
	for _, f := range v.openFiles() {
		f.n.opening.Lock()
		if f.n.openFile() == f {
			if err := f.finish(); err != nil && first == nil {
				first = err
			}
		}
		f.n.opening.Unlock()
	}
	if err := v.closeJournal(first == nil); first == nil {
		first = err
	}
	v.release()
	return first
}

// closeJournal makes everything durable, after which the journal is not needed
// any more; whole says that everything is in its place.
func (v *Volume) closeJournal(whole bool) error {
	log := v.journal
	if log == nil {
		return nil
	}
	if log.Oldest() == 0 { // nothing was changed
		return log.Close(false)
	}
	err := v.root.SyncFS()
	clean := whole && err == nil && log.Err() == nil && len(v.loose.broken) == 0
	if cerr := log.Close(clean); err == nil {
		err = cerr
	}
	if clean {
		for id, d := range maps.Clone(v.loose.doomed) {
			v.removeDoomed(id, d)
		}
	}
	return err
}

// release closes whatever is open; the volume may be half made.
func (v *Volume) release() {
	if v.journal != nil {
		_ = v.journal.Close(false)
	}
	v.jobs.wipe()
	if v.identKey != nil {
		v.identKey.Wipe()
	}
	v.dirs.closeAll()
	if v.keys != nil {
		v.keys.Close()
	}
	for _, c := range v.classes {
		c.wipe()
	}
	if v.rewraps.usage != nil && v.held() == nil {
		_ = v.rewraps.usage.Flush() // information for people
	}
	v.leaveLease()
	if v.meta != nil {
		_ = v.meta.Close()
	}
	if v.lock != nil {
		_ = v.lock.Close()
	}
	if v.root != nil {
		_ = v.root.Close()
	}
}

// Info tells what the verified store record says.
func (v *Volume) Info() *Info {
	v.ns.RLock()
	defer v.ns.RUnlock()
	return newInfo(v.rec, &record.Layout{
		ID: v.layout.ID, Placement: v.layout.Placement, HeaderSize: v.layout.HeaderSize,
		Suite: v.layout.Suite, Policy: v.policy.Clone(),
	}, true)
}

// Path returns the store's absolute path.
func (v *Volume) Path() string { return v.path }

// ReadOnly reports whether the volume was opened so.
func (v *Volume) ReadOnly() bool { return v.conf.ReadOnly }

// Statfs tells about the file system that the store is on.
func (v *Volume) Statfs() (unix.Statfs_t, error) { return v.root.Statfs() }

type counters struct {
	read, written, integrity, repairs, foreign atomic.Uint64
}

// spaceWatch says when the store is so full that a write that only reached
// memory might not reach the disk. It looks now and then.
type spaceWatch struct {
	mu    sync.Mutex
	until time.Time
	tight bool
}

const (
	tightBytes = 64 << 20 // free space below which a store is tight
	lookTime   = 100 * time.Millisecond
)

// Tight reports that the store is so full that programs should hear of it from
// write(2) itself.
func (v *Volume) Tight() bool {
	s := &v.space
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Now().Before(s.until) {
		return s.tight
	}
	st, err := v.root.Statfs()
	s.until = time.Now().Add(lookTime)
	s.tight = err == nil && int64(st.Bavail)*st.Bsize < tightBytes
	return s.tight
}

func wrapf(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf(format+": %w", append(args, err)...)
}
