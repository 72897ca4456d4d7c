package powercut

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// at is a value from time t on; times are the numbers of steps.
type at[T any] struct {
	t int
	v T
}

// object is a file or directory as programs see it, with all that it went through.
type object struct {
	id      int
	typ     uint32
	target  string
	data    []at[[]byte]
	mode    []at[uint32]
	xattr   []at[string] // user.k, "": none
	entries []at[map[string]*object]
	synced  []at[int] // durable is what it was at time v, for a cut after t
	// datasynced is the same of the data alone.
	datasynced []at[int]
	removed    []int // times at which it lost a name

	// poked: the kernel may hold writes that no sync has covered. Then an msync of
	// some pages makes those durable and no others, and whoever makes the file longer
	// does it before they come: at that time, partly, the end may be there before what
	// leads up to it.
	poked  bool
	partly []int
}

func last[T any](s []at[T]) T { return s[len(s)-1].v }

// oracle knows what programs did and what they were promised.
type oracle struct {
	root *object
	now  int
	next int
	all  []*object
	ends []int // record position at which each step was over
	from []int // and at which it began
}

func newOracle() *oracle {
	o := &oracle{from: []int{0}, ends: []int{0}}
	o.root = o.object(unix.S_IFDIR, 0o755)
	return o
}

func (o *oracle) object(typ, mode uint32) *object {
	x := &object{id: o.next, typ: typ, mode: []at[uint32]{{o.now, mode}}, xattr: []at[string]{{o.now, ""}}}
	if typ == unix.S_IFDIR {
		x.entries = []at[map[string]*object]{{o.now, map[string]*object{}}}
	} else if typ == unix.S_IFREG {
		x.data = []at[[]byte]{{o.now, nil}}
	}
	o.next++
	o.all = append(o.all, x)
	return x
}

func (o *oracle) dirOf(p string) (*object, string) {
	d := o.root
	dir, name := path.Split(p)
	for part := range strings.SplitSeq(strings.Trim(dir, "/"), "/") {
		if part != "" {
			d = last(d.entries)[part]
		}
	}
	return d, name
}

func (o *oracle) find(p string) *object {
	if p == "." {
		return o.root
	}
	d, name := o.dirOf(p)
	return last(d.entries)[name]
}

// edit makes d a new version of its names.
func (o *oracle) edit(d *object, f func(m map[string]*object)) {
	m := maps.Clone(last(d.entries))
	f(m)
	d.entries = append(d.entries, at[map[string]*object]{o.now, m})
}

func (o *oracle) put(p string, x *object) {
	d, name := o.dirOf(p)
	o.edit(d, func(m map[string]*object) {
		if old := m[name]; old != nil {
			old.removed = append(old.removed, o.now)
		}
		m[name] = x
	})
}

func (o *oracle) drop(p string) {
	d, name := o.dirOf(p)
	x := last(d.entries)[name]
	x.removed = append(x.removed, o.now)
	o.edit(d, func(m map[string]*object) { delete(m, name) })
}

func (o *oracle) move(p, to string) {
	from, name := o.dirOf(p)
	x := last(from.entries)[name]
	if dir, newName := o.dirOf(to); dir == from { // one change
		o.edit(from, func(m map[string]*object) {
			if old := m[newName]; old != nil {
				old.removed = append(old.removed, o.now)
			}
			delete(m, name)
			m[newName] = x
		})
		return
	}
	o.edit(from, func(m map[string]*object) { delete(m, name) })
	o.put(to, x)
}

func (o *oracle) exchange(p, q string) {
	a, an := o.dirOf(p)
	b, bn := o.dirOf(q)
	x, y := last(a.entries)[an], last(b.entries)[bn]
	if a == b {
		o.edit(a, func(m map[string]*object) { m[an], m[bn] = y, x })
		return
	}
	o.edit(a, func(m map[string]*object) { m[an] = y })
	o.edit(b, func(m map[string]*object) { m[bn] = x })
}

func (o *oracle) wrote(x *object, data []byte) {
	x.data = append(x.data, at[[]byte]{o.now, data})
}

// begin and end say where in the record a step lies; do is what it did.
func (o *oracle) begin(pos int) {
	o.now++
	o.from = append(o.from, pos)
}

