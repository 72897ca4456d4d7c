package integration

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/record"
	"github.com/kmsfs/kmsfs/integration/rig"
)

func (s *victimStore) recordPath() string { return filepath.Join(s.dir, ".kmsfs/store") }

// editRecord changes the store record, whose MAC the attacker cannot make.
func (s *victimStore) editRecord(f func(r *record.Store)) {
	s.t.Helper()
	r, err := record.ParseStore(s.read(s.recordPath()))
	if err != nil {
		s.t.Fatal(err)
	}
	f(r)
	b, err := r.Encode()
	if err != nil {
		s.t.Fatal(err)
	}
	s.write(s.recordPath(), b)
}

// refused wants the program to refuse the store in every way that opens it.
func (s *victimStore) refused(what string, code int, words ...string) {
	s.t.Helper()
	m := filepath.Join(s.t.TempDir(), "m")
	if err := os.Mkdir(m, 0o755); err != nil {
		s.t.Fatal(err)
	}
	for _, args := range [][]string{{"mount", s.dir, m}, {"mount", "--trust", "--read-only", s.dir, m}, {"ls", s.dir}, {"fsck", s.dir}} {
		res := s.h.Try(args...)
		checked := args[0] == "fsck" && code == 4 // by the second copy of the record, and tells what it found
		if res.Code != code || res.Stdout != "" && !checked {
			s.t.Errorf("%s: kmsfs %s: exit %d, want %d; %q %s", what, args[0], res.Code, code, res.Stdout, res.Stderr)
		}
		for _, w := range words {
			if !strings.Contains(res.Stderr, w) {
				s.t.Errorf("%s: kmsfs %s does not say %q: %s", what, args[0], w, res.Stderr)
			}
		}
	}
	if rig.Mounted(m) {
		s.t.Errorf("%s: it is mounted", what)
		s.h.Run("umount", m)
	}
}

// TestThreatRecord changes the policy, and the keys, in the store record.
func TestThreatRecord(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newVictim(t, p, "a")
		good := s.read(s.recordPath())
		policy := func(from, to string) func(*record.Store) {
			return func(r *record.Store) {
				now := bytes.Replace(r.Body.Policy, []byte(from), []byte(to), 1)
				if bytes.Equal(now, r.Body.Policy) {
					t.Fatalf("the policy has no %q: %s", from, r.Body.Policy)
				}
				r.Body.Policy = now
			}
		}
		for what, f := range map[string]func(*record.Store){
			"a bit of the rules":     func(r *record.Store) { r.Body.Rules[20] ^= 1 },
			"the rules are gone":     func(r *record.Store) { r.Body.Rules = nil },
			"a rule in plaintext":    policy(`"directories":{}`, `"directories":{"/patients":"general"}`),
			"the default is another": policy(`"default":"general"`, `"default":"open"`),
			"names are plain":        policy(`"names":"encrypted"`, `"names":"plain"`),
			"placement": func(r *record.Store) {
				r.Body.Placement = map[string]string{"header": "xattr", "xattr": "sidecar", "sidecar": "header"}[r.Body.Placement]
			},
			"suite":                    func(r *record.Store) { r.Body.Suite = "chacha20-poly1305" },
			"header size":              func(r *record.Store) { r.Body.HeaderSize = 512 },
			"name key of a class":      func(r *record.Store) { r.Body.Names["phi"] = r.Body.Names["general"] },
			"MAC":                      func(r *record.Store) { r.MAC[31] ^= 1 },
			"creation time":            func(r *record.Store) { r.Body.Created = r.Body.Created.AddDate(-1, 0, 0) },
			"store key of other class": func(r *record.Store) { r.Keys.Store["general"] = r.Keys.Store["open"] },
		} {
			s.editRecord(f)
			if what == "store key of other class" {
				// The classes share a key, and any class's copy of the store key
				// may open the record; what is wrong is the copy's class.
				s.wantErrnosClean("a")
			} else {
				s.refused(what, 4)
			}
			s.write(s.recordPath(), good)
		}
		for what, f := range map[string]func(*record.Store){
			"the attacker's key for a class": func(r *record.Store) { r.Body.Keys["phi"] = []string{"keyring:attacker"} },
			"the attacker's key as well":     func(r *record.Store) { r.Body.Keys["phi"] = append(r.Body.Keys["phi"], "keyring:attacker") },
			"the key of another class":       func(r *record.Store) { r.Body.Keys["phi"] = r.Body.Keys["general"] },
		} {
			s.editRecord(f)
			list, err := record.ParseStore(s.read(s.recordPath()))
			if err != nil {
				t.Fatal(err)
			}
			// Both lists: what this machine trusts, and what the store says.
			s.refused(what, 7, "phi: keyring:phi", "phi: "+strings.Join(list.Body.Keys["phi"], " "))
			s.write(s.recordPath(), good)
		}
		s.wantErrnosClean("a")
	})
}

