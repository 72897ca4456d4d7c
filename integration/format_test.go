package integration

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// formatStore is a store that kmsfs makes and the reader reads.
type formatStore struct {
	t       *testing.T
	dir     string
	keyring string
	keys    keywrap.Provider
	v       *cryptfs.Volume
}

const formatChunk = 4096

// newFormatStore has the class phi in /phi and the class open, whose names are
// plain, in /open.
func newFormatStore(t *testing.T, p envelope.Placement) *formatStore {
	t.Helper()
	s := &formatStore{t: t, dir: t.TempDir() + "/store", keyring: t.TempDir() + "/keyring.json"}
	k, err := keyring.Create(s.keyring, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })
	for _, name := range []string{"general", "phi"} {
		if err := k.CreateKey(name); err != nil {
			t.Fatal(err)
		}
	}
	s.keys = keywrap.Mux{Keyring: k}
	policy := classify.Single("general", "keyring:general")
	c := policy.Classes["general"]
	c.ChunkSize = formatChunk
	policy.Classes["general"] = c
	c.Keys = []string{"keyring:phi", "keyring:general"}
	policy.Classes["phi"] = c
	c.Names = classify.NamesPlain
	policy.Classes["open"] = c
	policy.Directories = map[string]string{"/phi": "phi", "/open": "open"}
	_, err = cryptfs.Init(context.Background(), cryptfs.InitConfig{Store: s.dir, Policy: policy, Placement: p,
		HeaderSize: 1024, Suite: dare.AES256GCM, Provider: s.keys})
	if err != nil {
		t.Fatal(err)
	}
	s.open()
	return s
}

func (s *formatStore) open() {
	s.t.Helper()
	info, err := cryptfs.Inspect(s.dir)
	if err != nil {
		s.t.Fatal(err)
	}
	s.v, err = cryptfs.Open(context.Background(), cryptfs.Config{Store: s.dir, Provider: s.keys, Keys: info.Keys})
	if err != nil {
		s.t.Fatal(err)
	}
	v := s.v
	s.t.Cleanup(func() { _ = v.Close() })
}

