package integration

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// classOf returns what a mount says of a file's class.
func classOf(t *testing.T, path string) string {
	t.Helper()
	buf := make([]byte, 64)
	n, err := unix.Lgetxattr(path, "user.kmsfs.class", buf)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return string(buf[:n])
}

// TestReclassifyKilled kills a reclassification at random moments, again and
// again, and mounts in between: the tree reads as it was, under the old class or
// the new one, and at last the new one. S-50 S-51
func TestReclassifyKilled(t *testing.T) {
	rig.Need(t, "root", "fuse", "setfattr", "setfacl")
	eachPlacementAndNames(t, func(t *testing.T, p envelope.Placement, names string) {
		rnd := jobSeed(t)
		h := rig.NewHome(t)
		store := filepath.Join(t.TempDir(), "S")
		h.Run("init", "--placement", p.String(), "--policy",
			namePolicy(t, names, "  phi: { keys: [\"keyring:phi\"], chunk_size: 16KiB }\n"), store)
		m := h.Mount(store)
		tree := m.Path("tree")
		if err := os.Mkdir(tree, 0o755); err != nil {
			t.Fatal(err)
		}
		manyFiles(t, tree, 120)
		hardTree(t, h, tree)
		h.Sh(`setfattr -n user.top -v yes "$1"; setfacl -d -m u:1234:rx "$1"; touch -d 2001-02-03 "$1" "$2"`, tree, m.Dir)
		want, before := readTree(t, tree), idsBelow(t, tree)
		m.Unmount()
		round := 0
		killed := killAgain(t, h, rnd, 20, 120, func() {
			if round++; round%4 != 0 {
				return
			}
			m.Again()
			mustEqual(t, fmt.Sprintf("after kill %d", round), readTree(t, tree), want)
			if classOf(t, tree) == "general" {
				// A kill before the rule leaves the directory as any other.
				err := os.WriteFile(tree+"/new", nil, 0o600)
				if err == nil {
					err = os.Remove(tree + "/new")
				}
				if err != nil && errnoOf(err) != unix.EPERM {
					t.Errorf("a new file: %v, want EPERM", err)
				}
				h.Sh(`touch -d 2001-02-03 "$1"`, tree)
			}
			m.Unmount()
		}, "reclassify", store, "/tree", "phi")
		t.Logf("killed %d times; %s", killed, h.Run("reclassify", store, "tree", "phi"))
		if out := h.Run("reclassify", store, "/tree", "phi"); !strings.Contains(out, "already") {
			t.Errorf("once more: %s", out)
		}
		m.Again()
		if killed == 0 {
			t.Error("the job was never killed")
		}
		mustEqual(t, "after", readTree(t, tree), want)
		after := idsBelow(t, tree)
		for path, id := range before {
			if after[path] == id || after[path] == "" {
				t.Errorf("%.60q has file id %q, had %q", path, after[path], id)
			}
			if got := classOf(t, filepath.Join(tree, path)); got != "phi" {
				t.Errorf("%.60q has class %s", path, got)
			}
		}
		mustBeSparse(t, tree+"/links/sparse")
		if got := strings.TrimSpace(h.Sh(`date -r "$1" +%F`, m.Dir)); got != "2001-02-03" {
			t.Errorf("the directory above was changed on %s", got)
		}
		m.Put("outside", []byte("x"))
		if errno := errnoOf(os.Rename(m.Path("outside"), tree+"/inside")); errno != unix.EXDEV {
			t.Errorf("rename into the tree: %s, want EXDEV", errnoName(errno))
		}
		if errno := errnoOf(os.Rename(tree, m.Path("elsewhere"))); errno != unix.EBUSY {
			t.Errorf("rename of the directory: %s, want EBUSY", errnoName(errno))
		}
		put(t, tree+"/new", []byte("of the new class"))
		m.Unmount()
		fsck(t, h, store, 0)
		if left, _ := filepath.Glob(store + "/.kmsfs/re[ck]*"); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
}

// TestReclassifyKMS: after the reclassification whoever may not use the new
// class's key reads none of the files, and could before. S-51
func TestReclassifyKMS(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newKMSStore(t, p, []string{"general", "phi"}, map[string]kmsClass{"general": {}, "phi": {cache: "0s"}})
		m := s.mount("records/2026")
		for i := range 20 {
			put(t, m.Path("records/2026", fmt.Sprint("r", i)), noise(5000, uint64(i)))
		}
		put(t, m.Path("records/index"), []byte("index"))
		want := readTree(t, m.Path("records"))
		m.Unmount()
		h := s.as(clerk(t, allow(s.arn["general"], nil, "kms:*")))
		read := func() map[string]string {
			m := h.Mount(s.dir)
			defer m.Unmount()
			out := map[string]string{}
			_ = filepath.WalkDir(m.Path("records"), func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.Type().IsRegular() {
					_, errno := readAll(path)
					err = nil
					if errno != 0 {
						err = errno
					}
				}
				out[filepath.Base(path)] = errnoName(errnoOf(err))
				return nil
			})
			return out
		}
		if got := read(); len(got) != 23 || got["r1"] != errnoName(0) {
			t.Fatalf("before: %v", got)
		}
		if res := h.Try("reclassify", s.dir, "/records", "phi"); res.Code != 5 {
			t.Errorf("by somebody without the key: exit %d: %s%s", res.Code, res.Stdout, res.Stderr)
		}
		if got := read(); got["r1"] != errnoName(0) {
			t.Errorf("after it was refused: %v", got)
		}
		s.h.Run("reclassify", s.dir, "/records", "phi")
		for name, errno := range read() {
			if errno != errnoName(unix.EACCES) {
				t.Errorf("%s: %s, want EACCES", name, errno)
			}
		}
		m = s.h.Mount(s.dir)
		mustEqual(t, "for the doctor", readTree(t, m.Path("records")), want)
		for i := range 20 {
			if keys := s.info(m.Path("records/2026", fmt.Sprint("r", i))).Keys; len(keys) != 1 || keys[0] != s.arn["phi"] {
				t.Errorf("r%d is wrapped for %q", i, keys)
			}
		}
		m.Unmount()
		s.fsck(0)
	})
}

