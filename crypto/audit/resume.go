package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// openTape opens or makes the log and finds the end of its chain: in FILE, else
// in the newest FILE.N, else in FILE.head.
func openTape(p *place) (*tape, error) {
	f, err := p.open("", unix.O_RDWR|unix.O_APPEND|unix.O_CREAT)
	if err != nil {
		return nil, err
	}
	t := &tape{place: p, f: f, write: (*os.File).Write}
	if err := t.resume(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return t, nil
}

func (t *tape) resume() error {
	h, err := t.place.readHead()
	damaged := errors.Is(err, errLine)
	if err != nil && !damaged {
		return err
	}
	var want link
	if h != nil {
		want = *h
	}
	last, err := lastLine(t.f, want)
	if err != nil {
		return err
	}
	t.size, t.open, t.torn = last.size, last.open, last.rest
	if last.end.seq == 0 { // no line in FILE: a new file, or a crash while it was made
		if last, err = t.lastArchived(want); err != nil {
			return err
		}
		t.first = last.end.seq > 0
	}
	t.end = last.end
	switch {
	case t.end.seq == 0 && h != nil: // FILE and its archives were moved away
		t.end, t.headed, t.first = want, want, true
	case damaged:
		t.gap = &Event{Kind: KindGap, Detail: "the head file is damaged"}
	case h == nil && t.end.seq > 0:
		t.gap = &Event{Kind: KindGap, Detail: "there is no head file"}
	case want.seq > t.end.seq:
		t.gap = &Event{Kind: KindGap, Seq: want.seq + 1,
			Detail: fmt.Sprintf("the head file says %d lines, the log ends at %d", want.seq, t.end.seq)}
	case last.changed:
		t.gap = &Event{Kind: KindGap, Detail: fmt.Sprintf("line %d is not the one that the head file names", want.seq)}
	default:
		t.headed = want
	}
	return nil
}

// lastArchived is lastLine for the newest archive that has a line.
func (t *tape) lastArchived(want link) (fileEnd, error) {
	numbers, err := t.place.archives()
	if err != nil {
		return fileEnd{}, err
	}
	for _, n := range numbers {
		f, err := t.place.open("."+strconv.Itoa(n), unix.O_RDONLY)
		if err != nil {
			return fileEnd{}, err
		}
		end, err := lastLine(f, want)
		if err = errors.Join(err, f.Close()); err != nil || end.end.seq > 0 {
			return end, err
		}
	}
	return fileEnd{}, nil
}

// fileEnd is how a file of the log ends.
type fileEnd struct {
	end     link    // of the last whole line; zero if there is none
	size    int64   // of the file
	open    bool    // that line has no newline
	rest    garbage // what stands behind it
	changed bool    // the line that should have been want is another
}

// firstWindow is how much is read from the end at first.
const firstWindow = 1 << 20

// lastLine finds the last whole line of f, from the end, and looks whether the
// line numbered want.seq is want.
func lastLine(f *os.File, want link) (fileEnd, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fileEnd{}, err
	}
	for window := int64(firstWindow); ; window *= 4 {
		window = min(window, size)
		b := make([]byte, window)
		if _, err := f.ReadAt(b, size-window); err != nil && !errors.Is(err, io.EOF) {
			return fileEnd{}, err
		}
		e := fileEnd{size: size}
		seen := e.scan(b, window < size, want)
		if window == size || e.end.seq > 0 && (seen || want.seq > e.end.seq) {
			return e, nil
		}
	}
}

// scan fills e from the last bytes of a file; cut says that there are others
// before. It reports whether a line at or below want's number was seen.
func (e *fileEnd) scan(b []byte, cut bool, want link) (seen bool) {
	if cut { // the first line may be a piece
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			b = b[i+1:]
		}
	}
	good := 0
	for at := 0; at < len(b); {
		line, next := b[at:], len(b)
		if i := bytes.IndexByte(line, '\n'); i >= 0 {
			line, next = line[:i], at+i+1
		}
		if p, err := parseLine(line); err == nil {
			e.end, e.open, good = p.link, at+len(line) == len(b), next
			seen = seen || p.link.seq <= want.seq
			if p.link.seq == want.seq {
				e.changed = p.link != want
			}
		}
		at = next
	}
	e.rest.add(b[good:])
	return seen
}
