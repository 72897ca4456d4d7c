package cryptfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/record"
)

type nameCipher = *nameenc.Cipher

// dirCopy is one of the two copies of a directory's record.
type dirCopy struct {
	b      []byte // nil: it is not there
	rec    *record.Dir
	cl     *class
	cipher nameCipher
	err    error // why it is of no use
}

func (c *dirCopy) node() *Node {
	return &Node{dir: &dirState{id: nameenc.DirID(c.rec.ID), class: c.cl, loaded: true}}
}

// judgeCopy reads and checks a copy.
func (k *checker) judgeCopy(ctx context.Context, read func() ([]byte, error)) (c dirCopy) {
	if c.b, c.err = read(); c.err != nil {
		c.b = nil
		return c
	}
	if c.rec, c.err = record.ParseDir(c.b); c.err != nil {
		return c
	}
	if c.cl = k.v.classes[c.rec.Class]; c.cl == nil {
		c.err = fmt.Errorf("class of the directory's record: %w: %w", ErrDirRecord, ErrNoClass)
		return c
	}
	if c.cipher, c.err = k.v.names(ctx, c.cl); c.err == nil {
		c.err = checkDirRecord(c.cipher, c.rec)
	}
	return c
}

// dirRecord checks both copies of a directory's record and restores one from the
// other. nil means that nothing in it can be read.
func (k *checker) dirRecord(ctx context.Context, d *backing.Dir, at string, entries []backing.Entry, plain string) (*checkedDir, error) {
	first := k.judgeCopy(ctx, func() (b []byte, err error) {
		err = lifted(d, func() (err error) { b, err = d.ReadFile(dirFile, record.MaxDir); return err })
		return b, err
	})
	second := k.judgeCopy(ctx, func() ([]byte, error) { return d.Attrs("").Get(dirAttr) })
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	use := &first
	switch {
	case first.err != nil && isKeyKind(fault.Of(first.err)):
		k.failed(path.Join(at, dirFile), first.err)
		return nil, nil
	case first.err != nil && second.err != nil:
		k.failed(path.Join(at, dirFile), fmt.Errorf("both copies of the directory record: %w: %w", ErrDirRecord, first.err))
		return nil, nil
	case first.err != nil:
		use = &second
		k.restoreFirst(d, at, &first, use, "first copy of the directory record is missing or damaged")
	case second.err == nil && !bytes.Equal(first.b, second.b):
		if k.secondFits(d, &first, &second, entries, plain) {
			use = &second
			k.restoreFirst(d, at, &first, use, "first copy of the directory record is that of another directory")
			break
		}
		k.restoreSecond(d, at, &second, use)
	case second.err != nil && !errors.Is(second.err, unix.EOPNOTSUPP) && !isKeyKind(fault.Of(second.err)):
		k.restoreSecond(d, at, &second, use)
	}
	k.mu.Lock()
	other, twice := k.dirs[string(use.rec.ID[:])]
	k.dirs[string(use.rec.ID[:])] = at
	k.mu.Unlock()
	if twice {
		k.add(Problem{Path: at, What: "has the directory id of " + other, Kind: fault.Integrity})
	}
	return &checkedDir{at, use.cl, use.node(), use.cipher}, nil
}

// secondFits decides between two authentic copies, of which one is another
// directory's or an older one: what is in the directory tells, else the policy.
func (k *checker) secondFits(d *backing.Dir, first, second *dirCopy, entries []backing.Entry, plain string) bool {
	a, b := k.fits(d, first, entries), k.fits(d, second, entries)
	if a != b || plain == "" {
		return b > a
	}
	want := k.v.policy.ClassOf(plain)
	return first.rec.Class != want && second.rec.Class == want
}

// fits counts the entries whose names a copy opens, and the files that are of its
// class.
func (k *checker) fits(d *backing.Dir, c *dirCopy, entries []backing.Entry) (n int) {
	node := c.node()
	for _, e := range entries {
		if _, ok, err := node.unseal(c.cipher, d, e.Name); !ok || err != nil {
			continue
		}
		n++
		if h := k.peek(d, e); h != nil && slices.ContainsFunc(h.Recipients, func(r envelope.Recipient) bool { return r.Class == c.cl.name }) {
			n++
		}
	}
	return n
}

// peek returns the header of an entry, nil if it has none.
func (k *checker) peek(d *backing.Dir, e backing.Entry) *envelope.Header {
	if e.Type != unix.S_IFREG {
		return nil
	}
	f, err := k.v.openEntry(d, e.Name, unix.O_RDONLY)
	if err != nil {
		return nil
	}
	defer func() { _ = f.Close() }()
	block, err := k.v.place.Read(f, []*backing.Dir{d})
	if err != nil {
		return nil
	}
	h, err := envelope.Parse(block)
	if err != nil {
		return nil
	}
	return h
}