// TestReclassifyFullDisk: without room nothing is begun; where the room goes while
// it runs nothing is lost, and with room it goes on. S-50
func TestReclassifyFullDisk(t *testing.T) {
	h := rig.NewHome(t)
	policy := namePolicy(t, "encrypted", "  phi: { keys: [\"keyring:phi\"] }\n")
	store := ext4Store(t, h, "64m", "--policy", policy)
	m := h.Mount(store)
	for i := range 16 {
		put(t, filepath.Join(mkdir(t, m.Path("d")), fmt.Sprint(i)), noise(1<<20, uint64(i)))
	}
	want := readTree(t, m.Path("d"))
	m.Unmount()
	fill := filepath.Join(filepath.Dir(store), "fill")
	room := func(mib int64) {
		t.Helper()
		_ = os.Remove(fill)
		var st unix.Statfs_t
		if err := unix.Statfs(store, &st); err != nil {
			t.Fatal(err)
		}
		h.Sh(`fallocate -l "$2" "$1"`, fill, fmt.Sprint(int64(st.Bavail)*st.Bsize-mib<<20))
	}
	check := func(what string) {
		t.Helper()
		m.Again()
		mustEqual(t, what, readTree(t, m.Path("d")), want)
		m.Unmount()
	}
	room(8)
	res := h.Try("reclassify", store, "/d", "phi")
	if res.Code != 9 || !strings.Contains(res.Stderr, "are free") {
		t.Errorf("without room: exit %d: %s", res.Code, res.Stderr)
	}
	m.Again()
	put(t, m.Path("d/still-writable"), nil)
	if err := os.Remove(m.Path("d/still-writable")); err != nil {
		t.Error(err)
	}
	m.Unmount()
	m.Again()
	h.Sh(`touch -d 2001-02-03 "$1"`, m.Path("d"))
	want = readTree(t, m.Path("d"))
	m.Unmount()
	// The room goes after the check.
	room(24)
	killAgain(t, h, jobSeed(t), 1, 1, func() {}, "reclassify", "--rate", "8", store, "/d", "phi")
	room(4)
	if res := h.Try("reclassify", store, "/d", "phi"); res.Code != 9 {
		t.Errorf("in the middle: exit %d: %s", res.Code, res.Stderr)
	}
	check("on a full disk")
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	h.Run("reclassify", store, "/d", "phi")
	check("with room")
	fsck(t, h, store, 0)
}

