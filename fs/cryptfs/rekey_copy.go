package cryptfs

import (
	"bytes"
	"context"
	"errors"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
	"github.com/kmsfs/kmsfs/fs/journal"
)

// source is a store file that a job copies. Nobody else has it open.
type source struct {
	disk *backing.File
	sec  secrets
	cf   *chunkfile.File // nil if the file is empty
	st   backing.Stat
}

// openSource opens an entry that is not empty and unwraps its key.
func (v *Volume) openSource(ctx context.Context, d *backing.Dir, entry string, cl *class) (*source, error) {
	var disk *backing.File
	err := v.let(d, func() (err error) { disk, err = v.openEntry(d, entry, unix.O_RDONLY); return err })
	if err != nil {
		return nil, err
	}
	s := &source{disk: disk}
	if s.st, err = disk.Stat(); err != nil {
		s.close()
		return nil, err
	}
	if s.st.Size == 0 {
		return s, nil
	}
	var block []byte
	err = v.let(d, func() (err error) { block, err = v.readBlock(disk, []*backing.Dir{d}, s.st); return err })
	if err == nil {
		s.sec, err = v.unwrap(ctx, cl, block)
	}
	if err == nil {
		s.cf, err = chunkfile.Open(chunkfile.Config{
			Disk: disk, Geo: cl.geo, Codec: s.sec.codec, Owner: unlogged{}, Size: s.st.Size, Sparse: s.sec.header.Sparse,
		})
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *source) close() {
	if s.cf != nil {
		s.cf.Wipe()
	}
	s.sec.wipe()
	_ = s.disk.Close() // read only
}

// copyOwner is the owner of a file that a job writes: nothing of it is in the
// journal, because it has no name that anybody sees until it is whole.
type copyOwner struct {
	unlogged
	v    *Volume
	disk *backing.File
	home *backing.Dir
	sec  *secrets
}

func (o *copyOwner) encode(sparse bool) ([]byte, error) {
	h := o.sec.header
	if h.Sparse != sparse {
		h.Sparse = sparse
		o.sec.key.Commit(h)
	}
	return h.Encode(o.v.layout.HeaderSize)
}

func (o *copyOwner) NewHeader(sparse bool) ([]byte, error) {
	block, err := o.encode(sparse)
	if err != nil {
		return nil, err
	}
	return o.v.place.Write(o.disk, []*backing.Dir{o.home}, o.sec.header.File, block)
}

func (o *copyOwner) Header(sparse bool) (journal.Op, error) {
	block, err := o.encode(sparse)
	if o.v.place.Body() {
		return journal.Op{Kind: journal.OpWrite, Data: block}, err
	}
	return journal.Op{Kind: journal.OpHeader, Data: block}, err
}

func (o *copyOwner) PutHeader(block []byte) error {
	_, err := o.v.place.Write(o.disk, []*backing.Dir{o.home}, o.sec.header.File, block)
	return err
}

// staged is a whole and durable file under a temporary name.
type staged struct {
	name string // temporary
	side string // its sidecar, "" if it has none
}

// discard removes it; what cannot be removed, the job's recovery will.
func (s staged) discard(home *backing.Dir) {
	_ = home.Unlink(s.name)
	if s.side != "" {
		_ = home.Unlink(s.side)
	}
}

// copyFile makes a copy of src in home: under a key of its own in class to, with
// the holes of the source and the attributes a, and durable. On failure nothing
// is left behind.
func (v *Volume) copyFile(ctx context.Context, src *source, to *class, home *backing.Dir, id envelope.ID, a fileAttrs) (staged, error) {
	out := staged{name: backing.TempName()}
	if err := v.step("copy file"); err != nil {
		return out, err
	}
	disk, err := home.Open(out.name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return out, err
	}
	defer func() { _ = disk.Close() }() // it was synced
	if src.cf != nil {
		out.side = v.place.Sidecar(id[:])
		err = v.copyContents(ctx, src, to, home, disk, id)
	}
	if err == nil {
		err = a.apply(fileChanger{disk}, disk.Attrs())
	}
	if err == nil {
		err = v.step("sync file")
	}
	if err == nil {
		err = disk.Sync()
	}
	if err == nil && out.side != "" {
		err = v.place.Sync([]*backing.Dir{home}, id)
	}
	if err != nil {
		out.discard(home)
	}
	return out, err
}

func (v *Volume) copyContents(ctx context.Context, src *source, to *class, home *backing.Dir, disk *backing.File, id envelope.ID) error {
	fixed := envelope.Fixed{Suite: uint8(v.layout.Suite), ChunkSize: to.geo.ChunkSize, Store: v.layout.ID, File: id}
	h, k, err := v.keys.Create(ctx, to.keys(), keywrap.PurposeData, fixed, v.layout.HeaderSize)
	if err != nil {
		return wrapf(err, "new key")
	}
	sec, err := newSecrets(h, k)
	if err != nil {
		return err
	}
	defer sec.wipe()
	dst, err := chunkfile.Open(chunkfile.Config{
		Disk: disk, Geo: to.geo, Codec: sec.codec, Owner: &copyOwner{v: v, disk: disk, home: home, sec: &sec},
	})
	if err != nil {
		return err
	}
	defer dst.Wipe()
	if err := copyData(ctx, src.cf, dst); err != nil {
		return err
	}
	return dst.Flush()
}

// copyData copies what is data; the last chunk of a file always is.
func copyData(ctx context.Context, src, dst *chunkfile.File) error {
	size := src.Size()
	buf := make([]byte, min(size, 1<<20))
	defer clear(buf)
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, err := src.SeekData(off)
		if err != nil {
			return err
		}
		hole, err := src.SeekHole(data)
		if err != nil {
			return err
		}
		n, err := src.ReadAt(buf[:min(int64(len(buf)), hole-data)], data)
		if err == nil {
			_, err = dst.WriteAt(buf[:n], data)
		}
		if err != nil {
			return err
		}
		off = data + int64(n)
	}
	return nil
}

