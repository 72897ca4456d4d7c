package cryptfs

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/record"
)

// fsckBench is a store with files of every kind, names in plaintext so that they
// are found on the disk.
type fsckBench struct {
	t    *testing.T
	dir  string
	prov keywrap.Provider
	keys map[string][]string
}

// fsckFiles are the regular files of the bench, by their sizes.
var fsckFiles = map[string]int{"one": 3*4096 + 5, "d/two": 4096, "d/linked": 9000, "patients/card": 5000}

func newFsckBench(t *testing.T, p envelope.Placement, names classify.NameMode) *fsckBench {
	t.Helper()
	dir, prov, info := testStore(t, p, names)
	b := &fsckBench{t: t, dir: dir, prov: prov, keys: info.Keys}
	v := openStore(t, dir, prov)
	for _, name := range []string{"d", "e", "patients"} {
		_, _, err := v.Mkdir(t.Context(), v.Root(), name, 0o755, Caller{})
		check(t, err)
	}
	for name, size := range fsckFiles {
		make1(t, v, b.node(v, filepath.Dir(name)), filepath.Base(name), fsckData(size))
	}
	linked := b.node(v, "d/linked")
	for _, to := range []string{"d", "e"} {
		_, err := v.Link(t.Context(), linked, b.node(v, to), "again")
		check(t, err)
	}
	check(t, v.Setxattr(t.Context(), b.node(v, "one"), "user.note", []byte("a note"), 0, Caller{}))
	for name, target := range map[string]string{"link": "one", "far": strings.Repeat("x", 3500)} {
		_, _, err := v.Symlink(t.Context(), v.Root(), name, target, Caller{})
		check(t, err)
	}
	make1(t, v, b.node(v, "e"), strings.Repeat("n", 250), "long")
	check(t, v.Close())
	return b
}

func fsckData(size int) string { return strings.Repeat("0123456789abcdef", size/16+1)[:size] }

func (b *fsckBench) node(v *Volume, name string) *Node {
	b.t.Helper()
	n := v.Root()
	for part := range strings.SplitSeq(name, "/") {
		if part == "." {
			continue
		}
		next, _, err := v.Lookup(b.t.Context(), n, part)
		if err != nil {
			b.t.Fatalf("%s: %v", name, err)
		}
		n = next
	}
	return n
}

func (b *fsckBench) config() Config { return Config{Store: b.dir, Provider: b.prov, Keys: b.keys} }

func (b *fsckBench) fsck(c FsckConfig) *FsckReport {
	b.t.Helper()
	c.Config = b.config()
	r, err := Fsck(b.t.Context(), c)
	if err != nil {
		b.t.Fatalf("fsck: %v", err)
	}
	return r
}

// sh changes the store behind kmsfs's back, in its root.
func (b *fsckBench) sh(script string) {
	b.t.Helper()
	if _, err := exec.LookPath("setfattr"); err != nil && os.Getenv("CI") != "true" {
		b.t.Skip("no setfattr")
	}
	const tools = `hex() { od -An -v -tx1 | tr -d ' \n'; }
		id() { head -c 16 "$1" | hex; }
		`
	cmd := exec.Command("sh", "-ec", tools+script)
	cmd.Dir = b.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		b.t.Fatalf("%s: %v: %s", script, err, out)
	}
}

func (b *fsckBench) clean(what string) {
	b.t.Helper()
	if r := b.fsck(FsckConfig{}); len(r.Problems) > 0 {
		b.t.Errorf("%s: got %+v, want nothing found", what, r.Problems)
	}
}

// whole wants every file to be what it was.
func (b *fsckBench) whole(what string) {
	b.t.Helper()
	v, err := Open(b.t.Context(), b.config())
	if err != nil {
		b.t.Fatalf("%s: %v", what, err)
	}
	defer v.Close()
	for name, size := range fsckFiles {
		n := b.node(v, name)
		h, err := v.Open(b.t.Context(), n, unix.O_RDONLY, false)
		check(b.t, err)
		got := make([]byte, size+1)
		m, err := h.ReadAt(got, 0)
		if err != nil || string(got[:m]) != fsckData(size) {
			b.t.Errorf("%s: %s: %d bytes, %v", what, name, m, err)
		}
		h.Release()
	}
}

