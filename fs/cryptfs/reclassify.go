package cryptfs

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/classify"
)

// ReclassifyConfig says which tree gets which class.
type ReclassifyConfig struct {
	JobConfig
	Path  string // plaintext path of the directory
	Class string
}

// ReclassifyReport is what a reclassification did. Paths are plaintext paths.
type ReclassifyReport struct {
	Path        string       `json:"path"`
	From        string       `json:"from"` // class before
	Class       string       `json:"class"`
	Changed     bool         `json:"changed"` // false: it had that class already
	Rule        bool         `json:"rule"`    // the policy got a rule for it
	Directories uint64       `json:"directories"`
	Files       uint64       `json:"files"`
	Others      uint64       `json:"others"` // symlinks and special files
	Bytes       uint64       `json:"bytes"`  // of store files
	Kept        uint64       `json:"kept"`   // of these, done by a run before
	Broken      []string     `json:"broken"` // files that had further names elsewhere, which are other files now
	Failures    []JobFailure `json:"failures"`
}

// reclassifyJob is the record of a reclassification that is under way.
type reclassifyJob struct {
	Path  []string `json:"path"` // entries of the store from the root to the directory
	Old   string   `json:"old"`  // directory id, 32 hexadecimal digits
	New   string   `json:"new"`  // id of the tree that takes its place
	Class string   `json:"class"`
	// Times are atime and mtime of the directory above, in seconds and
	// nanoseconds, from the exchange on.
	Times []int64 `json:"times"`
}

const (
	stagedTree = "tree" // in reclassifyDir: what is built, and after the exchange what was replaced
	oldTree    = "old"  // in reclassifyDir: what is being removed
)

// Reclassify gives a directory and all below it another class. Nobody else may
// use the volume meanwhile. The policy gets a rule first, from when on nothing
// new can be made there; then a copy of the tree is made beside it, under new
// keys and names; then the two change places in one step. Directories below for
// which the policy has a rule of their own get that rule's class, also where they
// had another. Killed at any moment, everything is readable, and the next call
// goes on.
//
// With ErrIncomplete the report tells which files could not be copied; the
// tree is as it was.
func (v *Volume) Reclassify(ctx context.Context, c ReclassifyConfig) (*ReclassifyReport, error) {
	if err := v.mayChange(); err != nil {
		return nil, err
	}
	if v.classes[c.Class] == nil {
		return nil, fmt.Errorf("%q: %w", c.Class, ErrNoClass)
	}
	parent, it, err := v.findPath(ctx, c.Path)
	if errors.Is(err, ErrFixed) {
		return nil, fmt.Errorf("the root has the policy's default class: %w", ErrFixed)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path.Clean("/"+c.Path), err)
	}
	defer func() { _ = parent.dir.Close() }()
	if it.st.Type() != unix.S_IFDIR {
		return nil, fmt.Errorf("%s: %w", path.Clean("/"+c.Path), unix.ENOTDIR)
	}
	r := &reclassifier{
		v: v, conf: c, parent: parent, entry: it.entry, path: parent.child(it.name),
		inodes: map[inoKey]*inodeNames{}, first: map[linkKey]*firstCopy{},
		report: &ReclassifyReport{Class: c.Class, Broken: []string{}, Failures: []JobFailure{}},
	}
	r.report.Path = r.path
	return r.report, r.run(ctx)
}

type reclassifier struct {
	v      *Volume
	conf   ReclassifyConfig
	parent *treeDir // where the directory is
	entry  string   // its entry there
	path   string   // its plaintext path
	policy *classify.Policy
	job    reclassifyJob
	stage  *backing.Dir
	crew   crew

	agrees bool                   // every directory has the class of its path
	inodes map[inoKey]*inodeNames // of files with several names
	first  map[linkKey]*firstCopy // of these: where the copy is

	progress jobCounter
	report   *ReclassifyReport
	needed   uint64 // bytes of disk, about
}

// inodeNames counts the names of a file in the tree.
type inodeNames struct {
	found, links uint32
	path         string // one of them
}