func mkdir(t *testing.T, path string) string {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestReclassifyCommand: the answers to what cannot be done, and what a changed
// policy leaves. S-25 S-51
func TestReclassifyCommand(t *testing.T) {
	rig.Need(t, "root", "fuse")
	h := rig.NewHome(t)
	store := filepath.Join(t.TempDir(), "S")
	more := "  phi: { keys: [\"keyring:phi\"] }\n"
	h.Run("init", "--policy", namePolicy(t, "encrypted", more), store)
	m := h.Mount(store)
	h.Sh(`cd "$1"; mkdir d; echo secret >d/f; ln d/f outside`, m.Dir)
	if res := h.Try("reclassify", store, "/d", "phi"); res.Code != 6 || !strings.Contains(res.Stderr, "unmount") {
		t.Errorf("a mounted store: exit %d: %s", res.Code, res.Stderr)
	}
	m.Unmount()
	for _, tt := range []struct {
		dir, class string
		code       int
		want       string
	}{
		{"/", "phi", 1, "default class"},
		{"/d", "none", 2, "no such class"},
		{"/d/f", "phi", 1, "not a directory"},
		{"/nowhere", "phi", 1, "no such file"},
		{"/d", "general", 0, "already"},
	} {
		res := h.Try("reclassify", store, tt.dir, tt.class)
		if res.Code != tt.code || !strings.Contains(res.Stdout+res.Stderr, tt.want) {
			t.Errorf("%s %s: exit %d, want %d and %q\n%s%s", tt.dir, tt.class, res.Code, tt.code, tt.want, res.Stdout, res.Stderr)
		}
	}
	h.Run("policy", "apply", store, namePolicy(t, "encrypted", more+"directories:\n  /d: phi\n"))
	m.Again()
	if errno := errnoOf(os.WriteFile(m.Path("d/new"), nil, 0o600)); errno != unix.EPERM {
		t.Errorf("after policy apply: %s, want EPERM", errnoName(errno))
	}
	m.Unmount()
	if out := h.Run("reclassify", store, "/d", "phi"); !strings.Contains(out, "/d/f: had further names") || !strings.Contains(out, "class phi now") {
		t.Errorf("reclassify: %s", out)
	}
	m.Again()
	put(t, m.Path("d/new"), []byte("x"))
	if got := classOf(t, m.Path("d/new")) + classOf(t, m.Path("d/f")) + classOf(t, m.Path("outside")); got != "phiphigeneral" {
		t.Errorf("classes %s", got)
	}
	m.Unmount()
	fsck(t, h, store, 0)
}

// TestJobsOfAnOrdinaryUser: both jobs without root, also in directories whose
// modes keep their owner out. S-48 S-51
func TestJobsOfAnOrdinaryUser(t *testing.T) {
	for _, p := range []string{"header", "sidecar"} {
		t.Run(p, func(t *testing.T) {
			u := newOrdinary(t)
			u.must(`printf 'version: 1\ndefault: general\nclasses:\n  general: { keys: ["keyring:general"] }\n  phi: { keys: ["keyring:phi"], names: plain }\n' >policy
				"$KMSFS" init --policy policy --placement "$1" store; mkdir m; "$KMSFS" mount store m
				mkdir -p m/d/e m/d/closed m/d/ro; for i in $(seq 20); do echo $i >m/d/f$i; ln m/d/f$i m/d/e/l$i; done
				echo x >m/d/closed/x; ln m/d/closed/x m/d/ro/y; echo z >m/d/ro/z; chmod 0 m/d/f1; chmod 400 m/d/f2
				touch -d 2001-01-01 m/d/ro m/d/closed m/d/e m/d; chmod 0 m/d/closed; chmod 500 m/d/ro
				(cd m/d; find . -printf '%p %m %T@ %s %n\n' 2>/dev/null | sort >../../before || true); "$KMSFS" umount m
				"$KMSFS" rekey store >out; grep -q '^22 files rekeyed' out
				"$KMSFS" reclassify store /d phi
				"$KMSFS" mount store m; (cd m/d; find . -printf '%p %m %T@ %s %n\n' 2>/dev/null | sort >../../after || true)
				diff before after; test "$(cat m/d/f2 m/d/e/l3 m/d/ro/y)" = "$(printf '2\n3\nx')"
				test "$(getfattr --only-values -n user.kmsfs.class m/d/ro/z)" = phi
				chmod 700 m/d/closed; test "$(cat m/d/closed/x)" = x; "$KMSFS" umount m; "$KMSFS" fsck store`, p)
		})
	}
}
