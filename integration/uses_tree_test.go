package integration

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// entry is what a user can see of one file.
type entry struct {
	mode   uint32 // type and permissions
	uid    uint32
	gid    uint32
	rdev   uint64
	size   int64             // 0 for a directory
	mtime  int64             // ns
	sum    [32]byte          // of a regular file's contents
	target string            // of a symlink
	links  string            // the names of the same inode in the tree, joined by NUL
	xattrs map[string]string // every attribute that is listed, ACLs included
	holes  bool              // a regular file with a hole before its end
}

// tree is a directory by relative names; "." is the directory itself.
type tree map[string]entry

// readTree reads all of a directory, contents included. Names are taken as
// bytes.
func readTree(t testing.TB, root string) tree {
	t.Helper()
	out, inodes := tree{}, map[uint64][]string{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		e, ino, err := readEntry(path)
		if err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		out[name] = e
		if e.mode&unix.S_IFMT != unix.S_IFDIR {
			inodes[ino] = append(inodes[ino], name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, names := range inodes {
		slices.Sort(names)
		for _, name := range names {
			e := out[name]
			e.links = strings.Join(names, "\x00")
			out[name] = e
		}
	}
	return out
}

func readEntry(path string) (entry, uint64, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return entry{}, 0, err
	}
	e := entry{mode: st.Mode, uid: st.Uid, gid: st.Gid, rdev: st.Rdev, size: st.Size, mtime: st.Mtim.Nano()}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.sum, e.holes, err = readContents(path)
	case unix.S_IFLNK:
		e.target, err = os.Readlink(path)
	case unix.S_IFDIR:
		e.size = 0
	}
	if err == nil {
		e.xattrs, err = readXattrs(path)
	}
	return e, st.Ino, err
}

func readContents(path string) (sum [32]byte, holes bool, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, false, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return sum, false, err
	}
	copy(sum[:], h.Sum(nil))
	if n > 0 {
		end, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_HOLE)
		if err != nil {
			return sum, false, err
		}
		holes = end < n
	}
	return sum, holes, nil
}

func readXattrs(path string) (map[string]string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		if errors.Is(err, unix.ENOTSUP) {
			return nil, nil
		}
		return nil, err
	}
	out := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 64<<10)
		m, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out[name] = string(value[:m])
	}
	return out, nil
}

// differences compares two trees; one line for each difference.
func differences(got, want tree) []string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(want)) {
		g, ok := got[name]
		if !ok {
			out = append(out, fmt.Sprintf("%q is missing", name))
			continue
		}
		for _, d := range g.against(want[name]) {
			out = append(out, fmt.Sprintf("%q: %s", name, d))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[name]; !ok {
			out = append(out, fmt.Sprintf("%q is new", name))
		}
	}
	return out
}

func (e entry) against(want entry) []string {
	var out []string
	differ := func(what string, got, want any) {
		out = append(out, fmt.Sprintf("%s: got %v, want %v", what, got, want))
	}
	if e.mode != want.mode {
		differ("mode", fmt.Sprintf("%o", e.mode), fmt.Sprintf("%o", want.mode))
	}
	if e.uid != want.uid || e.gid != want.gid {
		differ("owner", fmt.Sprint(e.uid, ":", e.gid), fmt.Sprint(want.uid, ":", want.gid))
	}
	if e.rdev != want.rdev {
		differ("device", e.rdev, want.rdev)
	}
	if e.size != want.size {
		differ("size", e.size, want.size)
	}
	if e.mtime != want.mtime {
		differ("mtime", e.mtime, want.mtime)
	}
	if e.sum != want.sum {
		differ("sha256", fmt.Sprintf("%x", e.sum[:8]), fmt.Sprintf("%x", want.sum[:8]))
	}
	if e.target != want.target {
		differ("target", fmt.Sprintf("%q", e.target), fmt.Sprintf("%q", want.target))
	}
	if e.links != want.links {
		differ("links", fmt.Sprintf("%q", e.links), fmt.Sprintf("%q", want.links))
	}
	if !maps.Equal(e.xattrs, want.xattrs) {
		differ("xattrs", fmt.Sprintf("%q", e.xattrs), fmt.Sprintf("%q", want.xattrs))
	}
	if e.holes != want.holes {
		differ("holes", e.holes, want.holes)
	}
	return out
}

// mustEqual fails the test with the first differences of two directories.
func mustEqual(t testing.TB, what string, got, want tree) {
	t.Helper()
	d := differences(got, want)
	if len(d) == 0 {
		return
	}
	t.Errorf("%s: %d differences", what, len(d))
	for _, line := range d[:min(len(d), 20)] {
		t.Errorf("  %s", line)
	}
}

