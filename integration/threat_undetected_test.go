package integration

import (
	"bytes"
	"encoding/binary"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/record"
)

func (s *victimStore) writingPath() string { return filepath.Join(s.dir, ".kmsfs/writing") }

// captureEntry appends to a file through a mount and returns the writing list
// as it is meanwhile: a genuine entry for the file, of a time at which no fsync
// had promised anything. The file is as before then.
func (s *victimStore) captureEntry(name string) []byte {
	s.t.Helper()
	before := s.plain[name]
	m := s.h.Mount(s.dir)
	f, err := os.OpenFile(m.Path(name), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := f.Write([]byte("more")); err != nil {
		s.t.Fatal(err)
	}
	if _, err := f.Write(make([]byte, 2*threatChunk)); err != nil {
		s.t.Fatal(err)
	}
	list := s.read(s.writingPath())
	if len(bytes.Trim(list, "\x00")) == 0 {
		s.t.Fatal("a file that is being written is not in the list")
	}
	if err := f.Close(); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Truncate(m.Path(name), int64(len(before))); err != nil {
		s.t.Fatal(err)
	}
	m.Unmount()
	return list
}

// TestThreatWritingList cuts a file and forges its entry in the writing list, by
// which the next mount would seal the cut as the file's end.
func TestThreatWritingList(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newVictim(t, p, "v", "w")
		genuine := s.captureEntry("w")[:record.WritingLen]
		id := s.header("v")[32:48]
		ino := inode(t, s.path("v"))
		whole := s.body("v")
		forge := func(slot int, mac []byte) []byte {
			e := record.Writing{Slot: slot, File: [16]byte(id), Ino: ino}
			copy(e.MAC[:], mac)
			return e.Encode()
		}
		other := bytes.Clone(genuine)
		copy(other[16:32], id)
		binary.BigEndian.PutUint64(other[32:], ino)
		second := append(make([]byte, record.WritingLen), genuine...)
		torn := bytes.Clone(forge(0, nil))
		torn[3] ^= 0xff
		for what, list := range map[string][]byte{
			"an entry without a MAC":          forge(0, nil),
			"an entry with another's MAC":     forge(0, genuine[96:]),
			"another's entry with this id":    other,
			"another's entry, as it is":       genuine,
			"another's entry in another slot": second,
			"no entry at all":                 torn,
			"a list of odd length":            append(forge(0, genuine[96:]), 1, 2, 3),
		} {
			s.setBody("v", whole[:s.base()+3*threatSlot])
			s.write(s.writingPath(), list)
			m := s.h.Mount(s.dir)
			if got, errno := readAll(m.Path("v")); errno != unix.EIO {
				t.Errorf("%s: the cut file gives %d bytes, %s, want EIO", what, len(got), errnoName(errno))
			}
			if got, errno := readAll(m.Path("w")); errno != 0 || !bytes.Equal(got, s.plain["w"]) {
				t.Errorf("%s: the other file: %s", what, errnoName(errno))
			}
			m.Unmount()
			if kind := s.fsck(4).kind(s.entries["v"]); kind != "integrity" {
				t.Errorf("%s: fsck says %q", what, kind)
			}
			if got := len(s.body("v")); got != s.base()+3*threatSlot {
				t.Errorf("%s: the mount changed the file to %d bytes", what, got)
			}
		}
		s.setBody("v", whole)
		s.write(s.writingPath(), nil)
		s.fsck(0)
	})
}

// TestNotDetected shows what kmsfs by itself does not see, so that nobody
// believes it does: the store's past, put back, and whole things of one class
// changed for each other. A signed list of what belongs to a store at one time
// is needed for these.
func TestNotDetected(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		files := []string{"older", "emptied", "deleted", "swap1", "swap2", "sub/swap3", "one/a", "two/a", "sparse", "material", "replayed"}
		s := newVictim(t, p, files...)
		list := s.captureEntry("replayed")
		oldHeader, oldChunks := s.take("older")
		m := s.h.Mount(s.dir)
		s.h.Sh(`printf 'a newer version' > "$1"/older
			truncate -s +20K "$1"/sparse; printf end >> "$1"/sparse`, m.Dir)
		one, two := inode(t, m.Path("one")), inode(t, m.Path("two"))
		want := map[string][]byte{
			"older": s.plain["older"], "emptied": {}, "swap1": s.plain["swap2"], "swap2": s.plain["sub/swap3"], "sub/swap3": s.plain["swap1"],
			"one/a": s.plain["two/a"], "two/a": s.plain["one/a"], "sparse": nil, "material": s.plain["material"],
			"replayed": s.plain["replayed"][:3*threatChunk],
		}
		sparse, errno := readAll(m.Path("sparse"))
		if errno != 0 {
			t.Fatal(errno)
		}
		clear(sparse[threatChunk : 2*threatChunk])
		want["sparse"] = sparse
		m.Unmount()
		s.locate2(map[uint64]string{one: "one", two: "two"})

		s.put("older", oldHeader, oldChunks)
		s.setBody("emptied", nil)
		if err := os.Remove(s.path("deleted")); err != nil {
			t.Fatal(err)
		}
		s.rotate("swap1", "swap2", "sub/swap3")
		s.rotateEntries("one", "two")
		b := s.body("sparse")
		clear(s.slot(b, 1))
		s.setBody("sparse", b)
		s.changeMaterial("material")
		s.setBody("replayed", s.body("replayed")[:s.base()+3*threatSlot])
		s.write(s.writingPath(), list)

		m = s.h.Mount(s.dir)
		for name, data := range want {
			if got, errno := readAll(m.Path(name)); errno != 0 || !bytes.Equal(got, data) {
				t.Errorf("%s: %d bytes, %s; want the attacker's %d bytes", name, len(got), errnoName(errno), len(data))
			}
		}
		if _, errno := readAll(m.Path("deleted")); errno != unix.ENOENT {
			t.Errorf("deleted: %s, want ENOENT", errnoName(errno))
		}
		m.Unmount()
		report := s.h.Try("fsck", s.dir)
		if report.Code != 0 {
			t.Errorf("fsck detects something: %s", report.Stdout)
		}
	})
}

