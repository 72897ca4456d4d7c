package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

const salvageLost = "lost+found.kmsfs"

// salvageReport is what the command prints with --json.
type salvageReport struct {
	Complete bool
	Files    int
	Notes    []string
	Problems []salvageProblem
}

type salvageProblem struct {
	Source, Out, State, ID, Class, What, Cause string
	Zeroed                                     []struct{ Offset, Length int64 }
	Truncated                                  bool
}

// salvageBench is a store of two classes with files of every size, and what
// they hold.
type salvageBench struct {
	t          *testing.T
	h          *rig.Home
	dir, store string
	placement  string
	want       tree
	entries    map[string]string // plaintext path -> path in the store
	contents   map[string][]byte
	outs       int
}

func newSalvageBench(t *testing.T, placement string) *salvageBench {
	t.Helper()
	rig.Need(t, "root", "fuse", "setfattr")
	b := &salvageBench{t: t, h: rig.NewHome(t), dir: t.TempDir(), placement: placement, contents: map[string][]byte{}, entries: map[string]string{}}
	b.store = filepath.Join(b.dir, "S")
	policy := filepath.Join(b.dir, "policy.yaml")
	put(t, policy, []byte("version: 1\ndefault: general\nclasses:\n  general: { keys: [\"keyring:general\"], chunk_size: 32KiB }\n"+
		"  phi: { keys: [\"keyring:phi\"], chunk_size: 4KiB }\n  open: { keys: [\"keyring:general\"], names: plain }\n"+
		"directories:\n  /phi: phi\n  /open: open\n"))
	b.h.Run("init", "--policy", policy, "--placement", placement, b.store)
	m := b.h.Mount(b.store)
	b.h.Sh(`cd "$1"; mkdir -p phi open dir/sub; ln -s ../dir phi/up; mkfifo dir/fifo; touch dir/empty; chmod 2751 dir/sub`, m.Dir)
	for name, size := range map[string]int{
		"small": 100, "dir/chunks": 200000, "dir/even": 4 * 32768, "dir/sub/x": 40000, "phi/card": 20000, "phi/" + strings.Repeat("n", 200): 5000, "open/plain": 70000,
	} {
		b.contents[name] = noise(size, uint64(size))
		put(t, m.Path(name), b.contents[name])
	}
	b.h.Sh(`cd "$1"; ln dir/chunks dir/sub/again; setfattr -n user.note -v secret phi/card; setfattr -n user.note -v open open/plain; chmod 0400 phi/card`, m.Dir)
	setTimes(t, m.Dir)
	b.want = readTree(t, m.Dir)
	m.Unmount()
	// Store files keep the mode, the link count and the times of the plaintext's.
	byTime := map[int64]string{}
	for name, e := range readTree(t, b.store) {
		if !strings.Contains(name, ".kmsfs") || strings.Contains(filepath.Base(name), ".kmsfs.l.") {
			byTime[e.mtime] = name
		}
	}
	for name, e := range b.want {
		b.entries[name] = byTime[e.mtime]
	}
	return b
}

// path returns the store file of a plaintext path.
func (b *salvageBench) path(name string) string {
	b.t.Helper()
	if b.entries[name] == "" {
		b.t.Fatalf("%s has no entry in the store", name)
	}
	return filepath.Join(b.store, b.entries[name])
}

// salvage runs the command over src and returns what it wrote. The source must
// be what it was.
func (b *salvageBench) salvage(src string, code int, flags ...string) (string, salvageReport) {
	b.t.Helper()
	b.outs++
	out := filepath.Join(b.dir, fmt.Sprintf("out%d", b.outs))
	before := readTree(b.t, src)
	r := b.h.Try(append(append([]string{"salvage", "--json"}, flags...), src, out)...)
	if r.Code != code {
		b.t.Fatalf("salvage: got exit code %d, want %d: %s%s", r.Code, code, r.Stderr, r.Stdout)
	}
	mustEqual(b.t, "the source", readTree(b.t, src), before)
	var rep salvageReport
	if err := json.Unmarshal([]byte(r.Stdout), &rep); err != nil {
		b.t.Fatalf("%v in %s", err, r.Stdout)
	}
	for name := range b.contents {
		if strings.Contains(r.Stderr, filepath.Base(name)) && filepath.Base(name) != "x" {
			b.t.Errorf("the log has a plaintext name: %s", r.Stderr)
		}
	}
	return out, rep
}

