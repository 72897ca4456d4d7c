package stress

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// fsxArgs is one random run on one file.
type fsxArgs struct {
	Dir   string
	Seed  uint64
	Ops   int
	Chunk int // bytes; sizes and places are often near its multiples
	Mount bool
}

// fsx changes a file in every way there is, through several descriptors and a
// mapping, and knows what has to be in it.
type fsx struct {
	fsxArgs
	rnd   *rand.Rand
	max   int // bytes, of the file
	want  []byte
	fds   []int // read and write
	app   int   // O_APPEND
	raw   int   // O_DIRECT
	mem   []byte
	other []byte // contents of another file, to copy from
	log   []string

	nameless bool // the file was removed
}

func playFsx(args []byte) error {
	x := &fsx{}
	if err := json.Unmarshal(args, &x.fsxArgs); err != nil {
		return err
	}
	x.rnd = rand.New(rand.NewPCG(x.Seed, 7))
	x.max = 12*x.Chunk + 1234
	x.other = x.noise(3*x.Chunk + 17)
	err := os.WriteFile(x.path("other"), x.other, 0o600)
	if err == nil {
		err = x.open()
	}
	for step := 0; err == nil && step < x.Ops; step++ {
		if err = x.step(); err == nil {
			err = x.sizes()
		}
		if err == nil && step%40 == 39 {
			err = x.compare()
		}
	}
	if err == nil {
		err = x.compare()
	}
	if err != nil {
		return fmt.Errorf("KMSFS_STRESS_SEED=%d, chunks of %d: %w\nthe last operations:\n%s", x.Seed, x.Chunk, err, strings.Join(x.log[max(0, len(x.log)-25):], "\n"))
	}
	x.close()
	return nil
}

func (x *fsx) path(name string) string { return filepath.Join(x.Dir, name) }

func (x *fsx) noise(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(x.rnd.Uint32()) | 1
	}
	return b
}