// locate2 adds entries that locate did not look for.
func (s *victimStore) locate2(inos map[uint64]string) {
	s.t.Helper()
	all := s.entries
	s.entries = map[string]string{}
	s.locate(inos)
	for name, rel := range all {
		s.entries[name] = rel
	}
}

// rotate gives each file the contents of the next: whole files, header and all.
func (s *victimStore) rotate(names ...string) {
	s.t.Helper()
	type file struct{ header, chunks []byte }
	var old []file
	for _, n := range names {
		h, c := s.take(n)
		old = append(old, file{h, c})
	}
	for i, n := range names {
		next := old[(i+1)%len(old)]
		s.put(n, next.header, next.chunks)
	}
}

// rotateEntries changes two entries of one directory for each other.
func (s *victimStore) rotateEntries(a, b string) {
	s.t.Helper()
	if err := unix.Renameat2(unix.AT_FDCWD, s.path(a), unix.AT_FDCWD, s.path(b), unix.RENAME_EXCHANGE); err != nil {
		s.t.Fatal(err)
	}
}

func (s *victimStore) changeMaterial(name string) {
	s.t.Helper()
	h, err := envelope.Parse(s.header(name))
	if err != nil {
		s.t.Fatal(err)
	}
	h.Recipients[0].Wrapped.Material += "0"
	b, err := h.Encode(headerSize)
	if err != nil {
		s.t.Fatal(err)
	}
	s.setHeader(name, b)
}

// TestNoPlaintextInStore looks for what was written, and for names, in every
// byte of a store: while files are open, after a crash, and at rest.
func TestNoPlaintextInStore(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newVictim(t, p)
		m := s.h.Mount(s.dir)
		secrets := []string{"CONTENTS-are-secret", "NAME-is-secret", "DIR-is-secret", "TARGET-is-secret", "ATTR-is-secret", "VALUE-is-secret", "LONG-is-secret"}
		long := "LONG-is-secret" + strings.Repeat("x", 230)
		s.h.Sh(`cd "$1"; mkdir DIR-is-secret; cd DIR-is-secret
			(yes CONTENTS-are-secret || true) | head -c 300000 > NAME-is-secret
			ln -s TARGET-is-secret link; setfattr -n user.ATTR-is-secret -v VALUE-is-secret NAME-is-secret
			echo CONTENTS-are-secret > "$2"; mkfifo NAME-is-secret.fifo; ln NAME-is-secret NAME-is-secret.2
			mv "$2" ../"$2"; rm link; ln -s TARGET-is-secret link`, m.Dir, long)
		f, err := os.OpenFile(m.Path("DIR-is-secret/NAME-is-secret"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		for i := range 50 { // in place: redo records
			if _, err := f.WriteAt([]byte("CONTENTS-are-secret CONTENTS-are-secret"), int64(i)*5000); err != nil {
				t.Fatal(err)
			}
		}
		s.search("while a file is open", secrets)
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		m.Kill()
		s.search("after a crash", secrets)
		m.Again()
		if got := s.h.Sh(`cat "$1/DIR-is-secret/NAME-is-secret" | wc -c`, m.Dir); strings.TrimSpace(got) != "300000" {
			t.Errorf("%s bytes after the crash", got)
		}
		m.Unmount()
		s.search("at rest", secrets)
		s.fsck(0)
		// Nor do names show in the log, which is not in the store but in clear.
		logs, err := filepath.Glob(filepath.Join(s.h.Dir, ".state/kmsfs/*.log"))
		if err != nil || len(logs) != 1 {
			t.Fatalf("log files: %q, %v", logs, err)
		}
		log := s.read(logs[0])
		for _, secret := range secrets {
			if bytes.Contains(log, []byte(secret)) {
				t.Errorf("the log has %s", secret)
			}
		}
	})
}

func (s *victimStore) search(when string, secrets []string) {
	s.t.Helper()
	found := func(where string, b []byte) {
		for _, secret := range secrets {
			if bytes.Contains(b, []byte(secret)) {
				s.t.Errorf("%s: %s has %s", when, where, secret)
			}
		}
	}
	files := 0
	err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		files++
		found("a name", []byte(d.Name()))
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			found("a symlink", []byte(target))
		case d.Type().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			found(path, b)
		}
		names := make([]byte, 64<<10)
		n, err := unix.Llistxattr(path, names)
		if err != nil {
			return err
		}
		found("an attribute's name", names[:n])
		for name := range strings.SplitSeq(strings.TrimRight(string(names[:n]), "\x00"), "\x00") {
			if name != "" {
				found("an attribute", s.attr(path, name))
			}
		}
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	if files < 10 {
		s.t.Errorf("%s: the store has %d files", when, files)
	}
}
