package powercut

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// cut is a power cut after the first at events of a record: what is on the disk
// of those that were not synced.
type cut struct {
	at   int
	lost map[int]mask // event -> what of it is missing; none: whole
}

// mask says what of an event is lost: of a write the sectors whose bit is set.
type mask struct {
	sector int64 // bytes; 0: all is lost
	bits   uint64
}

func (m mask) whole() bool { return m.sector == 0 }

// has tells whether sector i of a write is lost; the bits repeat.
func (m mask) has(i int64) bool { return m.sector == 0 || m.bits>>(uint64(i)%64)&1 == 1 }

// history is a disk and what was done to it.
type history struct {
	base   *disk
	events []event
	first  int // of the events, that are no part of what is tried

	from, to int // the events of the steps, without those of the mount and its end

	mustAt int // of the last call of must
	mustOf []bool
}

// must returns which of the first at events are durable. It is not to be changed.
func (h *history) must(at int) []bool {
	if h.mustOf != nil && h.mustAt == at {
		return h.mustOf
	}
	h.mustAt, h.mustOf = at, h.durable(at)
	return h.mustOf
}

func (h *history) durable(at int) []bool {
	out := make([]bool, at)
	for i := at - 1; i >= 0; i-- {
		switch e := &h.events[i]; e.kind {
		case syncfs:
			for j := range i {
				out[j] = true
			}
			i = 0
		case fsync, datasync:
			for j := range i {
				if h.syncs(e, &h.events[j]) {
					out[j] = true
				}
			}
		}
	}
	h.need(out)
	return out
}

func (h *history) syncs(s, e *event) bool {
	if dirs := e.dirs(); dirs != nil {
		return s.kind == fsync && slices.Contains(dirs, s.ino)
	}
	if e.ino != s.ino {
		return false
	}
	return s.kind == fsync || e.kind == write || e.kind == zero || e.kind == resize
}

// need adds what durable names need: earlier ones of their directories, and the
// directories' own.
func (h *history) need(must []bool) {
	for changed := true; changed; {
		changed = false
		needed := map[uint64]bool{} // directories of which a later name is durable
		for i := len(must) - 1; i >= 0; i-- {
			e := &h.events[i]
			dirs := e.dirs()
			if !must[i] {
				own := e.kind == linkTo && e.made != nil && needed[e.ino]
				if own || slices.ContainsFunc(dirs, func(d uint64) bool { return needed[d] }) {
					must[i], changed = true, true
				}
			}
			if must[i] {
				for _, d := range dirs {
					needed[d] = true
				}
			}
		}
	}
}

// order says where the changes go that persist in order only: a name in the
// directory's, a truncate in the file's, an attribute in the file's other order.
func (e *event) orders() (out []order) {
	switch e.kind {
	case resize:
		return []order{{'t', e.ino}}
	case xattr, owner:
		return []order{{'a', e.ino}}
	}
	for _, d := range e.dirs() {
		out = append(out, order{'d', d})
	}
	return out
}

// needs says which orders an event must not be behind of.
func (e *event) needs() []order {
	switch e.kind {
	case write, zero:
		return []order{{'t', e.ino}}
	}
	return e.orders()
}

type order struct {
	of  byte
	ino uint64
}

// state is the disk after a cut.
func (h *history) state(c cut) *disk {
	d := h.base.clone()
	h.apply(d, c, h.must(c.at))
	return d
}

// below is the order of names in a directory that e makes.
func (h *history) below(e *event) []order {
	if e.kind == linkTo && e.made != nil && e.made.entries != nil {
		return []order{{'d', e.ino}}
	}
	return nil
}

