package rewrap

import (
	"context"
	"fmt"
	"path"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/placement"
)

// file is a store file with contents, as the walk finds it.
type file struct {
	path   string // ciphertext path
	size   int64  // bytes of the store file
	block  []byte
	header *envelope.Header
}

// Problem is a file whose header could not be looked at, or written.
type Problem struct {
	Path string // ciphertext path
	Err  error
}

// sight is what a walk does with what it finds. Both are called from several
// goroutines. An error ends the walk.
type sight struct {
	file    func(f *file) error
	problem func(p Problem)
}

const (
	// perTask is how many entries of a directory one goroutine looks at.
	perTask = 128
	// A header that does not parse may be in the middle of a write.
	looks     = 4
	lookAfter = 20 * time.Millisecond
)

// walker walks a store. Hard-linked files are seen once.
type walker struct {
	s     *Store
	sight sight
	group *errgroup.Group

	mu   sync.Mutex
	seen map[[2]uint64]bool // files with several names
}

// walk looks at every file of the store that is not empty.
func (s *Store) walk(ctx context.Context, see sight) error {
	w := &walker{s: s, sight: see, seen: map[[2]uint64]bool{}}
	w.group, ctx = errgroup.WithContext(ctx)
	w.group.SetLimit(2 * runtime.GOMAXPROCS(0))
	err := w.dir(ctx, s.root, "")
	if werr := w.group.Wait(); werr != nil {
		return werr
	}
	return err
}

// shared is a directory that several tasks use, closed with the last of them.
type shared struct {
	*backing.Dir
	users atomic.Int64
}

func (d *shared) release() {
	if d.users.Add(-1) == 0 {
		_ = d.Close()
	}
}

// dir looks at what is in a directory, d, which stays the caller's.
func (w *walker) dir(ctx context.Context, d *backing.Dir, at string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var entries []backing.Entry
	err := placement.Lifted(d, func() (err error) { entries, err = d.ReadDir(); return err })
	own, oerr := d.OpenDir(".")
	if err == nil {
		err = oerr
	}
	if err != nil {
		if oerr == nil {
			_ = own.Close()
		}
		if !gone(err) {
			w.sight.problem(Problem{path.Join(at, "."), err})
		}
		return nil
	}
	here := &shared{Dir: own}
	here.users.Store(1)
	defer here.release()
	var task []string
	flush := func() {
		if names := task; len(names) > 0 {
			task = nil
			here.users.Add(1)
			w.group.Go(func() error {
				defer here.release()
				return w.entries(ctx, here.Dir, at, names)
			})
		}
	}
	for _, e := range entries {
		if isInternal(e.Name) || e.Type != 0 && e.Type != unix.S_IFREG && e.Type != unix.S_IFDIR {
			continue
		}
		if e.Type == unix.S_IFREG {
			if task = append(task, e.Name); len(task) == perTask {
				flush()
			}
			continue
		}
		if err := w.other(ctx, here.Dir, at, e, func() { task = append(task, e.Name) }); err != nil {
			return err
		}
	}
	flush()
	return nil
}

// other looks at an entry that is a directory, or of which the file system does
// not say what it is.
func (w *walker) other(ctx context.Context, d *backing.Dir, at string, e backing.Entry, regular func()) error {
	if e.Type == 0 {
		st, err := d.Stat(e.Name)
		switch {
		case err != nil && !gone(err):
			w.sight.problem(Problem{path.Join(at, e.Name), err})
			return nil
		case err == nil && st.Type() == unix.S_IFREG:
			regular()
		}
		if err != nil || st.Type() != unix.S_IFDIR {
			return nil
		}
	}
	sub, err := d.OpenDir(e.Name)
	if err != nil {
		if !gone(err) {
			w.sight.problem(Problem{path.Join(at, e.Name), err})
		}
		return nil
	}
	defer func() { _ = sub.Close() }()
	return w.dir(ctx, sub, path.Join(at, e.Name))
}

func (w *walker) entries(ctx context.Context, d *backing.Dir, at string, names []string) error {
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		where := path.Join(at, name)
		f, err := w.look(d, name)
		switch {
		case err == nil && f == nil, gone(err): // empty, seen before, or removed meanwhile
		case err != nil:
			w.sight.problem(Problem{where, err})
		default:
			f.path = where
			if err := w.sight.file(f); err != nil {
				return err
			}
		}
	}
	return nil
}

// look reads an entry's header; nil if it has none to look at.
func (w *walker) look(d *backing.Dir, name string) (*file, error) {
	for i := 1; ; i++ {
		f, err := w.s.read(d, name, w.first)
		if err == nil || gone(err) || i == looks {
			return f, err
		}
		time.Sleep(lookAfter)
	}
}

// first reports whether a file is seen for the first time.
func (w *walker) first(st backing.Stat) bool {
	if st.Nlink < 2 {
		return true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	key := [2]uint64{st.Dev, st.Ino}
	if w.seen[key] {
		return false
	}
	w.seen[key] = true
	return true
}

// read reads a file's header; nil if the file is empty or not wanted.
func (s *Store) read(d *backing.Dir, name string, want func(backing.Stat) bool) (*file, error) {
	disk, err := placement.Open(d, name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer func() { _ = disk.Close() }()
	st, err := disk.Stat()
	if err != nil || st.Type() != unix.S_IFREG || st.Size == 0 {
		return nil, err
	}
	block, err := s.place.Read(disk, []*backing.Dir{d})
	if err != nil {
		return nil, err
	}
	h, err := envelope.Parse(block)
	if err != nil {
		return nil, err
	}
	if h.Store != s.layout.ID || h.BlockSize != s.layout.HeaderSize {
		return nil, fmt.Errorf("file %s of store %s: %w", h.File, h.Store, ErrHeader)
	}
	if want != nil && !want(st) {
		return nil, nil
	}
	return &file{size: st.Size, block: block, header: h}, nil
}