func (x *fsx) open() (err error) {
	one := func(flags int) (fd int) {
		if err == nil {
			fd, err = unix.Open(x.path("f"), flags|unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
		}
		return fd
	}
	x.fds = []int{one(0), one(0), one(0)}
	x.app, x.raw = one(unix.O_APPEND), one(unix.O_DIRECT)
	if err == nil {
		x.mem, err = unix.Mmap(x.fds[0], 0, (x.max+4095)&^4095, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	return err
}

// close is also for a mount that is dead.
func (x *fsx) close() {
	_ = unix.Munmap(x.mem)
	for _, fd := range append(x.fds, x.app, x.raw) {
		_ = unix.Close(fd)
	}
}

func (x *fsx) fd() int { return x.fds[x.rnd.IntN(len(x.fds))] }

// spot is a place up to limit, often near a chunk's or a page's edge.
func (x *fsx) spot(limit int) int {
	at := x.rnd.IntN(limit + 1)
	switch x.rnd.IntN(4) {
	case 0:
		at = at/x.Chunk*x.Chunk + x.rnd.IntN(5) - 2
	case 1:
		at = at/4096*4096 + x.rnd.IntN(5) - 2
	}
	return min(max(at, 0), limit)
}

// span is a place and a size that fit into limit.
func (x *fsx) span(limit int) (off, n int) {
	off = x.spot(limit)
	most := limit - off
	if x.rnd.IntN(2) == 0 {
		most = min(most, x.Chunk/2)
	}
	return off, x.spot(most)
}

func (x *fsx) put(off int, p []byte) {
	x.grow(off + len(p))
	copy(x.want[off:], p)
}

func (x *fsx) grow(size int) {
	if size > len(x.want) {
		x.want = append(x.want, make([]byte, size-len(x.want))...)
	}
}

func (x *fsx) note(format string, args ...any) {
	x.log = append(x.log, fmt.Sprintf(format, args...)+fmt.Sprintf("  [size %d]", len(x.want)))
}

type fsxOp struct {
	weight int
	do     func(*fsx) error
}

// fsxOps is a function: the operations refer to it in turn.
func fsxOps() []fsxOp {
	return []fsxOp{
		{12, (*fsx).write}, {6, (*fsx).append}, {12, (*fsx).read}, {10, (*fsx).readMap}, {10, (*fsx).writeMap}, {4, (*fsx).msync},
		{4, (*fsx).allocate}, {6, (*fsx).punch}, {6, (*fsx).zeroRange}, {8, (*fsx).truncate}, {5, (*fsx).copyRange}, {3, (*fsx).copyIn},
		{6, (*fsx).readDirect}, {6, (*fsx).writeDirect}, {6, (*fsx).sync}, {4, (*fsx).reopen}, {6, (*fsx).seek}, {3, (*fsx).dropPages},
		{1, (*fsx).remount}, {1, (*fsx).kill}, {1, (*fsx).orphan},
	}
}

func (x *fsx) step() error {
	ops, sum := fsxOps(), 0
	for _, o := range ops {
		sum += o.weight
	}
	n := x.rnd.IntN(sum)
	for _, o := range ops {
		if n -= o.weight; n < 0 {
			return o.do(x)
		}
	}
	return nil
}

func (x *fsx) write() error {
	off, n := x.span(x.max)
	p := x.noise(n)
	x.note("write %d at %d", n, off)
	if err := fullWrite(x.fd(), p, off); err != nil {
		return err
	}
	if n > 0 {
		x.put(off, p)
	}
	return nil
}

func fullWrite(fd int, p []byte, off int) error {
	n, err := unix.Pwrite(fd, p, int64(off))
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return err
}

func (x *fsx) append() error {
	p := x.noise(x.rnd.IntN(min(x.Chunk, x.max-len(x.want)) + 1))
	x.note("append %d", len(p))
	n, err := unix.Write(x.app, p)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	x.want = append(x.want, p...)
	return err
}

// same compares what was read from off on with what is there.
func (x *fsx) same(what string, got []byte, off int) error {
	want := x.want[min(off, len(x.want)):]
	if len(got) > len(want) {
		return fmt.Errorf("%s of %d bytes at %d, which is past the end", what, len(got), off)
	}
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("%s at %d: byte %d is %#x, want %#x", what, off, off+i, got[i], want[i])
		}
	}
	return nil
}

func (x *fsx) readBy(what string, fd int) error {
	off, n := x.span(x.max)
	p := make([]byte, n)
	x.note("%s %d at %d", what, n, off)
	got, err := unix.Pread(fd, p, int64(off))
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if want := min(n, max(0, len(x.want)-off)); got != want {
		return fmt.Errorf("%s of %d at %d: %d bytes, want %d", what, n, off, got, want)
	}
	return x.same(what, p[:got], off)
}

func (x *fsx) read() error { return x.readBy("read", x.fd()) }

// aligned returns a buffer at a page's edge, as direct calls want it elsewhere.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & 4095
	return b[skip : skip+n : skip+n]
}

func (x *fsx) readDirect() error {
	if x.Mount && x.rnd.IntN(3) == 0 { // S-5; a disk wants more
		return x.readBy("unaligned direct read", x.raw)
	}
	off := x.spot(x.max) &^ 4095
	p := aligned((x.rnd.IntN(3*x.Chunk) + 4096) &^ 4095)
	x.note("direct read %d at %d", len(p), off)
	got, err := unix.Pread(x.raw, p, int64(off))
	if err != nil {
		return fmt.Errorf("direct read: %w", err)
	}
	if want := min(len(p), max(0, len(x.want)-off)); got != want {
		return fmt.Errorf("direct read of %d at %d: %d bytes, want %d", len(p), off, got, want)
	}
	return x.same("direct read", p[:got], off)
}

