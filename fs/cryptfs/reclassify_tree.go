package cryptfs

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// A run builds the staged tree in two passes over the source. The first copies
// files, several at a time; the second makes further names of files, removes
// what the source does not have (any more), gives directories their attributes,
// and makes them durable. What a run before has left is used where it is newer
// than the source: a copy that has its name is whole.

// linkKey is a file with several names, in one class.
type linkKey struct {
	inode inoKey
	class *class
}

// firstCopy is where the copy of such a file is, from the staging directory.
type firstCopy struct {
	way   []string
	entry string
}

// fail notes what could not be copied, unless it concerns the whole job.
func (r *reclassifier) fail(ctx context.Context, path string, err error) error {
	if fatal(ctx, err) {
		return fmt.Errorf("%s: %w", path, err)
	}
	r.progress.mu.Lock()
	defer r.progress.mu.Unlock()
	r.report.Failures = append(r.report.Failures, newFailure(path, err))
	return nil
}

// subDir opens a directory below t, with its record.
func (v *Volume) subDir(ctx context.Context, t *treeDir, it treeItem) (*treeDir, error) {
	var d *backing.Dir
	err := lifted(t.dir, func() (err error) { d, err = t.dir.OpenDir(it.entry); return err })
	if err != nil {
		return nil, err
	}
	sub, err := v.newTreeDir(ctx, d, t.below(it.entry), t.child(it.name))
	if err != nil {
		_ = d.Close()
		return nil, err
	}
	return sub, nil
}

// plan counts the tree, and sees whether anything has to be done.
func (r *reclassifier) plan(ctx context.Context, t *treeDir) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	r.report.Directories++
	r.needed += 8 << 10
	r.agrees = r.agrees && t.class.name == r.policy.ClassOf(t.path)
	items, err := t.items(r.v, func(path string, err error) error { return r.fail(ctx, path, err) })
	if err != nil {
		return r.fail(ctx, t.path, err)
	}
	for _, it := range items {
		switch it.st.Type() {
		case unix.S_IFDIR:
			sub, err := r.v.subDir(ctx, t, it)
			if err == nil {
				err = r.plan(ctx, sub)
				_ = sub.dir.Close()
				if err != nil {
					return err
				}
			} else if err := r.fail(ctx, t.child(it.name), err); err != nil {
				return err
			}
			continue
		case unix.S_IFREG:
			r.report.Files++
		default:
			r.report.Others++
		}
		r.count(t.child(it.name), it.st)
	}
	return nil
}

// count adds what a file takes to the plan; one with several names counts once.
func (r *reclassifier) count(path string, st backing.Stat) {
	if st.Nlink > 1 {
		if n := r.inodes[keyOf(st)]; n != nil {
			n.found++
			return
		}
		r.inodes[keyOf(st)] = &inodeNames{found: 1, links: st.Nlink, path: path}
	}
	r.progress.p.TotalFiles++
	r.progress.p.TotalBytes += uint64(st.Size)
	r.needed += uint64(st.Blocks)*512/64*65 + 4<<10 // other chunks take other room
}

// stagedRoot returns the top of the staged tree.
func (r *reclassifier) stagedRoot(ctx context.Context) (*treeDir, error) {
	id, err := hex.DecodeString(r.job.New)
	if err != nil || len(id) != len(nameenc.DirID{}) {
		return nil, ErrJob
	}
	if have, err := treeID(r.stage, stagedTree); err == nil && have != r.job.New {
		if err := r.v.removeTree(r.stage, stagedTree); err != nil {
			return nil, err
		}
	}
	above := &treeDir{dir: r.stage}
	return r.makeDir(ctx, above, stored{entry: stagedTree}, r.path, nameenc.DirID(id))
}

// makeDir returns the staged directory of a plaintext path, which has the class
// of that path, making it if it is not there.
func (r *reclassifier) makeDir(ctx context.Context, above *treeDir, s stored, plain string, id nameenc.DirID) (*treeDir, error) {
	v := r.v
	cl := v.classes[r.policy.ClassOf(plain)]
	st, err := above.dir.Stat(s.entry)
	switch {
	case errors.Is(err, unix.ENOENT):
	case err != nil:
		return nil, err
	case st.Type() == unix.S_IFDIR:
		if !v.isRoot { // a run before may have given it a mode that keeps us out
			if err := above.dir.Chmod(s.entry, 0o700); err != nil {
				return nil, err
			}
		}
		if t, err := r.openStaged(ctx, above, s.entry, plain); err == nil {
			if t.class == cl {
				return t, nil
			}
			_ = t.dir.Close()
		}
		fallthrough
	default:
		if err := v.removeTree(above.dir, s.entry); err != nil {
			return nil, err
		}
	}
	cipher, err := v.names(ctx, cl)
	if err != nil {
		return nil, err
	}
	rec, err := newDirRecord(cipher, cl.name)
	if err != nil {
		return nil, err
	}
	if id != (nameenc.DirID{}) {
		rec.ID = id
		rec.MAC = cipher.MAC(dirMACLabel, rec.Body())
	}
	if err := r.newDir(above.dir, s, rec.Encode()); err != nil {
		return nil, err
	}
	return r.openStaged(ctx, above, s.entry, plain)
}

