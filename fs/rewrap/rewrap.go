package rewrap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/record"
)

// Wrapper makes the new recipients; *envelope.Manager is one.
type Wrapper interface {
	Rewrap(ctx context.Context, h *envelope.Header, c envelope.Class, r envelope.Recipients) (*envelope.Header, bool, error)
}

// Writer writes headers. It answers one error for each of the files, nil where
// the header is on the disk, durably; err is of the batch as a whole.
type Writer interface {
	Write(ctx context.Context, files []record.Rewrapped) (each []error, err error)
	// Keys writes the wrapped name keys and store keys that changed, by class.
	Keys(ctx context.Context, k record.StoreKeys) error
}

// Options say which recipients to replace.
type Options struct {
	Class string // "": every class
	// From is the key whose recipients are replaced, "": every recipient that is
	// not under one of the class's active keys, and every active key that has
	// none.
	From string
	// To is the key that takes From's place, one of the class's active keys; ""
	// for all of them. Without From, headers get a recipient under To and keep
	// what they have of the active keys; those under retired keys go.
	To       string
	DryRun   bool
	Workers  int                            // concurrent calls to the key service, default 16
	Progress func(done, total, seen uint64) // called often, from several goroutines; total is 0 while files are still counted
}

// Report is what a run did. All numbers are of files.
type Report struct {
	Seen      uint64    // files with contents
	Todo      uint64    // of them, those whose recipients were not as they shall be
	Rewrapped uint64    // and are now
	Left      uint64    // and are not, at the end
	Keys      int       // wrapped name keys and store keys that were rewrapped
	Failed    []Problem // why not, and headers that could not be looked at
}

// Run gives every file the recipients that it shall have. It is idempotent:
// what is right is passed over without a call, so that a run which was ended, in
// whatever way, is finished by the next one. A store that others work on
// meanwhile is gone through again until nothing is left to do, at most three
// times.
func (s *Store) Run(ctx context.Context, m Wrapper, w Writer, o Options) (*Report, error) {
	if o.Workers <= 0 {
		o.Workers = 16
	}
	if err := s.checkOptions(&o); err != nil {
		return nil, err
	}
	r := &run{s: s, m: m, w: w, o: o, report: &Report{}}
	if err := r.storeKeys(ctx); err != nil {
		return r.report, err
	}
	for pass := range 3 {
		before := r.report.Rewrapped
		r.report.Failed = nil
		if err := r.pass(ctx, pass == 0); err != nil {
			return r.report, err
		}
		if o.DryRun || r.report.Rewrapped == before {
			break
		}
	}
	return r.report, r.end(ctx)
}

func (s *Store) checkOptions(o *Options) error {
	classes := s.Classes()
	if o.Class != "" {
		if !slices.Contains(classes, o.Class) {
			return fmt.Errorf("class %q; the store's are %s: %w", o.Class, strings.Join(classes, ", "), ErrPath)
		}
		classes = []string{o.Class}
	}
	if o.To != "" && !slices.ContainsFunc(classes, func(c string) bool { return slices.Contains(s.Active(c), o.To) }) {
		return fmt.Errorf("%s: %w", o.To, ErrKey)
	}
	return nil
}

type run struct {
	s *Store
	m Wrapper
	w Writer
	o Options

	mu      sync.Mutex
	report  *Report
	pending []record.Rewrapped
	seen    atomic.Uint64
	done    atomic.Uint64
	total   atomic.Uint64
}

// wants returns the recipients that a header of a class shall have; false if the
// run does not concern it.
func (r *run) wants(h *envelope.Header, class string) (envelope.Recipients, bool) {
	active := r.s.Active(class)
	want := envelope.Recipients{Keys: active, From: r.o.From, To: r.o.To}
	has := func(key string) bool {
		return slices.ContainsFunc(h.Recipients, func(x envelope.Recipient) bool { return x.Class == class && x.Wrapped.Key == key })
	}
	switch {
	case r.o.Class != "" && r.o.Class != class, r.o.To != "" && !slices.Contains(active, r.o.To):
		return want, false
	case r.o.From != "":
		return want, has(r.o.From)
	case r.o.To != "":
		want.To, want.Keys = "", nil
		for _, key := range active { // in the class's order
			if key == r.o.To || has(key) {
				want.Keys = append(want.Keys, key)
			}
		}
	}
	var own []string
	for _, x := range h.Recipients {
		if x.Class == class {
			own = append(own, x.Wrapped.Key)
		}
	}
	return want, !slices.Equal(own, want.Keys)
}

// plan returns the classes of which a header's recipients are to be changed.
func (r *run) plan(h *envelope.Header) (classes []string) {
	for _, x := range h.Recipients {
		if _, ok := r.s.layout.Policy.Classes[x.Class]; !ok || slices.Contains(classes, x.Class) {
			continue
		}
		if _, change := r.wants(h, x.Class); change {
			classes = append(classes, x.Class)
		}
	}
	return classes
}

