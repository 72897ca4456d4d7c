package audit

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// tape is the open file with the end of the chain. Only the writer goroutine
// uses it, after Open. It never takes anything back: an incomplete write stays
// in the file, and a "torn" line tells of it.
type tape struct {
	place *place
	f     *os.File
	size  int64
	end   link

	first  bool    // the file is empty and goes on from another: a "rotate" line is due
	gap    *Event  // a "gap" line that is due, with its Seq
	open   bool    // the last line is whole but has no newline
	torn   garbage // what stands after the last whole line
	headed link    // what FILE.head holds

	buf   []byte
	marks []mark
	write func(f *os.File, b []byte) (int, error) // replaced by tests
}

// mark is the end of one line in buf.
type mark struct {
	at   int // after the newline
	end  link
	kind Kind // of the log's own lines; "" for the caller's
}

// garbage is bytes that are no line, by count and hash.
type garbage struct {
	n   uint64
	sum hash.Hash
}

func (g *garbage) add(b []byte) {
	if len(b) == 0 {
		return
	}
	if g.sum == nil {
		g.sum = sha256.New()
	}
	g.sum.Write(b)
	g.n += uint64(len(b))
}

func (g *garbage) torn() *Torn {
	sum := g.sum
	if sum == nil {
		sum = sha256.New()
	}
	return &Torn{Bytes: g.n, SHA256: hex.EncodeToString(sum.Sum(nil))}
}

// append writes events as lines behind the log's own lines that are due, with
// one write(2). It returns how many of the events are whole in the file.
func (t *tape) append(events []Event, now time.Time) (written int, err error) {
	t.buf, t.marks = t.buf[:0], t.marks[:0]
	if t.open || t.torn.n > 0 {
		t.buf = append(t.buf, '\n')
	}
	end, err := t.ownLines(now)
	if err != nil {
		return 0, err
	}
	for _, e := range events {
		if t.buf, end, err = appendLine(t.buf, end, e); err != nil {
			return 0, err
		}
		t.marks = append(t.marks, mark{at: len(t.buf), end: end})
	}
	n, err := t.write(t.f, t.buf)
	t.size += int64(n)
	return t.settle(n), err
}

// ownLines puts the log's own lines that are due into buf.
func (t *tape) ownLines(now time.Time) (link, error) {
	end := t.end
	own := func(e Event) (err error) {
		e.Time = now
		before := end.seq
		if e.Seq > before { // a gap: the number goes on from where the head was
			end.seq = e.Seq - 1
		}
		if t.buf, end, err = appendLine(t.buf, end, e); err == nil {
			t.marks = append(t.marks, mark{len(t.buf), end, e.Kind})
		}
		return err
	}
	if t.torn.n > 0 {
		if err := own(Event{Kind: KindTorn, Torn: t.torn.torn()}); err != nil {
			return end, err
		}
	}
	if t.first {
		if err := own(Event{Kind: KindRotate, Result: OK}); err != nil {
			return end, err
		}
	}
	if t.gap != nil {
		if err := own(*t.gap); err != nil {
			return end, err
		}
	}
	return end, nil
}

// settle takes note of what the first n bytes of buf left in the file.
func (t *tape) settle(n int) (events int) {
	if n == 0 {
		return 0
	}
	var last mark
	for _, m := range t.marks {
		if m.at-1 > n { // not even whole without its newline
			break
		}
		last = m
		switch m.kind {
		case "":
			events++
		case KindRotate:
			t.first = false
		case KindGap:
			t.gap = nil
		}
	}
	switch {
	case last.at == 0: // nothing but a piece
		rest := t.buf[:n]
		if t.torn.n == 0 && t.open {
			rest, t.open = rest[1:], false // the newline ended the last line
		}
		t.torn.add(rest)
	case last.at-1 == n:
		t.end, t.torn, t.open = last.end, garbage{}, true
	default:
		t.end, t.torn, t.open = last.end, garbage{}, false
		t.torn.add(t.buf[last.at:n])
	}
	return events
}

// due reports whether the log has a line of its own to write that waits for
// no event.
func (t *tape) due() bool { return t.torn.n > 0 || t.gap != nil }

// sync makes the lines durable, and then the head. While a "gap" line is due
// the old head stays: it is the evidence.
func (t *tape) sync(now time.Time) error {
	if t.end == t.headed || t.gap != nil {
		return nil
	}
	if err := t.f.Sync(); err != nil {
		return err
	}
	if err := t.place.writeHead(t.end, now); err != nil {
		return err
	}
	t.headed = t.end
	return nil
}

// rotate makes a new FILE the end of the log. If somebody else has moved FILE
// away already, nothing is renamed. On failure the log goes on where it is.
func (t *tape) rotate(now time.Time) error {
	if err := t.sync(now); err != nil {
		return err
	}
	same, there, err := t.place.holds(t.f)
	switch {
	case err != nil:
		return err
	case same && t.size == 0:
		return nil
	case same:
		if err := t.place.shift(); err != nil {
			return err
		}
		there = false
	}
	// From here on the log goes on in its old file, under its new name, until
	// a new one could be made.
	flags := unix.O_RDWR | unix.O_APPEND | unix.O_CREAT
	if !there {
		flags |= unix.O_EXCL
	}
	f, err := t.place.open("", flags)
	if err != nil {
		return err
	}
	if st, err := f.Stat(); err != nil || st.Size() > 0 {
		if err == nil {
			err = fmt.Errorf("%w: another file has taken the name %s", ErrFile, t.place.path)
		}
		_ = f.Close() // nothing was written to it
		return err
	}
	old := t.f
	t.f, t.size, t.first, t.open, t.torn = f, 0, t.end.seq > 0, false, garbage{}
	return old.Close()
}
