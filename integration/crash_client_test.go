package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// A crash client works in one directory of a mount until the mount dies under
// it, and writes to a log outside what it is about to do and what it was told is
// durable. Lines are a verb and numbers:
//
//	synced N          append: the first N bytes are durable
//	try B V / ok B V  rewrite: block B gets version V / has it durably
//	try OP I / ok OP I  names: OP on file I is tried / durable
//	try STEP N / ok STEP N  sizes: the N-th step is tried / durable

const (
	rewriteBlocks = 40
	rewriteBlock  = 3000 // no multiple of the chunk size: blocks share chunks
	sizesFull     = 50_000
	namesFile     = 9000
)

// crashPattern fills p with what byte off and the following of a file have.
func crashPattern(p []byte, seed, off uint64) {
	for i := range p {
		at := off + uint64(i)
		x := (seed + at/8) * 0x9e3779b97f4a7c15
		x ^= x >> 29
		p[i] = byte(x >> (at % 8 * 8))
	}
}

// blockVersion fills p with version v of block b.
func blockVersion(p []byte, b, v int) {
	for i := 0; i+8 <= len(p); i += 8 {
		binary.BigEndian.PutUint64(p[i:], uint64(b)<<32|uint64(v))
	}
}

type crashWorker struct {
	dir  int // descriptor of the directory
	log  *os.File
	rnd  *rand.Rand
	seed uint64
}

// crashClient is the part of the helper: kind, directory, log, seed.
func crashClient(args []string) error {
	seed, err := strconv.ParseUint(args[3], 10, 64)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(args[2], os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	// By descriptor: once the mount is gone the path is another directory.
	dir, err := unix.Open(args[1], unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if isDead(err) {
		return nil // before it has begun
	}
	if err != nil {
		return err
	}
	w := &crashWorker{dir: dir, log: log, rnd: rand.New(rand.NewPCG(seed, 1)), seed: seed}
	err = map[string]func() error{"append": w.append, "rewrite": w.rewrite, "names": w.names, "sizes": w.sizes}[args[0]]()
	if isDead(err) || errors.Is(err, unix.EIO) && w.dies() {
		return nil // the end that is meant
	}
	return fmt.Errorf("crash client %s: %w", args[0], err)
}

func isDead(err error) bool {
	return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED)
}

// dies waits for the mount's end. A request that the server was taking over when
// it was killed fails with EIO, a moment before (fuse_dev_do_read in the kernel).
func (w *crashWorker) dies() bool {
	for i := range 200 {
		// Another name each time: the kernel remembers that one is not there.
		fd, err := unix.Openat(w.dir, fmt.Sprintf("no such file %d", i), unix.O_RDONLY, 0)
		if err == nil {
			_ = unix.Close(fd)
		}
		if isDead(err) {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}

func (w *crashWorker) note(verb string, args ...any) {
	if _, err := fmt.Fprintln(w.log, append([]any{verb}, args...)...); err != nil {
		panic(err)
	}
}

func (w *crashWorker) open(name string, flags int) (*os.File, error) {
	for {
		fd, err := unix.Openat(w.dir, name, flags|unix.O_CLOEXEC, 0o644)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), name), nil
	}
}

func (w *crashWorker) syncDir() error { return unix.Fsync(w.dir) }

// append writes a stream to the end of a file, in pieces of all sizes.
func (w *crashWorker) append() error {
	f, err := w.open("stream", unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND)
	if err != nil {
		return err
	}
	if err := w.syncDir(); err != nil {
		return err
	}
	for size := uint64(0); ; {
		p := make([]byte, 1+w.rnd.IntN(1<<w.rnd.IntN(17)))
		crashPattern(p, w.seed, size)
		if _, err := f.Write(p); err != nil {
			return err
		}
		size += uint64(len(p))
		if w.rnd.IntN(3) == 0 {
			if err := f.Sync(); err != nil {
				return err
			}
			w.note("synced", size)
		}
	}
}

// rewrite replaces blocks of a file in place.
func (w *crashWorker) rewrite() error {
	f, err := w.open("blocks", unix.O_RDWR|unix.O_CREAT)
	if err != nil {
		return err
	}
	for b := range rewriteBlocks {
		p := make([]byte, rewriteBlock)
		blockVersion(p, b, 0)
		if _, err := f.WriteAt(p, int64(b)*rewriteBlock); err != nil {
			return err
		}
	}
	if err := errors.Join(f.Sync(), w.syncDir()); err != nil {
		return err
	}
	w.note("made")
	for v := 1; ; v++ {
		b := w.rnd.IntN(rewriteBlocks)
		n := min(1+w.rnd.IntN(3), rewriteBlocks-b) // neighbours in one write
		p := make([]byte, n*rewriteBlock)
		for i := range n {
			blockVersion(p[i*rewriteBlock:(i+1)*rewriteBlock], b+i, v)
			w.note("try", b+i, v)
		}
		if _, err := f.WriteAt(p, int64(b)*rewriteBlock); err != nil {
			return err
		}
		if w.rnd.IntN(2) == 0 {
			continue
		}
		if err := f.Sync(); err != nil {
			return err
		}
		w.note("ok", -1, v) // all versions up to v
	}
}

func (w *crashWorker) whole(name string, i int) error {
	f, err := w.open(name, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	p := make([]byte, namesFile)
	crashPattern(p, w.seed+uint64(i), 0)
	if _, err := f.Write(p); err != nil {
		return err
	}
	return f.Sync()
}

// names creates, renames, replaces and removes files.
func (w *crashWorker) names() error {
	step := func(op string, i int, do func() error) error {
		w.note("try", op, i)
		err := do()
		if err == nil {
			err = w.syncDir()
		}
		if err == nil {
			w.note("ok", op, i)
		}
		return err
	}
	for i := 0; ; i++ {
		name, moved := fmt.Sprintf("f%d", i), fmt.Sprintf("moved%d", i)
		if err := step("create", i, func() error { return w.whole(name, i) }); err != nil {
			return err
		}
		var err error
		switch i % 4 {
		case 1:
			err = step("rename", i, func() error { return unix.Renameat(w.dir, name, w.dir, moved) })
		case 2:
			err = step("remove", i, func() error { return unix.Unlinkat(w.dir, name, 0) })
		case 3: // as editors and rsync save
			err = step("replace", i, func() error {
				if err := w.whole("tmp", i); err != nil {
					return err
				}
				return unix.Renameat(w.dir, "tmp", w.dir, "saved")
			})
		}
		if err != nil {
			return err
		}
	}
}

// sizes fills, cuts and grows one file, over and over.
func (w *crashWorker) sizes() error {
	f, err := w.open("sizes", unix.O_RDWR|unix.O_CREAT)
	if err != nil {
		return err
	}
	if err := w.syncDir(); err != nil {
		return err
	}
	for {
		cut, grow := w.rnd.IntN(sizesFull), sizesFull+w.rnd.IntN(sizesFull)
		for _, step := range []struct {
			verb string
			n    int
			do   func() error
		}{
			{"empty", 0, func() error { return f.Truncate(0) }},
			{"fill", sizesFull, func() error {
				p := make([]byte, sizesFull)
				crashPattern(p, w.seed, 0)
				_, err := f.WriteAt(p, 0)
				return err
			}},
			{"cut", cut, func() error { return f.Truncate(int64(cut)) }},
			{"grow", grow, func() error { return f.Truncate(int64(grow)) }},
		} {
			w.note("try", step.verb, step.n)
			if err := step.do(); err != nil {
				return err
			}
			if err := f.Sync(); err != nil {
				return err
			}
			w.note("ok", step.verb, step.n)
		}
	}
}
