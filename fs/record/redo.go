package record

import (
	"encoding/binary"
	"fmt"
)

// OpKind is what a redo operation does to a store file.
type OpKind uint8

// The operations.
const (
	OpWrite    OpKind = 1 // Data at Off
	OpPunch    OpKind = 2 // zeros in [Off, Off+Size)
	OpTruncate OpKind = 3 // the file ends at Off
)

// Op is one change of a store file, in bytes of the store file. Doing it twice
// is doing it once.
type Op struct {
	Kind OpKind
	Off  int64
	Size int64 // OpPunch
	Data []byte
}

const (
	redoMagic = "kmsfsrdo"
	redoHead  = 8 + 4 + 4 + 16 + 8 + MACLen // magic, version, count, file id, body length, MAC
	maxOps    = 16
	// MaxRedo bounds a redo record, in bytes.
	MaxRedo = 8 << 20
)

// AppendRedo appends a redo record for the file to dst, its MAC still zero; mac
// is where in the result the MAC belongs. The MAC covers the record with those
// bytes zero. There are at most 16 operations, MaxRedo bytes in all.
func AppendRedo(dst []byte, file [16]byte, ops []Op) (out []byte, mac int) {
	body := 0
	for _, op := range ops {
		body += 1 + 8 + 8 + len(op.Data)
	}
	dst = append(dst, redoMagic...)
	dst = binary.BigEndian.AppendUint32(dst, Version)
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(ops)))
	dst = append(dst, file[:]...)
	dst = binary.BigEndian.AppendUint64(dst, uint64(body))
	mac = len(dst)
	dst = append(dst, make([]byte, MACLen)...)
	for _, op := range ops {
		var size int64
		switch op.Kind {
		case OpWrite:
			size = int64(len(op.Data))
		case OpPunch:
			size = op.Size
		}
		dst = append(dst, byte(op.Kind))
		dst = binary.BigEndian.AppendUint64(dst, uint64(op.Off))
		dst = binary.BigEndian.AppendUint64(dst, uint64(size))
		dst = append(dst, op.Data...)
	}
	return dst, mac
}

// ParseRedo reads a redo record; b may be longer than it (what an earlier,
// longer record left). signed is the record with a zero MAC. Op data points
// into b. Anything not whole is ErrFormat: the operations were not begun then.
func ParseRedo(b []byte) (file [16]byte, ops []Op, mac [MACLen]byte, signed []byte, err error) {
	bad := fmt.Errorf("redo record: %w", ErrFormat)
	if len(b) < redoHead || string(b[:8]) != redoMagic || binary.BigEndian.Uint32(b[8:]) != Version {
		return file, nil, mac, nil, bad
	}
	count, body := binary.BigEndian.Uint32(b[12:]), binary.BigEndian.Uint64(b[32:])
	if count > maxOps || body > uint64(min(len(b), MaxRedo)-redoHead) {
		return file, nil, mac, nil, bad
	}
	file, mac = [16]byte(b[16:32]), [MACLen]byte(b[40:])
	rest := b[redoHead : redoHead+int(body)]
	for range count {
		op, n, ok := parseOp(rest)
		if !ok {
			return file, nil, mac, nil, bad
		}
		ops, rest = append(ops, op), rest[n:]
	}
	if len(rest) != 0 {
		return file, nil, mac, nil, bad
	}
	signed = append([]byte(nil), b[:redoHead+int(body)]...)
	clear(signed[40:redoHead])
	return file, ops, mac, signed, nil
}

func parseOp(b []byte) (op Op, n int, ok bool) {
	const head = 1 + 8 + 8
	if len(b) < head {
		return op, 0, false
	}
	op = Op{Kind: OpKind(b[0]), Off: int64(binary.BigEndian.Uint64(b[1:])), Size: int64(binary.BigEndian.Uint64(b[9:]))}
	if op.Off < 0 || op.Size < 0 || op.Off+op.Size < 0 {
		return op, 0, false
	}
	switch op.Kind {
	case OpWrite:
		if op.Size > int64(len(b)-head) {
			return op, 0, false
		}
		n = head + int(op.Size)
		op.Data, op.Size = b[head:n], 0
	case OpPunch:
		n = head
	case OpTruncate:
		n = head
		if op.Size != 0 {
			return op, 0, false
		}
	default:
		return op, 0, false
	}
	return op, n, true
}
