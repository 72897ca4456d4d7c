package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// wantFailure wants the exit code, and on standard error one line that says what
// is wrong and one that says what to do.
func wantFailure(t *testing.T, r rig.Result, code int) {
	t.Helper()
	errors, hints := 0, 0
	for line := range strings.Lines(r.Stderr) {
		switch {
		case strings.HasPrefix(line, "kmsfs: error: "):
			errors++
		case strings.HasPrefix(line, "kmsfs: hint: "):
			hints++
		}
	}
	if r.Code != code || errors != 1 || hints != 1 {
		t.Errorf("exit %d, want %d; %d errors, %d hints, want one of each\n%s%s", r.Code, code, errors, hints, r.Stdout, r.Stderr)
	}
}

// badWorld is what the cases of TestBadInput find: a store S with a file, a
// store under a passphrase, and things that are none.
type badWorld struct {
	t       *testing.T
	h       *rig.Home
	dir     string
	secrets []string // must not be in any output
}

const badPassphrase = "correct-horse-battery-staple"

func newBadWorld(t *testing.T) *badWorld {
	t.Helper()
	rig.Need(t, "root", "fuse")
	w := &badWorld{t: t, h: rig.NewHome(t), dir: t.TempDir()}
	w.file("passphrase", badPassphrase+"\n")
	w.file("wrong", "incorrect-donkey\n")
	w.file("empty", "")
	w.file("a-file", "not a store\n")
	w.h.Run("init", w.path("S"))
	m := w.h.Mount(w.path("S"))
	w.h.Sh(`mkdir "$1"/SECRET-DIR "$1"/empty; echo SECRET-CONTENTS > "$1"/SECRET-DIR/SECRET-NAME`, m.Dir)
	m.Unmount()
	w.h.Run("init", "--keyring", w.path("protected.json"), "--passphrase", "--passphrase-file", w.path("passphrase"), w.path("P"))
	w.h.Sh(`cd "$1"; mkdir m full empty-dir; touch full/x
		cp -a S newer; rm newer/.kmsfs.store; sed -i '1s/1$/2/' newer/.kmsfs/store
		cp -a S cut; rm cut/.kmsfs.store; truncate -s 100 cut/.kmsfs/store
		cp -a S garbled; rm garbled/.kmsfs.store; sed -i 's/"placement"/"plaecment"/' garbled/.kmsfs/store
		cp -a S nothing; rm nothing/.kmsfs.store; : > nothing/.kmsfs/store
		cp -a S odd; rm odd/.kmsfs.store; head -c 5000 /dev/urandom > odd/.kmsfs/store
		cp -a S lost; rm lost/.kmsfs/store
		cp -a S nokeys; rm -r nokeys/.kmsfs/classes
		mkdir other; cp "$2" other/keyring.json; chmod 600 other/keyring.json
		cp "$2" open.json; chmod 644 open.json
		head -c 50 "$2" > damaged.json; chmod 600 damaged.json
		echo '{]' > bad-known; chmod 600 bad-known`, w.dir, w.h.Dir+"/.config/kmsfs/keyring.json")
	w.secrets = []string{"SECRET-DIR", "SECRET-NAME", "SECRET-CONTENTS", badPassphrase, "incorrect-donkey"}
	for _, file := range []string{w.h.Dir + "/.config/kmsfs/keyring.json", w.path("protected.json")} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range regexp.MustCompile(`[A-Za-z0-9+/=_-]{40,}`).FindAllString(string(b), -1) {
			w.secrets = append(w.secrets, s[:40])
		}
	}
	if len(w.secrets) < 7 {
		t.Fatal("no key material found in the keyrings")
	}
	return w
}

func (w *badWorld) path(name string) string { return filepath.Join(w.dir, name) }