// wantErrnosClean wants the store to mount and a file to read.
func (s *victimStore) wantErrnosClean(name string) {
	s.t.Helper()
	res := s.h.Try("cat", s.dir, name)
	if res.Code != 0 || res.Stdout != string(s.plain[name]) {
		s.t.Errorf("cat %s: exit %d, %d bytes: %s", name, res.Code, len(res.Stdout), res.Stderr)
	}
}

// TestThreatOtherStore puts the whole record of a store of the attacker's, whose
// MAC is right, in the place of the record.
func TestThreatOtherStore(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newVictim(t, p, "a")
		good, err := record.ParseStore(s.read(s.recordPath()))
		if err != nil {
			t.Fatal(err)
		}
		theirs := filepath.Join(t.TempDir(), "T")
		s.h.Run("init", "--key", "keyring:attacker", "--placement", p.String(), theirs)
		s.h.Sh(`rm -r "$2"/.kmsfs; cp -a "$1"/.kmsfs "$2"/`, theirs, s.dir)
		s.refused("another store", 7, "keyring:attacker")

		// With the victim's id in it the keys differ, whatever the MAC.
		ours := s.copy(t)
		ours.editRecord(func(r *record.Store) { r.Body.ID = good.Body.ID })
		ours.refused("another store with the same id", 7, "general: keyring:general", "general: keyring:attacker")
	})
}

// TestThreatDirectoryRecord weakens a directory's class by putting the record of
// another directory, of a weaker class, in the place of its own.
func TestThreatDirectoryRecord(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newVictim(t, p, "a", "patients/a", "sub/a")
		weak, strong := s.path("sub"), s.path("patients")
		s.write(filepath.Join(strong, ".kmsfs.dir"), s.read(filepath.Join(weak, ".kmsfs.dir")))
		s.setAttr(strong, dirAttr, s.attr(weak, dirAttr))

		m := s.h.Mount(s.dir)
		for what, err := range map[string]error{
			"create":  os.WriteFile(m.Path("patients/new"), []byte("secret"), 0o600),
			"replace": os.WriteFile(m.Path("patients/a"), []byte("secret"), 0o600),
			"mkdir":   os.Mkdir(m.Path("patients/dir"), 0o700),
			"symlink": os.Symlink("x", m.Path("patients/link")),
			"move in": os.Rename(m.Path("a"), m.Path("patients/moved")),
		} {
			if errno := errnoOf(err); errno != unix.EPERM {
				t.Errorf("%s: %s, want EPERM", what, errnoName(errno))
			}
		}
		// Its names are under another class's key and directory id now, so that
		// nothing of it is served, rather than something wrong.
		if entries, err := os.ReadDir(m.Path("patients")); err != nil || len(entries) != 0 {
			t.Errorf("%d entries, %v", len(entries), err)
		}
		if got, errno := readAll(m.Path("sub/a")); errno != 0 || !bytes.Equal(got, s.plain["sub/a"]) {
			t.Errorf("the other directory: %s", errnoName(errno))
		}
		m.Unmount()
		report := s.fsck(4)
		if report.kind(s.entries["patients"]) == "" && report.kind(s.entries["sub"]) == "" {
			t.Errorf("fsck found neither directory: %+v", report.Problems)
		}
		for _, kind := range []string{"foreign", "integrity"} { // its name, and its class
			if !report.has(s.entries["patients/a"], kind) {
				t.Errorf("fsck has no %q for the file: %+v", kind, report.Problems)
			}
		}
	})
}

// TestThreatDirectoryRecordForged: a record that nobody signed is an integrity
// error, and its second copy serves when the first is gone.
func TestThreatDirectoryRecordForged(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newVictim(t, p, "a", "patients/a", "sub/a", "other/a")
		forge := func(dir string) {
			d, err := record.ParseDir(s.read(filepath.Join(s.path(dir), ".kmsfs.dir")))
			if err != nil {
				t.Fatal(err)
			}
			d.Class = "general"
			s.write(filepath.Join(s.path(dir), ".kmsfs.dir"), d.Encode())
			s.setAttr(s.path(dir), dirAttr, d.Encode())
		}
		forge("patients")
		if err := os.Remove(filepath.Join(s.path("sub"), ".kmsfs.dir")); err != nil {
			t.Fatal(err)
		}
		b := s.read(filepath.Join(s.path("other"), ".kmsfs.dir"))
		b[12] ^= 1 // the directory id
		s.write(filepath.Join(s.path("other"), ".kmsfs.dir"), b)

		m := s.h.Mount(s.dir)
		if got, errno := readAll(m.Path("other/a")); errno != unix.EIO && !bytes.Equal(got, s.plain["other/a"]) {
			t.Errorf("other/a, one copy of whose directory's record is damaged: %s", errnoName(errno))
		}
		for path, want := range map[string]unix.Errno{"a": 0, "patients/a": unix.EIO, "sub/a": 0} {
			if _, errno := readAll(m.Path(path)); errno != want {
				t.Errorf("%s: %s, want %s", path, errnoName(errno), errnoName(want))
			}
		}
		_, err := os.ReadDir(m.Path("patients"))
		if errno := errnoOf(err); errno != unix.EIO {
			t.Errorf("ls of a forged directory: %s, want EIO", errnoName(errno))
		}
		m.Unmount()
		report := s.fsck(4)
		for _, dir := range []string{"patients", "sub", "other"} {
			if kind := report.kind(s.entries[dir]); kind != "integrity" {
				t.Errorf("fsck says %q of %s, want integrity", kind, dir)
			}
		}
		s.h.Try("fsck", "--repair", s.dir)
		report = s.fsck(4)
		if kind := report.kind(s.entries["sub"]); kind != "" {
			t.Errorf("fsck says %q of sub after a repair", kind)
		}
	})
}