// found wants a problem at a path, of a kind.
func wantFound(t *testing.T, r *FsckReport, path, kind string) Problem {
	t.Helper()
	for _, p := range r.Problems {
		if ok, _ := filepath.Match(path, p.Path); ok && p.Class == kind {
			return p
		}
	}
	t.Errorf("got %+v, want %s: %s", r.Problems, path, kind)
	return Problem{}
}

// TestFsckRestoresTheStoreRecord loses one copy of the record after the other.
// F-70, F-71
func TestFsckRestoresTheStoreRecord(t *testing.T) {
	for what, c := range map[string]struct {
		damage     string
		at, kind   string
		mountable  bool
		everything bool // .kmsfs itself is gone: only a repair can look at the store
	}{
		"first gone":       {damage: `rm .kmsfs/store`, at: ".kmsfs/store", kind: "integrity"},
		"first empty":      {damage: `: >.kmsfs/store`, at: ".kmsfs/store", kind: "integrity"},
		"first cut":        {damage: `truncate -s 100 .kmsfs/store`, at: ".kmsfs/store", kind: "integrity"},
		"first forged":     {damage: `sed -i 's/"suite":"aes-256-gcm"/"suite":"chacha20-poly1305"/' .kmsfs/store`, at: ".kmsfs/store", kind: "integrity"},
		"second gone":      {damage: `rm .kmsfs.store`, at: ".kmsfs.store", kind: "second-copy", mountable: true},
		"second cut":       {damage: `truncate -s 100 .kmsfs.store`, at: ".kmsfs.store", kind: "second-copy", mountable: true},
		"second forged":    {damage: `sed -i 's/"suite":"aes-256-gcm"/"suite":"chacha20-poly1305"/' .kmsfs.store`, at: ".kmsfs.store", kind: "second-copy", mountable: true},
		"all of .kmsfs":    {damage: `rm -r .kmsfs`, at: ".kmsfs/store", kind: "integrity", everything: true},
		"first, and class": {damage: `rm .kmsfs/store .kmsfs/classes/phi`, at: ".kmsfs/classes/phi", kind: "integrity"},
	} {
		t.Run(what, func(t *testing.T) {
			b := newFsckBench(t, envelope.Prefix, classify.NamesEncrypted)
			before, err := os.ReadFile(b.dir + "/.kmsfs/store")
			check(t, err)
			root, err := os.Stat(b.dir)
			check(t, err)
			b.sh(c.damage)
			check(t, os.Chtimes(b.dir, root.ModTime(), root.ModTime()))
			if c.everything {
				if _, err := Fsck(t.Context(), FsckConfig{Config: b.config()}); !errors.Is(err, ErrRecordLost) {
					t.Errorf("without a repair: got %v, want ErrRecordLost", err)
				}
			} else {
				r := b.fsck(FsckConfig{})
				wantFound(t, r, c.at, c.kind)
				if r.Damaged() != !c.mountable {
					t.Errorf("damaged: got %v, want %v: %+v", r.Damaged(), !c.mountable, r.Problems)
				}
			}
			if !c.mountable {
				if v, err := Open(t.Context(), b.config()); err == nil || !isDamage(err) {
					if err == nil {
						_ = v.Close()
					}
					t.Errorf("a mount: got %v, want it refused", err)
				}
			}
			r := b.fsck(FsckConfig{Repair: true})
			if wantFound(t, r, c.at, c.kind); r.Damaged() || slices.ContainsFunc(r.Problems, func(p Problem) bool { return !p.Mended }) {
				t.Errorf("repair: %+v", r.Problems)
			}
			b.clean("after the repair")
			b.whole("after the repair")
			for _, name := range []string{".kmsfs/store", ".kmsfs.store"} {
				if got, err := os.ReadFile(filepath.Join(b.dir, name)); err != nil || !bytes.Equal(got, before) {
					t.Errorf("%s is not what it was: %v", name, err)
				}
			}
			if now, err := os.Stat(b.dir); err != nil || !now.ModTime().Equal(root.ModTime()) {
				t.Errorf("the root's mtime: got %v, want %v", now.ModTime(), root.ModTime())
			}
		})
	}
}