// pass goes through the store once. The first pass counts before it begins, so
// that there is a total.
func (r *run) pass(ctx context.Context, first bool) error {
	if first {
		err := r.s.walk(ctx, sight{problem: func(Problem) {}, file: func(f *file) error {
			r.seen.Add(1)
			if len(r.plan(f.header)) > 0 {
				r.total.Add(1)
			}
			r.progress(true)
			return nil
		}})
		if err != nil {
			return err
		}
		r.report.Seen, r.report.Todo = r.seen.Load(), r.total.Load()
	}
	if r.o.DryRun {
		r.report.Left = r.report.Todo
		return nil
	}
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(r.o.Workers)
	err := r.s.walk(gctx, sight{problem: r.failed, file: func(f *file) error {
		if len(r.plan(f.header)) == 0 {
			return nil
		}
		group.Go(func() error { return r.file(gctx, f) })
		return nil
	}})
	if gerr := group.Wait(); gerr != nil {
		return gerr
	}
	if err != nil {
		return err
	}
	return r.flush(ctx)
}

// end counts what is left.
func (r *run) end(ctx context.Context) error {
	if r.o.DryRun {
		return nil
	}
	var left atomic.Uint64
	err := r.s.walk(ctx, sight{problem: func(Problem) { left.Add(1) }, file: func(f *file) error {
		if len(r.plan(f.header)) > 0 {
			left.Add(1)
		}
		return nil
	}})
	r.report.Left = left.Load()
	r.report.Todo = max(r.report.Todo, r.report.Rewrapped+r.report.Left)
	slices.SortFunc(r.report.Failed, func(a, b Problem) int { return strings.Compare(a.Path, b.Path) })
	return err
}

func (r *run) progress(counting bool) {
	if r.o.Progress == nil {
		return
	}
	total := r.total.Load()
	if counting {
		total = 0
	}
	r.o.Progress(r.done.Load(), total, r.seen.Load())
}

func (r *run) failed(p Problem) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Failed = append(r.report.Failed, p)
}

// rewrap makes a header's new recipients; nil if it is as it shall be.
func (r *run) rewrap(ctx context.Context, h *envelope.Header, purpose string) (*envelope.Header, error) {
	var out *envelope.Header
	for _, class := range r.plan(h) {
		want, _ := r.wants(h, class)
		want.Purpose = purposeOf(purpose)
		next, changed, err := r.m.Rewrap(ctx, h, r.s.class(class), want)
		if err != nil {
			return nil, err
		}
		if changed {
			h, out = next, next
		}
	}
	return out, nil
}

// file rewraps one file. Only the end of the whole run is an error.
func (r *run) file(ctx context.Context, f *file) error {
	defer func() { r.done.Add(1); r.progress(false) }()
	h, err := r.rewrap(ctx, f.header, "")
	if cerr := ctx.Err(); cerr != nil {
		return cerr
	}
	var block []byte
	if err == nil && h != nil {
		block, err = h.Encode(len(f.block))
	}
	next := record.Rewrapped{Path: f.path, Block: block}
	if err == nil && h != nil && !record.FitsRewrap([]record.Rewrapped{next}) {
		err = fmt.Errorf("path of %d bytes: %w", len(f.path), ErrPath)
	}
	if err != nil {
		r.failed(Problem{f.path, err})
	}
	if err != nil || h == nil {
		return nil
	}
	r.mu.Lock()
	var full []record.Rewrapped
	if !record.FitsRewrap(append(slices.Clone(r.pending), next)) {
		full, r.pending = r.pending, nil
	}
	r.pending = append(r.pending, next)
	r.mu.Unlock()
	return r.write(ctx, full)
}

func (r *run) flush(ctx context.Context) error {
	r.mu.Lock()
	files := r.pending
	r.pending = nil
	r.mu.Unlock()
	return r.write(ctx, files)
}

func (r *run) write(ctx context.Context, files []record.Rewrapped) error {
	if len(files) == 0 {
		return nil
	}
	each, err := r.w.Write(ctx, files)
	if err != nil {
		return err
	}
	for i, err := range each {
		switch {
		case err == nil:
			r.mu.Lock()
			r.report.Rewrapped++
			r.mu.Unlock()
		case !Moved(err): // else the next pass finds where it went
			r.failed(Problem{files[i].Path, err})
		}
	}
	return nil
}

// storeKeys rewraps the name keys and store keys that are not under the keys
// that their class has.
func (r *run) storeKeys(ctx context.Context) error {
	changed := record.StoreKeys{Store: map[string][]byte{}, Names: map[string][]byte{}}
	for _, class := range r.s.Classes() {
		for purpose, of := range map[string]struct{ have, to map[string][]byte }{
			"names": {r.s.rec.Keys.Names, changed.Names}, "store": {r.s.rec.Keys.Store, changed.Store},
		} {
			h, err := envelope.Parse(of.have[class])
			if err == nil {
				if len(r.plan(h)) == 0 {
					// A crash left the first copy of a name key as it was.
					if b, ferr := r.s.classFile(class); purpose == "names" && ferr == nil && SameFile(b, of.have[class]) && !bytes.Equal(b, of.have[class]) {
						of.to[class] = of.have[class]
					}
					continue
				}
				if r.o.DryRun {
					r.report.Keys++
					continue
				}
				if h, err = r.rewrap(ctx, h, purpose); err == nil && h != nil {
					of.to[class], err = h.Encode(h.BlockSize)
				}
			}
			if cerr := ctx.Err(); cerr != nil {
				return cerr
			}
			if err != nil {
				return fmt.Errorf("%s key of class %s: %w", purpose, class, err)
			}
		}
	}
	n := len(changed.Store) + len(changed.Names)
	if n == 0 {
		return nil
	}
	if err := r.w.Keys(ctx, changed); err != nil {
		return errors.Join(err, ctx.Err())
	}
	r.report.Keys = n
	return nil
}