func (r *reclassifier) run(ctx context.Context) error {
	v := r.v
	if err := r.newPolicy(); err != nil {
		return err
	}
	src, err := r.openTree(ctx, r.parent.dir, r.entry)
	if err != nil {
		return fmt.Errorf("%s: %w", r.path, err)
	}
	defer func() { _ = src.dir.Close() }()
	r.report.From = src.class.name
	r.agrees = true
	if err := r.plan(ctx, src); err != nil {
		return err
	}
	if n := len(r.report.Failures); n > 0 {
		return fmt.Errorf("%s: %d files: %w", r.path, n, ErrIncomplete)
	}
	if !r.agrees {
		if err := r.tryKeys(ctx); err != nil {
			return err
		}
	}
	if r.stage, err = v.stageDir(reclassifyDir); err != nil {
		return err
	}
	defer func() { _ = r.stage.Close() }()
	fresh, err := r.begin(ctx, src)
	if err != nil {
		return err
	}
	if r.agrees {
		if err := r.rule(ctx); err != nil {
			return err
		}
		r.report.Changed = r.report.Rule
		return v.endStage(r.stage, reclassifyDir)
	}
	if err := r.room(fresh); err != nil {
		return errors.Join(err, r.giveUp(fresh))
	}
	if err := r.probe(); err != nil {
		return errors.Join(err, r.giveUp(fresh))
	}
	if err := r.rule(ctx); err != nil {
		return errors.Join(err, r.giveUp(fresh))
	}
	if fresh {
		if err := r.record(); err != nil {
			return err
		}
	}
	return r.convert(ctx, src)
}

// giveUp ends a job that did nothing yet.
func (r *reclassifier) giveUp(fresh bool) error {
	if !fresh {
		return nil
	}
	return r.v.endStage(r.stage, reclassifyDir)
}

// tryKeys makes sure that files can be made in every class that the tree gets,
// before anything is changed.
func (r *reclassifier) tryKeys(ctx context.Context) error {
	for _, name := range ruleClasses(r.policy, r.path) {
		cl := r.v.classes[name]
		if _, err := r.v.names(ctx, cl); err != nil {
			return err
		}
		sec, err := r.v.newKey(ctx, cl)
		if err != nil {
			return fmt.Errorf("class %s: %w", name, err)
		}
		sec.wipe()
	}
	return nil
}

// newPolicy is the policy with a rule for the directory, where it takes one.
func (r *reclassifier) newPolicy() (err error) {
	r.policy = r.v.Info().Policy
	if r.policy.ClassOf(r.path) == r.conf.Class {
		return nil
	}
	r.policy, err = r.policy.WithRule(r.path, r.conf.Class)
	r.report.Rule = err == nil
	return err
}

// rule puts the policy into force, before anything else: from now on nothing new
// comes into the tree.
func (r *reclassifier) rule(ctx context.Context) error {
	if !r.report.Rule {
		return nil
	}
	if err := r.v.step("write policy"); err != nil {
		return err
	}
	return r.v.writePolicy(ctx, r.policy, r.v.keySet())
}

// openTree opens a directory of a parent, with its record.
func (r *reclassifier) openTree(ctx context.Context, parent *backing.Dir, entry string) (*treeDir, error) {
	var d *backing.Dir
	err := lifted(parent, func() (err error) { d, err = parent.OpenDir(entry); return err })
	if err != nil {
		return nil, err
	}
	t, err := r.v.newTreeDir(ctx, d, r.parent.below(entry), r.path)
	if err != nil {
		_ = d.Close()
		return nil, err
	}
	return t, nil
}

// begin goes on with the job that is there, or makes a new one. What a job for
// another class, or on a directory that is not there any more, has built is
// removed.
func (r *reclassifier) begin(ctx context.Context, src *treeDir) (fresh bool, err error) {
	v := r.v
	way := r.parent.below(r.entry)
	var old reclassifyJob
	err = v.jobs.readJob(r.stage, reclassifyMagic, &old)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return false, err
	}
	if err == nil {
		id, iderr := v.idAt(old.Path)
		alive := iderr == nil && id == old.Old
		same := slices.Equal(old.Path, way)
		if alive && same && old.Class == r.conf.Class {
			r.job = old
			return false, nil
		}
		if alive && !same {
			return false, fmt.Errorf("%s to class %s: %w", v.plainPath(ctx, old.Path), old.Class, ErrOtherJob)
		}
		for _, name := range []string{stagedTree, jobFile} {
			if err := v.removeTree(r.stage, name); err != nil {
				return false, err
			}
		}
	}
	id := envelope.NewID()
	r.job = reclassifyJob{Path: way, Old: hex.EncodeToString(src.id[:]), New: hex.EncodeToString(id[:]), Class: r.conf.Class}
	return true, nil
}

func (r *reclassifier) record() error {
	if err := r.v.step("write job record"); err != nil {
		return err
	}
	return r.v.jobs.writeJob(r.stage, reclassifyMagic, &r.job)
}

// idAt returns the id of the directory at a way of entries, as its record has
// it.
func (v *Volume) idAt(way []string) (id string, err error) {
	d, err := openPath(v.root, way)
	if err != nil {
		return "", err
	}
	defer func() { _ = d.Close() }()
	err = lifted(d, func() error {
		rec, _, err := readDirRecord(d)
		if err == nil {
			id = hex.EncodeToString(rec.ID[:])
		}
		return err
	})
	return id, err
}