func (k *checker) restoreFirst(d *backing.Dir, at string, bad, good *dirCopy, what string) {
	k.mend(Problem{Path: path.Join(at, dirFile), What: what, Kind: fault.Integrity}, func() error {
		if err := k.putAside(bad); err != nil {
			return err
		}
		return keepTimes(d, func() error { return d.Replace(dirFile, good.b, 0o600) })
	})
}

func (k *checker) restoreSecond(d *backing.Dir, at string, bad, good *dirCopy) {
	k.mend(Problem{Path: at, What: "second copy of the directory record is missing or damaged", Class: classSecond}, func() error {
		if err := k.putAside(bad); err != nil {
			return err
		}
		return setDirAttr(d, good.b)
	})
}

// putAside keeps a copy that is authentic, or may be, before another takes its
// place.
func (k *checker) putAside(c *dirCopy) error {
	if c.rec == nil {
		return nil
	}
	return k.v.quarantineBytes("dirrecord", c.b)
}

// companions checks the store's own files in a directory: each belongs to
// something that is there, and is what its name says.
func (k *checker) companions(d *backing.Dir, in *checkedDir, items []item, ours []backing.Entry) {
	there, needed, linked, headless, unsure := map[string]bool{}, map[string]bool{}, map[string]bool{}, false, false
	for _, e := range ours {
		there[e.Name] = true
	}
	for _, i := range items {
		if hash, long := strings.CutPrefix(i.Name, longEntry); long {
			needed[longName+hash] = true
		}
		if unsure = unsure || i.err != nil || i.unsure != nil; i.unsure != nil {
			k.failed(path.Join(in.at, i.Name), i.unsure)
		}
		if i.needs == "" {
			continue
		}
		needed[i.needs] = true
		linked[i.needs] = linked[i.needs] || i.st.Nlink > 1
		if !there[i.needs] && i.st.Type() == unix.S_IFREG {
			headless = true
			if i.st.Nlink > 1 { // it may be beside another name
				k.mu.Lock()
				k.needs = append(k.needs, neededSidecar{in.at, i.Name, i.needs})
				k.mu.Unlock()
			}
		}
	}
	for _, e := range ours {
		where := path.Join(in.at, e.Name)
		if unsure && !isTemp(e.Name) { // what could not be looked at may need it
			needed[e.Name] = true
		}
		var h *envelope.Header
		if strings.HasPrefix(e.Name, sidecarPrefix) {
			h = k.sidecar(d, e.Name, where, needed[e.Name])
		}
		if !needed[e.Name] && k.orphan(d, e.Name, where, headless) || h == nil {
			continue
		}
		if st, err := d.Stat(e.Name); err == nil && (linked[e.Name] || st.Nlink > 1) {
			k.noteSidecar(h.File, where, st)
		}
	}
}

// orphan deals with a file of the store's own that nothing in its directory needs.
// It reports whether that is not there any more.
func (k *checker) orphan(d *backing.Dir, entry, where string, headless bool) (moved bool) {
	p := Problem{Path: where, Class: classOrphan}
	switch {
	case strings.HasPrefix(entry, longName):
		p.What = "long name without an entry"
	case strings.HasPrefix(entry, sidecarPrefix) && headless:
		p.What = "sidecar without a file, while a file beside it has none: left where it is"
		k.add(p)
		return false
	case strings.HasPrefix(entry, sidecarPrefix):
		p.What = "sidecar without a file"
	case strings.HasPrefix(entry, targetPrefix):
		p.What = "target without a symlink"
	case isTemp(entry):
		p.What = "temporary that a crash left"
	default:
		k.add(Problem{Path: where, What: "not a file of this store", Class: classForeign})
		return false
	}
	return k.mend(p, func() error {
		return keepTimes(d, func() error { return k.v.quarantine(d, entry) })
	})
}

// sidecar checks a header file: that it is the header of the file that its name
// tells. It returns the header if it is.
func (k *checker) sidecar(d *backing.Dir, entry, where string, needed bool) *envelope.Header {
	b, err := d.ReadFile(entry, envelope.MaxHeader)
	if err != nil {
		k.failed(where, err)
		return nil
	}
	h, err := envelope.Parse(b)
	switch {
	case err != nil && needed:
		k.add(Problem{Path: where, What: "header file: " + err.Error(), Kind: fault.Of(err)})
	case err == nil && (sidecarPrefix+h.File.String() != entry || h.Store != k.v.layout.ID):
		k.add(Problem{Path: where, What: "header file is that of file " + h.File.String(), Kind: fault.Integrity})
	case err == nil:
		return h
	}
	return nil
}