func (s *formatStore) mkdir(name string) *cryptfs.Node {
	s.t.Helper()
	n, _, err := s.v.Mkdir(context.Background(), s.v.Root(), name, 0o755, cryptfs.Caller{})
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

func (s *formatStore) put(dir *cryptfs.Node, name string, data []byte) (*cryptfs.Node, *cryptfs.Handle) {
	s.t.Helper()
	n, h, _, err := s.v.Create(context.Background(), dir, name, unix.O_RDWR, 0o644, cryptfs.Caller{})
	if err == nil && len(data) > 0 {
		_, err = h.WriteAt(data, 0, false)
	}
	if err == nil {
		err = h.Flush()
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return n, h
}

// contents reads a file by the page: header where the placement has it, then
// every chunk.
func (d *readerDir) contents(entry string) ([]byte, error) {
	raw, err := os.ReadFile(filepath.Join(d.path, entry))
	if err != nil || len(raw) == 0 {
		return nil, err
	}
	var block []byte
	switch d.s.body.Placement {
	case "header":
		block, raw = raw[:d.s.body.HeaderSize], raw[d.s.body.HeaderSize:]
	case "xattr":
		block = make([]byte, d.s.body.HeaderSize)
		_, err = unix.Getxattr(filepath.Join(d.path, entry), "user.kmsfs.header", block)
	case "sidecar":
		block, err = os.ReadFile(filepath.Join(d.path, ".kmsfs.h."+hex.EncodeToString(raw[:16])))
		raw = raw[16:]
	}
	if err != nil {
		return nil, err
	}
	h, err := readHeader(block)
	if err != nil {
		return nil, err
	}
	size := 1 << h.log2
	if h.class != d.class || h.suite != 1 || size != d.s.body.Policy.Classes[d.class].ChunkSize {
		return nil, fmt.Errorf("header of class %s, suite %d, chunk size %d", h.class, h.suite, size)
	}
	prk, err := h.open(d.s.keys, "data")
	if err != nil {
		return nil, err
	}
	var out []byte
	for i := 0; len(raw) > 0; i++ {
		slot := raw[:min(len(raw), size+32)]
		raw = raw[len(slot):]
		if h.flags&1 != 0 && len(raw) > 0 && len(bytes.Trim(slot, "\x00")) == 0 {
			out = append(out, make([]byte, size)...)
			continue
		}
		plain, err := openChunk(prk, slot, i, len(raw) == 0)
		if err != nil {
			return nil, fmt.Errorf("chunk %d: %w", i, err)
		}
		out = append(out, plain...)
	}
	return out, nil
}

// F-6 F-7 F-9 F-13 F-17 F-18 F-19 F-20 F-22 F-23 F-24 F-25 F-27 F-36 F-38 F-41 F-43
//
// TestFormatIsEnough reads what kmsfs wrote by docs/format.md alone.
func TestFormatIsEnough(t *testing.T) {
	for _, p := range []envelope.Placement{envelope.Prefix, envelope.Xattr, envelope.Sidecar} {
		t.Run(p.String(), func(t *testing.T) {
			s := newFormatStore(t, p)
			files := map[string][]byte{"empty": nil, "one": {1}, "chunk": noise(formatChunk, 1), "chunk and one": noise(formatChunk+1, 2),
				strings.Repeat("long ", 51): noise(3*formatChunk+5, 3)}
			dirs := map[string]*cryptfs.Node{".": s.v.Root(), "phi": s.mkdir("phi"), "open": s.mkdir("open")}
			for _, dir := range dirs {
				for name, data := range files {
					_, h := s.put(dir, name, data)
					h.Release()
				}
				_, h := s.put(dir, "sparse", []byte("x"))
				if err := errors.Join(h.Truncate(10*formatChunk), h.Flush()); err != nil {
					t.Fatal(err)
				}
				h.Release()
			}
			if err := s.v.Close(); err != nil {
				t.Fatal(err)
			}
			files["sparse"] = append([]byte("x"), make([]byte, 10*formatChunk-1)...)
			r, err := openReader(s.dir, s.keyring)
			if err != nil {
				t.Fatal(err)
			}
			s.readBack(r, files)
		})
	}
}

func (s *formatStore) readBack(r *readerStore, files map[string][]byte) {
	s.t.Helper()
	root, err := r.openDir(".")
	if err != nil {
		s.t.Fatal(err)
	}
	entries, err := root.list()
	if err != nil {
		s.t.Fatal(err)
	}
	for path, class := range map[string]string{".": "general", "phi": "phi", "open": "open"} {
		entry := path
		if path != "." {
			entry = entries[path]
		}
		d, err := r.openDir(entry)
		if err != nil {
			s.t.Fatalf("%s: %v", path, err)
		}
		if d.class != class {
			s.t.Errorf("%s has class %s, want %s", path, d.class, class)
		}
		names, err := d.list()
		if err != nil {
			s.t.Fatalf("%s: %v", path, err)
		}
		for name, want := range files {
			got, err := d.contents(names[name])
			if err != nil || !bytes.Equal(got, want) {
				s.t.Errorf("%s/%.10s: %d bytes, %v, want %d", path, name, len(got), err, len(want))
			}
		}
		second := make([]byte, 200)
		n, err := unix.Getxattr(d.path, "user.kmsfs.dir", second)
		if first, ferr := os.ReadFile(d.path + "/.kmsfs.dir"); err != nil || ferr != nil || !bytes.Equal(first, second[:n]) {
			s.t.Errorf("%s: second copy of the directory record: %v, %v", path, err, ferr)
		}
	}
}

// F-39 F-40 F-41
func TestFormatOfLinksAndAttributes(t *testing.T) {
	s := newFormatStore(t, envelope.Prefix)
	c := cryptfs.Caller{}
	const target, attr, value = "../some/target", "user.note", "a value"
	n, h := s.put(s.v.Root(), "file", []byte("x"))
	h.Release()
	open := s.mkdir("open")
	plain, h := s.put(open, "file", []byte("x"))
	h.Release()
	_, _, err := s.v.Symlink(context.Background(), s.v.Root(), "link", target, c)
	_, _, perr := s.v.Symlink(context.Background(), open, "link", target, c)
	long := strings.Repeat("long/", 800)
	_, _, lerr := s.v.Symlink(context.Background(), s.v.Root(), "long link", long, c)
	err = errors.Join(err, perr, lerr, s.v.Setxattr(context.Background(), n, attr, []byte(value), 0, c),
		s.v.Setxattr(context.Background(), plain, attr, []byte(value), 0, c), s.v.Close())
	if err != nil {
		t.Fatal(err)
	}
	r, err := openReader(s.dir, s.keyring)
	if err != nil {
		t.Fatal(err)
	}
	root, err := r.openDir(".")
	if err != nil {
		t.Fatal(err)
	}
	entries, err := root.list()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"link": target, "long link": long} {
		if got, err := root.target(entries[name]); err != nil || got != want {
			t.Errorf("target of %d bytes, %v, want %d", len(got), err, len(want))
		}
	}
	root.wantAttr(t, entries["file"], attr, value)
	d, err := r.openDir(entries["open"])
	if err != nil {
		t.Fatal(err)
	}
	d.wantAttr(t, "file", attr, value)
	if got, err := os.Readlink(filepath.Join(d.path, "link")); err != nil || got != target {
		t.Errorf("link in a class with plain names: %q, %v", got, err)
	}
}

// target reads a symlink by the page.
func (d *readerDir) target(entry string) (string, error) {
	raw, err := os.Readlink(filepath.Join(d.path, entry))
	if err == nil && len(raw) == 41 && strings.HasPrefix(raw, ".kmsfs.t.") {
		var content []byte
		content, err = os.ReadFile(filepath.Join(d.path, raw))
		raw = string(content)
	}
	b, berr := base64Name.DecodeString(raw)
	if err := errors.Join(err, berr); err != nil || len(b) < 16 {
		return "", fmt.Errorf("link %q: %w", raw, err)
	}
	return d.siv("kmsfs v1 link", b[16:], append([]byte("kmsfs v1 link"), b[:16]...))
}

// wantAttr requires an attribute of an entry as the page has it.
func (d *readerDir) wantAttr(t *testing.T, entry, attr, want string) {
	t.Helper()
	list := make([]byte, 1024)
	n, err := unix.Listxattr(filepath.Join(d.path, entry), list)
	if err != nil {
		t.Fatal(err)
	}
	for _, stored := range strings.Split(strings.Trim(string(list[:n]), "\x00"), "\x00") {
		name := strings.TrimPrefix(stored, "user.")
		if enc, sealed := strings.CutPrefix(stored, "user.kmsfs.x."); sealed {
			b, err := base64Name.DecodeString(enc)
			if err == nil {
				name, err = d.siv("kmsfs v1 xattr name", b, []byte("kmsfs v1 xattr name"))
			}
			if err != nil {
				t.Fatal(err)
			}
			name = strings.TrimRight(name, "\x00")
		}
		if "user."+name != attr {
			continue
		}
		value := make([]byte, 1024)
		n, err := unix.Getxattr(filepath.Join(d.path, entry), stored, value)
		if err != nil || n < 32 {
			t.Fatalf("value of %d bytes, %v", n, err)
		}
		ad := append([]byte("kmsfs v1 xattr value"), u64(len(name))...)
		ad = append(append(ad, name...), value[:16]...)
		if got, err := d.siv("kmsfs v1 xattr value", value[16:n], ad); err != nil || got != want {
			t.Errorf("value %q, %v, want %q", got, err, want)
		}
		return
	}
	t.Errorf("no attribute %s among %q", attr, list[:n])
}

// F-32 F-57 F-58
func TestFormatOfTheJournal(t *testing.T) {
	s := newFormatStore(t, envelope.Prefix)
	_, h := s.put(s.v.Root(), "file", noise(3*formatChunk, 1))
	if err := h.Fsync(false); err != nil {
		t.Fatal(err)
	}
	_, err := h.WriteAt(noise(formatChunk, 2), formatChunk, false) // in place
	if err := errors.Join(err, h.Flush()); err != nil {
		t.Fatal(err)
	}
	r, err := openReader(s.dir, s.keyring)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(s.dir + "/.kmsfs/journal/1")
	if err != nil || len(b) < 4096 {
		t.Fatalf("segment of %d bytes, %v", len(b), err)
	}
	head := b[:56]
	if !bytes.HasPrefix(head, slicesOf([]byte("kmsfsjnl"), u32(1), u32(1), u32(1), u32(0))) {
		t.Errorf("header %x", head)
	}
	mac := hmacOf(r.journalKey, slicesOf([]byte{0}, head))
	if !bytes.Equal(b[56:88], mac) || len(bytes.Trim(b[88:4096], "\x00")) != 0 {
		t.Errorf("header's MAC %x, want %x, and zeros", b[56:88], mac)
	}
	raw, err := os.ReadFile(s.body())
	if err != nil {
		t.Fatal(err)
	}
	var kinds []byte
	for rec := b[4096:]; len(rec) >= 40 && rec[0] != 0; {
		n := 40 + int(binary.BigEndian.Uint32(rec[4:]))
		mac = hmacOf(r.journalKey, slicesOf([]byte{1}, mac, rec[:8], rec[40:n]))
		if !bytes.Equal(rec[8:40], mac) {
			t.Fatalf("record %d: MAC", len(kinds))
		}
		kinds = append(kinds, rec[0])
		if rec[0] == 1 {
			op := slicesOf([]byte{1}, u64(1024+formatChunk+32), u64(formatChunk+32))
			if body := rec[40:n]; !bytes.Equal(body[:24], slicesOf(raw[32:48], raw[48:56])) || !bytes.Equal(body[56:73], op) || len(body) != 73+formatChunk+32 {
				t.Errorf("record of %d bytes: %x", len(body), body[:73])
			}
		}
		rec = rec[n:]
	}
	if !bytes.Equal(kinds, []byte{3, 1}) { // the promise of the fsync, then the change
		t.Errorf("records of kinds %v", kinds)
	}
	h.Release()
}

func slicesOf(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// TestWorkedSizes holds the table of docs/format.md, section 12, to the code.
func TestWorkedSizes(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(repoRoot(t), "docs", "format.md"))
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile(`(?m)^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$`).FindAllStringSubmatch(string(page), -1)
	if len(rows) < 6 {
		t.Fatalf("%d rows", len(rows))
	}
	for _, row := range rows {
		var n [5]int64
		for i := range n {
			if n[i], err = strconv.ParseInt(row[i+1], 10, 64); err != nil {
				t.Fatal(err)
			}
		}
		for i, p := range []envelope.Placement{envelope.Prefix, envelope.Xattr, envelope.Sidecar} {
			g := dare.Geometry{ChunkSize: classify.DefaultChunkSize, Base: dare.CipherOff(p.Base(envelope.DefaultHeader))}
			if got := int64(g.CipherSize(dare.PlainOff(n[0]))); got != n[2+i] || g.Chunks(dare.PlainOff(n[0])) != n[1] {
				t.Errorf("%s: %d bytes have %d chunks and take %d, the page says %d and %d", p, n[0], g.Chunks(dare.PlainOff(n[0])), got, n[1], n[2+i])
			}
		}
	}
}