// TestSecondCopyFollows: whatever changes the record changes both copies, and a
// mount makes one where there is none or an old one, which it keeps. F-71
func TestSecondCopyFollows(t *testing.T) {
	b := newFsckBench(t, envelope.Prefix, classify.NamesEncrypted)
	read := func(name string) []byte {
		t.Helper()
		got, err := os.ReadFile(filepath.Join(b.dir, name))
		check(t, err)
		return got
	}
	same := func(what string) {
		t.Helper()
		if !bytes.Equal(read(".kmsfs/store"), read(".kmsfs.store")) {
			t.Errorf("%s: the copies differ", what)
		}
	}
	same("init")
	old := read(".kmsfs.store")
	v := openStore(t, b.dir, b.prov)
	_, _, err := v.Mkdir(t.Context(), v.Root(), "new", 0o755, Caller{})
	check(t, err)
	check(t, v.Classify(t.Context(), b.node(v, "new"), "phi"))
	check(t, v.Close())
	same("classify")
	if bytes.Equal(read(".kmsfs.store"), old) {
		t.Fatal("classify changed nothing")
	}
	for what, damage := range map[string]func(){
		"gone":  func() { check(t, os.Remove(b.dir+"/.kmsfs.store")) },
		"older": func() { check(t, os.WriteFile(b.dir+"/.kmsfs.store", old, 0o600)) },
	} {
		damage()
		b.whole(what)
		same(what)
	}
	kept, err := filepath.Glob(b.dir + "/.kmsfs/quarantine/.kmsfs.store.*")
	if err != nil || len(kept) != 1 {
		t.Fatalf("kept: %q, %v", kept, err)
	}
	if got, err := os.ReadFile(kept[0]); err != nil || !bytes.Equal(got, old) {
		t.Errorf("what was replaced is not kept: %v", err)
	}
	b.clean("in the end")
}

// TestFsckRestoresKeys damages wrapped keys in one place each. F-25
func TestFsckRestoresKeys(t *testing.T) {
	b := newFsckBench(t, envelope.Prefix, classify.NamesEncrypted)
	edit := func(f func(k *record.StoreKeys)) {
		t.Helper()
		text, err := os.ReadFile(b.dir + "/.kmsfs/store")
		check(t, err)
		rec, err := record.ParseStore(text)
		check(t, err)
		f(&rec.Keys)
		text, err = rec.Encode()
		check(t, err)
		check(t, os.WriteFile(b.dir+"/.kmsfs/store", text, 0o600))
	}
	flip := func(block []byte) { block[200] ^= 1 } // in the wrapped key
	for what, c := range map[string]struct {
		damage func()
		at     string
	}{
		"store key":                  {func() { edit(func(k *record.StoreKeys) { flip(k.Store["phi"]) }) }, ".kmsfs/store"},
		"name key in the record":     {func() { edit(func(k *record.StoreKeys) { flip(k.Names["phi"]) }) }, ".kmsfs/store"},
		"name key, of another class": {func() { edit(func(k *record.StoreKeys) { k.Names["phi"] = k.Names["general"] }) }, ".kmsfs/store"},
		"class file": {func() {
			name := b.dir + "/.kmsfs/classes/phi"
			text, err := os.ReadFile(name)
			check(t, err)
			flip(text)
			check(t, os.WriteFile(name, text, 0o600))
		}, ".kmsfs/classes/phi"},
		"class file and name key in the record": {func() {
			edit(func(k *record.StoreKeys) { flip(k.Names["phi"]) })
			check(t, os.Remove(b.dir+"/.kmsfs/classes/phi"))
		}, ".kmsfs/store"},
	} {
		before, err := os.ReadFile(b.dir + "/.kmsfs/classes/phi")
		check(t, err)
		c.damage()
		if r := b.fsck(FsckConfig{}); !r.Damaged() || wantFound(t, r, c.at, "integrity").Mended {
			t.Errorf("%s: got %+v, want damage", what, r.Problems)
		}
		b.fsck(FsckConfig{Repair: true})
		b.clean(what)
		b.whole(what)
		if after, err := os.ReadFile(b.dir + "/.kmsfs/classes/phi"); err != nil || !bytes.Equal(after, before) {
			t.Errorf("%s: the class file is not what it was: %v", what, err)
		}
	}
}