// check compares an output with the tree without some names, and fails for
// problems that are not expected: by entry of the store.
func (b *salvageBench) check(out string, rep salvageReport, without ...string) {
	b.t.Helper()
	got, want := readTree(b.t, out), tree{}
	for name, e := range b.want {
		if !slices.Contains(without, name) {
			want[name] = e
		}
	}
	for _, name := range append(without, ".") {
		delete(got, name)
		delete(want, name)
	}
	for name := range got {
		if strings.HasPrefix(name, salvageLost) {
			delete(got, name)
		}
	}
	for _, p := range []tree{got, want} { // some of the names may be missing
		for name, e := range p {
			if strings.Contains(e.links, "\x00") && len(without) > 0 {
				e.links = ""
				p[name] = e
			}
		}
	}
	mustEqual(b.t, "salvaged", got, want)
}

// problem returns what the report says of an entry, but for attributes.
func (b *salvageBench) problem(rep salvageReport, entry string) salvageProblem {
	b.t.Helper()
	for _, p := range rep.Problems {
		if p.Source == entry && p.State != "bare" {
			return p
		}
	}
	b.t.Fatalf("%s is not in the report: %+v", entry, rep.Problems)
	return salvageProblem{}
}

// fresh calls f and puts the store back as it was.
func (b *salvageBench) fresh(f func()) {
	b.t.Helper()
	b.outs++
	whole := fmt.Sprintf("%s.%d", b.store, b.outs)
	b.h.Sh(`cp -a "$1" "$2"`, b.store, whole)
	f()
	b.h.Sh(`rm -r "$1"; mv "$2" "$1"`, b.store, whole)
}

func (b *salvageBench) edit(name string, f func(b []byte) []byte) {
	b.t.Helper()
	data, err := os.ReadFile(b.path(name))
	if err != nil {
		b.t.Fatal(err)
	}
	fi, err := os.Stat(b.path(name))
	if err != nil {
		b.t.Fatal(err)
	}
	put(b.t, b.path(name), f(data))
	if err := os.Chtimes(b.path(name), fi.ModTime(), fi.ModTime()); err != nil {
		b.t.Fatal(err)
	}
}

// base returns what stands before the first chunk of a store file.
func (b *salvageBench) base() int {
	return map[string]int{"header": 1024, "xattr": 0, "sidecar": 16}[b.placement]
}

func TestSalvage(t *testing.T) {
	t.Parallel()
	for _, placement := range []string{"header", "xattr", "sidecar"} {
		t.Run(placement, func(t *testing.T) {
			t.Parallel()
			b := newSalvageBench(t, placement)
			out, rep := b.salvage(b.store, 0)
			b.check(out, rep)
			if len(rep.Problems)+len(rep.Notes) > 0 || !rep.Complete {
				t.Errorf("whole store: %+v", rep)
			}
			if st, err := os.Stat(out); err != nil || st.Mode().Perm() != 0o700 {
				t.Errorf("output: %v, %v", st, err)
			}
			for name, f := range map[string]func(*salvageBench){
				"chunk": salvageChunk, "cut": salvageCuts, "added": salvageAdded, "header": salvageHeader, "names": salvageNames, "record": salvageRecord,
				"classes": salvageClasses, "copies": salvageCopies, "file": salvageFile, "keys": salvageKeys, "keys gone": salvageKeysGone,
			} {
				b.t = t
				t.Log(name)
				b.fresh(func() { f(b) })
			}
		})
	}
}

// salvageChunk: a flipped bit costs its chunk, and is listed.
func salvageChunk(b *salvageBench) {
	b.edit("dir/chunks", func(d []byte) []byte {
		d[b.base()+32800+100] ^= 1
		d[b.base()+5*32800+100] ^= 1
		return d
	})
	out, rep := b.salvage(b.store, 4)
	b.check(out, rep, "dir/chunks", "dir/sub/again")
	want := bytes.Clone(b.contents["dir/chunks"])
	clear(want[32768:65536])
	clear(want[5*32768 : 6*32768])
	b.mustHold(out+"/dir/chunks", want)
	b.mustHold(out+"/dir/sub/again", want)
	b.mustZero(rep, []string{"dir/chunks", "dir/sub/again"}, false, [2]int64{32768, 32768}, [2]int64{5 * 32768, 32768})
}

