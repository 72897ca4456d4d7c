package salvage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// startFile decides where a file goes, and writes it in the background.
func (w *writer) startFile(ctx context.Context, p *spot, out *outDir, g *errgroup.Group, links *[]*spot) error {
	w.progress()
	disk, err := openQuiet(p.src, p.entry)
	if err != nil {
		w.r.add(Problem{Source: p.at, State: Lost}, err)
		return nil
	}
	headers, err := w.headersOf(p, disk)
	if headers == nil && p.st.Size > 0 {
		_ = disk.Close()
		if err != nil {
			w.r.add(Problem{Source: p.at, State: Lost}, err)
		}
		return nil
	}
	var h *envelope.Header
	unnamed := fmt.Sprintf("empty-%d", p.st.Ino)
	if len(headers) > 0 {
		h = headers[0].Header
		unnamed = h.File.String()
	}
	if err := w.place(p, out, h, unnamed); err != nil {
		_ = disk.Close()
		return err
	}
	key := inode{p.st.Dev, p.st.Ino}
	if p.st.Nlink > 1 {
		if _, twice := w.links[key]; twice {
			_ = disk.Close()
			*links = append(*links, p)
			return nil
		}
		w.links[key] = p.out()
	}
	g.Go(func() error {
		defer func() { _ = disk.Close() }()
		return w.file(ctx, p, disk, headers)
	})
	return nil
}

func (w *writer) progress() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.files++
	if w.c.Progress != nil {
		w.c.Progress(w.files)
	}
}

// headersOf returns what may be the header of a file that is not empty. Without
// any and without an error the file is a header itself, or a record of the store
// that lies among the files.
func (w *writer) headersOf(p *spot, disk *backing.File) ([]located, error) {
	if p.st.Size == 0 {
		return nil, nil
	}
	if h := prefixHeader(disk); h != nil && int64(h.BlockSize) == p.st.Size {
		if h.ChunkSize == 0 {
			return nil, nil // a name key
		}
		if w.s.bodies[h.File] {
			return nil, nil // of another file
		}
		if _, xerr := disk.Attrs().Get(envelope.XattrName); xerr != nil && len(w.s.stores[h.Store].entriesOf(h)) == 0 {
			return nil, fmt.Errorf("a header without contents: %w", ErrNoHeader)
		}
	}
	return w.s.headers(p.src, p.at, disk)
}

// file writes a file, whole or in part.
func (w *writer) file(ctx context.Context, p *spot, disk *backing.File, headers []located) error {
	var b *body
	if p.st.Size > 0 {
		var err error
		if b, err = w.unlockFile(ctx, disk, p.st.Size, headers); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			w.r.add(Problem{Source: p.at, State: Lost, ID: headers[0].File.String(), Class: strings.Join(classesOf(headers[0].Header), " ")}, err)
			return nil
		}
		defer b.codec.Wipe()
	}
	out, err := p.dir.d.Open(p.name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return w.outErr(p, err)
	}
	var o outcome
	if b != nil {
		o, err = b.copy(ctx, out)
	}
	if cerr := out.Close(); err == nil && cerr != nil {
		err = outError{cerr}
	}
	if err != nil {
		_ = p.dir.d.Unlink(p.name) // half a file would pass for a whole one
		if oerr := (outError{}); errors.As(err, &oerr) {
			return w.outErr(p, oerr.error)
		}
		return err
	}
	w.r.count(func(r *Report) { r.Files, r.Bytes = r.Files+1, r.Bytes+uint64(o.bytes) })
	if b != nil {
		w.tell(p, b, o)
		if b.mtime != nil && b.mtime.Nsec < 1e9 { // else there was none to tell
			p.st.Mtime.Sec, p.st.Mtime.Nsec = b.mtime.Sec, uint32(b.mtime.Nsec)
		}
	}
	return w.attributes(p)
}

// tell lists a file that is not whole.
func (w *writer) tell(p *spot, b *body, o outcome) {
	if len(o.zeroed) == 0 && !o.truncated && !o.trailing && o.cause == nil {
		return
	}
	var what []string
	if len(o.zeroed) > 0 {
		what = append(what, "damaged parts are zeros")
	}
	if o.truncated {
		what = append(what, "the end is missing")
	}
	if o.trailing {
		what = append(what, "something that follows the end was left out")
	}
	if o.cause == nil {
		o.cause = errNotLast
	}
	w.r.add(Problem{
		Source: p.at, Out: p.out(), State: Damaged, ID: b.File.String(), Class: b.class,
		What: strings.Join(what, ", "), Zeroed: o.zeroed, Truncated: o.truncated,
	}, o.cause)
}

// attributes gives what was written its attributes, owner, mode and times, the
// mode after the rest, so that nobody has more access meanwhile.
func (w *writer) attributes(p *spot) error {
	failed := p.n.attrs(p.src.Attrs(p.entry), func(name string, value []byte) error {
		return p.dir.d.Attrs(p.name).Set(name, value, 0)
	})
	mode := p.st.Mode & 0o7777
	if os.Geteuid() == 0 || int(p.st.Uid) != os.Geteuid() || int(p.st.Gid) != os.Getegid() {
		if err := p.dir.d.Chown(p.name, int(p.st.Uid), int(p.st.Gid)); err != nil {
			failed = append(failed, fmt.Errorf("owner %d:%d: %w", p.st.Uid, p.st.Gid, err))
			mode &= 0o1777 // bits that would act for another owner
		}
	}
	switch p.st.Type() {
	case unix.S_IFLNK:
	case unix.S_IFDIR:
		w.modes = append(w.modes, dirMode{p.out(), mode})
	default:
		if err := p.dir.d.Chmod(p.name, mode); err != nil {
			return w.outErr(p, err)
		}
	}
	atime := unix.Timespec{Sec: p.st.Atime.Sec, Nsec: int64(p.st.Atime.Nsec)}
	mtime := unix.Timespec{Sec: p.st.Mtime.Sec, Nsec: int64(p.st.Mtime.Nsec)}
	if err := p.dir.d.SetTimes(p.name, atime, mtime); err != nil {
		failed = append(failed, fmt.Errorf("times: %w", err))
	}
	if len(failed) > 0 {
		w.r.add(Problem{Source: p.at, Out: p.out(), State: Bare}, errors.Join(failed...))
	}
	return nil
}