// TestFsckRestoresDirectories: the copy that opens the names is the right one,
// and what is replaced is kept. F-28
func TestFsckRestoresDirectories(t *testing.T) {
	for what, c := range map[string]struct{ damage, kind string }{
		"first gone":               {`rm "$D"/.kmsfs.dir`, "integrity"},
		"first flipped":            {`printf X | dd of="$D"/.kmsfs.dir bs=1 seek=15 conv=notrunc status=none`, "integrity"},
		"first of another of them": {`cp "$E"/.kmsfs.dir "$D"/.kmsfs.dir`, "integrity"},
		"second gone":              {`setfattr -x user.kmsfs.dir "$D"`, "second-copy"},
		"second rubbish":           {`setfattr -n user.kmsfs.dir -v rubbish "$D"`, "second-copy"},
	} {
		t.Run(what, func(t *testing.T) {
			b := newFsckBench(t, envelope.Prefix, classify.NamesEncrypted)
			v := openStore(t, b.dir, b.prov)
			entry := func(name string) string {
				l, _ := b.node(v, name).where()
				return l.entry
			}
			d, e := entry("d"), entry("e")
			check(t, v.Close())
			b.sh("D=./" + d + " E=./" + e + "; touch -d 2001-01-01 $D; " + c.damage + "; touch -d 2001-01-01 $D")
			r := b.fsck(FsckConfig{})
			if r.Damaged() != (c.kind == "integrity") || len(r.Problems) != 1 || r.Problems[0].Class != c.kind {
				t.Errorf("got %+v, want one %s", r.Problems, c.kind)
			}
			b.fsck(FsckConfig{Repair: true})
			b.clean("after the repair")
			b.whole("after the repair")
			if fi, err := os.Stat(filepath.Join(b.dir, d)); err != nil || fi.ModTime().Year() > 2001 {
				t.Errorf("the directory's mtime: got %v, %v", fi.ModTime(), err)
			}
		})
	}
}

