package model

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// The model test does random operations on a directory and on a plain tree in
// memory, and compares errors after each and everything now and then. It runs
// on the bare file system as well: there it tests the model.

// modelOps is how many operations a run does; KMSFS_MODEL_OPS overrides it.
const modelOps = 1500

// inode is a file of the model.
type inode struct {
	mode  fs.FileMode // type and permissions
	data  []byte      // regular: contents; symlink: target
	kids  map[string]*inode
	links int
	attrs map[string]string
}

func (n *inode) isDir() bool { return n.kids != nil }

type model struct {
	t    testing.TB
	root *inode
	dir  string // the real thing
	rnd  *rand.Rand
	step int
	log  []string
}

func newModel(t testing.TB, dir string, seed uint64) *model {
	return &model{t: t, root: &inode{mode: fs.ModeDir, kids: map[string]*inode{}}, dir: dir, rnd: rand.New(rand.NewPCG(seed, 1))}
}

func (m *model) fatalf(format string, args ...any) {
	m.t.Helper()
	m.t.Fatalf("step %d: %s\nlast operations:\n%s", m.step, fmt.Sprintf(format, args...),
		strings.Join(m.log[max(0, len(m.log)-12):], "\n"))
}

// names are few, so that operations meet.
var modelNames = []string{"a", "b", "c", "with space", "новый", "line\nbreak", strings.Repeat("x", 200), strings.Repeat("y", 255), "\xff\xfe"}

func (m *model) name() string { return modelNames[m.rnd.IntN(len(modelNames))] }

// path picks a directory that is there, and a name in it that may be.
func (m *model) path() (dir *inode, at, name string) {
	dir, at = m.root, ""
	for m.rnd.IntN(3) > 0 {
		var subs []string
		for k, n := range dir.kids {
			if n.isDir() {
				subs = append(subs, k)
			}
		}
		if len(subs) == 0 {
			break
		}
		slices.Sort(subs)
		k := subs[m.rnd.IntN(len(subs))]
		dir, at = dir.kids[k], filepath.Join(at, k)
	}
	return dir, at, m.name()
}

func (m *model) real(parts ...string) string {
	return filepath.Join(append([]string{m.dir}, parts...)...)
}

// errno returns the errno in err, 0 for nil.
func errno(err error) unix.Errno {
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	if err != nil {
		return unix.EIO
	}
	return 0
}

func (m *model) check(what string, got error, want unix.Errno) bool {
	m.t.Helper()
	m.log = append(m.log, fmt.Sprintf("%d: %s -> %v", m.step, what, want))
	if errno(got) != want {
		m.fatalf("%s: got %v, want %v", what, got, want)
	}
	return want == 0
}

var modelOperations = []func(*model){
	(*model).opWrite, (*model).opWrite, (*model).opWrite, (*model).opAppend, (*model).opTruncate, (*model).opTruncate,
	(*model).opRead, (*model).opRead, (*model).opMkdir, (*model).opMkdir, (*model).opRmdir, (*model).opUnlink, (*model).opRename,
	(*model).opRename, (*model).opLink, (*model).opSymlink, (*model).opChmod, (*model).opXattr, (*model).opPunch, (*model).opCreateExcl,
}

func (m *model) run(n int, remount func()) {
	for m.step = 1; m.step <= n; m.step++ {
		modelOperations[m.rnd.IntN(len(modelOperations))](m)
		if m.step%250 == 0 {
			m.compare(m.root, "")
		}
		if remount != nil && m.step%600 == 0 {
			remount()
			m.compare(m.root, "")
		}
	}
	m.compare(m.root, "")
}

// size picks sizes around the edges of chunks.
func (m *model) size() int {
	edge := []int{0, 1, 100, 4095, 4096, 4097, 32767, 32768, 32769, 65536, 100_000}[m.rnd.IntN(11)]
	return max(0, edge+m.rnd.IntN(3)-1)
}

