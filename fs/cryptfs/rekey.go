package cryptfs

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// RekeyConfig says which files get a new data key.
type RekeyConfig struct {
	JobConfig
	Class     string    // of this class only; "": of every class
	Paths     []string  // plaintext paths: these files, and what is below these directories; none: all
	OlderThan time.Time // only files whose store file was made before; zero: all. A job that goes on keeps its own.
	// Selection is what the user asked for, in words: a job that was interrupted
	// goes on only if it is the same.
	Selection string
	// Restart gives up an unfinished job with another selection.
	Restart bool
}

// RekeyReport is what a rekey did.
type RekeyReport struct {
	Rekeyed  uint64       `json:"rekeyed"` // files
	Bytes    uint64       `json:"bytes"`   // of their store files
	Done     uint64       `json:"done_before"`
	Younger  uint64       `json:"younger"` // files that --older-than leaves out
	Resumed  bool         `json:"resumed"`
	Failures []JobFailure `json:"failures"`
}

// Rekey encrypts files again, each under a new data key. Nobody else may use
// the volume meanwhile. Each file changes its key and contents in one step; one
// with several names changes under all of them. Killed at any moment, all files
// are whole, and the next call with the same selection goes on. Directories and
// names keep their keys.
//
// The error is what ended the job; files that could not be done are in the
// report, and the job stays unfinished for them.
func (v *Volume) Rekey(ctx context.Context, c RekeyConfig) (*RekeyReport, error) {
	if err := v.mayChange(); err != nil {
		return nil, err
	}
	if c.Class != "" && v.classes[c.Class] == nil {
		return nil, fmt.Errorf("%q: %w", c.Class, ErrNoClass)
	}
	r := &rekeyer{
		v: v, conf: c, report: &RekeyReport{Failures: []JobFailure{}},
		links: map[inoKey][]linkName{}, claimed: map[inoKey]bool{}, dirs: map[inoKey]*rekeyDirState{}, spoiled: map[inoKey]bool{},
	}
	if err := r.checkPaths(ctx); err != nil {
		return nil, err
	}
	var err error
	if r.stage, err = v.stageDir(rekeyDir); err != nil {
		return nil, err
	}
	defer func() { _ = r.stage.Close() }()
	if err := r.begin(); err != nil {
		return nil, err
	}
	if err := r.plan(ctx); err != nil {
		return r.report, err
	}
	if err := r.run(ctx); err != nil || len(r.report.Failures) > 0 {
		return r.report, err
	}
	return r.report, v.endStage(r.stage, rekeyDir)
}

type rekeyer struct {
	v     *Volume
	conf  RekeyConfig
	job   rekeyJob
	stage *backing.Dir

	links map[inoKey][]linkName // files with several names; read only after plan

	mu      sync.Mutex
	claimed map[inoKey]bool // files with several names that somebody does, or did
	dirs    map[inoKey]*rekeyDirState
	spoiled map[inoKey]bool // directories that are left to the recovery
	report  *RekeyReport
	prog    JobProgress
}

// linkName is one name of a file with several.
type linkName struct {
	dir   []string
	entry string
	class *class
}