// TestFsckFinds damages one thing each, in a store whose names are plaintext.
func TestFsckFinds(t *testing.T) {
	for what, c := range map[string]struct {
		damage, at, kind string
		harmless         bool // no damage
		mends            bool // a repair leaves nothing
		placement        envelope.Placement
	}{
		"chunk":                     {damage: `printf X | dd of=one bs=1 seek=5300 conv=notrunc status=none`, at: "one", kind: "integrity"},
		"header":                    {damage: `printf X | dd of=one bs=1 seek=33 conv=notrunc status=none`, at: "one", kind: "integrity"},
		"size":                      {damage: `truncate -s 1030 d/two`, at: "d/two", kind: "integrity"},
		"cut at a chunk":            {damage: `truncate -s $((1024+4128)) one`, at: "one", kind: "integrity"},
		"attribute":                 {damage: `setfattr -n user.note -v other one`, at: "one", kind: "integrity"},
		"foreign directory":         {damage: `mkdir new`, at: "new/.kmsfs.dir", kind: "integrity"},
		"directory twice":           {damage: `cp -a d/. copy; setfattr -n user.kmsfs.dir -v "0x$(hex <d/.kmsfs.dir)" copy`, at: "*", kind: "integrity"},
		"store file twice":          {damage: `cp -a one other`, at: "o*", kind: "duplicate", harmless: true},
		"name gone":                 {damage: `ln one ../outside`, at: "one", kind: "links", harmless: true},
		"name in another class":     {damage: `ln one patients/one`, at: "patients/one", kind: "integrity"},
		"orphan target":             {damage: `echo x >.kmsfs.t.00112233445566778899aabbccddeeff`, at: ".kmsfs.t.*", kind: "orphan", harmless: true, mends: true},
		"temporary":                 {damage: `echo x >d/.kmsfs.tmp.001122334455667788990011`, at: "d/.kmsfs.tmp.*", kind: "orphan", harmless: true, mends: true},
		"temporary of the store":    {damage: `echo x >.kmsfs/.kmsfs.tmp.001122334455667788990011`, at: ".kmsfs/.kmsfs.tmp.*", kind: "orphan", harmless: true, mends: true},
		"class of no policy":        {damage: `cp .kmsfs/classes/phi .kmsfs/classes/other`, at: ".kmsfs/classes/other", kind: "orphan", harmless: true, mends: true},
		"not the store's":           {damage: `echo x >.kmsfs.rubbish`, at: ".kmsfs.rubbish", kind: "foreign"},
		"journal lost":              {damage: `rm -r .kmsfs/journal`, at: ".kmsfs/journal", kind: "integrity", mends: true},
		"sidecar, lost":             {placement: envelope.Sidecar, damage: `rm d/.kmsfs.h.$(id d/two)`, at: "d/two", kind: "integrity"},
		"sidecar, of another file":  {placement: envelope.Sidecar, damage: `cp .kmsfs.h.$(id one) d/.kmsfs.h.$(id d/two)`, at: "d/.kmsfs.h.*", kind: "integrity"},
		"sidecar, beside one name":  {placement: envelope.Sidecar, damage: `rm e/.kmsfs.h.$(id e/again)`, at: "e/again", kind: "integrity", mends: true},
		"sidecar, orphan":           {placement: envelope.Sidecar, damage: `cp .kmsfs.h.$(id one) d/`, at: "d/.kmsfs.h.*", kind: "orphan", harmless: true, mends: true},
		"sidecar, in several files": {placement: envelope.Sidecar, damage: `S=.kmsfs.h.$(id e/again); cp -a e/$S x; mv x e/$S`, at: "*/.kmsfs.h.*", kind: "links", harmless: true},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			b := newFsckBench(t, max(c.placement, envelope.Prefix), classify.NamesPlain)
			b.clean("a whole store")
			b.sh(c.damage)
			r := b.fsck(FsckConfig{})
			if wantFound(t, r, c.at, c.kind); r.Damaged() == c.harmless {
				t.Errorf("damaged: got %v, want %v: %+v", r.Damaged(), !c.harmless, r.Problems)
			}
			r = b.fsck(FsckConfig{Repair: true})
			if r.Damaged() != (!c.harmless && !c.mends) {
				t.Errorf("repaired: got %+v", r.Problems)
			}
			if c.mends {
				b.clean("after the repair")
				b.whole("after the repair")
			}
			again := b.fsck(FsckConfig{Repair: true})
			if slices.ContainsFunc(again.Problems, func(p Problem) bool { return p.Mended }) {
				t.Errorf("a second repair has something to mend: %+v", again.Problems)
			}
		})
	}
}