func (b *salvageBench) mustHold(path string, want []byte) {
	b.t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		b.t.Errorf("%s: %d bytes, %v, want %d others", strings.TrimPrefix(path, b.dir), len(got), err, len(want))
	}
}

// mustZero expects one file, under the first of its names that was met, with
// these ranges to be the only damaged one.
func (b *salvageBench) mustZero(rep salvageReport, names []string, truncated bool, ranges ...[2]int64) {
	b.t.Helper()
	if len(rep.Problems) != 1 || !slices.Contains(names, rep.Problems[0].Out) {
		b.t.Fatalf("got %+v, want %q", rep.Problems, names)
	}
	p := rep.Problems[0]
	var got [][2]int64
	for _, z := range p.Zeroed {
		got = append(got, [2]int64{z.Offset, z.Length})
	}
	if p.State != "damaged" || p.Truncated != truncated || !slices.Equal(got, ranges) || p.ID == "" || p.Class == "" {
		b.t.Errorf("got %+v, want truncated %v, zeros %v", p, truncated, ranges)
	}
}

// salvageCuts: a file that was cut keeps what is there.
func salvageCuts(b *salvageBench) {
	for _, cut := range []struct {
		size, plain int
		zeroed      [][2]int64
	}{
		{2 * 32800, 65536, nil},
		{2*32800 + 20, 65536, nil},
		{2*32800 + 1032, 65536 + 1000, [][2]int64{{65536, 1000}}},
		{0, 0, nil},
	} {
		if b.base()+cut.size == 0 {
			continue // an empty file is one
		}
		b.fresh(func() {
			b.edit("dir/even", func(d []byte) []byte { return d[:b.base()+cut.size] })
			if b.placement == "header" && cut.size == 0 {
				_, rep := b.salvage(b.store, 4)
				if p := b.problem(rep, b.entries["dir/even"]); p.State != "lost" {
					b.t.Errorf("header alone: %+v", p)
				}
				return
			}
			out, rep := b.salvage(b.store, 4)
			want := append(bytes.Clone(b.contents["dir/even"][:min(cut.plain, 65536)]), make([]byte, max(0, cut.plain-65536))...)
			b.mustHold(out+"/dir/even", want)
			b.mustZero(rep, []string{"dir/even"}, true, cut.zeroed...)
		})
	}
}

// salvageAdded: what follows the chunk that is sealed as the last is left out.
func salvageAdded(b *salvageBench) {
	for _, n := range []int{10, 1000, 40000} {
		b.fresh(func() {
			b.edit("dir/chunks", func(d []byte) []byte { return append(d, noise(n, 7)...) })
			out, rep := b.salvage(b.store, 4)
			b.mustHold(out+"/dir/chunks", b.contents["dir/chunks"])
			b.mustZero(rep, []string{"dir/chunks", "dir/sub/again"}, false)
		})
	}
}

// salvageHeader: a file without its header is lost, and listed.
func salvageHeader(b *salvageBench) {
	switch b.placement {
	case "header":
		b.edit("phi/card", func(d []byte) []byte { d[60] ^= 1; return d })
		b.edit("small", func(d []byte) []byte { clear(d[:512]); return d })
	case "xattr":
		b.h.Sh(`setfattr -x user.kmsfs.header "$1"; setfattr -n user.kmsfs.header -v rubbish "$2"`, b.path("phi/card"), b.path("small"))
	case "sidecar":
		for _, name := range []string{"phi/card", "small"} {
			d, err := os.ReadFile(b.path(name))
			if err != nil {
				b.t.Fatal(err)
			}
			if err := os.Remove(fmt.Sprintf("%s/.kmsfs.h.%x", filepath.Dir(b.path(name)), d[:16])); err != nil {
				b.t.Fatal(err)
			}
		}
	}
	out, rep := b.salvage(b.store, 4)
	// The directories' times are not their own any more, where a header file went.
	b.check(out, rep, "phi/card", "small", "phi", ".")
	for _, name := range []string{"phi/card", "small"} {
		if p := b.problem(rep, b.entries[name]); p.State != "lost" || p.Out != "" || p.What == "" {
			b.t.Errorf("%s: %+v", name, p)
		}
	}
}

