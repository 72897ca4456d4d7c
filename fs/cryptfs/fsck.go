package cryptfs

import (
	"context"
	"errors"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// FsckConfig says what to check.
type FsckConfig struct {
	Config
	// Repair restores records from their second copies and finishes or clears what
	// a crash left. Contents are never changed; what is in nobody's way any more
	// goes to the quarantine.
	Repair bool
	// Quick leaves out chunks and what only a file's own key can tell. It does not
	// go with Repair, which relies on more.
	Quick bool
	// EmptyQuarantine removes what repairs have put aside, if nothing is damaged.
	EmptyQuarantine bool
	Jobs            int // files and directories at a time; 0: DefaultJobs
	// Progress is called often, from several goroutines. total is zero until it is
	// known.
	Progress func(done, total FsckCount)
}

// FsckCount counts files, and their bytes in the store.
type FsckCount struct{ Files, Bytes uint64 }

// DefaultJobs is how many files and directories are checked at a time: a small
// file is mostly a call to the key service, which is waited for.
func DefaultJobs() int { return max(16, 4*runtime.GOMAXPROCS(0)) }

// FsckReport is what a check found. Paths are ciphertext paths.
type FsckReport struct {
	Directories uint64    `json:"directories"`
	Files       uint64    `json:"files"`  // names of regular files; what has several is read once
	Others      uint64    `json:"others"` // symlinks and special files
	Bytes       uint64    `json:"bytes"`  // plaintext bytes read and authenticated
	Quarantined uint64    `json:"quarantined"`
	Emptied     bool      `json:"emptied,omitempty"` // the quarantine was
	Problems    []Problem `json:"problems"`
}

// Problem is one finding.
type Problem struct {
	Path   string     `json:"path"`
	What   string     `json:"what"` // for people
	Kind   fault.Kind `json:"-"`
	Class  string     `json:"kind"` // the kind's name, or one of the constants below
	Mended bool       `json:"mended"`
}

// What a Problem may be that is no failure with a kind. The last five are no
// damage, nor is what is orphaned: nothing is missing.
const (
	classUnread     = "unread"      // the disk failed, which says nothing about what is there
	classUnfinished = "unfinished"  // the next mount, or a repair, finishes it
	classForeign    = "foreign"     // no writer of this store has made it
	classOrphan     = "orphan"      // a file of the store's own that nothing needs
	classSecond     = "second-copy" // the second copy of a record is missing or another one
	classPending    = "pending"     // a job that goes on when it is called again
	classLinks      = "links"       // names that are not in the store, or files that should be one
	classDuplicate  = "duplicate"   // a store file is a copy of another
	classPolicy     = "policy"      // a directory's class is not what the policy says
)

// Damaged reports whether anything found is damage that is still there.
func (r *FsckReport) Damaged() bool {
	return slices.ContainsFunc(r.Problems, func(p Problem) bool {
		return !p.Mended && (p.Kind == fault.Integrity || p.Kind == fault.BadFormat || p.Class == classUnfinished || p.Class == classForeign)
	})
}

// Unread reports whether something could not be checked because the disk failed.
func (r *FsckReport) Unread() bool {
	return slices.ContainsFunc(r.Problems, func(p Problem) bool { return p.Class == classUnread })
}

// KeysMissing reports whether files could not be checked for want of a key.
func (r *FsckReport) KeysMissing() bool {
	return slices.ContainsFunc(r.Problems, func(p Problem) bool { return isKeyKind(p.Kind) })
}

func isKeyKind(k fault.Kind) bool {
	switch k {
	case fault.KeyDenied, fault.KeyMissing, fault.KeyRevoked, fault.KeyExpired, fault.KeyRejected, fault.KeyUnavailable:
		return true
	}
	return false
}

// Fsck checks every record, name, header and chunk of a store that nobody has
// mounted (ErrLocked). The error is of the check itself; what the store has
// wrong is in the report, and after an error, or the end of ctx, what had been
// found and mended by then. Without a report nothing was begun.
func Fsck(ctx context.Context, c FsckConfig) (*FsckReport, error) {
	c.ReadOnly, c.Alone, c.mend = !c.Repair && !c.EmptyQuarantine, true, true
	v, err := Open(ctx, c.Config)
	if err != nil {
		return nil, err
	}
	k := newChecker(v, c)
	err = k.run(ctx)
	if cerr := v.Close(); err == nil {
		err = cerr
	}
	if err == nil && k.reborn > 0 {
		err = k.liftEpoch(ctx)
	}
	slices.SortFunc(k.report.Problems, func(a, b Problem) int { return strings.Compare(a.Path+a.What, b.Path+b.What) })
	return k.report, err
}

type checker struct {
	v      *Volume
	conf   FsckConfig
	group  *errgroup.Group
	births births
	reborn uint32 // the journal has to begin after this epoch; 0: it may go on

	mu     sync.Mutex
	report *FsckReport
	done   FsckCount
	total  FsckCount
	dirs   map[string]string       // directory id -> path
	files  map[envelope.ID]fileAt  // file id -> where it was met first
	linked map[inoKey]*linkedFile  // files with several names
	needs  []neededSidecar         // header files that are not beside a name
	sides  map[envelope.ID]*sideOf // header files of files with several names
}

func newChecker(v *Volume, c FsckConfig) *checker {
	k := &checker{
		v: v, conf: c, report: &FsckReport{Problems: []Problem{}}, group: &errgroup.Group{}, dirs: map[string]string{},
		files: map[envelope.ID]fileAt{}, linked: map[inoKey]*linkedFile{}, sides: map[envelope.ID]*sideOf{},
	}
	if k.conf.Jobs <= 0 {
		k.conf.Jobs = DefaultJobs()
	}
	return k
}

func (k *checker) run(ctx context.Context) error {
	stop := k.measure(ctx)
	defer stop()
	if err := k.checkStore(ctx); err != nil {
		return err
	}
	var wctx context.Context
	k.group, wctx = errgroup.WithContext(ctx)
	k.group.SetLimit(k.conf.Jobs)
	err := k.dir(wctx, k.v.root, ".", "/")
	if werr := k.group.Wait(); err == nil {
		err = werr
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return err
	}
	if err := k.checkLinks(); err != nil {
		return err
	}
	k.checkEpochs()
	return k.checkQuarantine()
}

// later does f in the background, or at once if enough is under way.
func (k *checker) later(f func() error) error {
	if k.group.TryGo(f) {
		return nil
	}
	return f()
}

func (k *checker) add(p Problem) {
	switch {
	case p.Class == "" && p.Kind == fault.None:
		p.Class = classUnread
	case p.Class == "":
		p.Class = p.Kind.String()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.report.Problems = append(k.report.Problems, p)
}

func (k *checker) failed(at string, err error) {
	k.add(Problem{Path: at, What: err.Error(), Kind: fault.Of(err)})
}

// mend does a repair if there are to be any; what fails is listed as it is.
func (k *checker) mend(p Problem, f func() error) (mended bool) {
	if k.conf.Repair {
		err := f()
		p.Mended = err == nil
		if err != nil {
			p.What += "; it could not be mended: " + err.Error()
		}
	}
	k.add(p)
	return p.Mended
}

func (k *checker) count(f func(r *FsckReport)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f(k.report)
}

// advance tells of files and bytes of the store that were looked at.
func (k *checker) advance(files, bytes uint64) {
	k.mu.Lock()
	k.done.Files += files
	k.done.Bytes += bytes
	done, total := k.done, k.total
	k.mu.Unlock()
	if k.conf.Progress != nil {
		k.conf.Progress(done, total)
	}
}

// measure finds out in the background how much there is to be done, if somebody
// wants to know.
func (k *checker) measure(ctx context.Context) (stop func()) {
	if k.conf.Progress == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		var sum FsckCount
		err := k.v.walk(func(d *backing.Dir, e backing.Entry) bool {
			if e.Type == unix.S_IFREG && !isInternal(e.Name) {
				if st, err := d.Stat(e.Name); err == nil {
					sum.Files, sum.Bytes = sum.Files+1, sum.Bytes+uint64(st.Size)
				}
			}
			return ctx.Err() == nil
		})
		if err != nil || ctx.Err() != nil {
			return // it is only for people
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		k.total = sum
	})
	return func() { cancel(); wg.Wait() }
}

// item is an entry of a directory under check.
type item struct {
	backing.Entry
	st     backing.Stat
	err    error  // of st
	needs  string // the sidecar, or file of a long target, that must be beside it
	unsure error  // why that is not known
}

// dir checks a directory and what is in it; d stays the caller's. plain is its
// plaintext path, for the policy, "" if that is not known.
func (k *checker) dir(ctx context.Context, d *backing.Dir, at, plain string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var entries []backing.Entry
	err := lifted(d, func() (err error) { entries, err = d.ReadDir(); return err })
	if err != nil {
		k.failed(at, err)
		return nil
	}
	in, err := k.dirRecord(ctx, d, at, entries, plain)
	if err != nil || in == nil {
		return err
	}
	k.count(func(r *FsckReport) { r.Directories++ })
	if plain != "" {
		if want := k.v.policy.ClassOf(plain); want != in.cl.name {
			k.add(Problem{Path: at, Class: classPolicy,
				What: "the policy has class " + want + " for the directory and its record " + in.cl.name + ": nothing can be written in it until kmsfs reclassify, or classify, says which"})
		}
	}
	items, ours := k.items(d, entries, at)
	k.companions(d, in, items, ours)
	for i := range items {
		if err := k.entry(ctx, d, in, &items[i], plain); err != nil {
			return err
		}
	}
	return nil
}

// items looks at the entries of a directory: those of the tree, and the store's
// own.
func (k *checker) items(d *backing.Dir, entries []backing.Entry, at string) (items []item, ours []backing.Entry) {
	for _, e := range entries {
		if at == "." && (e.Name == metaDir || isStoreCopy(e.Name)) || e.Name == dirFile {
			continue
		}
		if isInternal(e.Name) {
			ours = append(ours, e)
			continue
		}
		i := item{Entry: e}
		i.err = lifted(d, func() (err error) {
			if i.st, err = d.Stat(e.Name); err != nil {
				return err
			}
			i.needs, i.unsure = k.v.sidecarOf(d, e.Name, i.st)
			return nil
		})
		items = append(items, i)
	}
	return items, ours
}

// place is a directory under check.
type checkedDir struct {
	at     string
	cl     *class
	n      *Node // only a bearer of id and class, for names
	cipher nameCipher
}

func (k *checker) entry(ctx context.Context, d *backing.Dir, in *checkedDir, i *item, plain string) error {
	where := path.Join(in.at, i.Name)
	name, mine := k.name(d, in, i, where)
	if !mine {
		return nil
	}
	if i.err != nil {
		k.failed(where, i.err)
		return nil
	}
	k.attrs(d, where, i.Name, in)
	switch i.st.Type() {
	case unix.S_IFDIR:
		below := ""
		if plain != "" && name != "" {
			below = path.Join(plain, name)
		}
		return k.subdir(ctx, d, i.Name, where, below)
	case unix.S_IFREG:
		return k.regular(ctx, d, in, i, where)
	case unix.S_IFLNK:
		k.link(d, i.Name, where, in)
	default:
		k.count(func(r *FsckReport) { r.Others++ })
	}
	return nil
}

// name checks an entry's name and returns it in plaintext, "" if it is lost. mine
// is false for what is no file of this store.
func (k *checker) name(d *backing.Dir, in *checkedDir, i *item, where string) (name string, mine bool) {
	name, ok, err := in.n.unseal(in.cipher, d, i.Name)
	long := strings.HasPrefix(i.Name, longEntry)
	switch {
	case err != nil && !long:
		k.add(Problem{Path: where, What: "name: " + err.Error(), Kind: fault.Of(err), Class: classForeign})
		return "", true
	case err != nil:
		k.add(Problem{Path: where, What: "long name: its file is missing or holds another name: " + err.Error(), Kind: fault.Integrity})
		return "", true
	case !ok:
		k.add(Problem{Path: where, What: "not a file of this store", Class: classForeign})
		return "", false
	}
	// A name has one spelling. Another one would be the same name twice.
	if s, err := in.n.seal(in.cipher, name); err != nil || s.entry != i.Name {
		k.add(Problem{Path: where, What: "a name that no writer spells so, and that may be there twice", Kind: fault.Integrity})
	}
	return name, true
}

func (k *checker) subdir(ctx context.Context, d *backing.Dir, entry, where, plain string) error {
	var sub *backing.Dir
	err := lifted(d, func() (err error) { sub, err = d.OpenDir(entry); return err })
	if err != nil {
		k.failed(where, err)
		return nil
	}
	return k.later(func() error {
		defer func() { _ = sub.Close() }()
		return k.dir(ctx, sub, where, plain)
	})
}

func (k *checker) link(d *backing.Dir, entry, where string, in *checkedDir) {
	k.count(func(r *FsckReport) { r.Others++ })
	err := lifted(d, func() error { _, err := readTarget(d, entry, in.cl, in.cipher); return err })
	if err != nil {
		k.add(Problem{Path: where, What: "symlink target: " + err.Error(), Kind: fault.Of(err)})
	}
}

// attrs checks a file's attributes of the user namespace.
func (k *checker) attrs(d *backing.Dir, where, entry string, in *checkedDir) {
	a := d.Attrs(entry)
	names, err := a.List()
	if err != nil {
		return // a file system without attributes, or a kind of file without
	}
	for _, name := range names {
		plain, sealed := strings.CutPrefix(name, sealedAttr)
		switch {
		case sealed && !in.cl.plain:
			if plain, err = in.cipher.DecryptAttrName(plain); err != nil {
				k.add(Problem{Path: where, What: "attribute " + name + ": " + err.Error(), Kind: fault.Of(err)})
				continue
			}
		case in.cl.plain && strings.HasPrefix(name, plainPrefix) && !strings.HasPrefix(name, attrPrefix):
			plain = strings.TrimPrefix(name, plainPrefix)
		default:
			continue
		}
		value, err := a.Get(name)
		if err == nil {
			_, err = in.cipher.DecryptAttrValue(plain, value)
		}
		if err != nil {
			what := name
			if in.cl.plain {
				what = "of the user's" // its name is plaintext
			}
			k.add(Problem{Path: where, What: "attribute " + what + ": " + err.Error(), Kind: fault.Of(err)})
		}
	}
}

// checkQuarantine counts what was put aside, and removes it if that is wanted and
// nothing is damaged: it may be what the damaged files are to be had from.
func (k *checker) checkQuarantine() error {
	q, err := k.v.meta.OpenDir(quarantineDir)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = q.Close() }()
	entries, err := q.ReadDir()
	if err != nil {
		return err
	}
	k.report.Quarantined = uint64(len(entries))
	if !k.conf.EmptyQuarantine || k.report.Damaged() || k.report.KeysMissing() {
		return nil
	}
	for _, e := range entries {
		if err := errors.Join(k.v.held(), k.v.removeTree(q, e.Name)); err != nil {
			return err
		}
	}
	k.report.Quarantined, k.report.Emptied = 0, true
	return nil
}