// checkPaths brings the paths into one form, and misses none.
func (r *rekeyer) checkPaths(ctx context.Context) error {
	for i, p := range r.conf.Paths {
		t, it, err := r.v.findPath(ctx, p)
		if errors.Is(err, ErrFixed) { // the root: everything
			r.conf.Paths = nil
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		_ = t.dir.Close()
		r.conf.Paths[i] = t.child(it.name)
	}
	return nil
}

// begin goes on with the job that is there, or records a new one.
func (r *rekeyer) begin() error {
	v := r.v
	selection := v.jobs.selection(r.conf.Selection)
	err := v.jobs.readJob(r.stage, rekeyMagic, &r.job)
	switch {
	case err == nil && r.job.Selection == selection:
		r.report.Resumed = true
		r.conf.OlderThan = r.job.Cutoff
		return nil
	case err == nil && !r.conf.Restart:
		return fmt.Errorf("begun %s: %w", r.job.Started.Format(time.DateTime), ErrOtherJob)
	case err != nil && !errors.Is(err, unix.ENOENT):
		return err
	}
	id := envelope.NewID()
	r.job = rekeyJob{Job: hex.EncodeToString(id[:]), Started: time.Now().UTC().Truncate(time.Second), Cutoff: r.conf.OlderThan, Selection: selection}
	if err := v.step("write job record"); err != nil {
		return err
	}
	return v.jobs.writeJob(r.stage, rekeyMagic, &r.job)
}

// selected reports whether a file of a directory is to be done, as far as stat
// tells.
func (r *rekeyer) selected(t *treeDir, it treeItem) bool {
	if it.st.Type() != unix.S_IFREG || it.st.Size == 0 {
		return false
	}
	if r.conf.Class != "" && t.class.name != r.conf.Class {
		return false
	}
	if len(r.conf.Paths) == 0 {
		return true
	}
	at := t.child(it.name)
	return slices.ContainsFunc(r.conf.Paths, func(p string) bool { return at == p || strings.HasPrefix(at, p+"/") })
}

// young reports whether --older-than leaves a file out. The age of a data key is
// that of the store file; where the file system does not tell, it is old.
func (r *rekeyer) young(st backing.Stat) bool {
	if r.conf.OlderThan.IsZero() || st.Btime == (unix.StatxTimestamp{}) {
		return false
	}
	return !time.Unix(st.Btime.Sec, int64(st.Btime.Nsec)).Before(r.conf.OlderThan)
}

// walk calls visit for every directory whose record can be read; others are
// failures. The directory is closed after the visit.
func (r *rekeyer) walk(ctx context.Context, d *backing.Dir, entries []string, plain string, quiet bool, visit func(t *treeDir, items []treeItem) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	fail := func(at string, err error) error {
		if fatal(ctx, err) {
			return err
		}
		if !quiet {
			r.fail(at, err)
		}
		return nil
	}
	t, err := r.v.newTreeDir(ctx, d, entries, plain)
	if err != nil {
		if !r.otherClass(d) {
			if err := fail((&treeDir{entry: entries}).at(""), err); err != nil {
				return err
			}
		}
		t = &treeDir{dir: d, entry: entries, path: "?"}
	}
	items, err := t.items(r.v, fail)
	if err != nil {
		return fail(plain, err)
	}
	if t.class != nil {
		if err := visit(t, items); err != nil {
			return err
		}
	}
	for _, it := range items {
		if it.st.Type() != unix.S_IFDIR {
			continue
		}
		var sub *backing.Dir
		err := r.v.let(d, func() (err error) { sub, err = d.OpenDir(it.entry); return err })
		if err == nil {
			err = r.walk(ctx, sub, t.below(it.entry), t.child(it.name), quiet, visit)
			_ = sub.Close()
			if err != nil {
				return err
			}
			continue
		}
		if err := fail(t.child(it.name), err); err != nil {
			return err
		}
	}
	return nil
}

// otherClass reports whether a directory's record, which need not be right, names
// a class that is not asked for.
func (r *rekeyer) otherClass(d *backing.Dir) bool {
	rec, _, err := readDirRecord(d)
	return err == nil && r.conf.Class != "" && rec.Class != r.conf.Class
}

func (r *rekeyer) fail(path string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Failures = append(r.report.Failures, newFailure(path, err))
}

// plan counts what is to be done and finds all names of files with several,
// also those that were not selected.
func (r *rekeyer) plan(ctx context.Context) error {
	counted := map[inoKey]bool{}
	return r.walk(ctx, r.v.root, nil, "/", true, func(t *treeDir, items []treeItem) error {
		for _, it := range items {
			if it.st.Type() != unix.S_IFREG || it.st.Size == 0 {
				continue
			}
			key := keyOf(it.st)
			if it.st.Nlink > 1 {
				r.links[key] = append(r.links[key], linkName{t.entry, it.entry, t.class})
			}
			if !r.selected(t, it) || counted[key] {
				continue
			}
			if it.st.Nlink > 1 {
				counted[key] = true
			}
			r.prog.TotalFiles++
			r.prog.TotalBytes += uint64(it.st.Size)
		}
		return nil
	})
}

// run does the files.
func (r *rekeyer) run(ctx context.Context) error {
	group, ctx := r.conf.crew(ctx)
	err := r.walk(ctx, r.v.root, nil, "/", false, func(t *treeDir, items []treeItem) error {
		d, err := r.enter(t)
		if err != nil {
			return err
		}
		defer r.leave(d)
		for _, it := range items {
			if !r.selected(t, it) || it.st.Nlink > 1 && !r.claim(it.st) {
				continue
			}
			r.stay(d)
			group.do(func() error {
				defer r.leave(d)
				return r.one(ctx, d, t, it)
			})
		}
		return nil
	})
	if gerr := group.Wait(); gerr != nil { // it is why the walk ended
		err = gerr
	}
	return err
}

// claim says that the caller does a file with several names.
func (r *rekeyer) claim(st backing.Stat) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := keyOf(st)
	if r.claimed[key] {
		return false
	}
	r.claimed[key] = true
	return true
}

// one does one file. The error is one that ends the job.
func (r *rekeyer) one(ctx context.Context, d *rekeyDirState, t *treeDir, it treeItem) error {
	count := &r.report.Rekeyed
	done := r.report.Resumed && r.v.jobs.made(&r.job, r.v.idOf(d.dir, it.entry))
	switch {
	case done:
		count = &r.report.Done
	case r.young(it.st):
		count = &r.report.Younger
	default:
		if r.conf.Wait != nil {
			if err := r.conf.Wait(ctx); err != nil {
				return err
			}
		}
		if err := r.replace(ctx, d, t, it); err != nil {
			if fatal(ctx, err) {
				return fmt.Errorf("%s: %w", t.child(it.name), err)
			}
			r.fail(t.child(it.name), err)
			count = nil
		}
	}
	r.mu.Lock()
	if count != nil {
		*count++
		if count == &r.report.Rekeyed {
			r.report.Bytes += uint64(it.st.Size)
		}
	}
	r.prog.Files++
	r.prog.Bytes += uint64(it.st.Size)
	p := r.prog
	r.mu.Unlock()
	if r.conf.Progress != nil {
		r.conf.Progress(p)
	}
	return nil
}
