package salvage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/record"
)

// LostDir is the directory of the output that has what is without a name.
const LostDir = "lost+found.kmsfs"

// Config says how a source is written out.
type Config struct {
	Out      string // a directory that is empty, or is not there
	Provider keywrap.Provider
	// Keys are the keys that each store may use: store -> class -> key URIs.
	// Files under others are lost.
	Keys     map[envelope.ID]map[string][]string
	SameKey  func(a, b string) bool // as envelope.Options has it
	Log      *slog.Logger           // nil: nothing is logged; plaintext names never are
	Progress func(files uint64)     // called often, from several goroutines; nil: nobody is told
}

// Write writes what can be read of the source. What cannot is in the report,
// which is never nil; the error is of the run itself: ctx's, ErrNotEmpty, or of
// the output, such as ENOSPC. What was written until then stays, in whole files.
func (s *Source) Write(ctx context.Context, c Config) (*Report, error) {
	r := &Report{Notes: append([]string{}, s.notes...), Problems: []Problem{}}
	out, err := s.makeOut(c.Out)
	if err != nil {
		return r, err
	}
	defer func() { _ = out.Close() }()
	w := &writer{s: s, c: c, r: r, out: &outDir{d: out, at: ".", used: map[string]bool{LostDir: true}}, links: map[inode]string{}}
	defer func() {
		for _, t := range s.stores {
			t.close()
		}
	}()
	for _, k := range s.Stores() {
		if err := s.stores[k.ID].unlock(ctx, s, c, r); err != nil {
			return r, err
		}
	}
	err = w.dir(ctx, s.root, ".", w.out)
	if w.lost != nil {
		_ = w.lost.d.Close()
	}
	if merr := w.setModes(); err == nil {
		err = merr
	}
	if err == nil {
		err = out.SyncFS()
	}
	r.sort()
	return r, err
}

// makeOut makes the output, for its owner only.
func (s *Source) makeOut(name string) (*backing.Dir, error) {
	abs, err := filepath.Abs(name)
	if err != nil {
		return nil, err
	}
	if real, err := filepath.EvalSymlinks(filepath.Dir(abs)); err == nil {
		abs = filepath.Join(real, filepath.Base(abs))
	}
	if rel, err := filepath.Rel(s.path, abs); err == nil && filepath.IsLocal(rel) {
		return nil, ErrInside
	}
	if err := os.Mkdir(abs, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	d, err := backing.OpenRoot(abs)
	if errors.Is(err, unix.ENOTDIR) {
		return nil, ErrNotEmpty
	}
	if err != nil {
		return nil, err
	}
	entries, err := d.ReadDir()
	if err == nil && len(entries) > 0 {
		err = ErrNotEmpty
	}
	if err == nil {
		err = d.ChmodSelf(0o700)
	}
	if err != nil {
		_ = d.Close()
		return nil, err
	}
	return d, nil
}

// inode is the identity of a store file with several names.
type inode struct{ dev, ino uint64 }

type writer struct {
	s     *Source
	c     Config
	r     *Report
	out   *outDir
	lost  *outDir          // nil until something is lost
	links map[inode]string // where the first name of a file went
	modes []dirMode

	mu    sync.Mutex
	files uint64
}

// dirMode is the mode that a directory of the output gets in the end: until then
// its owner can write, and nobody else can look.
type dirMode struct {
	at   string
	mode uint32
}

// setModes gives every directory its mode, those below before those above.
func (w *writer) setModes() error {
	for _, m := range w.modes {
		d, err := openPath(w.out.d, path.Dir(m.at))
		if err == nil {
			err = d.Chmod(path.Base(m.at), m.mode)
			_ = d.Close()
		}
		if err != nil {
			return outError{err}
		}
	}
	return nil
}

// outDir is a directory of the output.
type outDir struct {
	d    *backing.Dir
	at   string // path in the output
	used map[string]bool
}

// maxName is the longest name that a file system of Linux takes, in bytes.
const maxName = 255

// take returns a name that is free in the directory, name if it is.
func (o *outDir) take(name string) string {
	free := name
	for n := 1; o.used[free]; n++ {
		suffix := fmt.Sprintf("~%d", n)
		free = name[:min(len(name), maxName-len(suffix))] + suffix
	}
	o.used[free] = true
	return free
}

func (w *writer) lostDir() (*outDir, error) {
	if w.lost != nil {
		return w.lost, nil
	}
	if err := w.out.d.Mkdir(LostDir, 0o700); err != nil {
		return nil, outError{err}
	}
	d, err := w.out.d.OpenDir(LostDir)
	if err != nil {
		return nil, outError{err}
	}
	w.lost = &outDir{d: d, at: LostDir, used: map[string]bool{}}
	return w.lost, nil
}

// spot is where an entry goes.
type spot struct {
	src   *backing.Dir
	at    string // path of the entry in the source
	entry string
	n     *names
	st    backing.Stat
	dir   *outDir
	name  string
}

func (p *spot) out() string { return path.Join(p.dir.at, p.name) }

// place decides where an entry goes: to its name, or to the lost ones under
// unnamed.
func (w *writer) place(p *spot, dir *outDir, h *envelope.Header, unnamed string) error {
	name, err := w.name(p.n, p.src, p.entry, h)
	if err == nil {
		p.dir, p.name = dir, dir.take(name)
		return nil
	}
	lost, lerr := w.lostDir()
	if lerr != nil {
		return lerr
	}
	p.dir, p.name = lost, lost.take(unnamed)
	problem := Problem{Source: p.at, Out: p.out(), State: Unnamed}
	if h != nil {
		problem.ID = h.File.String()
	}
	w.r.add(problem, err)
	return nil
}

// dir writes what is in a directory of the source.
func (w *writer) dir(ctx context.Context, src *backing.Dir, at string, out *outDir) error {
	entries, err := src.ReadDir()
	if err != nil {
		w.r.add(Problem{Source: at, Out: out.at, State: Lost, What: "what is in the directory"}, err)
		return nil
	}
	n := w.readNames(src)
	var g errgroup.Group
	g.SetLimit(2 * runtime.GOMAXPROCS(0))
	var links, dirs []*spot
	for _, e := range entries {
		if w.s.only != "" && e.Name != w.s.only {
			continue
		}
		p := &spot{src: src, at: path.Join(at, e.Name), entry: e.Name, n: n}
		if p.st, err = src.Stat(e.Name); err != nil {
			w.r.add(Problem{Source: p.at, State: Lost}, err)
			err = nil
			continue
		}
		if p.st.Type() == unix.S_IFDIR {
			dirs = append(dirs, p)
		} else if err = w.entry(ctx, p, out, &g, &links); err != nil {
			break
		}
	}
	if gerr := g.Wait(); err == nil {
		err = gerr
	}
	// A file's first name is written by now, wherever it was met.
	for _, p := range links {
		if err == nil {
			err = w.link(p)
		}
	}
	for _, p := range dirs {
		if err == nil {
			err = w.subdir(ctx, p, out)
		}
	}
	return err
}

// entry writes an entry that is no directory: a file in the background, its
// further names later.
func (w *writer) entry(ctx context.Context, p *spot, out *outDir, g *errgroup.Group, links *[]*spot) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if strings.HasPrefix(p.entry, internalPrefix) && !strings.HasPrefix(p.entry, longEntry) {
		return nil
	}
	if p.st.Type() == unix.S_IFREG {
		return w.startFile(ctx, p, out, g, links)
	}
	if err := w.place(p, out, nil, "entry-"+fmt.Sprint(p.st.Ino)); err != nil {
		return err
	}
	return w.special(p)
}

