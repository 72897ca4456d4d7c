package journal

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
)

// file is a segment's file: *backing.File.
type file interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) error
	Size() (int64, error)
	Truncate(size int64) error
	Allocate(mode uint32, off, size int64) error
	Datasync() error
	Close() error
}

const (
	magic     = "kmsfsjnl"
	version   = 1
	headerLen = 4096 // a block of its own, so that no torn record touches it
	signedLen = 56   // of the header: what the MAC covers; the rest is zero
)

// What is MAC'd begins with a byte that says which of the two it is.
const (
	macHeader = 0
	macRecord = 1
)

// A header begins a segment. It lies in one sector, but for its zeros.
type header struct {
	epoch  uint32
	oldest uint32    // the oldest epoch that is live when this one begins: itself or the one before
	begun  time.Time // this epoch
	since  time.Time // the oldest
	nonce  [16]byte  // two uses of one epoch number do not chain alike
}

func newHeader(epoch, oldest uint32, begun, since time.Time) *header {
	h := &header{epoch: epoch, oldest: oldest, begun: begun, since: since}
	_, _ = rand.Read(h.nonce[:])
	return h
}

// encode returns the header block and its MAC.
func (h *header) encode(key *keymem.Key) (b []byte, mac [macLen]byte) {
	b = make([]byte, 0, headerLen)
	b = append(b, magic...)
	b = binary.BigEndian.AppendUint32(b, version)
	b = binary.BigEndian.AppendUint32(b, h.epoch)
	b = binary.BigEndian.AppendUint32(b, h.oldest)
	b = binary.BigEndian.AppendUint32(b, 0)
	b = binary.BigEndian.AppendUint64(b, uint64(h.begun.UnixNano()))
	b = binary.BigEndian.AppendUint64(b, uint64(h.since.UnixNano()))
	b = append(b, h.nonce[:]...)
	mac = headerMAC(key, b)
	b = append(b, mac[:]...)
	return b[:headerLen], mac
}

func headerMAC(key *keymem.Key, signed []byte) (mac [macLen]byte) {
	m := hmac.New(sha256.New, key.Bytes())
	m.Write([]byte{macHeader})
	m.Write(signed)
	m.Sum(mac[:0])
	return mac
}

// parseHeader reads a header block; h is nil if it is none of this key, which
// is what a crash while it was first written leaves too.
func parseHeader(key *keymem.Key, b []byte) (h *header, mac [macLen]byte, err error) {
	if len(b) < headerLen || string(b[:8]) != magic {
		return nil, mac, nil
	}
	if v := binary.BigEndian.Uint32(b[8:]); v != version {
		if v > version {
			return nil, mac, ErrNewer
		}
		return nil, mac, nil
	}
	mac = headerMAC(key, b[:signedLen])
	if !hmac.Equal(mac[:], b[signedLen:signedLen+macLen]) || !allZero(b[signedLen+macLen:headerLen]) {
		return nil, mac, nil
	}
	h = &header{
		epoch:  binary.BigEndian.Uint32(b[12:]),
		oldest: binary.BigEndian.Uint32(b[16:]),
		begun:  time.Unix(0, int64(binary.BigEndian.Uint64(b[24:]))),
		since:  time.Unix(0, int64(binary.BigEndian.Uint64(b[32:]))),
		nonce:  [16]byte(b[40:]),
	}
	if h.epoch == 0 || h.oldest == 0 || h.oldest > h.epoch || h.epoch-h.oldest > 1 {
		return nil, mac, nil // nobody with the key writes that
	}
	return h, mac, nil
}

func allZero(b []byte) bool {
	return len(bytes.TrimLeft(b, "\x00")) == 0
}

// chain makes the MACs of records. Not safe for concurrent use.
type chain struct {
	mac  hash.Hash
	last [1 + macLen]byte // macRecord || the MAC of the record before
}

func newChain(key *keymem.Key) *chain {
	c := &chain{mac: hmac.New(sha256.New, key.Bytes())}
	c.last[0] = macRecord
	return c
}

