package integration

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
)

// The tests of this file show requirements of docs/format.md that one package
// alone cannot show.

const formatSlot = formatChunk + 32

// close ends the volume, so that the store can be changed from outside.
func (s *formatStore) close() {
	s.t.Helper()
	if err := s.v.Close(); err != nil {
		s.t.Fatal(err)
	}
}

// bodies returns the paths of the store files of the tree, in no order.
func (s *formatStore) bodies() (out []string) {
	s.t.Helper()
	err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && !strings.Contains(path, "/.kmsfs") {
			out = append(out, path)
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

// body returns the only store file.
func (s *formatStore) body() string {
	s.t.Helper()
	b := s.bodies()
	if len(b) != 1 {
		s.t.Fatalf("%d store files, want 1", len(b))
	}
	return b[0]
}

// editFile changes a file of the store.
func editFile(t *testing.T, path string, f func(b []byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, f(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

// read reads a file of the root, as far as it opens.
func (s *formatStore) read(name string) ([]byte, error) {
	s.t.Helper()
	ctx := context.Background()
	n, a, err := s.v.Lookup(ctx, s.v.Root(), name)
	if err != nil {
		return nil, err
	}
	h, err := s.v.Open(ctx, n, unix.O_RDONLY, false)
	if err != nil {
		return nil, err
	}
	defer h.Release()
	buf := make([]byte, a.Size+1)
	k, err := h.ReadAt(buf, 0)
	return buf[:k], err
}

// F-9 F-10 F-11
func TestHolesAreOnlyWhereTheHeaderSaysSo(t *testing.T) {
	zero := func(slot int) func(b []byte) []byte {
		return func(b []byte) []byte {
			clear(b[1024+slot*formatSlot : min(len(b), 1024+(slot+1)*formatSlot)])
			return b
		}
	}
	for name, tt := range map[string]struct {
		sparse bool
		edit   func(b []byte) []byte
		ok     bool
	}{
		"dense, middle chunk zeroed":     {false, zero(1), false},
		"sparse, middle chunk zeroed":    {true, zero(1), true},
		"sparse, last chunk zeroed":      {true, zero(4), false},
		"sparse flag set from outside":   {false, func(b []byte) []byte { b[11] |= 1; return zero(1)(b) }, false},
		"cut at a chunk boundary":        {false, func(b []byte) []byte { return b[:1024+2*formatSlot] }, false},
		"sparse, cut at a hole's edge":   {true, func(b []byte) []byte { return b[:1024+3*formatSlot] }, false},
		"untouched file, for comparison": {false, func(b []byte) []byte { return b }, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newFormatStore(t, envelope.Prefix)
			_, h := s.put(s.v.Root(), "file", noise(3*formatChunk, 1))
			if tt.sparse {
				if err := h.Truncate(4*formatChunk + 9); err != nil {
					t.Fatal(err)
				}
			}
			h.Release()
			s.close()
			editFile(t, s.body(), tt.edit)
			s.open()
			got, err := s.read("file")
			if tt.ok != (err == nil) || !tt.ok && fault.Of(err) != fault.Integrity {
				t.Errorf("got %d bytes, %v; want success: %v", len(got), err, tt.ok)
			}
			if !tt.ok && len(got) > 0 {
				t.Errorf("%d bytes were given out", len(got))
			}
		})
	}
}

// F-16
//
// Somebody who may use the class's key makes a header with a chunk size of
// their own.
func TestHeaderOfAnotherGeometryIsRefused(t *testing.T) {
	s := newFormatStore(t, envelope.Prefix)
	_, h := s.put(s.v.Root(), "file", []byte("x"))
	h.Release()
	info := s.v.Info()
	s.close()
	m := envelope.NewManager(s.keys, info.ID, envelope.Options{})
	defer m.Close()
	class := envelope.Class{Name: "general", Keys: info.Keys["general"], Allowed: info.Keys["general"]}
	for _, chunk := range []int{formatChunk, 2 * formatChunk} {
		fixed := envelope.Fixed{Suite: uint8(dare.AES256GCM), ChunkSize: chunk, Store: info.ID, File: envelope.NewID()}
		header, key, err := m.Create(context.Background(), class, keywrap.PurposeData, fixed, 1024)
		if err != nil {
			t.Fatal(err)
		}
		defer key.Wipe()
		block, err := header.Encode(1024)
		if err != nil {
			t.Fatal(err)
		}
		codec, err := dare.New(key.PRK(), dare.AES256GCM, chunk)
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := codec.Seal(block, []byte("forged by a key holder"), 0, true)
		if err != nil {
			t.Fatal(err)
		}
		editFile(t, s.body(), func([]byte) []byte { return sealed })
		s.open()
		_, err = s.read("file")
		if (chunk == formatChunk) != (err == nil) || err != nil && !errors.Is(err, cryptfs.ErrHeader) {
			t.Errorf("chunk size %d: %v", chunk, err)
		}
		s.close()
	}
}

// F-21
func TestSidecarsGoWithTheirNames(t *testing.T) {
	s := newFormatStore(t, envelope.Sidecar)
	ctx := context.Background()
	sub := s.mkdir("sub")
	n, h := s.put(s.v.Root(), "file", []byte("x"))
	h.Release()
	id, err := s.v.Getxattr(ctx, n, "user.kmsfs.id")
	if err != nil {
		t.Fatal(err)
	}
	want := func(when string, dirs ...bool) {
		t.Helper()
		found, err := filepath.Glob(s.dir + "/*/.kmsfs.h." + string(id))
		_, rootErr := os.Stat(s.dir + "/.kmsfs.h." + string(id))
		if err != nil || (rootErr == nil) != dirs[0] || (len(found) == 1) != dirs[1] {
			t.Errorf("%s: in the root %v, below %q, want %v", when, rootErr == nil, found, dirs)
		}
	}
	want("made", true, false)
	if _, err := s.v.Link(ctx, n, sub, "second"); err != nil {
		t.Fatal(err)
	}
	want("linked", true, true)
	if err := s.v.Unlink(ctx, s.v.Root(), "file"); err != nil {
		t.Fatal(err)
	}
	want("first name removed", false, true)
	if err := s.v.Rename(ctx, sub, "second", s.v.Root(), "moved", 0); err != nil {
		t.Fatal(err)
	}
	want("moved", true, false)
	if err := s.v.Unlink(ctx, s.v.Root(), "moved"); err != nil {
		t.Fatal(err)
	}
	want("removed", false, false)
}

// countingProvider counts calls.
type countingProvider struct {
	keywrap.Provider
	calls int
}

func (p *countingProvider) Decrypt(ctx context.Context, w keywrap.Wrapped, ec keywrap.Context) (*keymem.Key, error) {
	p.calls++
	return p.Provider.Decrypt(ctx, w, ec)
}

// F-22 F-23 F-26
func TestStoreRecordChangedFromOutside(t *testing.T) {
	s := newFormatStore(t, envelope.Prefix)
	info := s.v.Info()
	s.close()
	path := s.dir + "/.kmsfs/store"
	original, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		old, new string
		want     error
		calls    bool
	}{
		"policy":              {`"default":"general"`, `"default":"phi"`, cryptfs.ErrRecord, true},
		"cache time":          {`"cache":"5m"`, `"cache":"6m"`, cryptfs.ErrRecord, true},
		"the keys to be used": {`"keys":{"general":["keyring:general"]`, `"keys":{"general":["keyring:phi"]`, cryptfs.ErrKeysChanged, false},
		"white space":         {`"default":"general"`, `"default": "general"`, cryptfs.ErrRecordLost, false},
		"unknown member":      {`{"id":`, `{"x":1,"id":`, cryptfs.ErrRecordLost, false},
		"newer version":       {"kmsfs store 1\n", "kmsfs store 2\n", cryptfs.ErrNewerFormat, false},
		"MAC":                 {"\nmac ", "\nmac 0", cryptfs.ErrRecordLost, false},
	} {
		t.Run(name, func(t *testing.T) {
			changed := bytes.Replace(original, []byte(tt.old), []byte(tt.new), 1)
			if bytes.Equal(changed, original) {
				t.Fatalf("no %q in the record", tt.old)
			}
			editFile(t, path, func([]byte) []byte { return changed })
			p := &countingProvider{Provider: s.keys}
			_, err := cryptfs.Open(context.Background(), cryptfs.Config{Store: s.dir, Provider: p, Keys: info.Keys})
			if !errors.Is(err, tt.want) || (p.calls > 0) != tt.calls {
				t.Errorf("got %v after %d calls, want %v; with calls: %v", err, p.calls, tt.want, tt.calls)
			}
		})
	}
}

// F-25
func TestNameKeyHasTwoCopies(t *testing.T) {
	s := newFormatStore(t, envelope.Prefix)
	_, h := s.put(s.v.Root(), "file", []byte("x"))
	h.Release()
	s.close()
	class := s.dir + "/.kmsfs/classes/general"
	other, err := os.ReadFile(s.dir + "/.kmsfs/classes/phi")
	if err != nil {
		t.Fatal(err)
	}
	for _, content := range [][]byte{nil, []byte("damaged"), other} {
		editFile(t, class, func([]byte) []byte { return content })
		s.open()
		if got, err := s.read("file"); err != nil || string(got) != "x" {
			t.Errorf("class file of %d bytes: %q, %v", len(content), got, err)
		}
		s.close()
	}
	editFile(t, s.dir+"/.kmsfs/store", func(b []byte) []byte { // line 4 is outside the MAC
		i := bytes.LastIndex(b, []byte(`"names":{"general":"`)) + len(`"names":{"general":"`)
		b[i+40] ^= 1
		return b
	})
	info, err := cryptfs.Inspect(s.dir)
	if err == nil {
		_, err = cryptfs.Open(context.Background(), cryptfs.Config{Store: s.dir, Provider: s.keys, Keys: info.Keys})
	}
	if err == nil {
		t.Error("a store without a name key for its class opens")
	}
}

// storeDir returns a directory of the store by its plaintext name.
func (s *formatStore) storeDir(name string) string {
	s.t.Helper()
	r, err := openReader(s.dir, s.keyring)
	if err != nil {
		s.t.Fatal(err)
	}
	root, err := r.openDir(".")
	if err != nil {
		s.t.Fatal(err)
	}
	entries, err := root.list()
	if err != nil || entries[name] == "" {
		s.t.Fatalf("no %s in the store: %v", name, err)
	}
	return filepath.Join(s.dir, entries[name])
}

// F-27 F-28 F-29
func TestDirectoryRecordChangedFromOutside(t *testing.T) {
	ctx := context.Background()
	s := newFormatStore(t, envelope.Prefix)
	_, h := s.put(s.mkdir("phi"), "file", []byte("x"))
	h.Release()
	s.mkdir("general")
	s.close()
	phi, general := s.storeDir("phi"), s.storeDir("general")
	original, err := os.ReadFile(phi + "/.kmsfs.dir")
	weaker, werr := os.ReadFile(general + "/.kmsfs.dir")
	if err != nil || werr != nil {
		t.Fatal(err, werr)
	}
	flipped := bytes.Clone(original)
	flipped[12] ^= 1
	for name, tt := range map[string]struct {
		first, second []byte
		load, create  error
	}{
		"first copy lost":         {nil, original, nil, nil},
		"second copy lost":        {original, nil, nil, nil},
		"first copy cut":          {original[:20], original, nil, nil},
		"both copies lost":        {nil, nil, cryptfs.ErrDirRecord, cryptfs.ErrDirRecord},
		"id changed":              {flipped, original, cryptfs.ErrDirRecord, cryptfs.ErrDirRecord},
		"record of another class": {weaker, weaker, nil, cryptfs.ErrClassMismatch},
	} {
		t.Run(name, func(t *testing.T) {
			s.t = t
			editFile(t, phi+"/.kmsfs.dir", func([]byte) []byte { return tt.first })
			if err := unix.Setxattr(phi, "user.kmsfs.dir", tt.second, 0); err != nil {
				t.Fatal(err)
			}
			s.open()
			defer s.close()
			n, _, err := s.v.Lookup(ctx, s.v.Root(), "phi")
			if err != nil {
				t.Fatal(err)
			}
			d, err := s.v.OpenDir(ctx, n)
			if !errors.Is(err, tt.load) {
				t.Errorf("opendir: got %v, want %v", err, tt.load)
			}
			if err == nil {
				d.Close()
			}
			_, h, _, err := s.v.Create(ctx, n, name, unix.O_RDWR, 0o600, cryptfs.Caller{})
			if !errors.Is(err, tt.create) {
				t.Errorf("create: got %v, want %v", err, tt.create)
			}
			if err == nil {
				h.Release()
			}
		})
	}
}

// F-1
func TestForeignEntriesDoNotShow(t *testing.T) {
	s := newFormatStore(t, envelope.Prefix)
	_, h := s.put(s.v.Root(), strings.Repeat("n", 200), []byte("x"))
	h.Release()
	for _, name := range []string{"plaintext.txt", ".kmsfs.tmp.00", ".kmsfs.n.x", ".kmsfs.new", "AAAA"} {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte("by hand"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	d, err := s.v.OpenDir(context.Background(), s.v.Root())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var names []string
	for _, e := range d.Entries() {
		names = append(names, e.Name)
	}
	slices.Sort(names)
	if want := []string{".", "..", strings.Repeat("n", 200)}; !slices.Equal(names, want) {
		t.Errorf("got %q, want %q", names, want)
	}
	if got := s.v.Status().Counters.ForeignEntries; got != 2 {
		t.Errorf("%d foreign entries counted, want 2", got)
	}
}

// F-24
//
// Whoever may use one class opens the store; the other classes are refused.
func TestOneClassOpensTheStore(t *testing.T) {
	s := newFormatStore(t, envelope.Prefix)
	_, h := s.put(s.mkdir("phi"), "file", []byte("x"))
	h.Release()
	s.close()
	info := s.v.Info()
	p := &deniedProvider{Provider: s.keys, deny: "general"}
	v, err := cryptfs.Open(context.Background(), cryptfs.Config{Store: s.dir, Provider: p, Keys: info.Keys})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if _, _, err := v.Lookup(context.Background(), v.Root(), "phi"); fault.Of(err) != fault.KeyDenied {
		t.Errorf("lookup in the class that is denied: got %v, want key-denied", err)
	}
	for _, c := range v.Status().Classes {
		if c.Available != (c.Name != "general") {
			t.Errorf("class %s is available: %v", c.Name, c.Available)
		}
	}
}

// deniedProvider refuses one class.
type deniedProvider struct {
	keywrap.Provider
	deny string
}

func (p *deniedProvider) Decrypt(ctx context.Context, w keywrap.Wrapped, ec keywrap.Context) (*keymem.Key, error) {
	if ec.Class == p.deny {
		return nil, &keywrap.CallError{Op: "Decrypt", Key: w.Key, Err: keywrap.ErrDenied}
	}
	return p.Provider.Decrypt(ctx, w, ec)
}

// F-17
//
// A wrapped key in another file's header does not open there.
func TestWrappedKeyMovedToAnotherFile(t *testing.T) {
	s := newFormatStore(t, envelope.Prefix)
	for _, name := range []string{"a", "b"} {
		_, h := s.put(s.v.Root(), name, []byte(name))
		h.Release()
	}
	s.close()
	files := s.bodies()
	other, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	editFile(t, files[1], func(b []byte) []byte { copy(b[80:1024], other[80:1024]); return b })
	moved, err := os.ReadFile(files[1])
	if err != nil {
		t.Fatal(err)
	}
	s.open()
	failed := 0
	for _, name := range []string{"a", "b"} {
		if _, err := s.read(name); fault.Of(err) == fault.Integrity {
			failed++
		} else if err != nil {
			t.Error(err)
		}
	}
	if failed != 1 {
		t.Errorf("%d files fail, want 1: file id %s", failed, hex.EncodeToString(moved[32:48]))
	}
}