// quarantined writes what a repair took out of the tree; it has no names.
func (w *writer) quarantined(ctx context.Context, p *spot) error {
	d, err := openPath(p.src, path.Join(record.MetaDir, quarantineDir))
	if err != nil {
		return nil // there is none
	}
	defer func() { _ = d.Close() }()
	return w.dir(ctx, d, path.Join(p.at, quarantineDir), w.out)
}

func (w *writer) subdir(ctx context.Context, p *spot, out *outDir) error {
	if p.entry == record.MetaDir {
		return w.quarantined(ctx, p)
	}
	if err := w.place(p, out, nil, "directory-"+fmt.Sprint(p.st.Ino)); err != nil {
		return err
	}
	src, err := p.src.OpenDir(p.entry)
	if err != nil {
		w.r.add(Problem{Source: p.at, Out: p.out(), State: Lost}, err)
		return nil
	}
	defer func() { _ = src.Close() }()
	if err := p.dir.d.Mkdir(p.name, 0o700); err != nil {
		return w.outErr(p, err)
	}
	d, err := p.dir.d.OpenDir(p.name)
	if err != nil {
		return w.outErr(p, err)
	}
	defer func() { _ = d.Close() }()
	w.r.count(func(r *Report) { r.Directories++ })
	if err := w.dir(ctx, src, p.at, &outDir{d: d, at: p.out(), used: map[string]bool{}}); err != nil {
		return err
	}
	return w.attributes(p)
}

// link gives a file another name.
func (w *writer) link(p *spot) error {
	first := w.links[inode{p.st.Dev, p.st.Ino}]
	d, err := openPath(w.out.d, path.Dir(first))
	if err != nil {
		return w.outErr(p, err)
	}
	defer func() { _ = d.Close() }()
	err = d.Link(path.Base(first), p.dir.d, p.name)
	if errors.Is(err, unix.ENOENT) {
		w.r.add(Problem{Source: p.at, State: Lost, What: "another name of a file that is lost"}, ErrNoHeader)
		return nil
	}
	return w.outErr(p, err)
}

// special writes a symlink, a pipe, a socket or a device.
func (w *writer) special(p *spot) error {
	var err error
	if p.st.Type() == unix.S_IFLNK {
		target, terr := p.n.target(p.src, p.entry)
		if terr != nil {
			w.r.add(Problem{Source: p.at, Out: p.out(), State: Lost}, terr)
			return nil
		}
		err = p.dir.d.Symlink(target, p.name)
	} else {
		err = p.dir.d.Mknod(p.name, p.st.Type()|0o600, uint64(p.st.Rdev))
		if errors.Is(err, unix.EPERM) {
			w.r.add(Problem{Source: p.at, Out: p.out(), State: Lost, What: "a device"}, err)
			return nil
		}
	}
	if err != nil {
		return w.outErr(p, err)
	}
	w.r.count(func(r *Report) { r.Others++ })
	return w.attributes(p)
}

// outErr is a failure of the output. It tells the path in the source: errors
// have no plaintext names.
func (w *writer) outErr(p *spot, err error) error {
	if err == nil {
		return nil
	}
	return outError{fmt.Errorf("writing %s: %w", p.at, err)}
}