func (x *fsx) writeDirect() error {
	off, n := x.span(x.max)
	if !x.Mount || x.rnd.IntN(3) > 0 {
		off, n = off&^4095, n&^4095
	}
	p := aligned(n)
	copy(p, x.noise(n))
	x.note("direct write %d at %d", n, off)
	if err := fullWrite(x.raw, p, off); err != nil {
		return fmt.Errorf("direct write: %w", err)
	}
	if n > 0 {
		x.put(off, p)
	}
	return nil
}

func (x *fsx) readMap() error {
	off, n := x.span(len(x.want))
	x.note("read mapped %d at %d", n, off)
	return x.same("mapped read", bytes.Clone(x.mem[off:off+n]), off)
}

func (x *fsx) writeMap() error {
	off, n := x.span(len(x.want))
	x.note("write mapped %d at %d", n, off)
	p := x.noise(n)
	copy(x.mem[off:], p)
	x.put(off, p)
	return nil
}

func (x *fsx) msync() error {
	flags := []int{unix.MS_SYNC, unix.MS_ASYNC}[x.rnd.IntN(2)]
	x.note("msync %d", flags)
	return unix.Msync(x.mem, flags)
}

func (x *fsx) fallocate(mode uint32, off, n int) error {
	x.note("fallocate %#x %d at %d", mode, n, off)
	if err := unix.Fallocate(x.fd(), mode, int64(off), int64(n)); err != nil {
		return fmt.Errorf("fallocate: %w", err)
	}
	return nil
}

func (x *fsx) allocate() error {
	off, n := x.span(x.max)
	if n == 0 {
		return nil
	}
	mode := uint32(unix.FALLOC_FL_KEEP_SIZE)
	if x.rnd.IntN(2) == 0 {
		mode = 0
	}
	err := x.fallocate(mode, off, n)
	if mode == 0 {
		x.grow(off + n)
	}
	return err
}

func (x *fsx) punch() error {
	off, n := x.span(x.max)
	if n == 0 {
		return nil
	}
	err := x.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	x.clear(off, n)
	return err
}

func (x *fsx) clear(off, n int) {
	clear(x.want[min(off, len(x.want)):min(off+n, len(x.want))])
}

func (x *fsx) zeroRange() error {
	off, n := x.span(x.max)
	if n == 0 {
		return nil
	}
	mode := uint32(unix.FALLOC_FL_ZERO_RANGE)
	if x.rnd.IntN(2) == 0 {
		mode |= unix.FALLOC_FL_KEEP_SIZE
	}
	err := x.fallocate(mode, off, n)
	if mode == unix.FALLOC_FL_ZERO_RANGE {
		x.grow(off + n)
	}
	x.clear(off, n)
	return err
}

func (x *fsx) truncate() (err error) {
	size := x.spot(x.max)
	if x.rnd.IntN(8) == 0 {
		size = 0
	}
	switch how := x.rnd.IntN(3); {
	case how == 0 && !x.nameless:
		x.note("truncate to %d", size)
		err = unix.Truncate(x.path("f"), int64(size))
	case how == 1 && size == 0 && !x.nameless:
		x.note("open with O_TRUNC")
		var fd int
		if fd, err = unix.Open(x.path("f"), unix.O_WRONLY|unix.O_TRUNC|unix.O_CLOEXEC, 0); err == nil {
			err = unix.Close(fd)
		}
	default:
		x.note("ftruncate to %d", size)
		err = unix.Ftruncate(x.fd(), int64(size))
	}
	if err != nil {
		return fmt.Errorf("truncate: %w", err)
	}
	x.want = x.want[:min(size, len(x.want))]
	clear(x.want[len(x.want):cap(x.want)])
	x.grow(size)
	return nil
}

func copyFileRange(from, to, off, at, n int) (done int, err error) {
	for done < n {
		a, b := int64(off+done), int64(at+done)
		k, err := unix.CopyFileRange(from, &a, to, &b, n-done, 0)
		if err != nil {
			return done, fmt.Errorf("copy_file_range: %w", err)
		}
		if k == 0 {
			break
		}
		done += k
	}
	return done, nil
}

