package chunkfile_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
	"github.com/kmsfs/kmsfs/fs/journal"
)

// bases are the bytes before slot 0 of the three placements.
var bases = []dare.CipherOff{1024, 0, 16}

var (
	fileID = [16]byte{'f', 'i', 'l', 'e'}
	macKey = []byte("the header key of the tests")
)

func newCodec(t testing.TB, chunk int) *dare.Codec {
	t.Helper()
	prk := keymem.Copy(bytes.Repeat([]byte{7}, 32))
	defer prk.Wipe()
	c, err := dare.New(prk, dare.AES256GCM, chunk)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Wipe)
	return c
}

// owner keeps what the volume keeps for a file: its journal, and the header
// where the placement puts it. What it holds survives a crash, and every change
// of it is a step of the power.
type owner struct {
	*power
	geo dare.Geometry

	log     []logged
	birth   int
	covered bool
	durable journal.LSN
	apart   []byte // the header, if it is not in the store file
	records int    // operations logged
	grows   int    // records of growth
	syncs   int    // of the journal
	synced  int64
	tight   bool
}

// logged is a record of the journal.
type logged struct {
	birth    int
	grow     bool
	fence    bool
	promised int64
	ops      []journal.Op
}

func (o *owner) add(l logged, n int) error {
	l.birth = o.birth
	done, err := o.step(0, n, false)
	if done == n {
		o.log = append(o.log, l)
	}
	return err
}

func (o *owner) Log(_ unix.Timespec, promised int64, ops ...journal.Op) (journal.LSN, uint32, error) {
	o.records++
	l := logged{promised: promised}
	for _, op := range ops {
		op.Data = bytes.Clone(op.Data)
		l.ops = append(l.ops, op)
	}
	err := o.add(l, 1)
	return journal.LSN(len(o.log)), 1, err
}

func (o *owner) Live(uint32) bool     { return true }
func (o *owner) Durable() journal.LSN { return o.durable }
func (o *owner) Covered() bool        { return o.covered }

func (o *owner) Commit(upTo journal.LSN) error {
	o.syncs++
	err := o.sync()
	if err == nil {
		o.durable = upTo
	}
	return err
}

func (o *owner) Direct(fence bool, durable int64, write func() error) error {
	if !o.covered || fence {
		o.grows++
		if err := o.add(logged{grow: true, fence: fence, promised: durable}, 1); err != nil {
			return err
		}
		if err := o.Commit(journal.LSN(len(o.log))); err != nil {
			return err
		}
		o.covered = true
	}
	return write()
}

func sum(b []byte) []byte {
	h := hmac.New(sha256.New, macKey)
	h.Write(b)
	return h.Sum(nil)
}

// header is a block that tells whether it is whole.
func header(sparse bool) []byte {
	b := make([]byte, 1024)
	copy(b, "header")
	if sparse {
		b[6] = 1
	}
	copy(b[1024-32:], sum(b[:1024-32]))
	return b
}

func parseHeader(b []byte) (sparse, ok bool) {
	for _, sparse := range []bool{false, true} {
		if bytes.Equal(b, header(sparse)) {
			return sparse, true
		}
	}
	return false, false
}

func (o *owner) NewHeader(sparse bool) ([]byte, error) {
	o.birth++
	o.covered = true
	block := header(sparse)
	if o.geo.Base == 1024 {
		return block, nil
	}
	return fileID[:o.geo.Base], o.PutHeader(block)
}

func (o *owner) Header(sparse bool) (journal.Op, error) {
	if o.geo.Base == 1024 {
		return journal.Op{Kind: journal.OpWrite, Data: header(sparse)}, nil
	}
	return journal.Op{Kind: journal.OpHeader, Data: header(sparse)}, nil
}

func (o *owner) PutHeader(block []byte) error {
	n, err := o.step(0, 1, false) // xattr and sidecar replace it at once
	if n == 1 {
		o.apart = bytes.Clone(block)
	}
	return err
}

func (o *owner) Emptied() { o.covered = false }

func (o *owner) Through() bool { return o.tight }

func (o *owner) Synced(size int64) {
	if err := o.add(logged{promised: size}, 1); err == nil {
		o.synced = size
	}
}

// stored is a file on its disk with its owner, through crashes and reopening.
type stored struct {
	*power
	disk  *memDisk
	own   *owner
	codec *dare.Codec
	f     *chunkfile.File
}

func newStored(t testing.TB, chunk int, base dare.CipherOff) *stored {
	p := &power{}
	s := &stored{power: p, disk: &memDisk{power: p}, codec: newCodec(t, chunk)}
	s.own = &owner{power: p, geo: dare.Geometry{ChunkSize: chunk, Base: base}}
	if err := s.open(); err != nil {
		t.Fatal(err)
	}
	return s
}

// config describes the file as the disk has it. errHeader: its header is not
// whole.
func (s *stored) config() (chunkfile.Config, error) {
	c := chunkfile.Config{Disk: s.disk, Geo: s.own.geo, Codec: s.codec, Owner: s.own, Size: int64(len(s.disk.b))}
	if c.Size == 0 {
		return c, nil
	}
	block := s.own.apart
	if base := int(s.own.geo.Base); len(s.disk.b) < base {
		return c, errHeader
	} else if base == 1024 {
		block = s.disk.b[:base]
	} else if !bytes.Equal(s.disk.b[:base], fileID[:base]) {
		return c, errHeader
	}
	var ok bool
	if c.Sparse, ok = parseHeader(block); !ok {
		return c, errHeader
	}
	return c, nil
}

var errHeader = errors.New("no whole header")

func (s *stored) open() error {
	c, err := s.config()
	if err != nil {
		return err
	}
	c.Durable, c.Promised = c.Size, c.Size
	s.f, err = chunkfile.Open(c)
	return err
}

// close writes out, as the volume does, and is a checkpoint.
func (s *stored) close() error {
	if err := s.f.Flush(); err != nil {
		return err
	}
	if s.f.Pending() > 0 {
		if err := s.own.Commit(journal.LSN(len(s.own.log))); err != nil {
			return err
		}
		if err := s.f.Apply(); err != nil {
			return err
		}
	}
	s.f.Wipe()
	s.f = nil
	s.own.log, s.own.covered, s.own.durable = nil, false, 0
	return nil
}

// recover is what the next mount does. It can be killed and done again.
func (s *stored) recover() error {
	var ops []journal.Op
	promised, live := int64(0), s.own.covered
	for _, l := range s.own.log {
		if l.birth != s.own.birth {
			continue
		}
		if l.fence {
			ops = nil
		}
		live, promised = true, l.promised
		for _, op := range l.ops {
			if op.Kind == journal.OpTruncate {
				promised = min(promised, op.Off)
			}
		}
		ops = append(ops, l.ops...)
	}
	if !live {
		return s.open()
	}
	if len(s.disk.b) > 0 {
		if err := chunkfile.Apply(s.disk, s.own.PutHeader, ops...); err != nil {
			return fmt.Errorf("apply: %w", err)
		}
	}
	c, err := s.config()
	if err != nil {
		if c.Size > int64(s.own.geo.Base) || promised > 0 {
			return fmt.Errorf("%d bytes, %d promised: %w", c.Size, promised, err)
		}
		if err := s.disk.Truncate(0); err != nil {
			return err
		}
		c.Size = 0
	}
	if c.Size > 0 {
		c.Promised = promised
		if _, err := chunkfile.Repair(c); err != nil {
			return fmt.Errorf("repair: %w", err)
		}
	}
	if s.dead {
		return errPower
	}
	s.own.log, s.own.covered, s.own.durable = nil, false, 0
	return s.open()
}
