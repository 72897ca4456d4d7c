package integration

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
)

func (s *victimStore) segment(i int) string {
	return filepath.Join(s.dir, ".kmsfs/journal", string(rune('0'+i)))
}

// journal returns the journal's files; setJournal puts others in their place.
func (s *victimStore) journal() (out [2][]byte) {
	for i := range out {
		out[i] = s.read(s.segment(i))
	}
	return out
}

func (s *victimStore) setJournal(files [2][]byte) {
	for i, b := range files {
		s.write(s.segment(i), b)
	}
}

// capture writes a file anew through a mount, without an fsync, and returns the
// journal as it is meanwhile: genuine, of an epoch in which the file was born
// and nothing was promised.
func (s *victimStore) capture(name string) [2][]byte {
	s.t.Helper()
	m := s.h.Mount(s.dir)
	if err := os.WriteFile(m.Path(name), s.plain[name], 0o644); err != nil {
		s.t.Fatal(err)
	}
	j := s.journal()
	m.Unmount()
	return j
}

// TestThreatJournal cuts a file and forges or replays the journal, by which the
// next mount would seal the cut as the file's end.
func TestThreatJournal(t *testing.T) { // F-31 F-33
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newVictim(t, p, "v", "w")
		genuine := s.capture("w")
		clean := s.journal()
		id, other := s.header("v")[32:48], s.header("w")[32:48]
		whole := s.body("v")
		change := func(f func(b []byte) []byte) (out [2][]byte) {
			for i, b := range genuine {
				out[i] = f(bytes.Clone(b))
			}
			return out
		}
		epoch := s.header("v")[48:52] // in which the file was born
		for what, j := range map[string][2][]byte{
			"the journal of another file's birth": genuine,
			"another's records with this id":      change(func(b []byte) []byte { return bytes.ReplaceAll(b, other, id) }),
			"a header with this file's epoch": change(func(b []byte) []byte {
				if len(b) >= 16 {
					copy(b[12:], epoch)
					copy(b[16:], epoch)
				}
				return b
			}),
			"segments exchanged": {genuine[1], genuine[0]},
			"no journal at all":  {nil, nil},
			"noise":              {noise(10_000, 1), noise(10_000, 2)},
		} {
			s.setBody("v", whole[:s.base()+3*threatSlot])
			s.setJournal(j)
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
		s.setJournal(clean)
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
		journal := s.capture("replayed")
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
		s.setJournal(journal)

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
		for i := range 50 { // in place: records of the journal
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