// copyRange copies within the file; source and target do not overlap.
func (x *fsx) copyRange() error {
	off, n := x.span(x.max)
	at := x.spot(x.max - n)
	if n == 0 || at < off+n && off < at+n {
		return nil
	}
	x.note("copy_file_range %d from %d to %d", n, off, at)
	want := min(n, max(0, len(x.want)-off))
	done, err := copyFileRange(x.fd(), x.fd(), off, at, n)
	if err != nil {
		return err
	}
	if done < want || done > n { // more if the target moved the end
		return fmt.Errorf("copy_file_range copied %d of %d", done, want)
	}
	for k := 0; k < done; k += max(1, want) {
		m := min(done-k, max(1, want))
		x.put(at+k, bytes.Clone(x.want[off+k:min(off+k+m, len(x.want))]))
	}
	return nil
}

// copyIn copies from another file.
func (x *fsx) copyIn() error {
	off, n := x.span(len(x.other))
	at := x.spot(x.max - n)
	if n == 0 {
		return nil
	}
	x.note("copy_file_range %d of another file to %d", n, at)
	from, err := unix.Open(x.path("other"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	done, err := copyFileRange(from, x.fd(), off, at, n)
	if err == nil && done != n {
		err = fmt.Errorf("copy_file_range of another file: %d of %d", done, n)
	}
	x.put(at, x.other[off:off+n])
	return errors.Join(err, unix.Close(from))
}

func (x *fsx) sync() error {
	x.note("fsync")
	if x.rnd.IntN(2) == 0 {
		return unix.Fdatasync(x.fd())
	}
	return unix.Fsync(x.fd())
}

func (x *fsx) reopen() error {
	i := x.rnd.IntN(len(x.fds))
	x.note("close and open")
	if err := unix.Close(x.fds[i]); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	path := x.path("f")
	if x.nameless {
		path = fmt.Sprintf("/proc/self/fd/%d", x.app)
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	x.fds[i] = fd
	return err
}

// seek goes through all data and holes: a hole is zeros, they take turns, and
// nothing lies past the end.
func (x *fsx) seek() error {
	fd, size := x.fd(), int64(len(x.want))
	x.note("msync, seek data and holes")
	// Of what is only in a mapping the kernel does not tell the server.
	if err := unix.Msync(x.mem, unix.MS_SYNC); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		data, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			data = size
		} else if err != nil || data < at || data >= size {
			return fmt.Errorf("SEEK_DATA from %d: %d, %v", at, data, err)
		}
		if !allZero(x.want[at:data]) {
			return fmt.Errorf("[%d, %d) is said to be a hole, and is not", at, data)
		}
		if data == size {
			break
		}
		hole, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		if err != nil || hole <= data || hole > size {
			return fmt.Errorf("SEEK_HOLE from %d: %d, %v", data, hole, err)
		}
		at = hole
	}
	for _, whence := range []int{unix.SEEK_DATA, unix.SEEK_HOLE} {
		if at, err := unix.Seek(fd, size, whence); !errors.Is(err, unix.ENXIO) {
			return fmt.Errorf("lseek %d at the end: %d, %v; want ENXIO", whence, at, err)
		}
	}
	return nil
}

func allZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

func (x *fsx) dropPages() error {
	x.note("drop pages")
	if x.rnd.IntN(8) == 0 {
		return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
	}
	return unix.Fadvise(x.fd(), 0, 0, unix.FADV_DONTNEED)
}

func (x *fsx) remount() error {
	if !x.Mount || x.nameless {
		return nil
	}
	x.note("remount")
	x.close()
	if err := ask("remount"); err != nil {
		return err
	}
	return errors.Join(x.open(), x.compare())
}

// kill ends the serving process after an fsync, which may be followed by reads
// only.
func (x *fsx) kill() error {
	if !x.Mount || x.nameless {
		return nil
	}
	x.note("fsync, and kill the server")
	if err := unix.Fsync(x.fd()); err != nil {
		return err
	}
	if err := ask("die"); err != nil {
		return err
	}
	x.close()
	if err := ask("again"); err != nil {
		return err
	}
	return errors.Join(x.open(), x.compare())
}

// orphan goes on with a file that has no name any more, and then with another
// that has what was in it.
func (x *fsx) orphan() error {
	if x.nameless {
		return nil
	}
	x.note("remove the name")
	err := os.WriteFile(x.path("next"), nil, 0o644)
	if err == nil {
		err = []func() error{
			func() error { return unix.Unlink(x.path("f")) },
			func() error { return unix.Rename(x.path("next"), x.path("f")) },
		}[x.rnd.IntN(2)]()
	}
	x.nameless = true
	for n := 0; err == nil && n < 20; n++ {
		if err = x.step(); err == nil {
			err = x.sizes()
		}
	}
	if err == nil {
		err = x.compare()
	}
	if err != nil {
		return err
	}
	x.note("give it a name again")
	x.nameless = false
	x.close()
	return errors.Join(os.WriteFile(x.path("f"), x.want, 0o644), x.open(), x.compare())
}

// sizes compares what stat(2) says.
func (x *fsx) sizes() error {
	var st, byName unix.Stat_t
	err := unix.Fstat(x.fd(), &st)
	if byName = st; err == nil && !x.nameless {
		err = unix.Stat(x.path("f"), &byName)
	}
	if err == nil && (st.Size != int64(len(x.want)) || byName.Size != st.Size) {
		err = fmt.Errorf("the size is %d, by name %d, want %d", st.Size, byName.Size, len(x.want))
	}
	return err
}

func (x *fsx) compare() error {
	x.note("compare")
	got := make([]byte, x.max+1)
	n, err := unix.Pread(x.fd(), got, 0)
	got = got[:max(n, 0)]
	if !x.nameless && err == nil {
		got, err = os.ReadFile(x.path("f"))
	}
	if err == nil && len(got) != len(x.want) {
		err = fmt.Errorf("the file has %d bytes, want %d", len(got), len(x.want))
	}
	if err == nil {
		err = x.same("the file", got, 0)
	}
	if err == nil {
		err = x.same("the mapping", bytes.Clone(x.mem[:len(x.want)]), 0)
	}
	if err == nil {
		err = x.seek()
	}
	return err
}

// TestFsxOnBareDisk tests the test.
func TestFsxOnBareDisk(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root")
	args := fsxArgs{Dir: t.TempDir(), Seed: seedOf(t), Ops: opsOf(400, 5000), Chunk: 4096}
	all(t, start(t, "fsx", args))
}

// TestFsx: S-4, S-5, S-11, S-14, S-15, S-17, S-18, S-19 and S-20 hold together, through
// several descriptors of one file, with the serving process killed and the
// store mounted again in between.
func TestFsx(t *testing.T) {
	for _, placement := range placements {
		for _, chunk := range []int{4, 32, 64} {
			t.Run(fmt.Sprintf("%s/%dKiB", placement, chunk), func(t *testing.T) {
				t.Parallel()
				m := newMount(t, "--placement", placement, "--chunk-size", fmt.Sprintf("%dKiB", chunk))
				args := fsxArgs{Dir: m.Dir, Seed: seedOf(t), Ops: opsOf(250, 10_000), Chunk: chunk << 10, Mount: true}
				err := start(t, "fsx", args).serve(func(question string) {
					switch question {
					case "remount":
						m.Unmount()
						m.Again()
					case "die":
						m.Die()
					case "again":
						m.Detach()
						m.Again()
					}
				})
				if err != nil {
					t.Fatal(err)
				}
				clean(t, m)
			})
		}
	}
}