// hardTree makes a directory with everything that backup tools get wrong.
func hardTree(t testing.TB, h *rig.Home, root string) {
	t.Helper()
	h.Sh(`mkdir -p "$1"/a/b/c "$1"/empty "$1"/links "$1"/odd "$1"/attrs "$1"/modes "$1"/times`, root)
	for _, n := range []int{0, 1, 4095, 4096, 4097, 32767, 32768, 32769, 1<<20 + 3} {
		put(t, fmt.Sprintf("%s/a/b/size-%d", root, n), noise(n, uint64(n)))
	}
	h.Sh(`cd "$1"/links
		echo one >a; ln a b; ln a ../a/b/c/third
		printf 'big%.0s' {1..20000} >big; ln big big2
		ln -s nowhere dangling; ln -s /etc/passwd absolute; ln -s .. up; ln -s ../a/b dir
		ln -s "$(printf 'x%.0s' {1..4000})" long; ln -s "$(printf 'caf\351\n')" bytes
		mkfifo fifo; mknod null c 1 3`, root)
	if err := unix.Mknod(root+"/links/sock", unix.S_IFSOCK|0o600, 0); err != nil {
		t.Fatal(err)
	}
	sparseFile(t, root+"/links/sparse")
	for _, name := range []string{
		"-rf", " leading", "trailing ", "two\nlines", "tab\t", "bad\xff\xfeutf8", "quote'\"\\", "*?[x]", "~", "#x#",
		".hidden", "..two", "...", strings.Repeat("n", 255), strings.Repeat("é", 127), "kmsfs", "\u202egpj.exe", "con", "a:b",
	} {
		put(t, root+"/odd/"+name, []byte(name))
	}
	if err := os.Mkdir(root+"/odd/"+strings.Repeat("d", 255), 0o755); err != nil {
		t.Fatal(err)
	}
	put(t, root+"/odd/"+strings.Repeat("d", 255)+"/"+strings.Repeat("f", 255), []byte("deep"))
	h.Sh(`cd "$1"/attrs
		echo x >file; mkdir dir
		setfattr -n user.plain -v value file; setfattr -n user.empty file; setfattr -n user.big -v "$(printf 'v%.0s' {1..2000})" file
		setfattr -n user.dir -v yes dir; setfattr -n user."$(printf 'k%.0s' {1..100})" -v long file; setfattr -n user.bin -v 0x00ff0a00 file
		echo y >acl; setfacl -m u:1234:rwx,g:4321:r,m:rx acl
		setfacl -m u:1234:r dir; setfacl -d -m u:1234:rw,g:77:--- dir; echo z >dir/inherits; mkdir dir/sub
		cd ../modes
		for m in 0 0400 0644 1755 2755 4755 6711 0777; do echo $m >f$m; chmod $m f$m; done
		mkdir d1777 d2775 d0; chmod 1777 d1777; chmod 2775 d2775; chmod 0 d0
		echo o >owned; chown 1000:2000 owned; chown -h 1001:2001 "$1"/links/dangling; mkdir od; chown 65534:65534 od
		chown 3:4 f2755 && chmod 2755 f2755`, root)
	setTimes(t, root)
}

// setTimes gives each file a time of its own with nanoseconds, the oldest
// before 1970's first day is over, the newest after 2038.
func setTimes(t testing.TB, root string) {
	t.Helper()
	var names []string
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		names = append(names, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	span := int64(time.Date(2040, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano()) / int64(len(names))
	for i, path := range slices.Backward(names) { // children before their directory
		ts := unix.NsecToTimespec(int64(i)*span + 123456789)
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			t.Fatal(err)
		}
	}
}

// sparseFile writes 64 MiB of which two stretches are data, so far from each
// other and from the end that every chunk size leaves holes.
func sparseFile(t testing.TB, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, at := range []int64{8 << 20, 40<<20 + 12345} {
		if _, err := f.WriteAt(noise(70000, uint64(at)), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(64 << 20); err != nil {
		t.Fatal(err)
	}
}

// mustBeSparse checks that a file made by sparseFile takes little room and
// shows its holes: data is found where it is and not far beside it.
func mustBeSparse(t testing.TB, path string) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != 64<<20 || st.Blocks*512 > 4<<20 {
		t.Errorf("%s: got %d bytes on %d of disk, want %d on at most 4 MiB", path, st.Size, st.Blocks*512, 64<<20)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, want := range []int64{8 << 20, 40<<20 + 12345} {
		at, err := unix.Seek(int(f.Fd()), want-(4<<20), unix.SEEK_DATA)
		if err != nil || at > want || at < want-(1<<20) {
			t.Errorf("%s: SEEK_DATA: got %d, %v, want at most 1 MiB before %d", path, at, err, want)
		}
		at, err = unix.Seek(int(f.Fd()), want, unix.SEEK_HOLE)
		if err != nil || at < want+70000 || at > want+(1<<20) {
			t.Errorf("%s: SEEK_HOLE: got %d, %v, want at most 1 MiB behind %d", path, at, err, want)
		}
	}
}

func put(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// noise returns n bytes that depend on seed alone and do not compress.
func noise(n int, seed uint64) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	out := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(out) // it never fails
	return out
}

// TestComparerSees shows that the comparison of trees sees each difference.
func TestComparerSees(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root", "setfacl", "setfattr")
	h := rig.NewHome(t)
	for _, change := range []string{
		`chmod 600 x/f`, `chown 7 x/f`, `touch -d @5.000000001 x/f`, `printf 2 1<>x/f; touch -d @5 x/f`, `echo >>x/f`,
		`ln -sfn b x/l`, `rm x/h; cp -p x/f x/h`, `setfattr -n user.a -v 2 x/f`, `setfacl -m u:9:r x/f`, `rm x/p`,
		`setfacl -d -m u:9:r x`, `rm x/s; head -c 1M /dev/zero >x/s; touch -d @5 x/s`, `touch x/new`, `rm x/p; mknod x/p c 1 5`,
	} {
		dir := t.TempDir()
		h.Sh(`cd "$1"; mkdir x; echo 1 >x/f; chmod 644 x/f; ln x/f x/h; ln -s a x/l; mkfifo x/p; truncate -s 1M x/s
			setfattr -n user.a -v 1 x/f; touch -h -d @5 x/* x`, dir)
		want := readTree(t, dir+"/x")
		h.Sh(`cp -a "$1"/x "$1"/y`, dir)
		mustEqual(t, "cp -a", readTree(t, dir+"/y"), want)
		h.Sh(`cd "$1"; `+change, dir)
		if d := differences(readTree(t, dir+"/x"), want); len(d) == 0 {
			t.Errorf("%s: no difference", change)
		} else if !bytes.ContainsAny([]byte(d[0]), `"`) {
			t.Errorf("%s: %q names no file", change, d)
		}
	}
}