// next returns the MAC of a record behind the one with MAC before. The bytes
// where the record has its own are left out.
func (c *chain) next(before [macLen]byte, record []byte) (mac [macLen]byte) {
	copy(c.last[1:], before[:])
	c.mac.Reset()
	c.mac.Write(c.last[:])
	c.mac.Write(record[:8])
	c.mac.Write(record[recordHead:])
	c.mac.Sum(mac[:0])
	return mac
}

// segment is what a segment's file holds.
type segment struct {
	header
	entries []Entry
	done    uint32       // the greatest epoch that a record says is done
	mac     [macLen]byte // of the last record, or the header
	end     int64        // behind it
}

// readSegment reads up to the first record that is not whole or not authentic.
// It returns nil if the file has no header of this key.
func readSegment(f file, key *keymem.Key) (*segment, error) {
	size, err := f.Size()
	if err != nil || size < headerLen {
		return nil, err
	}
	w := &window{f: f, size: size}
	b, err := w.at(0, headerLen)
	if err != nil {
		return nil, err
	}
	h, mac, err := parseHeader(key, b)
	if h == nil || err != nil {
		return nil, err
	}
	s := &segment{header: *h, mac: mac, end: headerLen}
	c := newChain(key)
	for {
		record, err := w.record(s.end)
		if err != nil {
			return nil, err
		}
		if record == nil {
			return s, nil
		}
		mac := c.next(s.mac, record)
		if !hmac.Equal(mac[:], record[8:recordHead]) || !s.add(record) {
			return s, nil
		}
		s.mac = mac
		s.end += int64(len(record))
	}
}

// add takes an authentic record, unless nobody with the key writes it.
func (s *segment) add(record []byte) bool {
	kind, body := Kind(record[0]), record[recordHead:]
	switch kind {
	case done:
		epoch := binary.BigEndian.Uint32(body)
		if epoch > s.epoch {
			return false
		}
		s.done = max(s.done, epoch)
		return true
	case resume:
		return true
	}
	e, ok := parseEntry(kind, bytes.Clone(body))
	if ok {
		s.entries = append(s.entries, e)
	}
	return ok
}

// recordLen returns a record's length from its first 8 bytes, or 0 if there is
// no such record.
func recordLen(b []byte) int {
	if b[1] != 0 || b[2] != 0 || b[3] != 0 {
		return 0
	}
	n := binary.BigEndian.Uint32(b[4:])
	ok := false
	switch Kind(b[0]) {
	case Ops:
		ok = n >= entryHead && n <= MaxEntry
	case Grow, Promise:
		ok = n == entryHead
	case done:
		ok = n == doneLen
	case resume:
		ok = n == resumeLen
	}
	if !ok {
		return 0
	}
	return recordHead + int(n)
}

// window reads a file from its beginning to its end, some at a time.
type window struct {
	f    file
	size int64
	off  int64
	buf  []byte
}

const windowLen = 256 << 10

// record returns the bytes of the record at off, valid until the next call, or
// nil if there is no whole one.
func (w *window) record(off int64) ([]byte, error) {
	if w.size-off < recordHead {
		return nil, nil
	}
	b, err := w.at(off, recordHead)
	if len(b) < recordHead || err != nil {
		return nil, err
	}
	n := recordLen(b)
	if n == 0 || int64(n) > w.size-off {
		return nil, nil
	}
	if b, err = w.at(off, n); len(b) < n || err != nil {
		return nil, err
	}
	return b, nil
}

// at returns n bytes at off, fewer at the end of the file, valid until the next
// call.
func (w *window) at(off int64, n int) ([]byte, error) {
	if off >= w.off && off+int64(n) <= w.off+int64(len(w.buf)) {
		return w.buf[off-w.off:][:n], nil
	}
	want := int(min(w.size-off, int64(max(n, windowLen))))
	if cap(w.buf) < want {
		w.buf = make([]byte, want)
	}
	got, err := w.f.ReadAt(w.buf[:want], off)
	if err != nil {
		w.buf = w.buf[:0]
		return nil, err
	}
	w.off, w.buf = off, w.buf[:got]
	return w.buf[:min(n, got)], nil
}