func (r *reclassifier) openStaged(ctx context.Context, above *treeDir, entry, plain string) (*treeDir, error) {
	d, err := above.dir.OpenDir(entry)
	if err != nil {
		return nil, err
	}
	t, err := r.v.newTreeDir(ctx, d, above.below(entry), plain)
	if err != nil {
		_ = d.Close()
	}
	return t, err
}

// newDir makes a directory with its record before it has its name.
func (r *reclassifier) newDir(above *backing.Dir, s stored, rec []byte) error {
	if err := r.v.step("make directory"); err != nil {
		return err
	}
	tmp := backing.TempName()
	if err := above.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	d, err := above.OpenDir(tmp)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	if err := d.WriteNew(dirFile, rec, 0o600, true); err != nil {
		return err
	}
	if err := setDirAttr(d, rec); err != nil {
		return err
	}
	if err := placeName(above, s); err != nil {
		return err
	}
	return above.Rename(tmp, above, s.entry, 0)
}

// build is the first pass.
func (r *reclassifier) build(ctx context.Context, src, dst *treeDir) error {
	r.crew, ctx = r.conf.crew(ctx)
	err := r.copyDir(ctx, src, dst)
	if gerr := r.crew.Wait(); gerr != nil { // it is why the pass ended
		err = gerr
	}
	return err
}

// dirPair keeps two directories open while files are copied from one to the
// other.
type dirPair struct {
	src, dst treeDir
	users    atomic.Int32
}

func newPair(src, dst *treeDir) (*dirPair, error) {
	p := &dirPair{src: *src, dst: *dst}
	var err error
	if p.src.dir, err = openPath(src.dir, nil); err != nil {
		return nil, err
	}
	if p.dst.dir, err = openPath(dst.dir, nil); err != nil {
		_ = p.src.dir.Close()
		return nil, err
	}
	p.users.Add(1)
	return p, nil
}

func (p *dirPair) leave() {
	if p.users.Add(-1) == 0 {
		_ = p.src.dir.Close()
		_ = p.dst.dir.Close()
	}
}