func (o *oracle) end(pos int) { o.ends = append(o.ends, pos) }

func (o *oracle) do(s step) {
	switch s.Op {
	case "create", "tmpfile":
		o.put(s.Path, o.object(unix.S_IFREG, 0o644))
	case "mkdir":
		o.put(s.Path, o.object(unix.S_IFDIR, 0o755))
	case "symlink":
		x := o.object(unix.S_IFLNK, 0o777)
		x.target = s.To
		o.put(s.Path, x)
	case "link":
		o.put(s.To, o.find(s.Path))
	case "unlink", "rmdir":
		o.drop(s.Path)
	case "rename":
		o.move(s.Path, s.To)
	case "exchange":
		o.exchange(s.Path, s.To)
	}
	switch s.Op {
	case "unlink", "rmdir", "rename", "exchange", "hold", "let":
	default:
		o.change(s, o.find(s.Path))
	}
}

func (o *oracle) change(s step, x *object) {
	if slices.Contains([]string{"truncate", "allocate", "zero"}, s.Op) && x.poked {
		x.partly = append(x.partly, o.now)
	}
	switch s.Op {
	case "rewrite":
		o.wrote(x, nil)
		fallthrough
	case "create", "tmpfile", "write", "poke", "mmap":
		if s.Len > 0 {
			o.wrote(x, overlay(last(x.data), s.Off, s.bytes()))
		}
		switch {
		case s.Op == "poke":
			x.poked = true
		case s.Op == "mmap" && s.Sync && x.poked:
			x.partly = append(x.partly, o.now)
			return
		}
	case "truncate":
		data := make([]byte, s.Off)
		copy(data, last(x.data))
		o.wrote(x, data)
	case "allocate":
		if n := s.Off + s.Len; int64(len(last(x.data))) < n {
			data := make([]byte, n)
			copy(data, last(x.data))
			o.wrote(x, data)
		}
	case "punch":
		if n := min(s.Len, int64(len(last(x.data)))-s.Off); n > 0 {
			o.wrote(x, overlay(last(x.data), s.Off, make([]byte, n)))
		}
	case "setxattr":
		x.xattr = append(x.xattr, at[string]{o.now, string(s.bytes())})
	case "rmxattr":
		x.xattr = append(x.xattr, at[string]{o.now, ""})
	case "chmod":
		x.mode = append(x.mode, at[uint32]{o.now, uint32(s.Off)})
	case "zero":
		n := max(int64(len(last(x.data))), s.Off+s.Len)
		data := make([]byte, n)
		copy(data, last(x.data))
		clear(data[s.Off : s.Off+s.Len])
		o.wrote(x, data)
	case "fsync", "fsyncdir":
		s.Sync = true
	case "fdatasync":
		x.datasynced = append(x.datasynced, at[int]{o.now, o.now})
	}
	if s.Op == "fdatasync" || s.Sync {
		x.poked = false
	}
	if s.Sync {
		x.synced = append(x.synced, at[int]{o.now, o.now})
		x.datasynced = append(x.datasynced, at[int]{o.now, o.now})
	}
}

// view is the oracle at a cut: what may be there.
type view struct {
	*oracle
	latest int // the last step that had begun
	over   int // the last step that was over

	oldest bool // try the oldest names of a directory first
}

func (o *oracle) at(pos int) *view {
	v := &view{oracle: o}
	for t := range o.from {
		if o.from[t] < pos || t == 0 {
			v.latest = t
		}
		if t < len(o.ends) && o.ends[t] <= pos {
			v.over = t
		}
	}
	v.latest = max(v.latest, v.over) // a step that needed nothing of the disk
	return v
}

// floor is the time as of which x is durable.
func (v *view) floor(x *object) int { return v.since(x.synced) }

func (v *view) since(synced []at[int]) int {
	t := 0
	for _, s := range synced {
		if s.t <= v.over {
			t = s.v
		}
	}
	return t
}

// may returns the values that s may have: the one at the floor, and later ones.
func may[T any](s []at[T], floor, latest int) (out []T) {
	for i, x := range s {
		if x.t > latest {
			break
		}
		if x.t <= floor && i+1 < len(s) && s[i+1].t <= floor {
			continue // there is a later one that is durable
		}
		out = append(out, x.v)
	}
	return out
}

