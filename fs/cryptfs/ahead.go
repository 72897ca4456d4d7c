package cryptfs

import (
	"container/list"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// Key read-ahead: a program that reads a directory's files one after another
// would wait for the key service once per file. Its opens are followed, and the
// keys of the files that come next are unwrapped ahead of it, into the cache.
//
// It never adds a call that the reader would not have made, but for the last
// window of a scan that ends early. A class without a cache has none: there
// every open is a call of its own.

// readOrder is an order in which programs read directories.
type readOrder uint8

const (
	unknownOrder readOrder = iota
	diskOrder              // as getdents64(2) lists them: tar, find
	inodeOrder             // GNU cp and rm on large directories, borg
	nameOrder              // the shell's *, rsync, restic
)

// aheadDirs bounds the directories whose scans are followed.
const aheadDirs = 8

// momentum is how long the order of one directory's scan is taken for the next
// directory's, from its first file on: a tree is read in one way.
const momentum = 2 * time.Second

// follower finds scans. Its lock is a leaf: nothing is locked or read with it
// held.
type follower struct {
	mu      sync.Mutex
	dirs    map[*Node]*list.Element // of *followed
	lru     list.List
	last    readOrder // of the newest scan that ran, until
	lastEnd time.Time
}

// followed is a directory whose opens are watched.
type followed struct {
	dir     *Node
	first   string // entry opened before there was a scan
	looking bool   // somebody reads the directory
	order   readOrder
	scan    *scan
	rest    time.Time // no order fitted: not looked at until then
}

// lookAhead notes that a file is opened whose key may be at the key service.
func (v *Volume) lookAhead(n *Node) {
	l, ok := n.where()
	if !ok || v.closed.Load() {
		return
	}
	cl := n.class
	if ec := cl.keys(); ec.Cache == 0 || ec.Shared {
		return
	}
	now := time.Now()
	f := &v.follower
	f.mu.Lock()
	d := f.at(l.parent)
	switch {
	case d.scan != nil:
		next := d.scan.opened(l.entry, now)
		if d.scan.window > 0 {
			f.last, f.lastEnd = d.order, now.Add(momentum)
		}
		f.mu.Unlock()
		if len(next) > 0 {
			v.stopped.Go(func() { v.unwrapAhead(l.parent, cl, next) })
		}
		return
	case d.looking || now.Before(d.rest):
	case d.first == "" && now.After(f.lastEnd):
		d.first = l.entry
	default:
		guess, first := unknownOrder, d.first
		if first == "" {
			guess = f.last
		}
		d.looking = true
		v.stopped.Go(func() { v.findScan(d, cl, guess, first, l.entry) })
	}
	f.mu.Unlock()
}

// at returns the directory's state, and drops the one used longest ago.
func (f *follower) at(dir *Node) *followed {
	if e := f.dirs[dir]; e != nil {
		f.lru.MoveToFront(e)
		return e.Value.(*followed)
	}
	if f.dirs == nil {
		f.dirs = map[*Node]*list.Element{}
	}
	d := &followed{dir: dir}
	f.dirs[dir] = f.lru.PushFront(d)
	if f.lru.Len() > aheadDirs {
		delete(f.dirs, f.lru.Remove(f.lru.Back()).(*followed).dir)
	}
	return d
}

// findScan reads a directory and looks for the order in which b comes after a,
// or takes the guess. It unwraps what comes after b.
func (v *Volume) findScan(d *followed, cl *class, guess readOrder, a, b string) {
	s, order := v.scanOf(d.dir, guess, a, b)
	now := time.Now()
	f := &v.follower
	f.mu.Lock()
	d.looking, d.first = false, b
	if s == nil {
		d.rest = now.Add(aheadRest)
		f.mu.Unlock()
		return
	}
	d.scan, d.order = s, order
	s.window = 4
	next := s.entries[s.sent:min(s.sent+s.window, len(s.entries))]
	s.sent += len(next)
	f.mu.Unlock()
	v.unwrapAhead(d.dir, cl, next)
}

func (v *Volume) scanOf(dir *Node, guess readOrder, a, b string) (*scan, readOrder) {
	files, err := v.filesIn(dir)
	if err != nil {
		return nil, unknownOrder
	}
	for _, order := range []readOrder{diskOrder, inodeOrder, nameOrder} {
		if guess != unknownOrder && order != guess {
			continue
		}
		entries := v.ordered(dir, files, order)
		if guess != unknownOrder {
			if at := slices.Index(entries, b); at >= 0 {
				return newScan(entries, at), order
			}
			continue
		}
		if at, ok := follows(entries, a, b); ok {
			return newScan(entries, at), order
		}
	}
	return nil, unknownOrder
}

// filesIn lists the entries that may be regular files with a name in the mount.
func (v *Volume) filesIn(dir *Node) ([]backing.Entry, error) {
	v.ns.RLock()
	ref, err := v.use(dir)
	v.ns.RUnlock()
	if err != nil {
		return nil, err
	}
	defer ref.release()
	entries, err := ref.ReadDir()
	return slices.DeleteFunc(entries, func(e backing.Entry) bool {
		return e.Type != unix.S_IFREG && e.Type != 0 ||
			strings.HasPrefix(e.Name, internalPrefix) && !strings.HasPrefix(e.Name, longEntry)
	}), err
}

// ordered returns the entries in an order; nil if it cannot be told.
func (v *Volume) ordered(dir *Node, files []backing.Entry, order readOrder) []string {
	if order == nameOrder {
		return v.byName(dir, files)
	}
	if order == inodeOrder {
		files = slices.Clone(files)
		slices.SortFunc(files, func(a, b backing.Entry) int {
			switch {
			case a.Ino < b.Ino:
				return -1
			case a.Ino > b.Ino:
				return 1
			}
			return 0
		})
	}
	out := make([]string, len(files))
	for i, e := range files {
		out[i] = e.Name
	}
	return out
}

func (v *Volume) byName(dir *Node, files []backing.Entry) []string {
	cipher, err := v.names(context.Background(), dir.dirClass()) // there already: the directory was looked up in
	if err != nil {
		return nil
	}
	v.ns.RLock()
	ref, err := v.use(dir)
	v.ns.RUnlock()
	if err != nil {
		return nil
	}
	defer ref.release()
	names := make(map[string]string, len(files))
	out := make([]string, 0, len(files))
	for _, e := range files {
		if name, ok, err := dir.unseal(cipher, ref.Dir, e.Name); ok && err == nil {
			names[e.Name] = name
			out = append(out, e.Name)
		}
	}
	slices.SortFunc(out, func(a, b string) int { return strings.Compare(names[a], names[b]) })
	return out
}

// unwrapAhead starts the unwrapping of the keys of a directory's files, as fast
// as the key manager takes them. What cannot be read is left to its own open.
func (v *Volume) unwrapAhead(dir *Node, cl *class, entries []string) {
	ec := cl.keys()
	for _, entry := range entries {
		h := v.peekHeader(dir, entry)
		for h != nil && !v.keys.Ahead(ec, h) {
			select {
			case <-v.stop:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}
}

// peekHeader reads the header of a file that nobody needs to have opened; nil
// if there is none.
func (v *Volume) peekHeader(dir *Node, entry string) *envelope.Header {
	v.ns.RLock()
	defer v.ns.RUnlock()
	ref, err := v.use(dir)
	if err != nil {
		return nil
	}
	defer ref.release()
	disk, err := ref.Open(entry, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) { // somebody else's file
		disk, err = ref.Open(entry, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		return nil
	}
	defer func() { _ = disk.Close() }()
	if st, err := disk.Stat(); err != nil || st.Type() != unix.S_IFREG || st.Size == 0 {
		return nil
	}
	block, err := v.place.Read(disk, []*backing.Dir{ref.Dir})
	if err != nil {
		return nil
	}
	h, err := envelope.Parse(block)
	if err != nil {
		return nil
	}
	return h
}
