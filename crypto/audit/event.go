package audit

import (
	"errors"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/kmsfs/kmsfs/crypto/fault"
)

// Kind says what a line tells about.
type Kind string

// The kinds that callers write.
const (
	KindUse       Kind = "use"       // a key was handed out, or refused
	KindCall      Kind = "call"      // one call to the key service, background ones included
	KindIntegrity Kind = "integrity" // a damaged chunk, header or name
	KindMount     Kind = "mount"
	KindUnmount   Kind = "unmount"
	KindPolicy    Kind = "policy" // classes or rules changed
)

// The kinds that the log itself writes.
const (
	KindRotate Kind = "rotate" // first line of a file that goes on from another
	KindLost   Kind = "lost"   // Lost events could not be written before this line
	KindTorn   Kind = "torn"   // the bytes before this line are an incomplete write; Torn tells which
	KindGap    Kind = "gap"    // the log was opened and did not end as its head file says
)

// OK is the Result of what succeeded.
const OK = "ok"

// Event is one line. The caller fills what it knows; Write completes Time
// (if zero), Mount and Store (from Options, if empty) and Caller.Program, and
// sets Seq, Prev and Hash. Strings are cut to bounded lengths.
type Event struct {
	Seq     uint64    `json:"seq"`             // from 1, without gaps
	Time    time.Time `json:"time"`            // RFC 3339 with nanoseconds, UTC
	Kind    Kind      `json:"kind"`            // see the constants
	Mount   string    `json:"mount,omitempty"` // mountpoint
	Store   string    `json:"store,omitempty"` // store id
	*Caller           // uid, gid, pid, program; nil for work that is done for nobody

	Op         string   `json:"op,omitempty"`     // "create", "open", "GenerateDataKey", …
	File       string   `json:"file,omitempty"`   // file id, or the id in the encryption context
	Branch     string   `json:"branch,omitempty"` // the id that the calls name instead of File, for a shared key
	Class      string   `json:"class,omitempty"`
	Key        string   `json:"key,omitempty"`        // key URI
	Purpose    string   `json:"purpose,omitempty"`    // data, names or store
	Requests   []string `json:"requests,omitempty"`   // request ids of all attempts, in order
	Request    string   `json:"request,omitempty"`    // of the attempt that decided
	Source     string   `json:"source,omitempty"`     // call, shared-call, cache, pool, branch or open-file
	Cached     bool     `json:"cached,omitempty"`     // no call was made for this use
	Background bool     `json:"background,omitempty"` // a call that nobody waits for
	Result     string   `json:"result,omitempty"`     // OK, or the kind of failure
	Code       string   `json:"code,omitempty"`       // the key service's own error code
	Detail     string   `json:"detail,omitempty"`     // one line about a failure, without names

	Lost uint64 `json:"lost,omitempty"` // KindLost
	Torn *Torn  `json:"torn,omitempty"` // KindTorn

	Prev string `json:"prev"`
	Hash string `json:"hash,omitempty"` // always the last member
}

// Torn names the bytes between the last whole line and the newline before the
// "torn" line.
type Torn struct {
	Bytes  uint64 `json:"bytes"`
	SHA256 string `json:"sha256"`
}

// Failed reports whether the event tells of a failure.
func (e *Event) Failed() bool { return e.Result != "" && e.Result != OK }

// Failure returns Result and Detail for err: OK and "" for nil, else the kind
// of the first sentinel in err's tree and its text. The full text of err is not
// used: operating-system errors in it hold plaintext paths.
func Failure(err error) (result, detail string) {
	var sentinel *fault.Error
	var errno syscall.Errno
	switch {
	case err == nil:
		return OK, ""
	case errors.As(err, &sentinel):
		return sentinel.Kind().String(), sentinel.Error()
	case errors.As(err, &errno):
		return "error", errno.Error()
	}
	return "error", ""
}

// Longest texts of a line, in bytes. With every byte escaped as \u00XX a line
// stays below MaxLine.
const (
	maxMount    = 4096 // PATH_MAX
	maxKey      = 2048
	maxField    = 256
	maxDetail   = 1024
	maxRequests = 32
)

// MaxLine bounds a line, its newline included. Longer ones are no lines of a
// log.
const MaxLine = 128 << 10

// bounded returns a copy of e that shares nothing with the caller and fits a
// line.
func (e Event) bounded() Event {
	e.Kind = Kind(clip(string(e.Kind), maxField))
	e.Mount, e.Key, e.Detail = clip(e.Mount, maxMount), clip(e.Key, maxKey), oneLine(clip(e.Detail, maxDetail))
	for _, s := range []*string{&e.Store, &e.Op, &e.File, &e.Branch, &e.Class, &e.Purpose, &e.Request, &e.Source, &e.Result, &e.Code} {
		*s = clip(*s, maxField)
	}
	if len(e.Requests) > maxRequests { // the last ones tell how it ended
		e.Requests = e.Requests[len(e.Requests)-maxRequests:]
	}
	e.Requests = slices.Clone(e.Requests)
	for i, r := range e.Requests {
		e.Requests[i] = clip(r, maxField)
	}
	if e.Caller != nil {
		e.Caller = e.Caller.withProgram()
	}
	return e
}

// clip cuts s to at most n bytes of valid UTF-8.
func clip(s string, n int) string {
	if len(s) > n {
		s = s[:n]
		for i := 0; i < utf8.UTFMax && len(s) > 0; i++ {
			if r, size := utf8.DecodeLastRuneInString(s); r != utf8.RuneError || size != 1 {
				break
			}
			s = s[:len(s)-1]
		}
	}
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, "?")
	}
	return s
}

func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}