// found is a file of the store after recovery.
type found struct {
	typ, mode uint32
	ino       uint64
	nlink     uint32
	data      []byte
	target    string
	xattr     string
	entries   map[string]*found
}

// oracleOf returns an oracle that begins with what was found, all of it durable.
func oracleOf(root *found) *oracle {
	o := &oracle{from: []int{0}, ends: []int{0}}
	o.root = o.take(root, map[uint64]*object{})
	return o
}

func (o *oracle) take(f *found, known map[uint64]*object) *object {
	if x := known[f.ino]; x != nil {
		return x
	}
	x := o.object(f.typ, f.mode)
	known[f.ino] = x
	x.target, x.xattr = f.target, []at[string]{{0, f.xattr}}
	if x.data != nil {
		x.data = []at[[]byte]{{0, f.data}}
	}
	for name, child := range f.entries {
		x.entries[0].v[name] = o.take(child, known)
	}
	return x
}

// same is the demand that what is found is what was found before.
func (f *found) same(p string, g *found) error {
	switch {
	case f.typ != g.typ || f.mode != g.mode || f.target != g.target || f.xattr != g.xattr:
		return fmt.Errorf("%s is not what it was at the mount before", p)
	case !bytes.Equal(f.data, g.data):
		return fmt.Errorf("%s: %d bytes are not the %d that it had at the mount before", p, len(g.data), len(f.data))
	case len(f.entries) != len(g.entries):
		return fmt.Errorf("%s has %d names, and had %d at the mount before", p, len(g.entries), len(f.entries))
	}
	for name, child := range f.entries {
		other := g.entries[name]
		if other == nil {
			return fmt.Errorf("%s/%s was there at the mount before", p, short(name))
		}
		if err := child.same(p+"/"+short(name), other); err != nil {
			return err
		}
	}
	return nil
}

// check holds what was found against what may be there. An empty file may be the
// one that had a name, or another that got the name later: each version of the
// root's names is tried, and with it the newest names of others first, or the oldest.
func (v *view) check(root *found) error {
	versions := may(v.root.entries, v.floor(v.root), v.latest)
	var errs []error
	for _, names := range slices.Backward(versions) {
		for _, oldest := range []bool{false, true} {
			w := *v
			w.oldest = oldest
			is := map[*object]*found{v.root: root}
			err := w.names(".", v.root, names, root, is)
			if err == nil {
				err = w.lost(is)
			}
			if err == nil {
				return nil
			}
			errs = append(errs, err)
		}
	}
	return fmt.Errorf("%d versions of . may be there:\n%w", len(versions), errors.Join(errs...))
}

// dir: the names of a directory are those of one moment, whatever other
// directories' are of.
func (v *view) dir(p string, x *object, f *found, is map[*object]*found) error {
	var errs []error
	versions := slices.Clone(may(x.entries, v.floor(x), v.latest))
	if !v.oldest {
		slices.Reverse(versions)
	}
	for _, names := range versions {
		try := maps.Clone(is)
		err := v.names(p, x, names, f, try)
		if err == nil {
			maps.Copy(is, try)
			return nil
		}
		errs = append(errs, err)
	}
	return fmt.Errorf("%d versions of %s may be there:\n%w", len(versions), p, errors.Join(errs...))
}

// names: a directory that nobody made durable may be gone with all that is in it.
func (v *view) names(p string, dir *object, names map[string]*object, f *found, is map[*object]*found) error {
	for name := range f.entries {
		if names[name] == nil {
			return fmt.Errorf("%s/%s is there", p, short(name))
		}
	}
	for name, x := range names {
		at := p + "/" + short(name)
		got := f.entries[name]
		if got == nil && x.entries != nil && x.mode[0].t > v.floor(dir) && v.floor(x) == 0 {
			continue
		}
		if got == nil {
			return fmt.Errorf("%s is not there", at)
		}
		if err := v.file(at, x, got, is); err != nil {
			return err
		}
	}
	return nil
}

