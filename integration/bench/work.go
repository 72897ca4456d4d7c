package main

import (
	"crypto/rand"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// work is a workload. Its value is a rate: more is better.
type work struct {
	name, unit string
	target     float64 // of the ratio to the faster of the peers
	run        func(*client) (float64, error)
}

// works are in the order in which they run: some use what others have made.
var works = []work{
	{"seqwrite", "MiB/s", 1.4, (*client).seqwrite},
	{"seqread", "MiB/s, cold", 1.3, (*client).seqread},
	{"warmread", "MiB/s", 5, (*client).warmread},
	{"randread4k", "1/s, cold", 1.0, (*client).randread4k},
	{"randwrite4k", "1/s, then fsync", 3, (*client).randwrite4k},
	{"fsync4k", "appends and fsyncs/s", 1.2, (*client).fsync4k},
	{"append100", "appends of 100 B/s", 20, (*client).append100},
	{"smallcreate", "files of 1 kB/s", 1.3, (*client).smallcreate},
	{"smallread", "files of 1 kB/s, cold", 1.3, (*client).smallread},
	{"untar", "trees/s", 1.3, (*client).untar},
	{"md5all", "trees/s, cold", 1.1, (*client).md5all},
	{"lsR", "trees/s, cold", 1.1, (*client).lsR},
	{"rm", "trees/s", 1.1, (*client).rm},
}

// floorTarget is what kmsfs reaches of the faster floor, in every workload.
const floorTarget = 0.7

func workNames() (names []string) {
	for _, w := range works {
		names = append(names, w.name)
	}
	return names
}

func findWork(name string) *work {
	if i := slices.IndexFunc(works, func(w work) bool { return w.name == name }); i >= 0 {
		return &works[i]
	}
	return nil
}

// needsTree reports whether any of the workloads works on the tree.
func needsTree(only []string) bool {
	return len(only) == 0 || slices.ContainsFunc(only, func(name string) bool {
		return slices.Contains([]string{"untar", "md5all", "lsR", "rm"}, name)
	})
}

// ops is how many operations a workload of n does.
func (c *client) ops(n int) int {
	if c.brief {
		return n / 50
	}
	return n
}

func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

// file is an open file of the client's.
type file struct {
	fd  int
	err error // the first that occurred
}

func open(path string, flags int) *file {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		err = fmt.Errorf("open %s: %w", path, err)
	}
	return &file{fd, err}
}

func (f *file) did(n int, want int, err error) {
	if err == nil && n != want {
		err = io.ErrShortWrite
	}
	if f.err == nil {
		f.err = err
	}
}

func (f *file) write(b []byte) {
	if f.err == nil {
		n, err := unix.Write(f.fd, b)
		f.did(n, len(b), err)
	}
}

func (f *file) fsync() {
	if f.err == nil {
		f.err = unix.Fsync(f.fd)
	}
}

// readAll reads to the end, and returns the number of bytes.
func (f *file) readAll(buf []byte) (total int64) {
	for f.err == nil {
		n, err := unix.Read(f.fd, buf)
		f.err = err
		if n <= 0 {
			break
		}
		total += int64(n)
	}
	return total
}

func (f *file) close() error {
	if f.fd >= 0 {
		if err := unix.Close(f.fd); f.err == nil {
			f.err = err
		}
	}
	return f.err
}

// since returns n per second.
func since(began time.Time, n float64) float64 { return n / time.Since(began).Seconds() }

func (c *client) seqwrite() (float64, error) {
	return writeLarge(c.dir+"/seq", c.size)
}

// writeLarge returns MiB per second.
func writeLarge(path string, size int64) (float64, error) {
	buf := noise(1 << 20)
	began := time.Now()
	f := open(path, unix.O_CREAT|unix.O_WRONLY|unix.O_TRUNC)
	for range size >> 20 {
		f.write(buf)
	}
	f.fsync()
	err := f.close()
	return since(began, float64(size>>20)), err
}

func (c *client) seqread() (float64, error) {
	if err := c.drop(); err != nil {
		return 0, err
	}
	return readLarge(c.dir+"/seq", c.size)
}

func (c *client) warmread() (float64, error) {
	if _, err := readLarge(c.dir+"/seq", c.size); err != nil {
		return 0, err
	}
	return readLarge(c.dir+"/seq", c.size)
}

func readLarge(path string, size int64) (float64, error) {
	buf := make([]byte, 1<<20)
	began := time.Now()
	f := open(path, unix.O_RDONLY)
	n := f.readAll(buf)
	err := f.close()
	rate := since(began, float64(size>>20))
	if err == nil && n != size {
		err = fmt.Errorf("read %d bytes of %d", n, size)
	}
	return rate, err
}

// offsets are n places of pages in a file, always the same ones.
func offsets(n int, size int64, seed uint64) []int64 {
	r := mathrand.New(mathrand.NewPCG(seed, seed))
	out := make([]int64, n)
	for i := range out {
		out[i] = r.Int64N(size>>12) << 12
	}
	return out
}