// salvageNames: without a directory's records its files are there by their ids.
func salvageNames(b *salvageBench) {
	dir := b.path("dir")
	b.h.Sh(`rm "$1"/.kmsfs.dir; setfattr -x user.kmsfs.dir "$1"`, dir)
	out, rep := b.salvage(b.store, 4)
	var without []string
	for name := range b.want {
		if name == "dir" || strings.HasPrefix(name, "dir/") {
			without = append(without, name)
		}
	}
	b.check(out, rep, without...)
	b.mustFindByID(out, rep, "dir/even")
	if p := b.problem(rep, b.entries["dir/sub"]); p.State != "unnamed" {
		b.t.Errorf("subdirectory: %+v", p)
	} else {
		// Its own names are as they were.
		b.mustHold(filepath.Join(out, p.Out, "x"), b.contents["dir/sub/x"])
		b.mustHold(filepath.Join(out, p.Out, "again"), b.contents["dir/chunks"])
	}
}

func (b *salvageBench) mustFindByID(out string, rep salvageReport, names ...string) {
	b.t.Helper()
	for _, name := range names {
		p := b.problem(rep, b.entries[name])
		if p.State != "unnamed" || p.ID == "" || p.Out != salvageLost+"/"+p.ID {
			b.t.Errorf("%s: %+v", name, p)
		}
		b.mustHold(filepath.Join(out, p.Out), b.contents[name])
	}
}

// salvageRecord: a store without its record is read by the keys that the
// machine trusts for it; one that it does not know only if the user says so.
func salvageRecord(b *salvageBench) {
	for _, damage := range []string{`truncate -s 100 "$1"/.kmsfs/store`, `sed -i 's/^mac ..../mac 0000/' "$1"/.kmsfs/store`, `rm "$1"/.kmsfs/store`} {
		b.fresh(func() {
			b.h.Sh(damage, b.store) // F-70
			out, rep := b.salvage(b.store, 0)
			b.check(out, rep)
			if !strings.Contains(strings.Join(rep.Notes, "\n"), "second copy") {
				b.t.Errorf("notes: %q", rep.Notes)
			}
		})
	}
	for _, damage := range []string{`rm "$1"/.kmsfs/store "$1"/.kmsfs.store`, `truncate -s 100 "$1"/.kmsfs/store`} {
		b.h.Sh(damage, b.store)
		out, rep := b.salvage(b.store, 0)
		b.check(out, rep)
		if len(rep.Notes) == 0 || !strings.Contains(strings.Join(rep.Notes, "\n"), "no store record") {
			b.t.Errorf("notes: %q", rep.Notes)
		}
		other := filepath.Join(b.dir, "other-known-stores")
		if r := b.h.Try("salvage", "--known-stores", other, b.store, filepath.Join(b.dir, "refused")); r.Code != 7 || !strings.Contains(r.Stderr, "keyring:phi") {
			b.t.Errorf("unknown store: got exit code %d: %s", r.Code, r.Stderr)
		}
		out, rep = b.salvage(b.store, 0, "--trust", "--known-stores", other)
		b.check(out, rep)
	}
	if _, err := os.Stat(filepath.Join(b.dir, "refused")); err == nil {
		b.t.Error("a refused run made its output")
	}
}

// salvageClasses: name keys are in the store record as well, and without both
// copies names are lost.
func salvageClasses(b *salvageBench) {
	b.h.Sh(`rm -r "$1"/.kmsfs/classes`, b.store)
	out, rep := b.salvage(b.store, 0)
	b.check(out, rep)
	b.h.Sh(`rm "$1"/.kmsfs/store "$1"/.kmsfs.store`, b.store)
	out, rep = b.salvage(b.store, 4)
	b.mustFindByID(out, rep, "small", "dir/even", "phi/card")
	open := b.problem(rep, b.entries["open"]) // its own name is one of the root's
	b.mustHold(filepath.Join(out, open.Out, "plain"), b.contents["open/plain"])
}