func (m *model) bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(m.rnd.Uint32())
	}
	return b
}

func put(data []byte, off int, p []byte) []byte {
	if need := off + len(p); len(data) < need {
		data = append(data, make([]byte, need-len(data))...)
	}
	copy(data[off:], p)
	return data
}

// regular returns the file at a name, made if it is not there; nil where the
// name is something else.
func (m *model) regular(dir *inode, name string) *inode {
	n := dir.kids[name]
	if n == nil {
		n = &inode{links: 1, mode: 0o644}
		dir.kids[name] = n
	}
	if n.isDir() || n.mode&fs.ModeSymlink != 0 {
		return nil
	}
	return n
}

func wantOpen(n *inode) unix.Errno {
	switch {
	case n == nil:
		return 0
	case n.isDir():
		return unix.EISDIR
	case n.mode&fs.ModeSymlink != 0:
		return unix.ELOOP
	}
	return 0
}

func (m *model) open(what string, dir *inode, at, name string, flags int) (*os.File, *inode) {
	want := wantOpen(dir.kids[name])
	fd, err := unix.Open(m.real(at, name), flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
	if !m.check(fmt.Sprintf("%s %q", what, filepath.Join(at, name)), err, want) {
		return nil, nil
	}
	return os.NewFile(uintptr(fd), name), m.regular(dir, name)
}

func (m *model) done(f *os.File) {
	if m.rnd.IntN(8) == 0 {
		if err := f.Sync(); err != nil {
			m.fatalf("fsync: %v", err)
		}
	}
	if err := f.Close(); err != nil {
		m.fatalf("close: %v", err)
	}
}

func (m *model) opWrite() {
	dir, at, name := m.path()
	f, n := m.open("write", dir, at, name, unix.O_RDWR|unix.O_CREAT)
	if f == nil {
		return
	}
	for range 1 + m.rnd.IntN(3) {
		off, p := m.size(), m.bytes(1+m.size())
		if _, err := f.WriteAt(p, int64(off)); err != nil {
			m.fatalf("write: %v", err)
		}
		n.data = put(n.data, off, p)
		m.stat(f, n)
	}
	m.done(f)
}

func (m *model) stat(f *os.File, n *inode) {
	fi, err := f.Stat()
	if err != nil || fi.Size() != int64(len(n.data)) {
		m.fatalf("fstat: size %d, want %d (%v)", fi.Size(), len(n.data), err)
	}
}

func (m *model) opAppend() {
	dir, at, name := m.path()
	f, n := m.open("append", dir, at, name, unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND)
	if f == nil {
		return
	}
	for range 1 + m.rnd.IntN(20) {
		p := m.bytes(1 + m.rnd.IntN(3000))
		if _, err := f.Write(p); err != nil {
			m.fatalf("append: %v", err)
		}
		n.data = append(n.data, p...)
	}
	m.done(f)
}

func (m *model) opTruncate() {
	dir, at, name := m.path()
	if m.rnd.IntN(4) == 0 {
		f, n := m.open("open with O_TRUNC", dir, at, name, unix.O_RDWR|unix.O_CREAT|unix.O_TRUNC)
		if f != nil {
			n.data = nil
			m.stat(f, n)
			m.done(f)
		}
		return
	}
	f, n := m.open("ftruncate", dir, at, name, unix.O_RDWR|unix.O_CREAT)
	if f == nil {
		return
	}
	size := m.size()
	if err := f.Truncate(int64(size)); err != nil {
		m.fatalf("ftruncate: %v", err)
	}
	if size <= len(n.data) {
		n.data = n.data[:size:size]
	} else {
		n.data = put(n.data, size, nil)
	}
	m.stat(f, n)
	m.done(f)
}

func (m *model) opPunch() {
	dir, at, name := m.path()
	f, n := m.open("punch", dir, at, name, unix.O_RDWR|unix.O_CREAT)
	if f == nil {
		return
	}
	off, size := m.size(), 1+m.size()
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(size)); err != nil {
		m.fatalf("punch: %v", err)
	}
	if off < len(n.data) {
		clear(n.data[off:min(len(n.data), off+size)])
	}
	m.done(f)
}