// apply does to d what is on the disk. An event that is behind a lost one of an
// order is lost too; a rename that one of its two directories has lost is lost
// in both, which only concerns later events of the other.
func (h *history) apply(d *disk, c cut, must []bool) {
	broken := map[order]bool{}
	for i := range c.at {
		e := &h.events[i]
		if e.made != nil && d.inodes[e.ino] == nil {
			d.inodes[e.ino] = e.made.clone()
		}
		m, lost := c.lost[i]
		gone := lost && m.whole() || slices.ContainsFunc(e.needs(), func(o order) bool { return broken[o] })
		if e.kind == write && broken[order{'a', e.ino}] && e.off+int64(len(e.data)) > int64(len(d.inodes[e.ino].data)) {
			gone = true // the new size is an attribute, too
		}
		switch {
		case must[i] || e.kind == owner && e.made != nil:
			d.do(e, mask{}, false)
		case gone:
			for _, o := range append(e.orders(), h.below(e)...) {
				broken[o] = true
			}
		default:
			d.do(e, m, lost)
		}
	}
}

func (d *disk) do(e *event, m mask, torn bool) {
	n := d.inodes[e.ino]
	switch e.kind {
	case write:
		if !torn {
			n.data = overlay(n.data, e.off, e.data)
			return
		}
		first := e.off / m.sector
		for i := first; i*m.sector < e.off+int64(len(e.data)); i++ {
			if from, to := max(e.off, i*m.sector), min(e.off+int64(len(e.data)), (i+1)*m.sector); !m.has(i - first) {
				n.data = overlay(n.data, from, e.data[from-e.off:to-e.off])
			}
		}
	case zero:
		if size := min(e.size, int64(len(n.data))-e.off); size > 0 {
			n.data = overlay(n.data, e.off, make([]byte, size))
		}
	case resize:
		data := make([]byte, e.size)
		copy(data, n.data)
		n.data = data
	case xattr:
		if n.xattrs[e.attr] = string(e.data); e.gone {
			delete(n.xattrs, e.attr)
		}
	case owner:
		if e.made == nil {
			n.mode, n.uid, n.gid = e.mode, e.uid, e.gid
		}
	case linkTo:
		d.inodes[e.dir].entries[e.name] = e.ino
	case unlink:
		delete(d.inodes[e.dir].entries, e.name)
	case rename:
		from, to := d.inodes[e.dir].entries, d.inodes[e.newDir].entries
		moved, other := from[e.name], to[e.newName]
		delete(from, e.name)
		if to[e.newName] = moved; e.exchange {
			from[e.name] = other
		}
	}
}

// overlay is data with p at off; data stays as it is.
func overlay(data []byte, off int64, p []byte) []byte {
	out := make([]byte, max(int64(len(data)), off+int64(len(p))))
	copy(out, data)
	copy(out[off:], p)
	return out
}

// open returns the events before at that may be lost.
func (h *history) open(at int) (out []int) {
	for i, must := range h.must(at) {
		if e := &h.events[i]; !must && e.kind < fsync && !(e.kind == owner && e.made != nil) {
			out = append(out, i)
		}
	}
	return out
}

// cuts returns the cuts at a place: the broad ones, of each event alone, of all
// but one, of writes also sectors, and n more at random.
func (h *history) cuts(at int, r *rand.Rand, n int) []cut {
	open := h.open(at)
	out := append(h.broad(at, open), h.single(at, open, r)...)
	for range n {
		out = append(out, h.random(at, open, r))
	}
	return out
}

// anywhere returns one cut at random.
func (h *history) anywhere(r *rand.Rand) cut {
	at := h.first + r.IntN(len(h.events)+1-h.first)
	if h.to > h.from && r.IntN(4) > 0 {
		at = h.from + r.IntN(h.to+1-h.from)
	}
	open := h.open(at)
	if len(open) == 0 {
		return cut{at, nil}
	}
	switch r.IntN(3) {
	case 0:
		return pick(r, h.broad(at, open))
	case 1:
		return pick(r, h.single(at, open, r))
	}
	return h.random(at, open, r)
}