// fileAttrs is what a copy keeps of an object beside its contents, as the store
// has it: mode, owner, times, and every attribute but the store's own.
type fileAttrs struct {
	st    backing.Stat
	attrs map[string][]byte
}

func readAttrs(a backing.Attrs, st backing.Stat) (fileAttrs, error) {
	out := fileAttrs{st, map[string][]byte{}}
	names, err := a.List()
	if errors.Is(err, unix.EOPNOTSUPP) || st.Type() == unix.S_IFLNK && errors.Is(err, unix.EPERM) {
		return out, nil
	}
	if err != nil {
		return out, err
	}
	for _, name := range names {
		if name == headerAttr || name == dirAttr {
			continue
		}
		value, err := a.Get(name)
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // such as the label of a security module that is not there
		}
		if err != nil {
			return out, wrapf(err, "attribute %s", name)
		}
		out.attrs[name] = value
	}
	return out, nil
}

// reseal encrypts the attributes of the user namespace, which are under the keys
// of class from, under those of class to.
func (a fileAttrs) reseal(from, to *class, fc, tc *nameenc.Cipher) (fileAttrs, error) {
	out := fileAttrs{a.st, map[string][]byte{}}
	for name, value := range a.attrs {
		plain, ok, err := openAttrName(from, fc, name)
		if err != nil {
			return out, wrapf(err, "attribute %s", name)
		}
		if !ok {
			if !strings.HasPrefix(name, plainPrefix) {
				out.attrs[name] = value
			}
			continue // somebody put it there by hand; no mount shows it
		}
		contents, err := fc.DecryptAttrValue(plain, value)
		if err != nil {
			return out, wrapf(err, "attribute %s", name)
		}
		sealed, err := sealAttr(to, tc, plainPrefix+plain)
		if err == nil {
			value, err = tc.EncryptAttrValue(plain, contents)
		}
		if err != nil {
			return out, wrapf(err, "attribute %s", name)
		}
		out.attrs[sealed] = value
	}
	return out, nil
}

// openAttrName returns the plaintext name, without "user.", of an attribute that
// is sealed; ok is false for any other.
func openAttrName(cl *class, c *nameenc.Cipher, name string) (plain string, ok bool, err error) {
	enc, sealed := strings.CutPrefix(name, sealedAttr)
	switch {
	case sealed && !cl.plain:
		plain, err = c.DecryptAttrName(enc)
		return plain, true, err
	case cl.plain && strings.HasPrefix(name, plainPrefix) && !strings.HasPrefix(name, attrPrefix):
		return strings.TrimPrefix(name, plainPrefix), true, nil
	}
	return "", false, nil
}

// apply gives an object its attributes. Owner comes first, as it clears others;
// times come last.
func (a fileAttrs) apply(c changer, at backing.Attrs) error {
	now, err := c.stat()
	if err != nil {
		return err
	}
	if now.Uid != a.st.Uid || now.Gid != a.st.Gid {
		if err := c.chown(int(a.st.Uid), int(a.st.Gid)); err != nil {
			return wrapf(err, "chown")
		}
	}
	if err := a.applyXattrs(at); err != nil {
		return err
	}
	if a.st.Type() != unix.S_IFLNK {
		if err := c.chmod(a.st.Mode & 0o7777); err != nil {
			return err
		}
	}
	return c.times(statxTime(a.st.Atime), statxTime(a.st.Mtime))
}

func (a fileAttrs) applyXattrs(at backing.Attrs) error {
	there, err := at.List()
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EPERM) {
		return err
	}
	for _, name := range there { // such as an ACL inherited from the directory
		_, want := a.attrs[name]
		if want || name == headerAttr || name == dirAttr || strings.HasPrefix(name, "security.") {
			continue
		}
		if err := at.Remove(name); err != nil && !errors.Is(err, unix.ENODATA) {
			return wrapf(err, "attribute %s", name)
		}
	}
	for name, value := range a.attrs {
		if old, err := at.Get(name); err == nil && bytes.Equal(old, value) {
			continue
		}
		err := at.Set(name, value, 0)
		if err != nil && isLabel(name) && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP)) {
			continue
		}
		if err != nil {
			return wrapf(err, "attribute %s", name)
		}
	}
	return nil
}

// isLabel names attributes that the kernel gives a file itself.
func isLabel(name string) bool {
	return name == "security.selinux" || name == "security.ima" || name == "security.evm" || strings.HasPrefix(name, "security.SMACK64")
}

func statxTime(t unix.StatxTimestamp) unix.Timespec {
	return unix.Timespec{Sec: t.Sec, Nsec: int64(t.Nsec)}
}
