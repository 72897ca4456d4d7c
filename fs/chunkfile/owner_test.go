package chunkfile_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
	"github.com/kmsfs/kmsfs/fs/record"
)

// bases are the bytes before slot 0 of the three placements.
var bases = []dare.CipherOff{1024, 0, 16}

var (
	fileID  = [16]byte{'f', 'i', 'l', 'e'}
	journal = []byte("the writing-list key of the tests")
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

// owner keeps what the volume keeps for a file: the writing-list entry, the redo
// record, and the header where the placement puts it. What it holds survives a
// crash, and every change of it is a step of the power.
type owner struct {
	*power
	geo dare.Geometry

	listed  bool
	durable int64
	redo    []byte
	apart   []byte // the header, if it is not in the store file
	begins  int
	records int
	synced  int64
	tight   bool
}

func (o *owner) Begin() error {
	if o.listed {
		return nil
	}
	n, err := o.step(0, 1, false)
	if n == 1 {
		o.listed, o.durable = true, 0
		o.begins++
	}
	return err
}

func (o *owner) Redo(ops []record.Op) error {
	o.records++
	if len(ops) == 0 {
		n, err := o.step(0, 1, true)
		if n == 1 {
			o.redo = nil
		}
		return err
	}
	b, mac := record.AppendRedo(nil, fileID, ops)
	copy(b[mac:], sum(b))
	n, err := o.step(0, len(b), false)
	o.redo = writeAt(o.redo, b[:n], 0)
	return err
}

func sum(b []byte) []byte {
	h := hmac.New(sha256.New, journal)
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

func (o *owner) Header(sparse bool) ([]byte, error) {
	block := header(sparse)
	if o.geo.Base == 1024 {
		return block, nil
	}
	n, err := o.step(0, 1, false) // xattr and sidecar replace it at once
	if n == 1 {
		o.apart = block
	}
	return fileID[:o.geo.Base], err
}

func (o *owner) Emptied() {
	if n, _ := o.step(0, 1, true); n == 1 {
		o.durable = 0
	}
	if n, _ := o.step(0, 1, true); n == 1 && o.geo.Base == 16 {
		o.apart = nil
	}
}

func (o *owner) Tight(int) bool { return o.tight }

func (o *owner) Synced(size int64) error {
	n, err := o.step(0, 1, true)
	if n == 1 {
		o.synced = size
		if o.listed {
			o.durable = size
		}
	}
	return err
}

// lower is what the volume does before a truncate: the promise shrinks.
func (o *owner) lower(size int64) error {
	n, err := o.step(0, 1, true)
	if n == 1 {
		o.durable = min(o.durable, size)
	}
	return err
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
	s.f, err = chunkfile.Open(c)
	return err
}

// close writes out and takes the file off the list, as the volume does.
func (s *stored) close() error {
	if err := s.f.Flush(); err != nil {
		return err
	}
	s.f.Wipe()
	s.f = nil
	s.own.listed, s.own.redo = false, nil
	return nil
}

// recover is what the next mount does. It can be killed and done again.
func (s *stored) recover() error {
	if !s.own.listed {
		return s.open()
	}
	if _, ops, mac, signed, err := record.ParseRedo(s.own.redo); err == nil && hmac.Equal(mac[:], sum(signed)) {
		if err := chunkfile.Apply(s.disk, ops); err != nil {
			return fmt.Errorf("apply: %w", err)
		}
	}
	c, err := s.config()
	if err != nil {
		if c.Size > int64(s.own.geo.Base) || s.own.durable > 0 {
			return fmt.Errorf("%d bytes, %d durable: %w", c.Size, s.own.durable, err)
		}
		if err := s.disk.Truncate(0); err != nil {
			return err
		}
		c.Size = 0
	}
	if c.Size > 0 {
		if _, _, err := chunkfile.Repair(c, s.own.durable); err != nil {
			return fmt.Errorf("repair: %w", err)
		}
	}
	if s.dead {
		return errPower
	}
	s.own.listed, s.own.redo = false, nil
	return s.open()
}