func (w *badWorld) file(name, text string) string {
	w.t.Helper()
	if err := os.WriteFile(w.path(name), []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return w.path(name)
}

// policy writes a policy file and returns its path.
func (w *badWorld) policy(name, text string) string {
	return w.file(name, "version: 1\ndefault: general\n"+text)
}

func (w *badWorld) want(what string, code int, args ...string) {
	w.t.Helper()
	w.t.Run(what, func(t *testing.T) {
		r := w.h.Try(args...)
		wantFailure(t, r, code)
		w.noSecrets(t, r)
	})
}

func (w *badWorld) noSecrets(t *testing.T, r rig.Result) {
	t.Helper()
	for _, s := range w.secrets {
		if strings.Contains(r.Stdout+r.Stderr, s) {
			t.Errorf("the output has a secret: %s%s", r.Stdout, r.Stderr)
		}
	}
}

func TestBadStores(t *testing.T) {
	t.Parallel()
	w := newBadWorld(t)
	m := w.path("m")
	for name, code := range map[string]int{
		"absent": 3, "a-file": 3, "empty-dir": 3, "full": 3, "nothing": 3, "odd": 3, "newer": 3, "cut": 4, "garbled": 4, "lost": 4,
	} {
		w.want("mount "+name, code, "mount", w.path(name), m)
		w.want("ls "+name, code, "ls", w.path(name))
		w.want("fsck "+name, code, "fsck", w.path(name))
		w.want("policy show "+name, code, "policy", "show", w.path(name))
	}
	w.want("a mountpoint in the place of the store", 3, "mount", m, w.path("S"))
	w.want("no such file", 1, "cat", w.path("S"), "/absent")
	w.want("a directory", 1, "cat", w.path("S"), "/empty")
	w.want("init over a store", 1, "init", w.path("S"))
	w.want("init in a directory with files", 1, "init", w.path("full"))
	w.want("init without a parent", 1, "init", w.path("absent/S"))
	w.want("info of nothing", 1, "info", w.path("absent"))
	// The second copies of the name keys, in the record, are enough.
	w.h.Run("ls", w.path("nokeys"))
}

func TestBadKeyrings(t *testing.T) {
	t.Parallel()
	w := newBadWorld(t)
	m, p := w.path("m"), w.path("P")
	ring := "--keyring=" + w.path("protected.json")
	w.want("no passphrase", 5, "mount", ring, p, m)
	w.want("wrong passphrase", 5, "mount", ring, "--passphrase-file", w.path("wrong"), p, m)
	w.want("wrong passphrase, ls", 5, "ls", ring, "--passphrase-file", w.path("wrong"), p)
	w.want("wrong passphrase, fsck", 5, "fsck", ring, "--passphrase-file", w.path("wrong"), p)
	w.want("empty passphrase file", 5, "ls", ring, "--passphrase-file", w.path("empty"), p)
	w.want("descriptor not open", 2, "ls", ring, "--passphrase-fd", "77", p)
	if err := os.Chmod(w.path("passphrase"), 0o644); err != nil {
		t.Fatal(err)
	}
	w.want("passphrase file open to others", 5, "ls", ring, "--passphrase-file", w.path("passphrase"), p)
	if err := os.Chmod(w.path("passphrase"), 0o600); err != nil {
		t.Fatal(err)
	}
	known := "--known-stores=" + w.h.Dir + "/.config/kmsfs/known-stores" // by default it is beside the keyring
	w.want("no keyring", 5, "mount", known, "--keyring", w.path("absent"), w.path("S"), m)
	// Its key of the same name is another key: as for any wrapped key that does
	// not open, and the hint says so.
	w.want("another keyring", 4, "mount", known, ring, "--passphrase-file", w.path("passphrase"), w.path("S"), m)
	w.want("keyring open to others", 5, "mount", known, "--keyring", w.path("open.json"), w.path("S"), m)
	w.want("damaged keyring", 5, "mount", known, "--keyring", w.path("damaged.json"), w.path("S"), m)
	w.want("a directory for a keyring", 5, "mount", known, "--keyring", w.path("full"), w.path("S"), m)
	w.want("damaged known-stores file", 7, "mount", "--known-stores", w.path("bad-known"), w.path("S"), m)
	w.want("a store new to this machine", 7, "mount", "--known-stores", w.path("none"), w.path("S"), m)
	t.Run("passphrase in the environment", func(t *testing.T) {
		r := w.h.TrySh(`KMSFS_PASSPHRASE="$3" "$1" ls "$2"`, rig.Binary(t), w.path("S"), badPassphrase)
		wantFailure(t, r, 2)
		w.noSecrets(t, r)
	})
	w.h.Run("keyring", "disable", "general")
	w.want("disabled key", 5, "mount", w.path("S"), m)
	w.h.Run("keyring", "schedule-deletion", "general")
	w.want("key pending deletion", 5, "mount", w.path("S"), m)
	w.h.Run("keyring", "cancel-deletion", "general")
	w.h.Run("keyring", "enable", "general")
	w.h.Run("ls", ring, "--passphrase-file", w.path("passphrase"), p)
	w.h.Run("ls", w.path("S"))
}

func TestBadPolicies(t *testing.T) {
	t.Parallel()
	w := newBadWorld(t)
	const general = "classes:\n  general: { keys: [\"keyring:general\"] }\n"
	for name, text := range map[string]string{
		"a rule with an unknown class":  general + "directories: { /a: phi }\n",
		"an unknown default":            "classes:\n  phi: { keys: [\"keyring:general\"] }\n",
		"a key of an unknown service":   "classes:\n  general: { keys: [\"vault:general\"] }\n",
		"a key that is none":            "classes:\n  general: { keys: [\"keyring:\"] }\n",
		"no key":                        "classes:\n  general: { keys: [] }\n",
		"an unknown field":              "classes:\n  general: { keys: [\"keyring:general\"], chunksize: 4KiB }\n",
		"an odd chunk size":             "classes:\n  general: { keys: [\"keyring:general\"], chunk_size: 5KiB }\n",
		"a relative rule":               general + "directories: { a/b: general }\n",
		"a class twice":                 general + "  general: { keys: [\"keyring:phi\"] }\n",
		"no YAML":                       "\tclasses: [",
		"a name that no class may have": "classes:\n  general: { keys: [\"keyring:general\"] }\n  \"../x\": { keys: [\"keyring:general\"] }\n",
	} {
		file := w.policy("policy.yaml", text)
		w.want("init: "+name, 2, "init", "--policy", file, w.path("new"))
		w.want("check: "+name, 2, "policy", "check", file)
		w.want("apply: "+name, 2, "policy", "apply", w.path("S"), file)
		if _, err := os.Stat(w.path("new")); !os.IsNotExist(err) {
			t.Fatalf("%s: init left something: %v", name, err)
		}
	}
	w.want("an absent policy", 1, "init", "--policy", w.path("absent"), w.path("new"))
	w.want("an unknown class on the command line", 2, "classify", "--store", w.path("S"), "/empty", "phi")
	w.want("a directory that is not there", 1, "classify", "--store", w.path("S"), "/absent", "general")
	unknown := w.policy("unknown.yaml", "classes:\n  general: { keys: [\"keyring:general\", \"keyring:absent\"] }\n")
	w.want("a key that the keyring does not have", 5, "policy", "apply", w.path("S"), unknown)
	removed := w.policy("removed.yaml", "classes:\n  general: { keys: [\"keyring:other\"] }\n")
	w.h.Run("keyring", "create", "other")
	w.want("a policy that drops a key", 1, "policy", "apply", w.path("S"), removed)
	w.h.Run("ls", w.path("S"))
}

func TestBadMountpoints(t *testing.T) {
	t.Parallel()
	w := newBadWorld(t)
	s := w.path("S")
	w.h.Sh(`cd "$1"; mkdir S/inside; ln -s S/inside into; ln -s m link`, w.dir)
	for what, mountpoint := range map[string]string{
		"absent": w.path("absent"), "a file": w.path("a-file"), "not empty": w.path("full"), "the store": s, "in the store": s + "/inside",
		"in the store, by a link": w.path("into"), "above the store": w.dir,
	} {
		w.want(what, 2, "mount", s, mountpoint)
	}
	w.want("the root", 6, "mount", s, "/")
	w.h.Sh(`rmdir "$1"/S/inside`, w.dir)
	w.want("umount of nothing", 2, "umount", w.path("m"))
	w.want("status of nothing", 2, "status", w.path("m"))
	w.want("one operand", 2, "mount", s)
	w.want("three operands", 2, "mount", s, w.path("m"), "x")
	w.want("an unknown option", 2, "mount", "--frobnicate", s, w.path("m"))
	w.want("an unknown -o option", 2, "mount", "-o", "frobnicate", s, w.path("m"))
	w.want("an unknown command", 2, "mont", s, w.path("m"))
	w.want("a log file that cannot be", 1, "mount", "--log-file", w.path("a-file/x"), s, w.path("m"))

	w.h.Run("mount", s, w.path("link")) // links to a mountpoint are fine
	w.want("a mountpoint already", 6, "mount", w.path("nokeys"), w.path("m"))
	w.want("a store that is mounted", 6, "mount", s, w.path("empty-dir"))
	w.want("fsck of a store that is mounted", 6, "fsck", s)
	w.want("fsck of a mountpoint", 3, "fsck", w.path("m"))
	cd, err := unix.Open(w.path("m"), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	w.want("umount of a mount in use", 6, "umount", w.path("m"))
	if err := unix.Close(cd); err != nil {
		t.Fatal(err)
	}
	w.h.Run("umount", w.path("m"))
	if rig.Mounted(w.path("m")) {
		t.Error("still mounted")
	}
}

// TestNoFuse runs in a mount namespace whose /dev has no fuse, and in one where
// it is something else.
func TestNoFuse(t *testing.T) {
	t.Parallel()
	rig.Need(t, "unshare")
	w := newBadWorld(t)
	for what, prepare := range map[string]string{
		"absent":              `true`,
		"a file":              `touch /dev/fuse`,
		"not to be opened":    `mknod /dev/fuse c 10 229; mount -o bind,nodev /dev/fuse /dev/fuse 2>/dev/null; mount -o remount,bind,nodev /dev/fuse`,
		"of another number":   `mknod /dev/fuse c 10 999`,
		"a dangling symlink":  `ln -s nowhere /dev/fuse`,
		"an empty directory ": `mkdir /dev/fuse`,
	} {
		t.Run(what, func(t *testing.T) {
			r := w.h.Exec(nil, "unshare", "-m", "--propagation", "private", "bash", "-c", `
				mkdir "$4"; mount --bind /dev "$4"
				mount -t tmpfs tmpfs /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/urandom c 1 9
				`+prepare+`
				exec "$1" mount "$2" "$3"`, "bash", rig.Binary(t), w.path("S"), w.path("m"), w.path("dev "+what))
			wantFailure(t, r, 8)
			w.noSecrets(t, r)
		})
	}
	w.h.Run("ls", w.path("S")) // needs no FUSE, and the store is as before
	w.h.Run("fsck", w.path("S"))
}

// TestDamagedFileOutput: what is said of a damaged file names the store's entry
// or what the user gave, never what is in the store's encrypted parts.
func TestDamagedFileOutput(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newVictim(t, p, "sub/SECRET-NAME")
		b := s.body("sub/SECRET-NAME")
		b[len(b)-1] ^= 1
		s.setBody("sub/SECRET-NAME", b)
		for _, args := range [][]string{{"fsck", s.dir}, {"fsck", "--json", s.dir}, {"fsck", "--repair", s.dir}} {
			r := s.h.Try(args...)
			wantFailure(t, r, 4)
			if strings.Contains(r.Stdout+r.Stderr, "SECRET") || strings.Contains(r.Stdout+r.Stderr, "sub/") {
				t.Errorf("%s tells names: %s%s", args, r.Stdout, r.Stderr)
			}
		}
		m := s.h.Mount(s.dir)
		if _, errno := readAll(m.Path("sub/SECRET-NAME")); errno != unix.EIO {
			t.Errorf("%s, want EIO", errnoName(errno))
		}
		m.Unmount()
		if log := crashLog(s.h); strings.Contains(log, "SECRET") || !strings.Contains(log, "audit=true") {
			t.Errorf("the log tells names, or has no audit event: %s", log)
		}
		if !bytes.Equal(b, s.body("sub/SECRET-NAME")) {
			t.Error("fsck --repair changed a damaged file")
		}
	})
}