// TestFsckNames: long names and their files, and names spelled otherwise. F-37, F-38
func TestFsckNames(t *testing.T) {
	b := newFsckBench(t, envelope.Prefix, classify.NamesEncrypted)
	long, err := filepath.Glob(b.dir + "/*/.kmsfs.n.*")
	if err != nil || len(long) != 1 {
		t.Fatalf("%q, %v", long, err)
	}
	text, err := os.ReadFile(long[0])
	check(t, err)
	entry := strings.Replace(long[0], ".kmsfs.n.", ".kmsfs.l.", 1)
	rel := func(p string) string { return strings.TrimPrefix(p, b.dir+"/") }
	check(t, os.WriteFile(long[0], append(text, 'A'), 0o600))
	if r := b.fsck(FsckConfig{}); !r.Damaged() || wantFound(t, r, rel(entry), "integrity").Path == "" {
		t.Errorf("changed: %+v", r.Problems)
	}
	check(t, os.Remove(long[0]))
	if r := b.fsck(FsckConfig{Repair: true}); !r.Damaged() || wantFound(t, r, rel(entry), "integrity").Path == "" {
		t.Errorf("gone: %+v", r.Problems)
	}
	check(t, os.WriteFile(long[0], text, 0o600))
	b.clean("put back")
	v := openStore(t, b.dir, b.prov)
	l, _ := b.node(v, "one").where()
	check(t, v.Close())
	hash := nameenc.LongHash(l.entry)
	check(t, os.WriteFile(b.dir+"/.kmsfs.n."+hash, []byte(l.entry), 0o600))
	b.sh("cp -a " + l.entry + " .kmsfs.l." + hash)
	r := b.fsck(FsckConfig{})
	if wantFound(t, r, ".kmsfs.l."+hash, "integrity"); !r.Damaged() {
		t.Errorf("a name twice: %+v", r.Problems)
	}
}

// countingProvider counts unwrapping, by purpose.
type countingProvider struct {
	keywrap.Provider
	files atomic.Int64
}

func (p *countingProvider) Decrypt(ctx context.Context, w keywrap.Wrapped, c keywrap.Context) (*keymem.Key, error) {
	if c.Purpose == keywrap.PurposeData {
		p.files.Add(1)
	}
	return p.Provider.Decrypt(ctx, w, c)
}

// TestFsckQuick asks for no file's key, and sees what can be seen without.
func TestFsckQuick(t *testing.T) {
	b := newFsckBench(t, envelope.Prefix, classify.NamesPlain)
	p := &countingProvider{Provider: b.prov}
	b.prov = p
	r := b.fsck(FsckConfig{Quick: true})
	if p.files.Load() != 0 || r.Files != 7 || r.Bytes != 0 || len(r.Problems) > 0 {
		t.Errorf("got %d calls and %+v, want none", p.files.Load(), r)
	}
	b.sh(`printf X | dd of=one bs=1 seek=5300 conv=notrunc status=none`)
	if r := b.fsck(FsckConfig{Quick: true}); len(r.Problems) > 0 {
		t.Errorf("a chunk is damaged: got %+v, want nothing seen", r.Problems)
	}
	b.sh(`printf X | dd of=d/two bs=1 seek=20 conv=notrunc status=none; truncate -s 1030 patients/card`)
	r = b.fsck(FsckConfig{Quick: true})
	wantFound(t, r, "d/two", "integrity")
	wantFound(t, r, "patients/card", "integrity")
	if p.files.Load() != 0 {
		t.Errorf("%d calls", p.files.Load())
	}
}

// TestFsckReadsLinkedFilesOnce counts what is read, and with how many calls.
func TestFsckReadsLinkedFilesOnce(t *testing.T) {
	b := newFsckBench(t, envelope.Sidecar, classify.NamesPlain)
	p := &countingProvider{Provider: b.prov}
	b.prov = p
	want := uint64(len("long"))
	for _, size := range fsckFiles {
		want += uint64(size)
	}
	for _, jobs := range []int{1, 2, 0} {
		p.files.Store(0)
		var mu sync.Mutex
		var last FsckCount
		r := b.fsck(FsckConfig{Jobs: jobs, Progress: func(done, _ FsckCount) {
			mu.Lock()
			defer mu.Unlock()
			last = FsckCount{max(last.Files, done.Files), max(last.Bytes, done.Bytes)}
		}})
		if r.Bytes != want || r.Files != 7 || p.files.Load() != 5 || last.Files != 7 || len(r.Problems) > 0 {
			t.Errorf("%d jobs: got %d bytes, %d files, %d calls, progress %+v, %+v, want %d, 7, 5", jobs, r.Bytes, r.Files, p.files.Load(), last, r.Problems, want)
		}
	}
}

