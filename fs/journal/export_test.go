package journal

import (
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// File is what a Log needs of a segment's file.
type File = file

// Lengths of the format.
const (
	HeaderLen  = headerLen
	RecordHead = recordHead
	EntryHead  = entryHead
	Small      = smallSegment
)

// OpenWrapped is Open with wrap around each segment's file.
func OpenWrapped(meta *backing.Dir, key *keymem.Key, o Options, wrap func(i int, f File) File) (*Log, *Found, error) {
	return open(meta, key, o, wrap)
}

// ReadFiles is Read of two files; nil is one that does not exist.
func ReadFiles(a, b File, key *keymem.Key) (*Found, error) {
	st, err := readState(&[2]file{a, b}, key)
	if err != nil {
		return nil, err
	}
	return &st.found, nil
}

// Header makes a header block.
func Header(epoch, oldest uint32, key *keymem.Key) []byte {
	b, _ := (&header{epoch: epoch, oldest: oldest}).encode(key)
	return b
}

// Sign chains records, which hold no MACs yet, to the header block before them.
func Sign(key *keymem.Key, head []byte, records ...[]byte) []byte {
	out := append([]byte(nil), head...)
	mac := headerMAC(key, head[:signedLen])
	c := newChain(key)
	for _, r := range records {
		if len(r) >= recordHead {
			mac = c.next(mac, r)
			copy(r[8:], mac[:])
		}
		out = append(out, r...)
	}
	return out
}

// RecordLen is the length of the record that begins with b.
func RecordLen(b []byte) int { return recordLen(b) }

// AppendEntry, AppendDone and ParseEntry are the codec of records.
func AppendEntry(dst []byte, e Entry) ([]byte, error) { return appendEntry(dst, &e) }

// AppendDone appends a record that epoch is done.
func AppendDone(dst []byte, epoch uint32) []byte { return appendDone(dst, epoch) }

// ParseEntry reads the body of a record.
func ParseEntry(kind Kind, b []byte) (Entry, bool) { return parseEntry(kind, b) }
