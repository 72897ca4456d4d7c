package integration

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// jobSeed is the seed of the moments at which jobs are killed; JOB_SEED sets
// another.
func jobSeed(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("JOB_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	t.Logf("JOB_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// killAgain starts a command and kills it after a random time, until it has been
// killed rounds times or ended. It reports how often it was killed.
func killAgain(t *testing.T, h *rig.Home, rnd *rand.Rand, rounds, maxMS int, after func(), args ...string) (killed int) {
	t.Helper()
	for range rounds {
		cmd := exec.Command(rig.Binary(t), args...)
		cmd.Env = append(os.Environ(), h.Env...)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		select {
		case err := <-ended:
			if err != nil {
				t.Fatalf("kmsfs %s: %v\n%s", strings.Join(args, " "), err, out.String())
			}
			return killed
		case <-time.After(time.Duration(10+rnd.IntN(maxMS)) * time.Millisecond):
			_ = cmd.Process.Kill()
			<-ended
			killed++
			after()
		}
	}
	return killed
}

// storeFiles returns the hashes of the store files of the tree by path; .kmsfs
// is left out.
func storeFiles(t *testing.T, store string) map[string][32]byte {
	t.Helper()
	out := map[string][32]byte{}
	err := filepath.WalkDir(store, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() && path == filepath.Join(store, ".kmsfs") {
			if err == nil {
				err = filepath.SkipDir
			}
			return err
		}
		name := d.Name()
		if !d.Type().IsRegular() || strings.HasPrefix(name, ".kmsfs") && !strings.HasPrefix(name, ".kmsfs.l.") {
			return nil
		}
		b, err := os.ReadFile(path)
		if len(b) > 0 {
			out[path] = sha256.Sum256(b)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// idsBelow returns the file ids on a mount, by path; empty files have none.
func idsBelow(t *testing.T, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		buf := make([]byte, 64)
		n, err := unix.Lgetxattr(path, "user.kmsfs.id", buf)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if n > 0 {
			rel, _ := filepath.Rel(root, path)
			out[rel] = string(buf[:n])
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// namePolicy is a policy of one class under the embedded keyring.
func namePolicy(t *testing.T, names string, more string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "policy.yaml")
	text := fmt.Sprintf("version: 1\ndefault: general\nclasses:\n  general: { keys: [\"keyring:general\"], names: %s, chunk_size: 4KiB }\n%s", names, more)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func eachPlacementAndNames(t *testing.T, f func(t *testing.T, p envelope.Placement, names string)) {
	for _, p := range []envelope.Placement{envelope.Prefix, envelope.Xattr, envelope.Sidecar} {
		for _, names := range []string{"encrypted", "plain"} {
			t.Run(p.String()+"/"+names, func(t *testing.T) { f(t, p, names) })
		}
	}
}

// manyFiles adds small files, so that a job takes a while.
func manyFiles(t *testing.T, dir string, n int) {
	t.Helper()
	for i := range n {
		d := fmt.Sprintf("%s/many/%d", dir, i%7)
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		put(t, fmt.Sprintf("%s/f%d", d, i), noise(100+i*37, uint64(i)))
		if i%10 == 0 {
			if err := os.Link(fmt.Sprintf("%s/f%d", d, i), fmt.Sprintf("%s/many/link%d", dir, i)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestRekeyKilled kills a rekey of everything that is hard to keep at random
// moments, again and again, and mounts in between. Nothing changes but the keys,
// and at last all of these. S-48 S-49
func TestRekeyKilled(t *testing.T) {
	rig.Need(t, "root", "fuse", "setfattr", "setfacl")
	eachPlacementAndNames(t, func(t *testing.T, p envelope.Placement, names string) {
		rnd := jobSeed(t)
		h := rig.NewHome(t)
		store := filepath.Join(t.TempDir(), "S")
		h.Run("init", "--policy", namePolicy(t, names, ""), "--placement", p.String(), store)
		m := h.Mount(store)
		tree := m.Path("tree")
		if err := os.Mkdir(tree, 0o755); err != nil {
			t.Fatal(err)
		}
		manyFiles(t, tree, 150)
		hardTree(t, h, tree)
		want, before := readTree(t, tree), idsBelow(t, tree)
		if res := h.Try("rekey", store); res.Code != 6 || !strings.Contains(res.Stderr, "unmount") {
			t.Errorf("a mounted store: exit %d, want 6 and what to do: %s", res.Code, res.Stderr)
		}
		m.Unmount()
		old := storeFiles(t, store)
		round := 0
		killed := killAgain(t, h, rnd, 20, 120, func() {
			if round++; round%4 == 0 {
				m.Again()
				mustEqual(t, fmt.Sprintf("after kill %d", round), readTree(t, tree), want)
				m.Unmount()
			}
		}, "rekey", store)
		var rep struct {
			Rekeyed, Done uint64
			Failures      []any
		}
		out := h.Run("rekey", "--json", store)
		if err := json.Unmarshal([]byte(out), &rep); err != nil || len(rep.Failures) > 0 {
			t.Fatalf("%v: %s", err, out)
		}
		t.Logf("killed %d times; the last run: %+v", killed, rep)
		if killed == 0 {
			t.Error("the job was never killed")
		}
		if rep.Rekeyed+rep.Done == 0 {
			t.Error("the last run found nothing to do")
		}
		m.Again()
		mustEqual(t, "after the rekey", readTree(t, tree), want)
		after := idsBelow(t, tree)
		for path, id := range before {
			if after[path] == id || after[path] == "" {
				t.Errorf("%.60q has file id %q, had %q", path, after[path], id)
			}
		}
		if len(after) != len(before) || len(before) < 150 {
			t.Errorf("%d files with keys, want %d", len(after), len(before))
		}
		mustBeSparse(t, tree+"/links/sparse")
		m.Unmount()
		oldBlocks := map[[32]byte]bool{}
		for _, b := range old {
			oldBlocks[b] = true
		}
		now := storeFiles(t, store)
		for path, b := range now {
			if oldBlocks[b] {
				t.Errorf("%s has its old ciphertext", path)
			}
		}
		if len(now) != len(old) {
			t.Errorf("%d store files, want %d", len(now), len(old))
		}
		fsck(t, h, store, 0)
		if left, _ := filepath.Glob(store + "/.kmsfs/re[ck]*"); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
}

// TestRekeyFullDisk: a full disk ends a rekey with a code of its own; nothing is
// lost, and with room it goes on. S-49
func TestRekeyFullDisk(t *testing.T) {
	h := rig.NewHome(t)
	store := memoryStore(t, h, "24m", "--chunk-size", "4KiB")
	m := h.Mount(store)
	for i := range 10 {
		m.Put(fmt.Sprintf("small%d", i), noise(10_000, uint64(i)))
	}
	m.Put("big", noise(10<<20, 99))
	m.Unmount() // on so small a disk files are written through, and the kernel has their old times
	m.Again()
	want := readTree(t, m.Dir)
	m.Unmount()
	fill := filepath.Join(filepath.Dir(store), "fill")
	h.Sh(`head -c 8M /dev/zero >"$1"`, fill)
	for range 2 {
		res := h.Try("rekey", store)
		if res.Code != 9 || !strings.Contains(res.Stderr, "make room") {
			t.Fatalf("exit %d, want 9 and what to do: %s", res.Code, res.Stderr)
		}
		m.Again()
		mustEqual(t, "on a full disk", readTree(t, m.Dir), want)
		m.Unmount()
	}
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	h.Run("rekey", store)
	m.Again()
	mustEqual(t, "with room", readTree(t, m.Dir), want)
	m.Unmount()
	fsck(t, h, store, 0)
}

// TestRekeyCommand: options, and the answers to wrong ones.
func TestRekeyCommand(t *testing.T) {
	rig.Need(t, "root", "fuse")
	h := rig.NewHome(t)
	store := filepath.Join(t.TempDir(), "S")
	h.Run("init", store)
	m := h.Mount(store)
	h.Sh(`cd "$1"; mkdir d; for i in $(seq 20); do echo $i >f$i; echo $i >d/f$i; done`, m.Dir)
	m.Unmount()
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"rekey", "--class", "none", store}, 2, "no such class"},
		{[]string{"rekey", "--older-than", "yesterday", store}, 2, "neither a time nor an age"},
		{[]string{"rekey", "--rate", "-1", store}, 2, "--rate"},
		{[]string{"rekey", store, "/nowhere"}, 1, "no such file"},
		{[]string{"rekey", "--older-than", "1d", store}, 0, "0 files rekeyed"},
		{[]string{"rekey", "--older-than", "0s", store}, 0, "40 files rekeyed"},
		{[]string{"rekey", store, "d", "/f1"}, 0, "21 files rekeyed"},
		{[]string{"rekey", "--class", "general", "--rate", "1000", store}, 0, "40 files rekeyed"},
	} {
		if res := h.Try(tt.args...); res.Code != tt.code || !strings.Contains(res.Stdout+res.Stderr, tt.want) {
			t.Errorf("%q: exit %d, want %d and %q\n%s%s", tt.args[:len(tt.args)-1], res.Code, tt.code, tt.want, res.Stdout, res.Stderr)
		}
	}
	cmd := exec.Command(rig.Binary(t), "rekey", "--rate", "10", store)
	cmd.Env = append(os.Environ(), h.Env...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	job := filepath.Join(store, ".kmsfs/rekey/job")
	for range 500 {
		if _, err := os.Stat(job); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	time.Sleep(300 * time.Millisecond)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if res := h.Try("rekey", "--class", "general", store); res.Code != 6 || !strings.Contains(res.Stderr, "--restart") {
		t.Errorf("other options: exit %d: %s", res.Code, res.Stderr)
	}
	if out := h.Run("fsck", store); !strings.Contains(out, "goes on with it") {
		t.Errorf("fsck tells nothing of the job: %s", out)
	}
	if out := h.Run("rekey", "--class", "general", "--restart", store); !strings.Contains(out, "40 files rekeyed") {
		t.Errorf("--restart: %s", out)
	}
	if slices.Contains(strings.Fields(h.Run("fsck", store)), "pending:") {
		t.Error("the job is still there")
	}
}
