package journal

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// LSN is the place of a record in the order of all records of one open Log,
// over all its epochs. 0 is before the first.
type LSN uint64

// OpKind is what an operation does to a store file.
type OpKind uint8

// The operations.
const (
	OpWrite    OpKind = 1 // Data at Off
	OpPunch    OpKind = 2 // zeros in [Off, Off+Size)
	OpTruncate OpKind = 3 // the file ends at Off
	OpHeader   OpKind = 4 // Data is the file's header block, put where headers live; Off is 0
)

// Op is one change of a store file, in bytes of the store file. Doing it twice
// is doing it once.
type Op struct {
	Kind OpKind
	Off  int64
	Size int64 // OpPunch only
	Data []byte
}

// Kind is what an entry says.
type Kind uint8

// The kinds of entry.
const (
	Ops     Kind = 1 // the operations, in order
	Grow    Kind = 2 // the file is appended to directly, past Durable bytes
	Promise Kind = 3 // an fsync promised Durable bytes

	done   Kind = 4 // an epoch, and all before it, is in place and durable
	resume Kind = 5 // another process goes on with the segment
)

// Entry is what one record says of one file. Birth and Ino are not interpreted
// here; Mtime is, but for 0 <= Nsec < 1<<30, which has room for UTIME_OMIT.
type Entry struct {
	Kind    Kind
	File    [16]byte
	Birth   uint64 // epoch<<32 | serial
	Ino     uint64 // a hint: where to look first
	Durable int64  // bytes of the store file
	Fence   bool   // all earlier records of the file are durable in place, and void
	Mtime   unix.Timespec
	Ops     []Op // kind Ops only
}

// The bounds of an entry.
const (
	MaxOps   = 16
	MaxEntry = 8 << 20 // bytes of its body in a record
)

const (
	macLen     = 32
	recordHead = 8 + macLen // kind 1, zero 3, body length 4, MAC
	entryHead  = 56         // of the body: all but the operations
	opHead     = 1 + 8 + 8
	flagFence  = 1
	resumeLen  = 16
	doneLen    = 4
)

// appendEntry appends e's record to dst, its MAC still zero.
func appendEntry(dst []byte, e *Entry) ([]byte, error) {
	n, err := e.bodyLen()
	if err != nil {
		return nil, err
	}
	dst = appendRecordHead(dst, e.Kind, n)
	dst = append(dst, e.File[:]...)
	dst = binary.BigEndian.AppendUint64(dst, e.Birth)
	dst = binary.BigEndian.AppendUint64(dst, e.Ino)
	dst = binary.BigEndian.AppendUint64(dst, uint64(e.Durable))
	dst = binary.BigEndian.AppendUint64(dst, uint64(e.Mtime.Sec))
	dst = binary.BigEndian.AppendUint32(dst, uint32(e.Mtime.Nsec))
	var flags byte
	if e.Fence {
		flags = flagFence
	}
	dst = append(dst, flags, byte(len(e.Ops)), 0, 0)
	for i := range e.Ops {
		op := &e.Ops[i]
		size := op.Size
		if op.hasData() {
			size = int64(len(op.Data))
		}
		dst = append(dst, byte(op.Kind))
		dst = binary.BigEndian.AppendUint64(dst, uint64(op.Off))
		dst = binary.BigEndian.AppendUint64(dst, uint64(size))
		dst = append(dst, op.Data...)
	}
	return dst, nil
}

func appendRecordHead(dst []byte, kind Kind, body int) []byte {
	dst = append(dst, byte(kind), 0, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, uint32(body))
	return append(dst, make([]byte, macLen)...)
}

func appendDone(dst []byte, epoch uint32) []byte {
	return binary.BigEndian.AppendUint32(appendRecordHead(dst, done, doneLen), epoch)
}

func (op *Op) hasData() bool { return op.Kind == OpWrite || op.Kind == OpHeader }

// bodyLen returns the length of e's record without its head, if a reader would
// take it.
func (e *Entry) bodyLen() (int, error) {
	if len(e.Ops) > MaxOps {
		return 0, fmt.Errorf("%d operations: %w", len(e.Ops), ErrEntryTooLong)
	}
	if !e.valid() {
		return 0, fmt.Errorf("kind %d: %w", e.Kind, ErrEntry)
	}
	n := entryHead
	for i := range e.Ops {
		op := &e.Ops[i]
		if !op.valid(int64(len(op.Data))) || op.hasData() != (op.Data != nil) && len(op.Data) > 0 || op.hasData() && op.Size != 0 {
			return 0, fmt.Errorf("operation %d: %w", i, ErrEntry)
		}
		n += opHead + len(op.Data)
		if n > MaxEntry {
			return 0, ErrEntryTooLong
		}
	}
	return n, nil
}

// valid tells about everything but the operations themselves.
func (e *Entry) valid() bool {
	switch e.Kind {
	case Ops:
	case Grow, Promise:
		if len(e.Ops) != 0 {
			return false
		}
	default:
		return false
	}
	return e.Durable >= 0 && e.Mtime.Nsec >= 0 && e.Mtime.Nsec < 1<<30
}

// valid tells whether the operation stays within a file's offsets. data is the
// length of its data.
func (op *Op) valid(data int64) bool {
	if op.Off < 0 || op.Size < 0 {
		return false
	}
	switch op.Kind {
	case OpWrite:
		return op.Off+data >= 0
	case OpPunch:
		return op.Off+op.Size >= 0
	case OpTruncate:
		return op.Size == 0
	case OpHeader:
		return op.Off == 0
	}
	return false
}

// parseEntry reads a body as appendEntry writes it, and nothing else. Data of
// the operations points into b.
func parseEntry(kind Kind, b []byte) (e Entry, ok bool) {
	if len(b) < entryHead || len(b) > MaxEntry {
		return e, false
	}
	e = Entry{
		Kind: kind, File: [16]byte(b),
		Birth:   binary.BigEndian.Uint64(b[16:]),
		Ino:     binary.BigEndian.Uint64(b[24:]),
		Durable: int64(binary.BigEndian.Uint64(b[32:])),
		Fence:   b[52] == flagFence,
	}
	e.Mtime.Sec = int64(binary.BigEndian.Uint64(b[40:]))
	nsec, count := binary.BigEndian.Uint32(b[48:]), int(b[53])
	if b[52]&^flagFence != 0 || count > MaxOps || b[54] != 0 || b[55] != 0 || nsec >= 1<<30 {
		return Entry{}, false
	}
	e.Mtime.Nsec = int64(nsec)
	rest := b[entryHead:]
	for range count {
		op, n, ok := parseOp(rest)
		if !ok {
			return Entry{}, false
		}
		e.Ops, rest = append(e.Ops, op), rest[n:]
	}
	if len(rest) != 0 || !e.valid() {
		return Entry{}, false
	}
	return e, true
}

func parseOp(b []byte) (op Op, n int, ok bool) {
	if len(b) < opHead {
		return op, 0, false
	}
	size := int64(binary.BigEndian.Uint64(b[9:]))
	op = Op{Kind: OpKind(b[0]), Off: int64(binary.BigEndian.Uint64(b[1:]))}
	n = opHead
	if op.hasData() {
		if size < 0 || size > int64(len(b)-opHead) {
			return op, 0, false
		}
		n += int(size)
		op.Data = b[opHead:n:n]
		return op, n, op.valid(size)
	}
	op.Size = size
	return op, n, op.valid(0)
}
