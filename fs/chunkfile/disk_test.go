package chunkfile_test

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

var errPower = errors.New("the process is dead")

// power decides about every change that a file and its owner make: steps are
// counted, and one of them may be the last, or fail.
type power struct {
	steps int
	dead  bool

	// kill, if not 0, is the step in which the process dies; prefix tells how
	// many of the step's bytes still reach the file.
	kill   int
	prefix func(off int64, n int) int

	// fail, if not 0, is the step from which on steps fail with ENOSPC: one, or
	// all of them until it is 0 again. What only frees space may be spared.
	fail   int
	lasts  bool
	spares bool
}

// step asks for a change of n bytes at off; frees says that it needs no space.
// It answers how many bytes to change, and the error to return after that.
func (p *power) step(off int64, n int, frees bool) (int, error) {
	if p.dead {
		return 0, errPower
	}
	p.steps++
	if p.steps == p.kill {
		p.dead = true
		return p.prefix(off, n), errPower
	}
	if p.fail != 0 && (p.steps == p.fail || p.lasts && p.steps > p.fail) && (!frees || !p.spares) {
		return n / 2, fmt.Errorf("injected: %w", unix.ENOSPC)
	}
	return n, nil
}

// sync is a step that a full disk does not fail: no later fsync could mend that.
func (p *power) sync() error {
	if p.dead {
		return errPower
	}
	p.steps++
	if p.steps == p.kill {
		p.dead = true
		return errPower
	}
	return nil
}

// memDisk is a store file in memory, under a power.
type memDisk struct {
	*power
	b []byte
}

func (d *memDisk) ReadAt(p []byte, off int64) (int, error) {
	if d.dead {
		return 0, errPower
	}
	if off >= int64(len(d.b)) {
		return 0, nil
	}
	return copy(p, d.b[off:]), nil
}

func (d *memDisk) WriteAt(p []byte, off int64) error {
	n, err := d.step(off, len(p), false)
	d.b = writeAt(d.b, p[:n], off)
	return err
}

// writeAt is pwrite(2) on a file of bytes b; an empty p does nothing.
func writeAt(b, p []byte, off int64) []byte {
	if len(p) == 0 {
		return b
	}
	if end := int(off) + len(p); end > len(b) {
		b = append(b, make([]byte, end-len(b))...)
	}
	copy(b[off:], p)
	return b
}

func resize(b []byte, size int64) []byte {
	if size <= int64(len(b)) {
		return slices.Clip(b[:size])
	}
	return append(b, make([]byte, size-int64(len(b)))...)
}

func (d *memDisk) Truncate(size int64) error {
	n, err := d.step(0, 1, true)
	if n == 1 {
		d.b = resize(d.b, size)
	}
	return err
}

func (d *memDisk) Allocate(mode uint32, off, size int64) error {
	if mode != unix.FALLOC_FL_KEEP_SIZE {
		return unix.EOPNOTSUPP
	}
	_, err := d.step(0, 1, false)
	return err
}

// Punch may be caught half-way too: it frees block by block.
func (d *memDisk) Punch(off, size int64) error {
	end := min(off+size, int64(len(d.b)))
	if end <= off {
		return nil
	}
	n, err := d.step(off, int(end-off), true)
	clear(d.b[off : off+int64(n)])
	return err
}

// SeekData knows holes of whole blocks of 4 KiB.
func (d *memDisk) SeekData(off int64) (int64, bool, error) {
	if d.dead {
		return 0, false, errPower
	}
	for off < int64(len(d.b)) {
		end := min((off/4096+1)*4096, int64(len(d.b)))
		if slices.ContainsFunc(d.b[off:end], func(c byte) bool { return c != 0 }) {
			return off, true, nil
		}
		off = end
	}
	return 0, false, nil
}

func (d *memDisk) Mtime() (unix.Timespec, error) { return unix.Timespec{}, nil }

func (d *memDisk) SetTimes(unix.Timespec, unix.Timespec) error {
	_, err := d.step(0, 1, true)
	return err
}

func (d *memDisk) Sync() error { return d.sync() }

func (d *memDisk) Datasync() error { return d.Sync() }