func (v *view) file(p string, x *object, f *found, is map[*object]*found) error {
	if other := is[x]; other != nil && other.ino != f.ino {
		return fmt.Errorf("%s is another file than its other name", p)
	}
	is[x] = f
	floor := v.floor(x)
	switch {
	case f.typ != x.typ:
		return fmt.Errorf("%s has type %o, want %o", p, f.typ, x.typ)
	case f.target != x.target:
		return fmt.Errorf("%s leads to %q, want %q", p, f.target, x.target)
	case !slices.Contains(may(x.mode, floor, v.latest), f.mode) && x.typ != unix.S_IFLNK:
		return fmt.Errorf("%s has mode %o, want one of %o", p, f.mode, may(x.mode, floor, v.latest))
	case !slices.Contains(may(x.xattr, floor, v.latest), f.xattr):
		return fmt.Errorf("%s has an xattr of %d bytes that it never had, or no more", p, len(f.xattr))
	case x.typ == unix.S_IFDIR:
		return v.dir(p, x, f, is)
	case x.typ == unix.S_IFREG:
		floor := v.since(x.datasynced)
		partly := slices.ContainsFunc(x.partly, func(t int) bool { return t > floor && t <= v.latest })
		return content(p, f.data, may(x.data, floor, v.latest), partly)
	}
	return nil
}

// lost: what had a durable name, and lost none since, still has one.
func (v *view) lost(is map[*object]*found) error {
	for d := range is {
		floor := v.floor(d)
		if d.typ != unix.S_IFDIR {
			continue
		}
		for name, x := range may(d.entries, floor, v.latest)[0] {
			gone := slices.ContainsFunc(x.removed, func(t int) bool { return t > floor && t <= v.latest })
			if is[x] == nil && !gone {
				return fmt.Errorf("%s has no name any more", short(name))
			}
		}
	}
	return nil
}

const chunk = 4096

// content: each chunk of got is one that the file had, and so is the size, or
// the file ends at a chunk's end between two sizes that it had. In a file with
// holes what was never synced may be one, too, as on any file system. Where pages
// were synced apart from those before them, those may be zeros beyond an end that
// the file had.
func content(p string, got []byte, versions [][]byte, partly bool) error {
	if slices.ContainsFunc(versions, func(v []byte) bool { return bytes.Equal(v, got) }) {
		return nil
	}
	if !sizeOf(len(got), versions) {
		return fmt.Errorf("%s has %d bytes, %s", p, len(got), sizes(versions))
	}
	sparse := slices.ContainsFunc(versions, hasHole)
	for from := 0; from < len(got); from += chunk {
		to := min(from+chunk, len(got))
		if sparse && isZero(got[from:to]) && !slices.ContainsFunc(versions[:1], func(v []byte) bool { return len(v) > from }) {
			continue
		}
		if partly && slices.ContainsFunc(versions, func(v []byte) bool { return bytes.Equal(zeroed(v, from, to), got[from:to]) }) {
			continue
		}
		if !slices.ContainsFunc(versions, func(v []byte) bool { return len(v) >= to && bytes.Equal(v[from:to], got[from:to]) }) {
			return fmt.Errorf("%s: bytes %d to %d of %d never were so; %s", p, from, to, len(got), sizes(versions))
		}
	}
	return nil
}

// zeroed is a part of data, with zeros for what is behind its end.
func zeroed(data []byte, from, to int) []byte {
	out := make([]byte, to-from)
	copy(out, data[min(from, len(data)):min(to, len(data))])
	return out
}

// hasHole reports whether a whole chunk of data is zeros.
func hasHole(data []byte) bool {
	for from := 0; from+chunk <= len(data); from += chunk {
		if isZero(data[from : from+chunk]) {
			return true
		}
	}
	return false
}

func isZero(p []byte) bool { return len(bytes.Trim(p, "\x00")) == 0 }

func sizeOf(n int, versions [][]byte) bool {
	for i, v := range versions {
		if len(v) == n {
			return true
		}
		if i > 0 && n%chunk == 0 && min(len(versions[i-1]), len(v)) < n && n < max(len(versions[i-1]), len(v)) {
			return true
		}
	}
	return false
}

func sizes(versions [][]byte) string {
	var out []int
	for _, v := range versions {
		out = append(out, len(v))
	}
	return fmt.Sprintf("want one of the versions of %d bytes", out)
}