// TestFsckQuarantine is emptied when nothing is damaged, and then only.
func TestFsckQuarantine(t *testing.T) {
	b := newFsckBench(t, envelope.Prefix, classify.NamesPlain)
	b.sh(`mkdir -p d/.kmsfs.tmp.001122334455667788990011/deep; echo x >d/.kmsfs.t.00112233445566778899aabbccddeeff; cp -a one saved`)
	b.fsck(FsckConfig{Repair: true})
	b.sh(`printf X | dd of=one bs=1 seek=5300 conv=notrunc status=none`)
	if r := b.fsck(FsckConfig{EmptyQuarantine: true}); r.Emptied || r.Quarantined != 2 {
		t.Errorf("damaged: got %+v, want it kept", r)
	}
	b.sh(`mv saved one`)
	if r := b.fsck(FsckConfig{EmptyQuarantine: true}); !r.Emptied || r.Quarantined != 0 {
		t.Errorf("got %+v, want it emptied", r)
	}
	b.clean("emptied")
	b.whole("emptied")
}

var errCrash = errors.New("crash")

// crashTap lets a number of changes through, and then none.
type crashTap struct{ left atomic.Int64 }

func (c *crashTap) Do(op *backing.Op, do func() error) error {
	switch op.Call {
	case "write", "truncate", "mkdir", "mknod", "symlink", "unlink", "rmdir", "rename", "link", "chmod", "utimens", "setxattr", "removexattr", "fallocate":
		if c.left.Add(-1) < 0 {
			return errCrash
		}
	case "open":
		if op.Flags&unix.O_CREAT != 0 && c.left.Add(-1) < 0 {
			return errCrash
		}
	}
	return do()
}

// TestFsckRepairKilled ends a repair at each of its changes: another one finishes.
func TestFsckRepairKilled(t *testing.T) {
	b := newFsckBench(t, envelope.Sidecar, classify.NamesPlain)
	b.sh(`rm .kmsfs/store .kmsfs/classes/phi .kmsfs.dir; rm -r .kmsfs/journal; echo x >d/.kmsfs.tmp.001122334455667788990011
		cp .kmsfs.h.$(id one) d/; rm e/.kmsfs.h.$(id e/again); setfattr -x user.kmsfs.dir d; cp patients/.kmsfs.dir x; mv x e/.kmsfs.dir`)
	broken := b.dir
	for n := int64(0); ; n++ {
		b.dir = filepath.Join(t.TempDir(), "S")
		if out, err := exec.Command("cp", "-a", broken, b.dir).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		tap := &crashTap{}
		tap.left.Store(n)
		c := b.config()
		c.Tap = tap
		_, _ = Fsck(t.Context(), FsckConfig{Config: c, Repair: true}) // what it says nobody hears
		if r := b.fsck(FsckConfig{Repair: true}); r.Damaged() {
			t.Fatalf("killed at change %d: %+v", n, r.Problems)
		}
		b.clean("repaired once more")
		b.whole("repaired once more")
		if t.Failed() {
			t.Fatalf("killed at change %d", n)
		}
		if tap.left.Load() >= 0 {
			if n < 20 {
				t.Errorf("a repair of %d changes only", n)
			}
			return
		}
	}
}

// TestFsckEnds: a check that is called off says so, and lets the store go.
func TestFsckEnds(t *testing.T) {
	b := newFsckBench(t, envelope.Prefix, classify.NamesPlain)
	ctx, cancel := context.WithCancel(t.Context())
	c := FsckConfig{Config: b.config(), Repair: true, Progress: func(FsckCount, FsckCount) { cancel() }}
	if _, err := Fsck(ctx, c); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
	if left, _ := filepath.Glob(b.dir + "/.kmsfs/lease"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	b.clean("afterwards")
}
