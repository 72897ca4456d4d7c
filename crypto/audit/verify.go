package audit

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Report is what Verify finds.
type Report struct {
	Files []FileReport `json:"files"` // oldest first
	Lines uint64       `json:"lines"` // whole lines in all files
	First uint64       `json:"first"` // number of the first line that is there, 0: none
	Last  uint64       `json:"last"`  // number of the last one
	Head  string       `json:"head"`  // hash of the last line, "": none
	From  time.Time    `json:"from"`  // time of the first line
	To    time.Time    `json:"to"`    // time of the last line
	Lost  uint64       `json:"lost"`  // events that could not be written, by the log's own account

	// Problems are what an untouched log never has; Warnings what it has after
	// a crash or a full disk, or when old files were put away.
	Problems []Finding `json:"problems"`
	Warnings []Finding `json:"warnings"`
	More     int       `json:"more,omitempty"` // findings that the lists have no room for; some of them may be problems
}

// OK reports whether the chain is whole.
func (r *Report) OK() bool { return len(r.Problems) == 0 }

// FileReport is one file of the log.
type FileReport struct {
	Name  string `json:"name"`
	Bytes int64  `json:"bytes"`
	Lines uint64 `json:"lines"`
	First uint64 `json:"first,omitempty"`
	Last  uint64 `json:"last,omitempty"`
}

// Finding is one place in the log.
type Finding struct {
	File string `json:"file"`
	Line uint64 `json:"line"` // within the file, from 1; 0: the file as a whole
	Text string `json:"text"`
}

func (f Finding) String() string {
	if f.Line == 0 {
		return f.File + ": " + f.Text
	}
	return fmt.Sprintf("%s:%d: %s", f.File, f.Line, f.Text)
}

// maxFindings bounds each list of a Report.
const maxFindings = 1000

// Verify checks the log at path with its rotated files, also while it is
// written. heads are hashes that were noted earlier (Report.Head): each must be
// the hash of a line. A broken chain is no error: see Report.OK. Errors:
// ErrNoLog, ErrFile, and the operating system's.
func Verify(path string, heads ...string) (Report, error) {
	return Walk(path, nil, heads...)
}

// Walk is Verify, and calls f for each whole line, oldest first. It ends early
// with f's error.
func Walk(path string, f func(Event) error, heads ...string) (Report, error) {
	p, err := openPlace(path)
	if err != nil {
		return Report{}, noLog(path, err)
	}
	defer p.close()
	// The head first: what it names is in the files by then.
	head, headErr := p.readHead()
	if headErr != nil && !errors.Is(headErr, errLine) {
		return Report{}, headErr
	}
	files, err := p.openAll()
	defer func() {
		for _, file := range files {
			_ = file.Close() // only read
		}
	}()
	if err != nil {
		return Report{}, err
	}
	if len(files) == 0 && head == nil && headErr == nil {
		return Report{}, fmt.Errorf("%w: %s", ErrNoLog, path)
	}
	c := &checker{each: f, head: head, noted: map[string]bool{}}
	for _, h := range heads {
		c.noted[h] = false
	}
	for _, file := range files {
		if err := c.file(file.Name(), file); err != nil {
			return c.report, err
		}
	}
	c.finish(p.path+headSuffix, headErr, heads)
	return c.report, nil
}

func noLog(path string, err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %s", ErrNoLog, path)
	}
	return err
}

// openAll opens the files of the log, oldest first. A rotation meanwhile is
// noticed and they are opened again.
func (p *place) openAll() ([]*os.File, error) {
	for try := 0; ; try++ {
		numbers, err := p.archives()
		if err != nil {
			return nil, err
		}
		var files []*os.File
		for _, n := range append(numbers, 0) {
			suffix := ""
			if n > 0 {
				suffix = "." + strconv.Itoa(n)
			}
			f, err := p.open(suffix, unix.O_RDONLY)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return files, err
			}
			files = append(files, f)
		}
		again, err := p.archives()
		if err != nil {
			return files, err
		}
		if slices.Equal(numbers, again) || try == 10 {
			if n := len(numbers); n > 1 && len(files) >= n {
				slices.Reverse(files[:n])
			}
			return files, nil
		}
		for _, f := range files {
			_ = f.Close() // only read
		}
	}
}

// checker follows the chain through the files of one log.
type checker struct {
	report Report
	each   func(Event) error
	head   *link
	noted  map[string]bool // hash → seen

	end      link // of the last whole line
	headSeen bool
	garbage  garbage
	pieces   int    // lines of garbage
	at       uint64 // line of the file
	badAt    uint64 // where the garbage began
	name     string
}

func (c *checker) problem(line uint64, format string, args ...any) {
	c.add(&c.report.Problems, line, format, args...)
}

func (c *checker) warn(line uint64, format string, args ...any) {
	c.add(&c.report.Warnings, line, format, args...)
}

func (c *checker) add(to *[]Finding, line uint64, format string, args ...any) {
	if len(*to) == maxFindings {
		c.report.More++
		return
	}
	*to = append(*to, Finding{c.name, line, fmt.Sprintf(format, args...)})
}

