package audit

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// place is the directory of a log, and the log's name there. All files are
// reached through the directory's descriptor, and no symbolic link is followed.
type place struct {
	dir  *os.File
	base string
	path string // for messages
}

const (
	headSuffix = ".head"
	lockSuffix = ".lock"
	tempSuffix = ".head.tmp"
)

func openPlace(path string) (*place, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	base := filepath.Base(abs)
	if abs == "/" || strings.HasSuffix(path, "/") {
		return nil, fmt.Errorf("%w: %s is a directory", ErrFile, path)
	}
	dir, err := os.Open(filepath.Dir(abs))
	if err != nil {
		return nil, err
	}
	return &place{dir, base, abs}, nil
}

func (p *place) close() error { return p.dir.Close() }

// open opens a file of the log by its suffix ("" is the log itself).
func (p *place) open(suffix string, flags int) (*os.File, error) {
	var fd int
	var err error
	for {
		// O_NONBLOCK: a fifo under this name must not hang the mount.
		fd, err = unix.Openat(int(p.dir.Fd()), p.base+suffix, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o600)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	name := p.path + suffix
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%w: %s is a symbolic link", ErrFile, name)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.Join(fmt.Errorf("%w: %s is not a regular file", ErrFile, name), f.Close())
	}
	if flags&unix.O_ACCMODE != unix.O_RDONLY && st.Mode&0o022 != 0 {
		return nil, errors.Join(fmt.Errorf("%w: group or others may write %s", ErrFile, name), f.Close())
	}
	return f, nil
}

// lock takes the log for this process until the returned file is closed.
func (p *place) lock() (*os.File, error) {
	f, err := p.open(lockSuffix, unix.O_RDWR|unix.O_CREAT)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%w: %s", ErrLocked, p.path)
		}
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// archives returns the numbers N of the files FILE.N, ascending: newest first.
func (p *place) archives() ([]int, error) {
	fd, err := unix.Openat(int(p.dir.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: filepath.Dir(p.path), Err: err}
	}
	dir := os.NewFile(uintptr(fd), filepath.Dir(p.path))
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, name := range names {
		digits, ok := strings.CutPrefix(name, p.base+".")
		if n, err := strconv.Atoi(digits); ok && err == nil && n > 0 && strconv.Itoa(n) == digits {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out, nil
}

// shift makes FILE free by renaming it to FILE.1, FILE.1 to FILE.2 and so on
// up to the first number that is free. A crash in between leaves a number
// unused and the order as it was.
func (p *place) shift() error {
	taken, err := p.archives()
	if err != nil {
		return err
	}
	free := 1
	for _, n := range taken {
		if n != free {
			break
		}
		free++
	}
	dir := int(p.dir.Fd())
	for n := free; n > 0; n-- {
		from := p.base
		if n > 1 {
			from += "." + strconv.Itoa(n-1)
		}
		to := p.base + "." + strconv.Itoa(n)
		if err := unix.Renameat(dir, from, dir, to); err != nil {
			return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
		}
	}
	return p.dir.Sync()
}

// holds reports whether the log's name still leads to f; there is false if
// nothing has the name.
func (p *place) holds(f *os.File) (same, there bool, err error) {
	var here, open unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &open); err != nil {
		return false, false, err
	}
	err = unix.Fstatat(int(p.dir.Fd()), p.base, &here, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return false, false, nil
	}
	return here.Dev == open.Dev && here.Ino == open.Ino, err == nil, err
}

// head is what FILE.head holds: a recent end of the chain, synced to disk
// after the lines up to it were.
type head struct {
	Seq  uint64    `json:"seq"`
	Hash string    `json:"hash"`
	Time time.Time `json:"time"`
}

// readHead returns nil without an error if there is no head file, and errLine
// for one that is none.
func (p *place) readHead() (*link, error) {
	f, err := p.open(headSuffix, unix.O_RDONLY)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return nil, err
	}
	var h head
	if err := json.Unmarshal(b, &h); err != nil {
		return nil, fmt.Errorf("%w: %w", errLine, err)
	}
	sum, ok := parseHash(h.Hash)
	if !ok || h.Seq == 0 {
		return nil, errLine
	}
	return &link{h.Seq, sum}, nil
}

// writeHead replaces FILE.head atomically. The lines up to end must be on disk.
func (p *place) writeHead(end link, now time.Time) error {
	b, err := json.Marshal(head{end.seq, hex.EncodeToString(end.hash[:]), now.UTC()})
	if err != nil {
		return err
	}
	dir := int(p.dir.Fd())
	if err := unix.Unlinkat(dir, p.base+tempSuffix, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "remove", Path: p.path + tempSuffix, Err: err}
	}
	f, err := p.open(tempSuffix, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, unix.Unlinkat(dir, p.base+tempSuffix, 0))
	}
	if err := unix.Renameat(dir, p.base+tempSuffix, dir, p.base+headSuffix); err != nil {
		return &os.PathError{Op: "rename", Path: p.path + headSuffix, Err: err}
	}
	return p.dir.Sync()
}