func (r *reclassifier) copyDir(ctx context.Context, src, dst *treeDir) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	items, err := src.items(r.v, func(path string, err error) error { return r.fail(ctx, path, err) })
	if err != nil {
		return r.fail(ctx, src.path, err)
	}
	var pair *dirPair
	err = lifted(src.dir, func() (err error) { pair, err = newPair(src, dst); return err })
	if err != nil {
		return err
	}
	defer pair.leave()
	for _, it := range items {
		s, err := dst.seal(it.name)
		if err == nil && it.st.Type() == unix.S_IFDIR {
			err = r.copySubDir(ctx, src, dst, it, s)
		} else if err == nil && r.firstOf(dst, it, s) {
			pair.users.Add(1)
			r.crew.do(func() error {
				defer pair.leave()
				return r.copyEntry(ctx, &pair.src, &pair.dst, it, s)
			})
		}
		if err != nil {
			if err := r.fail(ctx, src.child(it.name), err); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *reclassifier) copySubDir(ctx context.Context, src, dst *treeDir, it treeItem, s stored) error {
	sub, err := r.v.subDir(ctx, src, it)
	if err != nil {
		return err
	}
	defer func() { _ = sub.dir.Close() }()
	to, err := r.makeDir(ctx, dst, s, sub.path, nameenc.DirID{})
	if err != nil {
		return err
	}
	defer func() { _ = to.dir.Close() }()
	return r.copyDir(ctx, sub, to)
}

// firstOf reports whether an item is to be copied: of a file with several names
// the first one is, and the others become names of the copy.
func (r *reclassifier) firstOf(dst *treeDir, it treeItem, s stored) bool {
	if it.st.Nlink < 2 {
		return true
	}
	key := linkKey{keyOf(it.st), dst.class}
	if r.first[key] != nil {
		return false
	}
	r.first[key] = &firstCopy{dst.entry, s.entry}
	return true
}

// jobCounter counts what is done.
type jobCounter struct {
	mu sync.Mutex
	p  JobProgress
}

// copyEntry copies one item that is no directory. The error is one that ends the
// job.
func (r *reclassifier) copyEntry(ctx context.Context, src, dst *treeDir, it treeItem, s stored) error {
	kept := r.valid(src, dst, it, s.entry)
	if !kept {
		err := ctx.Err()
		if err == nil && r.conf.Wait != nil {
			err = r.conf.Wait(ctx)
		}
		if err == nil {
			err = r.copyOne(ctx, src, dst, it, s)
		}
		if err != nil {
			return r.fail(ctx, src.child(it.name), err)
		}
	}
	r.progress.mu.Lock()
	if kept {
		r.report.Kept++
	}
	r.report.Bytes += uint64(it.st.Size)
	r.progress.p.Files++
	r.progress.p.Bytes += uint64(it.st.Size)
	p := r.progress.p
	r.progress.mu.Unlock()
	if r.conf.Progress != nil {
		r.conf.Progress(p)
	}
	return nil
}

// valid reports whether a run before has copied the item as it is now: the copy
// is as like it as stat can tell and was finished after the last change of the
// original, and it is wrapped for the keys that the class has now.
func (r *reclassifier) valid(src, dst *treeDir, it treeItem, entry string) bool {
	st, err := dst.dir.Stat(entry)
	if err != nil || st.Mode != it.st.Mode || st.Uid != it.st.Uid || st.Gid != it.st.Gid || st.Mtime != it.st.Mtime || st.Rdev != it.st.Rdev {
		return false
	}
	a, b := it.st.Ctime, st.Ctime
	if b.Sec < a.Sec || b.Sec == a.Sec && b.Nsec <= a.Nsec {
		return false
	}
	if st.Type() != unix.S_IFREG || it.st.Size == 0 && st.Size == 0 {
		return true
	}
	was, err1 := src.class.geo.PlainSize(dare.CipherOff(it.st.Size))
	is, err2 := dst.class.geo.PlainSize(dare.CipherOff(st.Size))
	return err1 == nil && err2 == nil && was == is && r.v.wrappedFor(dst.dir, entry, dst.class)
}

// wrappedFor reports whether the recipients of a file are the class's keys.
func (v *Volume) wrappedFor(d *backing.Dir, entry string, cl *class) bool {
	f, err := v.openEntry(d, entry, unix.O_RDONLY)
	if err != nil {
		return false
	}
	defer func() { _ = f.Close() }()
	block, err := v.place.Read(f, []*backing.Dir{d})
	if err != nil {
		return false
	}
	h, err := envelope.Parse(block)
	if err != nil {
		return false
	}
	var keys []string
	for _, rec := range h.Recipients {
		keys = append(keys, rec.Wrapped.Key)
	}
	return slices.Equal(keys, cl.keys().Keys)
}

// copyOne makes the copy and gives it its name.
func (r *reclassifier) copyOne(ctx context.Context, src, dst *treeDir, it treeItem, s stored) error {
	var raw fileAttrs
	err := r.v.let(src.dir, func() (err error) { raw, err = readAttrs(src.dir.Attrs(it.entry), it.st); return err })
	if err != nil {
		return err
	}
	attrs, err := raw.reseal(src.class, dst.class, src.cipher, dst.cipher)
	if err != nil {
		return err
	}
	var tmp staged
	switch it.st.Type() {
	case unix.S_IFREG:
		f, err := r.v.openSource(ctx, src.dir, it.entry, src.class)
		if err != nil {
			return err
		}
		defer f.close()
		tmp, err = r.v.copyFile(ctx, f, dst.class, dst.dir, envelope.NewID(), attrs)
		if err != nil {
			return err
		}
	case unix.S_IFLNK:
		tmp, err = r.copyLink(src, dst, it, attrs)
	default:
		tmp, err = r.copySpecial(dst, it, attrs)
	}
	if err != nil {
		return err
	}
	if err := r.v.step("name copy"); err != nil {
		return err
	}
	err = placeName(dst.dir, s)
	if err == nil {
		if err = dst.dir.Rename(tmp.name, dst.dir, s.entry, 0); errors.Is(err, unix.EISDIR) { // the source changed meanwhile
			if err = r.v.removeTree(dst.dir, s.entry); err == nil {
				err = dst.dir.Rename(tmp.name, dst.dir, s.entry, 0)
			}
		}
	}
	if err != nil {
		tmp.discard(dst.dir)
	}
	return err
}

// copyLink copies a symbolic link; a long target is in a file beside it.
func (r *reclassifier) copyLink(src, dst *treeDir, it treeItem, a fileAttrs) (staged, error) {
	out := staged{name: backing.TempName()}
	var target string
	err := r.v.let(src.dir, func() (err error) { target, err = readTarget(src.dir, it.entry, src.class, src.cipher); return err })
	if err != nil {
		return out, err
	}
	raw := target
	if !dst.class.plain {
		if raw, err = dst.cipher.EncryptTarget(target); err != nil {
			return out, err
		}
		if nameenc.IsLongTarget(raw) {
			out.side = targetPrefix + envelope.NewID().String()
			if err := dst.dir.WriteNew(out.side, []byte(raw), 0o600, true); err != nil {
				return out, err
			}
			raw = out.side
		}
	}
	if err = dst.dir.Symlink(raw, out.name); err == nil {
		err = a.apply(entryChanger{dst.dir, out.name}, dst.dir.Attrs(out.name))
	}
	if err != nil {
		out.discard(dst.dir)
	}
	return out, err
}

// copySpecial copies a fifo, a socket or a device.
func (r *reclassifier) copySpecial(dst *treeDir, it treeItem, a fileAttrs) (staged, error) {
	out := staged{name: backing.TempName()}
	err := dst.dir.Mknod(out.name, it.st.Type()|0o600, it.st.Rdev)
	if err == nil {
		err = a.apply(entryChanger{dst.dir, out.name}, dst.dir.Attrs(out.name))
	}
	if err != nil {
		out.discard(dst.dir)
	}
	return out, err
}
