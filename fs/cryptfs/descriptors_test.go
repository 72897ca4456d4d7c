package cryptfs

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/classify"
)

// holder keeps files of a volume open, and knows what is in them.
type holder struct {
	t    *testing.T
	v    *Volume
	dirs [2]*Node
	rnd  *rand.Rand
	who  int
	made int
	all  []*heldFile
}

type heldFile struct {
	n      *Node
	h      *Handle
	data   []byte
	place         // of its first name; name "" once it is removed
	second *place // of another
}

type place struct {
	dir  int
	name string
}

// lose notes that the first name is gone.
func (f *heldFile) lose() {
	f.place = place{}
	if f.second != nil {
		f.place, f.second = *f.second, nil
	}
}

// descriptorSeed is printed; KMSFS_DESCRIPTOR_SEED repeats a run.
func descriptorSeed(t *testing.T) uint64 {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("KMSFS_DESCRIPTOR_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("KMSFS_DESCRIPTOR_SEED=%d", seed)
	return seed
}

// TestFewDescriptors keeps many more files open than there may be descriptors,
// from several goroutines, and reads, writes, moves, replaces and removes them:
// each handle has to stay with its file.
func TestFewDescriptors(t *testing.T) {
	for _, p := range everyPlace {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			fewDescriptors(t, p, descriptorSeed(t))
		})
	}
}

func fewDescriptors(t *testing.T, p envelope.Placement, seed uint64) {
	dir, prov, _ := testStore(t, p, classify.NamesEncrypted)
	v := openStore(t, dir, prov)
	v.descr.max = 8
	const workers, files, steps = 4, 40, 400
	all := make([]*holder, workers)
	for w := range all {
		all[w] = &holder{t: t, v: v, who: w, rnd: rand.New(rand.NewPCG(seed, uint64(w)))}
		for d := range all[w].dirs {
			n, _, err := v.Mkdir(t.Context(), v.Root(), fmt.Sprintf("d%d.%d", w, d), 0o755, Caller{})
			if err != nil {
				t.Fatal(err)
			}
			all[w].dirs[d] = n
		}
	}
	var wg sync.WaitGroup
	for _, h := range all {
		wg.Go(func() {
			for range files {
				h.create()
			}
			for range steps {
				h.step()
			}
			for _, f := range h.all {
				h.check(f)
			}
		})
	}
	wg.Wait()
	removed := 0
	for _, h := range all {
		for _, f := range h.all {
			if f.name == "" {
				removed++
			}
		}
	}
	if v.descr.open > v.descr.max+removed {
		t.Errorf("%d descriptors, with %d removed files; want at most %d more", v.descr.open, removed, v.descr.max)
	}
	for _, h := range all {
		for _, f := range h.all {
			f.h.Release()
		}
	}
	v.finishIdle()
	if err := v.Settle(); err != nil {
		t.Fatal(err)
	}
	if v.descr.open != 0 || v.descr.files.Len() != 0 {
		t.Errorf("%d descriptors left, %d in the list", v.descr.open, v.descr.files.Len())
	}
	for _, h := range all {
		for _, f := range h.all {
			if f.name != "" {
				var err error
				if f.h, err = v.Open(t.Context(), f.n, unix.O_RDONLY, false); err != nil {
					t.Fatal(err)
				}
				h.check(f)
				f.h.Release()
			}
		}
	}
}

func (h *holder) create() {
	h.made++
	f := &heldFile{place: place{h.rnd.IntN(2), fmt.Sprintf("f%d", h.made)}}
	var err error
	if f.n, f.h, _, err = h.v.Create(h.t.Context(), h.dirs[f.dir], f.name, unix.O_RDWR, 0o644, Caller{}); err != nil {
		h.t.Errorf("create: %v", err)
		return
	}
	h.all = append(h.all, f)
	h.write(f)
}

func (h *holder) write(f *heldFile) {
	p := bytes.Repeat([]byte{byte(1 + h.rnd.IntN(255))}, 1+h.rnd.IntN(9000))
	off := h.rnd.IntN(len(f.data) + 1)
	if _, err := f.h.WriteAt(p, int64(off), false); err != nil {
		h.t.Errorf("write: %v", err)
		return
	}
	if need := off + len(p); need > len(f.data) {
		f.data = append(f.data, make([]byte, need-len(f.data))...)
	}
	copy(f.data[off:], p)
}

func (h *holder) check(f *heldFile) {
	got := make([]byte, len(f.data)+1)
	n, err := f.h.ReadAt(got, 0)
	if err != nil || !bytes.Equal(got[:n], f.data) {
		h.t.Errorf("%q reads %d bytes that differ, want %d: %v", f.name, n, len(f.data), err)
	}
	if a, err := h.v.Getattr(f.n); err != nil || a.Size != int64(len(f.data)) {
		h.t.Errorf("%q: size %d, want %d: %v", f.name, a.Size, len(f.data), err)
	}
}

