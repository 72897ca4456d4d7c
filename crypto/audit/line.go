package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// link is where a chain ends: number and hash of its last line. The zero link
// is the beginning.
type link struct {
	seq  uint64
	hash [sha256.Size]byte
}

const (
	hashMember = `,"hash":"`
	hashLen    = 2 * sha256.Size
	tailLen    = len(hashMember) + hashLen + len(`"}`)
)

// lineHash is SHA-256 over the hash before and the line without its own.
func lineHash(prev [sha256.Size]byte, bare []byte) [sha256.Size]byte {
	h := sha256.New()
	h.Write(prev[:])
	h.Write(bare)
	var sum [sha256.Size]byte
	h.Sum(sum[:0])
	return sum
}

// appendLine appends e as the line after end to buf, with its newline, and
// returns the new end. e is bounded.
func appendLine(buf []byte, end link, e Event) ([]byte, link, error) {
	e.Seq, e.Prev, e.Hash = end.seq+1, hex.EncodeToString(end.hash[:]), ""
	return appendNumbered(buf, end, e)
}

// appendNumbered is appendLine for an event that has Seq and Prev.
func appendNumbered(buf []byte, end link, e Event) ([]byte, link, error) {
	if y := e.Time.Year(); y < 1 || y > 9999 { // RFC 3339 has no others
		e.Time = time.Time{}
	}
	e.Time = e.Time.UTC()
	bare, err := json.Marshal(&e)
	if err != nil {
		return buf, end, fmt.Errorf("audit: encode line %d: %w", e.Seq, err)
	}
	sum := lineHash(end.hash, bare)
	buf = append(buf, bare[:len(bare)-1]...)
	buf = append(buf, hashMember...)
	buf = hex.AppendEncode(buf, sum[:])
	buf = append(buf, "\"}\n"...)
	return buf, link{e.Seq, sum}, nil
}

// parsed is a line whose own hash is right.
type parsed struct {
	Event
	prev [sha256.Size]byte
	link link // its number and hash
}

// parseLine reads a line without its newline. Any failure is errLine: it is no
// JSON object of the log's shape, or its hash does not belong to its bytes.
func parseLine(line []byte) (parsed, error) {
	var p parsed
	cut := len(line) - tailLen
	if cut < 1 || len(line) >= MaxLine || !bytes.HasPrefix(line[cut:], []byte(hashMember)) || !bytes.HasSuffix(line, []byte(`"}`)) {
		return p, errLine
	}
	if err := json.Unmarshal(line, &p.Event); err != nil {
		return p, fmt.Errorf("%w: %w", errLine, err)
	}
	var ok bool
	if p.prev, ok = parseHash(p.Prev); !ok || p.Seq == 0 {
		return p, errLine
	}
	bare := append(line[:cut:cut], '}')
	p.link = link{p.Seq, lineHash(p.prev, bare)}
	if string(line[cut+len(hashMember):len(line)-2]) != hex.EncodeToString(p.link.hash[:]) {
		return p, errLine
	}
	return p, nil
}

// parseHash reads 64 lower-case hexadecimal digits.
func parseHash(s string) (sum [sha256.Size]byte, ok bool) {
	if len(s) != hashLen {
		return sum, false
	}
	if _, err := hex.Decode(sum[:], []byte(s)); err != nil || hex.EncodeToString(sum[:]) != s {
		return sum, false
	}
	return sum, true
}
