package powercut

import (
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

type kind int

const (
	write    kind = iota // of data at off
	zero                 // a hole, [off, off+size)
	resize               // truncate to size
	xattr                // attr = data, or gone
	owner                // mode, uid, gid
	linkTo               // ino gets name in dir
	unlink               // name in dir goes
	rename               // name in dir -> newName in newDir
	fsync                // of ino
	datasync             // of ino
	syncfs               //
)

var kindNames = []string{"write", "punch", "truncate", "xattr", "owner", "link", "unlink", "rename", "fsync", "fdatasync", "syncfs"}

func (k kind) String() string { return kindNames[k] }

// event is a change of the disk, or a sync, as it was done.
type event struct {
	kind          kind
	ino           uint64
	dir, newDir   uint64
	name, newName string
	off, size     int64
	data          []byte
	attr          string
	gone          bool // xattr: removed
	mode          uint32
	uid, gid      int
	exchange      bool
	made          *inode // linkTo: the inode was made by it, so
}

func (e *event) dirs() []uint64 {
	switch e.kind {
	case linkTo, unlink:
		return []uint64{e.dir}
	case rename:
		if e.dir != e.newDir {
			return []uint64{e.dir, e.newDir}
		}
		return []uint64{e.dir}
	}
	return nil
}

// recorder is a tap that keeps what is done to a store. It does one operation
// after the other, so that its order is the order in which they happened.
type recorder struct {
	mu     sync.Mutex
	events []event
	known  map[uint64]bool
	isDir  map[uint64]bool
	root   uint64
	// skip makes bugs: operations that it names are lost on the way to the disk,
	// without an error.
	skip func(*event) bool
	// late makes bugs: operations that it names come only after the next one that
	// until names, a rename if it is nil.
	late  func(*event) bool
	until func(*event) bool
	held  []event
}

func newRecorder(d *disk) *recorder {
	r := &recorder{known: map[uint64]bool{}, isDir: map[uint64]bool{}, root: d.root}
	for ino, n := range d.inodes {
		r.known[ino], r.isDir[ino] = true, n.entries != nil
	}
	return r
}

// at is how many events there are.
func (r *recorder) at() int {
	if r == nil {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.events)
}

func (r *recorder) Do(op *backing.Op, doNow func() error) error {
	do := doNow
	switch op.Call {
	case "stat", "statfs", "read", "readdir", "readlink", "getxattr", "listxattr", "utimens":
		return do()
	case "open":
		if op.Flags&(unix.O_CREAT|unix.O_TRUNC) == 0 {
			return do()
		}
	}
	if r == nil {
		return roomy{}.Do(op, do)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	do = func() error { return roomy{}.Do(op, doNow) }
	before := inoAt(op.Fd, op.Name)
	if err := do(); err != nil {
		return err
	}
	for _, e := range r.of(op, before) {
		if r.skip != nil && r.skip(&e) {
			continue
		}
		if r.late != nil && r.late(&e) {
			r.held = append(r.held, e)
			if e.made == nil {
				continue
			}
			e = event{kind: owner, ino: e.ino, made: e.made} // without its name yet
		}
		r.events = append(r.events, e)
		if r.until == nil && e.kind == rename || r.until != nil && r.until(&e) {
			r.events, r.held = append(r.events, r.held...), nil
		}
	}
	return nil
}

func (r *recorder) of(op *backing.Op, before uint64) []event {
	r.know(op)
	self := inoAt(op.Fd, "")
	e := event{ino: before, dir: self, name: op.Name, off: op.Off, size: op.Size, attr: op.Attr}
	switch op.Call {
	case "write":
		e.kind, e.data = write, slices.Clone(op.Data)
	case "truncate":
		e.kind = resize
	case "fallocate":
		if op.Flags&unix.FALLOC_FL_PUNCH_HOLE == 0 {
			return nil // takes space only
		}
		e.kind = zero
	case "fsync":
		e.kind = fsync
	case "fdatasync":
		e.kind = datasync
	case "syncfs":
		e.kind = syncfs
	case "setxattr":
		e.kind, e.data = xattr, slices.Clone(op.Data)
	case "removexattr":
		e.kind, e.gone = xattr, true
	case "chmod", "chown":
		return []event{ownerOf(before, op)}
	case "unlink", "rmdir":
		e.kind = unlink
	case "rename":
		e.kind, e.newDir, e.newName = rename, inoAt(op.ToFd, ""), op.NewName
		e.exchange = op.Flags&unix.RENAME_EXCHANGE != 0
	case "link":
		e.kind, e.dir, e.name = linkTo, inoAt(op.ToFd, ""), op.NewName
	case "open", "mkdir", "mknod", "symlink":
		return r.created(op, before, self)
	default:
		panic("no such call: " + op.Call)
	}
	return []event{e}
}

func ownerOf(ino uint64, op *backing.Op) event {
	st := statAt(op.Fd, op.Name)
	return event{kind: owner, ino: ino, mode: st.Mode, uid: int(st.Uid), gid: int(st.Gid)}
}

func (r *recorder) created(op *backing.Op, before, dir uint64) []event {
	if op.Call == "open" && op.Flags&unix.O_TMPFILE == unix.O_TMPFILE {
		return nil // known when something is done with it
	}
	if before != 0 {
		if op.Flags&unix.O_TRUNC == 0 {
			return nil
		}
		return []event{{kind: resize, ino: before}}
	}
	ino := inoAt(op.Fd, op.Name)
	r.known[ino], r.isDir[ino] = true, op.Call == "mkdir"
	return []event{{kind: linkTo, ino: ino, dir: dir, name: op.Name, made: freshInode(op.Fd, op.Name, string(op.Data))}}
}

// know takes up a file that was opened without a name.
func (r *recorder) know(op *backing.Op) {
	if ino := inoAt(op.Fd, ""); !r.known[ino] {
		r.known[ino] = true
		r.events = append(r.events, event{kind: owner, ino: ino, made: freshInode(op.Fd, "", "")})
	}
}

func freshInode(fd int, name, target string) *inode {
	st := statAt(fd, name)
	n := &inode{mode: st.Mode, uid: int(st.Uid), gid: int(st.Gid), target: target, xattrs: map[string]string{}}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		n.entries = map[string]uint64{}
	}
	return n
}

func statAt(fd int, name string) (st unix.Stat_t) {
	if name == "" {
		_ = unix.Fstat(fd, &st) // of an open descriptor
		return st
	}
	if unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return unix.Stat_t{}
	}
	return st
}

func inoAt(fd int, name string) uint64 { return statAt(fd, name).Ino }
