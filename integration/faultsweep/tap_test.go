package faultsweep

import (
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// A how says which calls of an armed tap fail.
type how int

const (
	once    how = iota // the n-th
	onward             // the n-th and all after it: the disk is dead
	changes            // of those that change the disk the n-th and all after it: it takes no more
	kind               // all of one kind, n says which
	short              // the n-th write, after half of it
	filled             // none: before the n-th that changes the disk this becomes full, for real
)

var howNames = []string{"once", "onward", "changes", "kind", "short", "filled"}

func (h how) String() string { return howNames[h] }

// fault is a disk's failure.
type failure struct {
	how   how
	n     int // from 1
	errno unix.Errno
}

// dead says that it does not end.
func (f failure) dead() bool { return f.how == onward || f.how == changes || f.how == kind }

func (f failure) String() string {
	if f.how == kind {
		return fmt.Sprintf("%s %s %s", f.how, kinds[f.n-1], unix.ErrnoName(f.errno))
	}
	return fmt.Sprintf("%s %d %s", f.how, f.n, unix.ErrnoName(f.errno))
}

// kinds are the calls that fail together.
var kinds = []string{
	"write", "fsync", "fdatasync", "syncfs", "truncate", "fallocate", "open", "rename", "link", "unlink", "mkdir", "rmdir",
	"symlink", "mknod", "setxattr", "removexattr", "chmod", "chown", "utimens", "read", "stat", "readdir", "getxattr", "readlink", "listxattr",
}

// failing is a tap that can be armed with a fault.
type failing struct {
	mu    sync.Mutex
	armed bool
	fault failure
	calls int // of those that the fault counts, since it was armed
	hit   []string
	lost  map[uint64]string // store files whose sync failed, and that were not written again
	fill  func(full bool)   // of filled: takes all space of the disk, or gives it back
}

func newFailing() *failing { return &failing{lost: map[uint64]string{}} }

func (t *failing) arm(f failure) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.armed, t.fault, t.calls, t.hit = true, f, 0, nil
}

func (t *failing) disarm() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.armed = false
	if t.fill != nil {
		t.fill(false)
	}
}

// failed returns the calls that were failed.
func (t *failing) failed() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.hit
}

// count returns how many calls the fault has counted.
func (t *failing) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.calls
}

// over says that no call fails any more.
func (t *failing) over() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.armed || (t.fault.how == once || t.fault.how == short) && len(t.hit) > 0
}

// forgotten returns a store file that still has a name and of which a sync
// failed, so that the kernel may have dropped what was to be written.
func (t *failing) forgotten() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, what := range t.lost {
		return what
	}
	return ""
}

var changing = map[string]bool{
	"write": true, "truncate": true, "fallocate": true, "mkdir": true, "mknod": true, "symlink": true, "unlink": true, "rmdir": true,
	"rename": true, "link": true, "chmod": true, "chown": true, "utimens": true, "setxattr": true, "removexattr": true,
	"fsync": true, "fdatasync": true, "syncfs": true,
}

func changesDisk(op *backing.Op) bool {
	return changing[op.Call] || op.Call == "open" && op.Flags&(unix.O_CREAT|unix.O_TRUNC) != 0
}

// fails counts a call and says whether it fails.
func (t *failing) fails(op *backing.Op) bool {
	if !t.armed {
		return false
	}
	counts := true
	switch t.fault.how {
	case changes, filled:
		counts = changesDisk(op)
	case kind:
		counts = op.Call == kinds[t.fault.n-1]
	case short:
		counts = op.Call == "write" && len(op.Data) > 1
	}
	if !counts {
		return false
	}
	t.calls++
	switch t.fault.how {
	case once, short:
		return t.calls == t.fault.n
	case kind:
		return true
	case filled:
		if t.calls == t.fault.n {
			t.hit = append(t.hit, "full at "+op.Call)
			t.fill(true)
		}
		return false
	}
	return t.calls >= t.fault.n
}

// Do implements backing.Tap.
func (t *failing) Do(op *backing.Op, do func() error) error {
	t.mu.Lock()
	fail := t.fails(op)
	if fail {
		what := op.Call
		if op.Name != "" {
			what += " " + op.Name[:min(len(op.Name), 16)]
		}
		if len(t.hit) < 8 {
			t.hit = append(t.hit, what)
		}
	}
	errno, how := t.fault.errno, t.fault.how
	t.note(op, fail)
	t.mu.Unlock()
	if !fail {
		return do()
	}
	if how == short {
		_, _ = unix.Pwrite(op.Fd, op.Data[:len(op.Data)/2], op.Off)
	}
	return errno
}

// isJournal reports whether a file is of the journal, which stops for ever after
// a failed sync.
func isJournal(fd int) bool {
	to, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	return err == nil && strings.Contains(to, "/.kmsfs/journal/")
}

// note keeps the books on syncs that failed. A directory's are the file system's
// own business: it stops, or has the names still to be written.
func (t *failing) note(op *backing.Op, fail bool) {
	var st unix.Stat_t
	switch op.Call {
	case "fsync", "fdatasync":
		if fail && !isJournal(op.Fd) && unix.Fstat(op.Fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size > 0 {
			t.lost[st.Ino] = fmt.Sprintf("%s of inode %d", op.Call, st.Ino)
		}
	case "write":
		if !fail && op.Off == 0 && unix.Fstat(op.Fd, &st) == nil && int64(len(op.Data)) >= st.Size {
			delete(t.lost, st.Ino)
		}
	case "unlink", "rename":
		if fail {
			return
		}
		dir, name := op.Fd, op.Name
		if op.Call == "rename" { // what is there goes
			dir, name = op.ToFd, op.NewName
		}
		if unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Nlink == 1 {
			delete(t.lost, st.Ino)
		}
	}
}