// plainPath returns the plaintext path of a way of entries, as far as names can
// be read.
func (v *Volume) plainPath(ctx context.Context, way []string) string {
	out := "/"
	for i, e := range way {
		name := e
		if d, err := openPath(v.root, way[:i]); err == nil {
			if t, err := v.newTreeDir(ctx, d, way[:i], out); err == nil {
				if plain, ok, err := t.unseal(e); ok && err == nil {
					name = plain
				}
			}
			_ = d.Close()
		}
		out = path.Join(out, name)
	}
	return out
}

// probe makes sure that the store's file system can do the last step.
func (r *reclassifier) probe() error {
	a, b := backing.TempName(), backing.TempName()
	for _, name := range []string{a, b} {
		if err := r.stage.Mkdir(name, 0o700); err != nil {
			return err
		}
		defer func() { _ = r.stage.Rmdir(name) }()
	}
	if err := r.stage.Rename(a, r.stage, b, unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("%w: %w", ErrNoExchange, err)
	}
	return nil
}

// room makes sure that the copy fits, before anything is changed. A job that goes
// on has taken some of the room already.
func (r *reclassifier) room(fresh bool) error {
	st, err := r.v.root.Statfs()
	if err != nil || !fresh {
		return err
	}
	free := st.Bavail * uint64(st.Bsize)
	inodes := r.report.Files + r.report.Directories + r.report.Others
	switch {
	case r.needed > free:
		return fmt.Errorf("the copy of %s takes about %d MiB, %d MiB are free: %w", r.path, r.needed>>20, free>>20, unix.ENOSPC)
	case st.Files > 0 && inodes > st.Ffree:
		return fmt.Errorf("the copy of %s takes %d inodes, %d are free: %w", r.path, inodes, st.Ffree, unix.ENOSPC)
	}
	return nil
}

// convert builds the tree and puts it in place.
func (r *reclassifier) convert(ctx context.Context, src *treeDir) error {
	dst, err := r.stagedRoot(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = dst.dir.Close() }()
	if err := r.build(ctx, src, dst); err != nil {
		return err
	}
	if len(r.report.Failures) == 0 {
		// Its own attributes are under the keys of the directory above, and stay.
		st, err := src.dir.Stat("")
		if err != nil {
			return err
		}
		attrs, err := readAttrs(r.parent.dir.Attrs(r.entry), st)
		if err != nil {
			return err
		}
		if err := r.finishDir(ctx, src, dst, r.stage, stagedTree, attrs); err != nil {
			return err
		}
	}
	if n := len(r.report.Failures); n > 0 {
		return fmt.Errorf("%s: %d files: %w", r.path, n, ErrIncomplete)
	}
	r.tellBroken()
	if err := r.exchange(); err != nil {
		return err
	}
	r.report.Changed = true
	return r.v.finishReclassify(ctx)
}

// tellBroken lists the files that became several: because they have names
// outside the tree, or in parts of it with different classes.
func (r *reclassifier) tellBroken() {
	copies := map[inoKey]int{}
	for k := range r.first {
		copies[k.inode]++
	}
	for inode, n := range r.inodes {
		if n.found < n.links || copies[inode] > 1 {
			r.report.Broken = append(r.report.Broken, n.path)
		}
	}
	slices.Sort(r.report.Broken)
}

// exchange puts the new tree in the place of the old one. The name above stays,
// and so do the times there.
func (r *reclassifier) exchange() error {
	v := r.v
	if err := r.stage.Sync(); err != nil {
		return err
	}
	st, err := r.parent.dir.Stat("")
	if err != nil {
		return err
	}
	r.job.Times = []int64{st.Atime.Sec, int64(st.Atime.Nsec), st.Mtime.Sec, int64(st.Mtime.Nsec)}
	if err := r.record(); err != nil {
		return err
	}
	if err := v.step("exchange"); err != nil {
		return err
	}
	if err := v.let(r.parent.dir, func() error { return r.stage.Rename(stagedTree, r.parent.dir, r.entry, unix.RENAME_EXCHANGE) }); err != nil {
		return err
	}
	return lifted(r.parent.dir, r.parent.dir.Sync)
}

// ruleClasses returns the classes that the tree's directories get, sorted.
func ruleClasses(p *classify.Policy, dir string) []string {
	out := map[string]bool{p.ClassOf(dir): true}
	for rule, class := range p.Directories {
		if strings.HasPrefix(rule, dir+"/") {
			out[class] = true
		}
	}
	return slices.Sorted(maps.Keys(out))
}