func (m *model) opRead() {
	dir, at, name := m.path()
	want := unix.Errno(0)
	if dir.kids[name] == nil {
		want = unix.ENOENT
	} else {
		want = wantOpen(dir.kids[name])
	}
	if want == unix.EISDIR { // a directory can be opened for reading
		return
	}
	fd, err := unix.Open(m.real(at, name), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if !m.check(fmt.Sprintf("read %q", filepath.Join(at, name)), err, want) {
		return
	}
	f, n := os.NewFile(uintptr(fd), name), dir.kids[name]
	off, p := m.size(), make([]byte, 1+m.size())
	k, _ := f.ReadAt(p, int64(off))
	var exp []byte
	if off < len(n.data) {
		exp = n.data[off:min(len(n.data), off+len(p))]
	}
	if !bytes.Equal(p[:k], exp) {
		m.fatalf("read %d bytes at %d: %d bytes that differ, want %d", len(p), off, k, len(exp))
	}
	m.done(f)
}

func (m *model) opCreateExcl() {
	dir, at, name := m.path()
	want := unix.Errno(0)
	if dir.kids[name] != nil {
		want = unix.EEXIST
	}
	fd, err := unix.Open(m.real(at, name), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if m.check(fmt.Sprintf("create %q", filepath.Join(at, name)), err, want) {
		dir.kids[name] = &inode{links: 1, mode: 0o600}
		_ = unix.Close(fd)
	}
}

func (m *model) opMkdir() {
	dir, at, name := m.path()
	want := unix.Errno(0)
	if dir.kids[name] != nil {
		want = unix.EEXIST
	}
	if m.check(fmt.Sprintf("mkdir %q", filepath.Join(at, name)), os.Mkdir(m.real(at, name), 0o755), want) {
		dir.kids[name] = &inode{mode: fs.ModeDir | 0o755, kids: map[string]*inode{}}
	}
}

func (m *model) opRmdir() {
	dir, at, name := m.path()
	n := dir.kids[name]
	want := unix.Errno(0)
	switch {
	case n == nil:
		want = unix.ENOENT
	case !n.isDir():
		want = unix.ENOTDIR
	case len(n.kids) > 0:
		want = unix.ENOTEMPTY
	}
	if m.check(fmt.Sprintf("rmdir %q", filepath.Join(at, name)), unix.Rmdir(m.real(at, name)), want) {
		delete(dir.kids, name)
	}
}

func (m *model) opUnlink() {
	dir, at, name := m.path()
	n := dir.kids[name]
	want := unix.Errno(0)
	switch {
	case n == nil:
		want = unix.ENOENT
	case n.isDir():
		want = unix.EISDIR
	}
	if m.check(fmt.Sprintf("unlink %q", filepath.Join(at, name)), unix.Unlink(m.real(at, name)), want) {
		delete(dir.kids, name)
		n.links--
	}
}

// below reports whether n is in the tree under d, or is d.
func below(d, n *inode) bool {
	if d == n {
		return true
	}
	for _, k := range d.kids {
		if below(k, n) {
			return true
		}
	}
	return false
}

func (m *model) opRename() {
	dir, at, name := m.path()
	newDir, newAt, newName := m.path()
	flags := []uint{0, 0, 0, unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE}[m.rnd.IntN(5)]
	n, old := dir.kids[name], newDir.kids[newName]
	want := unix.Errno(0)
	switch {
	case n == nil:
		want = unix.ENOENT
	case flags == unix.RENAME_NOREPLACE && old != nil:
		want = unix.EEXIST
	case flags == unix.RENAME_EXCHANGE && old == nil:
		want = unix.ENOENT
	case n.isDir() && below(n, newDir):
		want = unix.EINVAL
	case flags == unix.RENAME_EXCHANGE && old.isDir() && below(old, dir):
		want = unix.EINVAL
	case old != nil && old.isDir() && below(old, dir) && old != n:
		want = unix.ENOTEMPTY
	case n == old || flags == unix.RENAME_EXCHANGE || old == nil:
	case n.isDir() && !old.isDir():
		want = unix.ENOTDIR
	case !n.isDir() && old.isDir():
		want = unix.EISDIR
	case old.isDir() && len(old.kids) > 0:
		want = unix.ENOTEMPTY
	}
	what := fmt.Sprintf("rename flags %d %q to %q", flags, filepath.Join(at, name), filepath.Join(newAt, newName))
	err := unix.Renameat2(unix.AT_FDCWD, m.real(at, name), unix.AT_FDCWD, m.real(newAt, newName), flags)
	if !m.check(what, err, want) || n == old {
		return
	}
	if flags == unix.RENAME_EXCHANGE {
		dir.kids[name], newDir.kids[newName] = old, n
		return
	}
	delete(dir.kids, name)
	newDir.kids[newName] = n
	if old != nil && !old.isDir() {
		old.links--
	}
}

func (m *model) opLink() {
	dir, at, name := m.path()
	newDir, newAt, newName := m.path()
	n := dir.kids[name]
	want := unix.Errno(0)
	switch {
	case n == nil:
		want = unix.ENOENT
	case newDir.kids[newName] != nil:
		want = unix.EEXIST
	case n.isDir():
		want = unix.EPERM
	}
	what := fmt.Sprintf("link %q to %q", filepath.Join(at, name), filepath.Join(newAt, newName))
	err := unix.Linkat(unix.AT_FDCWD, m.real(at, name), unix.AT_FDCWD, m.real(newAt, newName), 0)
	if n != nil && n.isDir() && newDir.kids[newName] != nil && errno(err) == unix.EPERM {
		want = unix.EPERM // either is right
	}
	if m.check(what, err, want) {
		newDir.kids[newName] = n
		n.links++
	}
}

func (m *model) opSymlink() {
	dir, at, name := m.path()
	target := strings.Repeat("t/", m.rnd.IntN(400)) + "end"
	want := unix.Errno(0)
	if dir.kids[name] != nil {
		want = unix.EEXIST
	}
	if m.check(fmt.Sprintf("symlink %q", filepath.Join(at, name)), os.Symlink(target, m.real(at, name)), want) {
		dir.kids[name] = &inode{mode: fs.ModeSymlink | 0o777, data: []byte(target), links: 1}
	}
}

func (m *model) opChmod() {
	dir, at, name := m.path()
	n := dir.kids[name]
	if n == nil || n.mode&fs.ModeSymlink != 0 {
		return
	}
	mode := fs.FileMode(0o700 | m.rnd.IntN(0o100))
	if m.check(fmt.Sprintf("chmod %q", filepath.Join(at, name)), os.Chmod(m.real(at, name), mode), 0) {
		n.mode = n.mode&^fs.ModePerm | mode
	}
}

func (m *model) opXattr() {
	dir, at, name := m.path()
	n := dir.kids[name]
	if n == nil || n.mode&fs.ModeSymlink != 0 {
		return
	}
	key, value := "user."+[]string{"one", "two", "kind of attribute"}[m.rnd.IntN(3)], string(m.bytes(m.rnd.IntN(60)))
	path := m.real(at, name)
	if m.rnd.IntN(3) == 0 {
		want := unix.Errno(0)
		if _, ok := n.attrs[key]; !ok {
			want = unix.ENODATA
		}
		if m.check(fmt.Sprintf("removexattr %q %s", filepath.Join(at, name), key), unix.Removexattr(path, key), want) {
			delete(n.attrs, key)
		}
		return
	}
	if m.check(fmt.Sprintf("setxattr %q %s", filepath.Join(at, name), key), unix.Setxattr(path, key, []byte(value), 0), 0) {
		if n.attrs == nil {
			n.attrs = map[string]string{}
		}
		n.attrs[key] = value
	}
}

// compare holds the whole real tree against the model.
func (m *model) compare(dir *inode, at string) {
	entries, err := os.ReadDir(m.real(at))
	if err != nil {
		m.fatalf("readdir %q: %v", at, err)
	}
	var got, want []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	for k := range dir.kids {
		want = append(want, k)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		m.fatalf("readdir %q: got %q, want %q", at, got, want)
	}
	for _, k := range want {
		m.compareNode(dir.kids[k], filepath.Join(at, k))
	}
}

func (m *model) compareNode(n *inode, at string) {
	fi, err := os.Lstat(m.real(at))
	if err != nil {
		m.fatalf("lstat %q: %v", at, err)
	}
	if fi.Mode().Type() != n.mode.Type() || n.mode&fs.ModeSymlink == 0 && fi.Mode().Perm() != n.mode.Perm() {
		m.fatalf("%q: mode %v, want %v", at, fi.Mode(), n.mode)
	}
	var st unix.Stat_t
	if err := unix.Lstat(m.real(at), &st); err != nil {
		m.fatalf("lstat %q: %v", at, err)
	}
	m.compareAttrs(n, at)
	switch {
	case n.isDir():
		m.compare(n, at)
	case n.mode&fs.ModeSymlink != 0:
		target, err := os.Readlink(m.real(at))
		if err != nil || target != string(n.data) || st.Size != int64(len(n.data)) {
			m.fatalf("readlink %q: %q (%d), %v", at, target, st.Size, err)
		}
	default:
		b, err := os.ReadFile(m.real(at))
		if err != nil || !bytes.Equal(b, n.data) || st.Size != int64(len(n.data)) {
			m.fatalf("%q: %d bytes that differ (stat %d), want %d: %v", at, len(b), st.Size, len(n.data), err)
		}
		if int(st.Nlink) != n.links {
			m.fatalf("%q: %d links, want %d", at, st.Nlink, n.links)
		}
	}
}

func (m *model) compareAttrs(n *inode, at string) {
	for k, want := range n.attrs {
		buf := make([]byte, 256)
		k2, err := unix.Lgetxattr(m.real(at), k, buf)
		if err != nil || string(buf[:k2]) != want {
			m.fatalf("%q: attribute %s: %q, want %q (%v)", at, k, buf[:max(k2, 0)], want, err)
		}
	}
}

func modelRun(t *testing.T) (seed uint64, ops int) {
	seed, ops = uint64(time.Now().UnixNano()), modelOps
	if s := os.Getenv("KMSFS_MODEL_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	if s := os.Getenv("KMSFS_MODEL_OPS"); s != "" {
		ops, _ = strconv.Atoi(s)
	}
	t.Logf("KMSFS_MODEL_SEED=%d", seed)
	return seed, ops
}

// TestModelOnBareDisk tests the model itself.
func TestModelOnBareDisk(t *testing.T) {
	rig.Need(t, "root")
	seed, ops := modelRun(t)
	newModel(t, t.TempDir(), seed).run(ops, nil)
}

func TestModel(t *testing.T) {
	rig.Need(t, "root", "fuse")
	for _, placement := range []string{"header", "xattr", "sidecar"} {
		for _, names := range []string{"encrypted", "plain"} {
			t.Run(placement+"/"+names, func(t *testing.T) {
				t.Parallel()
				seed, ops := modelRun(t)
				h := rig.NewHome(t)
				store := filepath.Join(t.TempDir(), "s")
				h.Run("init", "--placement", placement, "--names", names, store)
				mount := h.Mount(store)
				newModel(t, mount.Dir, seed).run(ops, func() { mount.Unmount(); mount.Again() })
				mount.Unmount()
				h.Run("fsck", store)
			})
		}
	}
}