func (h *holder) step() {
	f := h.all[h.rnd.IntN(len(h.all))]
	switch h.rnd.IntN(10) {
	case 0, 1, 2:
		h.write(f)
	case 3, 4:
		h.check(f)
	case 5:
		if err := f.h.Fsync(false); err != nil {
			h.t.Errorf("fsync: %v", err)
		}
	case 6:
		h.reopen(f)
	case 7:
		h.rename(f, h.all[h.rnd.IntN(len(h.all))])
	case 8:
		h.link(f)
	case 9:
		if h.rnd.IntN(4) == 0 {
			h.remove(f)
		}
	}
}

// reopen opens a second handle in the place of the first, for reading and then
// for both.
func (h *holder) reopen(f *heldFile) {
	if f.name == "" {
		return
	}
	f.h.Release()
	reader, err := h.v.Open(h.t.Context(), f.n, unix.O_RDONLY, false)
	if err != nil {
		h.t.Errorf("open: %v", err)
		return
	}
	f.h = reader
	h.check(f)
	if f.h, err = h.v.Open(h.t.Context(), f.n, unix.O_RDWR, false); err != nil {
		h.t.Errorf("open: %v", err)
	}
	reader.Release()
}

func (h *holder) rename(f, over *heldFile) {
	to, name := over.dir, over.name
	if f.name == "" || name == "" || f == over || h.rnd.IntN(3) > 0 {
		h.made++
		over, to, name = nil, h.rnd.IntN(2), fmt.Sprintf("r%d", h.made)
	}
	if f.name == "" {
		return
	}
	if err := h.v.Rename(h.t.Context(), h.dirs[f.dir], f.name, h.dirs[to], name, 0); err != nil {
		h.t.Errorf("rename: %v", err)
		return
	}
	f.place = place{to, name}
	if over != nil {
		over.lose()
	}
}

func (h *holder) link(f *heldFile) {
	if f.name == "" || f.second != nil {
		return
	}
	h.made++
	to := &place{h.rnd.IntN(2), fmt.Sprintf("l%d", h.made)}
	if _, err := h.v.Link(h.t.Context(), f.n, h.dirs[to.dir], to.name); err != nil {
		h.t.Errorf("link: %v", err)
		return
	}
	f.second = to
}

func (h *holder) remove(f *heldFile) {
	if f.name == "" {
		return
	}
	if err := h.v.Unlink(h.t.Context(), h.dirs[f.dir], f.name); err != nil {
		h.t.Errorf("unlink: %v", err)
		return
	}
	f.lose()
}

// TestFsyncOfRemoved syncs a file that lost its name before it was written out.
func TestFsyncOfRemoved(t *testing.T) {
	for _, p := range everyPlace {
		t.Run(p.String(), func(t *testing.T) {
			dir, prov, _ := testStore(t, p, classify.NamesEncrypted)
			v := openStore(t, dir, prov)
			for name, flush := range map[string]bool{"written out": true, "in memory": false} {
				_, h, _, err := v.Create(t.Context(), v.Root(), "f", unix.O_RDWR, 0o644, Caller{})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := h.WriteAt(make([]byte, 10_000), 0, false); err != nil {
					t.Fatal(err)
				}
				if flush {
					if err := h.Flush(); err != nil {
						t.Fatal(err)
					}
				}
				if err := v.Unlink(t.Context(), v.Root(), "f"); err != nil {
					t.Fatal(err)
				}
				if err := h.Fsync(false); err != nil {
					t.Errorf("%s: %v", name, err)
				}
				h.Release()
			}
		})
	}
}

// TestDescriptorOfAReplacedStoreFile: what lies at a file's place when its
// descriptor is opened again must be that file.
func TestDescriptorOfAReplacedStoreFile(t *testing.T) {
	dir, prov, _ := testStore(t, envelope.Prefix, classify.NamesPlain)
	v := openStore(t, dir, prov)
	v.descr.max = 1
	_, h, _, err := v.Create(t.Context(), v.Root(), "f", unix.O_RDWR, 0o644, Caller{})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Release()
	if _, err := h.WriteAt(make([]byte, 20_000), 0, false); err != nil {
		t.Fatal(err)
	}
	if err := h.Flush(); err != nil {
		t.Fatal(err)
	}
	_, other, _, err := v.Create(t.Context(), v.Root(), "g", unix.O_RDWR, 0o644, Caller{})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Release()
	if _, err := other.WriteAt(make([]byte, 20_000), 0, false); err != nil { // takes the one descriptor
		t.Fatal(err)
	}
	if err := errors.Join(os.Rename(dir+"/f", dir+"/away"), os.WriteFile(dir+"/f", make([]byte, 20_000), 0o600)); err != nil {
		t.Fatal(err)
	}
	if n, err := h.ReadAt(make([]byte, 4096), 0); !errors.Is(err, unix.ESTALE) {
		t.Errorf("read %d bytes, %v; want ESTALE", n, err)
	}
	if err := os.Rename(dir+"/away", dir+"/f"); err != nil {
		t.Fatal(err)
	}
	if n, err := h.ReadAt(make([]byte, 4096), 0); n != 4096 || err != nil {
		t.Errorf("read %d bytes, %v", n, err)
	}
}