// broad are cuts as they are common: nothing is lost, or everything, or all of
// one kind, as where a file system writes names before contents, or all of a
// file.
func (h *history) broad(at int, open []int) []cut {
	lose := func(what func(e *event) bool) cut {
		c := cut{at, map[int]mask{}}
		for _, i := range open {
			if what(&h.events[i]) {
				c.lost[i] = mask{}
			}
		}
		return c
	}
	data := func(e *event) bool { return e.kind == write || e.kind == zero || e.kind == resize }
	names := func(e *event) bool { return e.dirs() != nil }
	out := []cut{
		lose(func(*event) bool { return false }), lose(func(*event) bool { return true }),
		lose(data), lose(func(e *event) bool { return !data(e) }),
		lose(names), lose(func(e *event) bool { return !names(e) }),
	}
	seen := map[uint64]bool{}
	for _, i := range open {
		if ino := h.events[i].ino; !seen[ino] {
			seen[ino] = true
			of := func(e *event) bool { return e.ino == ino && !names(e) }
			out = append(out, lose(of), lose(func(e *event) bool { return !of(e) }))
		}
	}
	return out
}

// single are cuts of each event alone, and of all but one.
func (h *history) single(at int, open []int, r *rand.Rand) (out []cut) {
	all := map[int]mask{}
	for _, i := range open {
		all[i] = mask{}
	}
	for _, i := range open {
		out = append(out, cut{at, map[int]mask{i: {}}}, cut{at, without(all, i)})
		if h.events[i].kind != write {
			continue
		}
		for _, m := range tears(r) {
			only := without(all, i)
			only[i] = m
			out = append(out, cut{at, map[int]mask{i: m}}, cut{at, only})
		}
	}
	return out
}

func without(m map[int]mask, i int) map[int]mask {
	out := map[int]mask{}
	for j, v := range m {
		if j != i {
			out[j] = v
		}
	}
	return out
}

// tears are ways to tear a write: its end, its beginning, and anything.
func tears(r *rand.Rand) []mask {
	keep := r.IntN(8) + 1
	return []mask{
		{512, ^uint64(0) << keep}, {512, 1<<keep - 1}, {512, r.Uint64()}, {4096, r.Uint64()},
	}
}

// random loses each open event with one of a few likelihoods.
func (h *history) random(at int, open []int, r *rand.Rand) cut {
	c := cut{at, map[int]mask{}}
	likely := []float64{0.1, 0.5, 0.9}[r.IntN(3)]
	for _, i := range open {
		if r.Float64() >= likely {
			continue
		}
		if c.lost[i] = (mask{}); h.events[i].kind == write && r.IntN(2) == 0 {
			c.lost[i] = tears(r)[r.IntN(4)]
		}
	}
	return c
}

// describe tells people what a cut is.
func (h *history) describe(c cut) string {
	var b strings.Builder
	must := h.must(c.at)
	for i := range c.at {
		e := &h.events[i]
		mark := " "
		if must[i] {
			mark = "="
		} else if m, lost := c.lost[i]; lost && m.whole() {
			mark = "-"
		} else if lost {
			mark = fmt.Sprintf("~%d:%x", m.sector, m.bits)
		}
		fmt.Fprintf(&b, "%4d %s %s ino %d", i, mark, e.kind, e.ino)
		switch e.kind {
		case write, zero, resize:
			fmt.Fprintf(&b, " off %d size %d", e.off, e.size)
		case linkTo, unlink, rename:
			fmt.Fprintf(&b, " %d/%s -> %d/%s", e.dir, short(e.name), e.newDir, short(e.newName))
		case xattr:
			fmt.Fprintf(&b, " %s %d bytes gone=%v", e.attr, len(e.data), e.gone)
		}
		if e.made != nil && e.made.mode&unix.S_IFMT == unix.S_IFDIR {
			b.WriteString(" (directory)")
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func short(s string) string { return s[:min(len(s), 40)] }
