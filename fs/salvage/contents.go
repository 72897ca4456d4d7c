package salvage

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
	"github.com/kmsfs/kmsfs/fs/journal"
)

// outError is a failure of the output, which ends the run.
type outError struct{ error }

func (e outError) Unwrap() error { return e.error }

// body is a file whose key is at hand.
type body struct {
	*envelope.Header
	class string
	codec *dare.Codec
	geo   dare.Geometry
	view  *chunkfile.View
	mtime *unix.Timespec // of what the journal has; nil: the store file's
}

// unlockFile gets a file's key by the first of its headers that gives one. The
// caller wipes the codec.
func (w *writer) unlockFile(ctx context.Context, disk *backing.File, size int64, headers []located) (*body, error) {
	var first error
	for _, l := range headers {
		t := w.s.stores[l.Store]
		if t == nil {
			continue
		}
		for _, class := range classesOf(l.Header) {
			b, err := t.unlockFile(ctx, class, disk, size, l)
			if err == nil {
				return b, nil
			}
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			// A key that cannot be had says more than a header that is not the file's.
			if first == nil || fault.Of(first) == fault.Integrity && keyKind(fault.Of(err)) {
				first = err
			}
		}
	}
	return nil, first
}

func classesOf(h *envelope.Header) (out []string) {
	seen := map[string]bool{}
	for _, r := range h.Recipients {
		if !seen[r.Class] {
			seen[r.Class] = true
			out = append(out, r.Class)
		}
	}
	return out
}

func (t *store) unlockFile(ctx context.Context, class string, disk *backing.File, size int64, l located) (*body, error) {
	k, err := t.manager.Open(ctx, t.class(class), keywrap.PurposeData, l.Header)
	if err != nil {
		return nil, err
	}
	defer k.Wipe()
	h := l.Header
	ops, mtime := t.pending(h)
	for _, op := range ops {
		if op.Kind != journal.OpHeader {
			continue
		}
		if newer, err := envelope.Parse(op.Data); err == nil && newer.File == h.File && newer.Birth == h.Birth && k.Check(newer) == nil {
			h = newer
		}
	}
	codec, err := dare.New(k.PRK(), dare.Suite(h.Suite), h.ChunkSize)
	if err != nil {
		return nil, err
	}
	return &body{
		Header: h, class: class, codec: codec, view: chunkfile.Look(disk, size, ops), mtime: mtime,
		geo: dare.Geometry{ChunkSize: h.ChunkSize, Base: dare.CipherOff(l.base)},
	}, nil
}

// outcome is what became of a file's contents.
type outcome struct {
	bytes     int64 // authenticated
	size      int64 // of the plaintext written
	zeroed    []Range
	truncated bool
	trailing  bool  // what follows the chunk that is sealed as last was left out
	cause     error // of the first damage
}

func (o *outcome) damaged(from, n int64, cause error) {
	if o.cause == nil {
		o.cause = cause
	}
	if n <= 0 {
		return
	}
	if last := len(o.zeroed) - 1; last >= 0 && o.zeroed[last].Offset+o.zeroed[last].Length == from {
		o.zeroed[last].Length += n
		return
	}
	o.zeroed = append(o.zeroed, Range{from, n})
}

// cut takes back what was said of the plaintext from size on.
func (o *outcome) cut(size int64) {
	o.size = size
	for len(o.zeroed) > 0 {
		last := &o.zeroed[len(o.zeroed)-1]
		if last.Offset+last.Length <= size {
			return
		}
		if last.Length = size - last.Offset; last.Length > 0 {
			return
		}
		o.zeroed = o.zeroed[:len(o.zeroed)-1]
	}
}

// copy writes what can be read of the file to out.
func (b *body) copy(ctx context.Context, out *backing.File) (outcome, error) {
	var o outcome
	slotLen := int64(b.ChunkSize) + dare.Overhead
	base, size := int64(b.geo.Base), b.view.Size()
	slot, plain := make([]byte, slotLen), make([]byte, 0, b.ChunkSize)
	defer func() { clear(plain[:cap(plain)]) }()
	end := int64(-1) // of the plaintext, after a chunk that is sealed as the last
	for i, off := int64(0), base; off < size; i, off = i+1, off+slotLen {
		if err := ctx.Err(); err != nil {
			return o, err
		}
		n, at := min(slotLen, size-off), i*int64(b.ChunkSize)
		want := max(0, n-dare.Overhead)
		c := b.read(plain[:0], slot[:n], i, off)
		if c.cause == nil && c.hole {
			o.size = at + want
			continue
		}
		if len(c.data) > 0 {
			if err := out.WriteAt(c.data, at); err != nil {
				return o, outError{err}
			}
			o.bytes += int64(len(c.data))
			end = -1
		}
		if c.cause != nil {
			o.damaged(at+int64(len(c.data)), want-int64(len(c.data)), c.cause)
		}
		o.size = at + want
		if c.last && (off+n < size || int64(len(c.data)) < want) {
			end = at + int64(len(c.data))
		}
		o.truncated = !c.last
	}
	if size <= base {
		o.truncated, o.cause = true, errors.Join(o.cause, dare.ErrSize)
	}
	if end >= 0 {
		o.cut(end)
		o.truncated, o.trailing = false, true
	}
	if err := out.Truncate(o.size); err != nil {
		return o, outError{err}
	}
	return o, nil
}

// read reads and opens slot i, which is at off of the store file.
func (b *body) read(dst, slot []byte, i, off int64) chunk {
	n, err := b.view.ReadAt(slot, off)
	if err == nil && n < len(slot) {
		err = unix.EIO
	}
	if err != nil {
		return chunk{cause: fmt.Errorf("reading chunk %d: %w", i, err)}
	}
	return b.open(dst, slot, i, off+int64(n) == b.view.Size())
}

// chunk is what a slot gave.
type chunk struct {
	data  []byte
	last  bool // it is sealed as the last
	hole  bool
	cause error // what is missing of it, nil: nothing
}

// open opens slot i, which is the last of the store file if final. What does not
// open where it is may be the other kind of chunk, of a file that was cut or
// added to, and may be shorter than the slot.
func (b *body) open(dst, slot []byte, i int64, final bool) chunk {
	whole := len(slot) == b.ChunkSize+dare.Overhead
	if b.Sparse && !final && zero(slot) {
		return chunk{hole: true}
	}
	if len(slot) <= dare.Overhead {
		return chunk{cause: dare.ErrSize}
	}
	data, err := b.codec.Open(dst, slot, i, final)
	if err == nil {
		return chunk{data: data, last: final}
	}
	if whole {
		if data, oerr := b.codec.Open(dst, slot, i, !final); oerr == nil {
			return chunk{data: data, last: !final}
		}
	}
	if n := dare.SlotLen(slot); n > dare.Overhead && n < len(slot) {
		if data, oerr := b.codec.Open(dst, slot[:n], i, true); oerr == nil {
			return chunk{data: data, last: true, cause: err}
		}
	}
	return chunk{cause: err}
}

func zero(b []byte) bool { return len(bytes.TrimLeft(b, "\x00")) == 0 }
