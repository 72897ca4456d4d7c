package lease

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"strings"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
)

// The lease is one disk sector, so that a write in place is not torn.
const (
	recordLen = 512
	magic     = "kmsfslse"
	version   = 1
	maxHost   = 64 // bytes, as Linux bounds it
	macAt     = recordLen - sha256.Size

	flagSigned = 1
)

// record is what a lease file says. docs/format.md, section 16, has the table.
type record struct {
	signed   bool // else the last bytes are a checksum
	interval time.Duration
	beat     uint64
	machine  [sha256.Size]byte
	boot     [sha256.Size]byte
	token    [16]byte
	process  process
	begun    int64 // seconds since 1970 by the owner's clock, for people
	host     string
}

// process is one process of a machine: a number alone is used again.
type process struct {
	pid       uint32
	start     uint64 // clock ticks after the machine's start
	namespace uint64 // inode of the pid namespace
}

func (r *record) encode(key *keymem.Key) []byte {
	b := make([]byte, recordLen)
	copy(b, magic)
	binary.BigEndian.PutUint16(b[8:], version)
	if key != nil {
		binary.BigEndian.PutUint16(b[10:], flagSigned)
	}
	binary.BigEndian.PutUint32(b[12:], uint32(r.interval/time.Millisecond))
	binary.BigEndian.PutUint64(b[16:], r.beat)
	copy(b[24:], r.machine[:])
	copy(b[56:], r.boot[:])
	copy(b[88:], r.token[:])
	binary.BigEndian.PutUint32(b[104:], r.process.pid)
	binary.BigEndian.PutUint64(b[108:], r.process.start)
	binary.BigEndian.PutUint64(b[116:], r.process.namespace)
	binary.BigEndian.PutUint64(b[124:], uint64(r.begun))
	b[132] = byte(copy(b[133:133+maxHost], r.host))
	copy(b[macAt:], seal(b[:macAt], key))
	return b
}

// seal is the MAC under key, or without one a checksum.
func seal(b []byte, key *keymem.Key) []byte {
	if key == nil {
		sum := sha256.Sum256(b)
		return sum[:]
	}
	h := hmac.New(sha256.New, key.Bytes())
	h.Write(b)
	return h.Sum(nil)
}

// parse reads a lease. ok is false for what is not whole or not authentic. Who
// has no key cannot tell, and takes a signed one as it is.
func parse(b []byte, key *keymem.Key) (r record, ok bool) {
	if len(b) != recordLen || string(b[:8]) != magic || binary.BigEndian.Uint16(b[8:]) != version {
		return r, false
	}
	flags, host := binary.BigEndian.Uint16(b[10:]), int(b[132])
	if flags > flagSigned || host > maxHost {
		return r, false
	}
	r.signed = flags == flagSigned
	switch {
	case !r.signed:
		ok = hmac.Equal(b[macAt:], seal(b[:macAt], nil))
	case key != nil:
		ok = hmac.Equal(b[macAt:], seal(b[:macAt], key))
	default:
		ok = true
	}
	if !ok {
		return record{}, false
	}
	r.interval = time.Duration(binary.BigEndian.Uint32(b[12:])) * time.Millisecond
	r.beat = binary.BigEndian.Uint64(b[16:])
	r.machine, r.boot, r.token = [32]byte(b[24:56]), [32]byte(b[56:88]), [16]byte(b[88:104])
	r.process = process{binary.BigEndian.Uint32(b[104:]), binary.BigEndian.Uint64(b[108:]), binary.BigEndian.Uint64(b[116:])}
	r.begun = int64(binary.BigEndian.Uint64(b[124:]))
	r.host = strings.ToValidUTF8(string(b[133:133+host]), "?")
	return r, true
}