// salvageCopies: files alone, under any name, in any place.
func salvageCopies(b *salvageBench) {
	loose := filepath.Join(b.dir, "loose")
	if err := os.MkdirAll(loose+"/headers", 0o755); err != nil {
		b.t.Fatal(err)
	}
	defer os.RemoveAll(loose)
	i := 0
	for name := range b.contents {
		i++
		b.h.Sh(`cp --preserve=all "$1" "$2"`, b.path(name), fmt.Sprintf("%s/copy-%d", loose, i))
	}
	err := filepath.WalkDir(b.store, func(p string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasPrefix(d.Name(), ".kmsfs.h.") { // under a name that says nothing
			b.h.Sh(`cp "$1" "$2"`, p, filepath.Join(loose, "headers", d.Name()[9:]))
		}
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	out, rep := b.salvage(loose, 4)
	var found []string
	for _, p := range rep.Problems {
		if p.State != "unnamed" && p.State != "bare" {
			b.t.Errorf("%+v", p)
		}
		if p.ID == "" {
			continue
		}
		got, err := os.ReadFile(filepath.Join(out, p.Out))
		if err != nil {
			b.t.Fatal(err)
		}
		for name, want := range b.contents {
			if bytes.Equal(got, want) {
				found = append(found, name)
			}
		}
	}
	slices.Sort(found)
	if found = slices.Compact(found); len(found) != len(b.contents) {
		b.t.Errorf("found %q of %d files: %+v", found, len(b.contents), rep)
	}
}

// salvageFile: one file, in its store or a copy.
func salvageFile(b *salvageBench) {
	out, rep := b.salvage(b.path("phi/card"), 4)
	if len(rep.Problems) == 0 || rep.Files != 1 {
		b.t.Fatalf("%+v", rep)
	}
	p := rep.Problems[0]
	if p.State == "bare" {
		p = rep.Problems[1]
	}
	b.mustHold(filepath.Join(out, p.Out), b.contents["phi/card"])
	if st, err := os.Stat(filepath.Join(out, p.Out)); err != nil || st.Mode().Perm() != 0o400 {
		b.t.Errorf("mode: %v, %v", st, err)
	}
}

// salvageKeys: files whose key cannot be used are listed, the others are there.
func salvageKeys(b *salvageBench) {
	b.h.Run("keyring", "disable", "phi")
	defer b.h.Run("keyring", "enable", "phi")
	out, rep := b.salvage(b.store, 5)
	if p := b.problem(rep, b.entries["phi/card"]); p.State != "lost" || p.Cause != "key-missing" {
		b.t.Errorf("%+v", p)
	}
	b.mustHold(out+"/dir/even", b.contents["dir/even"])
}

// salvageKeysGone: a header that names another key than the store's is refused.
func salvageKeysGone(b *salvageBench) {
	b.h.Sh(`rm "$1"/.kmsfs/store "$1"/.kmsfs.store`, b.store)
	known, err := os.ReadFile(filepath.Join(b.h.Dir, ".config/kmsfs/known-stores"))
	if err != nil {
		b.t.Fatal(err)
	}
	file := filepath.Join(b.dir, "fewer")
	if err := os.WriteFile(file, bytes.ReplaceAll(known, []byte(`"keyring:phi"`), []byte(`"keyring:general"`)), 0o600); err != nil {
		b.t.Fatal(err)
	}
	_, rep := b.salvage(b.store, 5, "--known-stores", file)
	if p := b.problem(rep, b.entries["phi/card"]); p.State != "lost" || p.Cause != "key-rejected" {
		b.t.Errorf("%+v", p)
	}
}

// TestSalvageUnclean reads what a killed mount left in its journal.
func TestSalvageUnclean(t *testing.T) {
	t.Parallel()
	b := newSalvageBench(t, "header")
	m := b.h.Mount(b.store)
	b.h.Sh(`printf changed | dd of="$1" bs=1 seek=40000 conv=notrunc status=none; truncate -s 1000 "$2"`, m.Path("dir/chunks"), m.Path("phi/card"))
	m.Kill()
	want := bytes.Clone(b.contents["dir/chunks"])
	copy(want[40000:], "changed")
	out, rep := b.salvage(b.store, 0)
	b.mustHold(out+"/dir/chunks", want)
	b.mustHold(out+"/phi/card", b.contents["phi/card"][:1000])
	if len(rep.Problems) > 0 {
		t.Errorf("%+v", rep.Problems)
	}
}

// TestSalvageOutput: an output that is in use, or full.
func TestSalvageOutput(t *testing.T) {
	t.Parallel()
	b := newSalvageBench(t, "header")
	full := filepath.Join(b.dir, "full")
	if err := os.Mkdir(full, 0o755); err != nil {
		t.Fatal(err)
	}
	for what, out := range map[string]string{"not empty": b.dir, "in the source": b.store + "/out", "the source": b.store, "a file": b.path("small")} {
		if r := b.h.Try("salvage", b.store, out); r.Code == 0 || !strings.Contains(r.Stderr, "OUT") {
			t.Errorf("%s: got exit code %d: %s", what, r.Code, r.Stderr)
		}
	}
	if err := unix.Mount("tmpfs", full, "tmpfs", 0, "size=200k"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(full, 0); err != nil {
			t.Error(err)
		}
	}()
	r := b.h.Try("salvage", "--json", b.store, full)
	var rep salvageReport
	if err := json.Unmarshal([]byte(r.Stdout), &rep); err != nil || rep.Complete || r.Code != 9 {
		t.Errorf("full disk: got exit code %d, %v: %s", r.Code, err, r.Stderr)
	}
	for name, want := range b.contents { // whole files only
		got, err := os.ReadFile(filepath.Join(full, name))
		if err == nil && !bytes.Equal(got, want) {
			t.Errorf("%s: %d of %d bytes", name, len(got), len(want))
		}
	}
}

// TestSalvageHostile: whoever can write the store cannot have anything written
// outside of the output, nor have it wait for ever.
func TestSalvageHostile(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root", "fuse")
	h, dir := rig.NewHome(t), t.TempDir()
	store, outside := filepath.Join(dir, "S"), filepath.Join(dir, "outside")
	h.Run("init", "--names", "plain", store)
	m := h.Mount(store)
	m.Put("file", []byte("contents"))
	h.Sh(`mkdir "$1"/d; cp "$1"/file "$1"/d/inside`, m.Dir)
	m.Unmount()
	if err := os.Mkdir(outside, 0o755); err != nil {
		t.Fatal(err)
	}
	h.Sh(`cd "$1"; ln -s "$2" a; ln -s "$2" z; ln -s "$2"/new dangling; ln -s ../../outside lost+found.kmsfs; mkfifo pipe .kmsfs.h.00112233445566778899aabbccddeeff .kmsfs/rewrap.x
		mkdir e; cp -a .kmsfs.dir e/; ln -s "$2"/new e/.kmsfs.store; mkfifo e/.kmsfs.dir.x; rm d/.kmsfs.dir; mkfifo d/.kmsfs.dir; ln -s "$2" .kmsfs/quarantine
		truncate -s 1T huge; truncate -s 1T .kmsfs.h.ffeeddccbbaa99887766554433221100; printf 'kmsfs\0\377\377\377\377\377\377\377\377' >odd; cp file ..hidden; cp file "$(printf 'new\nline')"`, store, outside)
	before := readTree(t, outside)
	out := filepath.Join(dir, "out")
	r := h.Try("salvage", store, out)
	if r.Code != 4 {
		t.Errorf("got exit code %d, want 4: %s", r.Code, r.Stderr)
	}
	mustEqual(t, "outside of the output", readTree(t, outside), before)
	for name, want := range map[string]string{"file": "contents", "d/inside": "contents", "..hidden": "contents"} {
		if got, err := os.ReadFile(filepath.Join(out, name)); err != nil || string(got) != want {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
	}
	if target, err := os.Readlink(filepath.Join(out, "a")); err != nil || target != outside {
		t.Errorf("a symlink is not one: %q, %v", target, err)
	}
}