// TestPolicyChangedUnderADirectory: where the policy changed, files can still be
// read and nothing can be written.
func TestPolicyChangedUnderADirectory(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newVictim(t, p, "a", "sub/a", "patients/a")
		policy := filepath.Join(t.TempDir(), "policy.yaml")
		if err := os.WriteFile(policy, []byte(threatPolicy+"  /sub: phi\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		s.h.Run("policy", "apply", s.dir, policy)
		m := s.h.Mount(s.dir)
		for _, name := range []string{"a", "sub/a", "patients/a"} {
			if got, errno := readAll(m.Path(name)); errno != 0 || !bytes.Equal(got, s.plain[name]) {
				t.Errorf("%s: %s", name, errnoName(errno))
			}
		}
		for what, err := range map[string]error{
			"create":   os.WriteFile(m.Path("sub/new"), []byte("x"), 0o600),
			"write":    os.WriteFile(m.Path("sub/a"), []byte("x"), 0o600),
			"truncate": os.Truncate(m.Path("sub/a"), 10),
		} {
			if errno := errnoOf(err); errno != unix.EPERM {
				t.Errorf("%s: %s, want EPERM", what, errnoName(errno))
			}
		}
		if err := os.Remove(m.Path("sub/a")); err != nil {
			t.Errorf("a file that is in the wrong class can be removed: %v", err)
		}
		m.Unmount()
		s.fsck(0)
	})
}

// TestThreatNames changes names: what fails authentication is not listed, never
// wrongly named, and found by fsck.
func TestThreatNames(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		long := strings.Repeat("n", 200)
		s := newVictim(t, p, "a", "b", "sub/a", long)
		flip := func(name string) {
			b := []byte(filepath.Base(s.path(name)))
			if b[10] == 'A' {
				b[10] = 'B'
			} else {
				b[10] = 'A'
			}
			if err := os.Rename(s.path(name), filepath.Join(filepath.Dir(s.path(name)), string(b))); err != nil {
				t.Fatal(err)
			}
		}
		flip("a")
		// A name of another directory, and what was never a name.
		if err := os.Link(s.path("b"), filepath.Join(s.path("sub"), filepath.Base(s.path("b")))); err != nil {
			t.Fatal(err)
		}
		s.write(filepath.Join(s.dir, "README"), []byte("put here by hand"))
		s.write(filepath.Join(s.path("open"), ".kmsfs.evil"), []byte("x"))
		flipLong := strings.Replace(filepath.Base(s.path(long)), ".kmsfs.l.", ".kmsfs.n.", 1)
		b := s.read(filepath.Join(s.dir, flipLong))
		b[20]++
		s.write(filepath.Join(s.dir, flipLong), b)

		m := s.h.Mount(s.dir)
		for dir, want := range map[string]string{".": "b open other patients sub", "sub": "a", "open": ""} {
			if got := strings.Join(strings.Fields(s.h.Sh(`ls -A "$1"`, m.Path(dir))), " "); got != want {
				t.Errorf("ls %s: %q, want %q", dir, got, want)
			}
		}
		var status struct {
			Mounts []struct {
				Status struct {
					Counters struct {
						Foreign int `json:"foreign_entries"`
					} `json:"counters"`
				} `json:"status"`
			} `json:"mounts"`
		}
		if err := json.Unmarshal([]byte(s.h.Run("status", "--json", m.Dir)), &status); err != nil {
			t.Fatal(err)
		}
		if n := status.Mounts[0].Status.Counters.Foreign; n < 4 {
			t.Errorf("status counts %d foreign entries, want at least 4", n)
		}
		m.Unmount()
		report := s.fsck(4)
		foreign := 0
		for _, p := range report.Problems {
			if p.Kind == "foreign" || p.Kind == "integrity" && strings.HasPrefix(p.Path, ".kmsfs.l.") {
				foreign++
			}
		}
		if foreign != 5 {
			t.Errorf("fsck found %d entries that have no name, want 5: %+v", foreign, report.Problems)
		}
	})
}