func (c *client) randread4k() (float64, error) {
	if err := c.drop(); err != nil {
		return 0, err
	}
	return randRead(c.dir+"/seq", offsets(c.ops(4000), c.size, 7))
}

// randRead returns reads of 4 KiB per second, without reading ahead.
func randRead(path string, at []int64) (float64, error) {
	buf := make([]byte, 4096)
	f := open(path, unix.O_RDONLY)
	if f.err == nil {
		f.err = unix.Fadvise(f.fd, 0, 0, unix.FADV_RANDOM)
	}
	began := time.Now()
	for _, off := range at {
		if f.err == nil {
			n, err := unix.Pread(f.fd, buf, off)
			f.did(n, len(buf), err)
		}
	}
	rate := since(began, float64(len(at)))
	return rate, f.close()
}

func (c *client) randwrite4k() (float64, error) {
	buf, at := noise(4096), offsets(c.ops(8000), c.size, 9)
	f := open(c.dir+"/seq", unix.O_RDWR)
	began := time.Now()
	for _, off := range at {
		if f.err == nil {
			n, err := unix.Pwrite(f.fd, buf, off)
			f.did(n, len(buf), err)
		}
	}
	f.fsync()
	rate := since(began, float64(len(at)))
	return rate, f.close()
}

func (c *client) fsync4k() (float64, error) {
	n := c.ops(1500)
	buf := noise(4096)
	f := open(c.dir+"/log", unix.O_CREAT|unix.O_WRONLY|unix.O_APPEND)
	began := time.Now()
	for range n {
		f.write(buf)
		f.fsync()
	}
	rate := since(began, float64(n))
	return rate, f.close()
}

func (c *client) append100() (float64, error) {
	n := c.ops(20000)
	buf := noise(100)
	f := open(c.dir+"/lines", unix.O_CREAT|unix.O_WRONLY|unix.O_APPEND)
	began := time.Now()
	for range n {
		f.write(buf)
	}
	err := f.close()
	return since(began, float64(n)), err
}

func (c *client) smallcreate() (float64, error) {
	return createSmall(c.dir+"/small", c.ops(3000), noise(1000))
}

// createSmall makes a directory of n files, and returns files per second.
func createSmall(dir string, n int, data []byte) (float64, error) {
	if err := unix.Mkdir(dir, 0o755); err != nil {
		return 0, err
	}
	began := time.Now()
	for i := range n {
		f := open(fmt.Sprintf("%s/f%d", dir, i), unix.O_CREAT|unix.O_WRONLY|unix.O_EXCL)
		if len(data) > 0 {
			f.write(data)
		}
		if err := f.close(); err != nil {
			return 0, err
		}
	}
	return since(began, float64(n)), nil
}

func (c *client) smallread() (float64, error) {
	if err := c.drop(); err != nil {
		return 0, err
	}
	began := time.Now()
	n, err := readSmall(c.dir+"/small", 1000)
	return since(began, float64(n)), err
}

// readSmall reads the files of a directory while it lists it.
func readSmall(dir string, size int64) (n int, err error) {
	buf := make([]byte, 64<<10)
	err = eachName(dir, func(name string) error {
		var st unix.Stat_t
		f := open(dir+"/"+name, unix.O_RDONLY)
		if f.err == nil {
			f.err = unix.Fstat(f.fd, &st) // as those do who make their buffer by it
		}
		got := f.readAll(buf)
		n++
		if err := f.close(); err != nil {
			return err
		}
		if got != size {
			return fmt.Errorf("%s: %d bytes, want %d", name, got, size)
		}
		return nil
	})
	return n, err
}

// eachName lists a directory with the C library's buffer of 32 KiB.
func eachName(dir string, do func(name string) error) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	buf := make([]byte, 32<<10)
	for {
		n, err := unix.ReadDirent(fd, buf)
		if n <= 0 {
			return err
		}
		_, _, names := unix.ParseDirent(buf[:n], -1, nil)
		for _, name := range names {
			if err := do(name); err != nil {
				return err
			}
		}
	}
}

// shell runs a script with the mount as $1, and returns runs per second.
func (c *client) shell(script string) (float64, error) {
	began := time.Now()
	// In the client's process group, so that it is killed with the client.
	out, err := exec.Command("bash", "-c", script, "bash", c.dir, c.tar).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
	}
	return since(began, 1), nil
}

// coldShell is shell with cold caches.
func (c *client) coldShell(script string) (float64, error) {
	if err := c.drop(); err != nil {
		return 0, err
	}
	return c.shell(script)
}

func (c *client) untar() (float64, error) { return c.shell(`mkdir "$1"/u && tar xf "$2" -C "$1"/u`) }

func (c *client) md5all() (float64, error) {
	return c.coldShell(`set -o pipefail; cd "$1"/u && find . -type f -print0 | xargs -0 md5sum > /dev/null`)
}

func (c *client) lsR() (float64, error) { return c.coldShell(`ls -lR "$1"/u > /dev/null`) }

func (c *client) rm() (float64, error) { return c.shell(`rm -rf "$1"/u`) }