// file reads one file. Lines longer than MaxLine are garbage and not held in
// memory.
func (c *checker) file(name string, r io.Reader) error {
	c.name, c.at = name, 0
	c.report.Files = append(c.report.Files, FileReport{Name: name})
	this := &c.report.Files[len(c.report.Files)-1]
	in := bufio.NewReaderSize(r, MaxLine)
	for {
		line, err := in.ReadSlice('\n')
		this.Bytes += int64(len(line))
		if len(line) == 0 && errors.Is(err, io.EOF) {
			break
		}
		c.at++
		if errors.Is(err, bufio.ErrBufferFull) {
			if more, err := c.long(in, line, this); err != nil {
				return err
			} else if !more {
				break
			}
			continue
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("%s: %w", name, err)
		}
		whole := err == nil
		if whole {
			line = line[:len(line)-1]
		}
		if err := c.line(line, this); err != nil {
			return err
		}
		if !whole { // whatever is being appended now is not looked at
			break
		}
	}
	if c.pieces > 0 {
		c.warn(c.badAt, "the file ends with an incomplete write of %d bytes: a crash, a full disk, or a line that is being written", c.garbage.n)
		c.garbage, c.pieces = garbage{}, 0
	}
	return nil
}

// long takes a line of any length as garbage. more is false at the end.
func (c *checker) long(in *bufio.Reader, first []byte, this *FileReport) (more bool, err error) {
	c.piece()
	c.garbage.add(first)
	for {
		b, err := in.ReadSlice('\n')
		this.Bytes += int64(len(b))
		if err == nil {
			b = b[:len(b)-1]
		}
		c.garbage.add(b)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, io.EOF):
			return false, nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return false, fmt.Errorf("%s: %w", c.name, err)
		}
	}
}

// piece begins a further line of garbage.
func (c *checker) piece() {
	if c.pieces == 0 {
		c.badAt = c.at
	} else {
		c.garbage.add([]byte{'\n'})
	}
	c.pieces++
}

func (c *checker) line(line []byte, this *FileReport) error {
	p, err := parseLine(line)
	if err != nil {
		c.piece()
		c.garbage.add(line)
		return nil
	}
	c.pieceEnds(&p)
	c.chain(&p)
	c.end = p.link
	if c.head != nil && p.link.seq == c.head.seq {
		c.headSeen = true
		if p.link != *c.head {
			c.problem(c.at, "line %d is not the one that the head file names", p.Seq)
		}
	}
	if _, ok := c.noted[p.Hash]; ok {
		c.noted[p.Hash] = true
	}
	if this.First == 0 {
		this.First = p.Seq
	}
	this.Last = p.Seq
	this.Lines++
	r := &c.report
	r.Lines++
	if r.First == 0 {
		r.First, r.From = p.Seq, p.Time
	}
	r.Last, r.Head, r.To = p.Seq, p.Hash, p.Time
	if p.Kind == KindLost {
		r.Lost += p.Lost
		c.warn(c.at, "%d events could not be written before this line", p.Lost)
	}
	if c.each == nil {
		return nil
	}
	return c.each(p.Event)
}

// pieceEnds judges the garbage before a whole line.
func (c *checker) pieceEnds(p *parsed) {
	switch {
	case p.Kind == KindTorn && p.Torn != nil && *p.Torn == *c.garbage.torn() && c.pieces > 0:
		c.warn(c.badAt, "an incomplete write of %d bytes, set aside", p.Torn.Bytes)
	case p.Kind == KindTorn && c.pieces > 0:
		c.problem(c.badAt, "not what the \"torn\" line %d after it tells of", p.Seq)
	case p.Kind == KindTorn:
		c.problem(c.at, "a \"torn\" line without an incomplete write before it")
	case c.pieces > 0:
		c.problem(c.badAt, "not a line of the log, or changed")
	}
	c.garbage, c.pieces = garbage{}, 0
}

// chain judges how a whole line follows the one before.
func (c *checker) chain(p *parsed) {
	first := c.end.seq == 0
	switch {
	case p.Kind == KindGap && !first && p.prev == c.end.hash:
		c.problem(c.at, "when the log was opened: %s", p.Detail)
	case first && p.Seq == 1 && p.prev == (link{}).hash:
	case first && p.Seq > 1 && (p.Kind == KindRotate || p.Kind == KindTorn):
		c.warn(c.at, "lines 1 to %d are in older files that are not here", p.Seq-1)
	case first:
		c.problem(c.at, "the beginning is missing: the first line is number %d", p.Seq)
	case p.prev == c.end.hash && p.Seq == c.end.seq+1:
	case p.Seq > c.end.seq+1:
		c.problem(c.at, "lines %d to %d are missing before this one", c.end.seq+1, p.Seq-1)
	case p.Seq <= c.end.seq:
		c.problem(c.at, "line %d stands after line %d: moved, or put in", p.Seq, c.end.seq)
	default:
		c.problem(c.at, "line %d does not follow from the one before: one of them was replaced", p.Seq)
	}
}

// finish judges the end against the head file and the noted heads.
func (c *checker) finish(headFile string, headErr error, heads []string) {
	c.name = headFile
	found := 0
	for _, h := range heads {
		if c.noted[h] {
			found++
			continue
		}
		c.problem(0, "no line has the noted hash %s: lines up to it were changed or cut off", clip(h, hashLen))
	}
	switch {
	case headErr != nil:
		c.problem(0, "the head file is damaged")
	case c.head == nil && c.report.Lines == 0:
	case c.head == nil && found > 0:
		c.warn(0, "there is no head file: what was cut off after the noted line does not show")
	case c.head == nil:
		c.problem(0, "there is no head file: a cut-off end would not show")
	case c.head.seq > c.end.seq:
		c.problem(0, "the end is cut off: the head file names line %d, the last one is %d", c.head.seq, c.end.seq)
	case !c.headSeen && c.head.seq < c.report.First:
		c.problem(0, "the head file names line %d, which is older than the log", c.head.seq)
	case !c.headSeen:
		c.problem(0, "line %d, which the head file names (hash %s), is missing", c.head.seq, hex.EncodeToString(c.head.hash[:]))
	}
}
