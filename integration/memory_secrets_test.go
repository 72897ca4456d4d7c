package integration

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// secretStore is a store under an embedded keyring, whose keys the test can
// therefore know. Its classes differ in how long unwrapped keys are kept.
type secretStore struct {
	t       *testing.T
	h       *rig.Home
	dir     string
	keyring string
}

const (
	secretName = "plaintext-name-of-a-file"
	secretText = "PLAINTEXT-CONTENTS "
	// secretCache is the cache time of the class brief.
	secretCache = time.Second
)

func newSecretStore(t *testing.T, dir string) *secretStore {
	t.Helper()
	rig.Need(t, "root", "fuse", "python3")
	s := &secretStore{t: t, h: rig.NewHome(t), dir: dir}
	s.keyring = filepath.Join(s.h.Dir, "keyring.json")
	s.h.Env = append(s.h.Env, "KMSFS_KEYRING="+s.keyring)
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	text := fmt.Sprintf(`version: 1
default: general
classes:
  general: { keys: ["keyring:general"], cache: 5m, chunk_size: 4KiB }
  brief: { keys: ["keyring:brief"], cache: %s, chunk_size: 4KiB }
  none: { keys: ["keyring:none"], cache: 0s, chunk_size: 4KiB }
directories:
  /brief: brief
  /none: none
`, secretCache)
	if err := os.WriteFile(policy, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s.h.Run("init", "--policy", policy, s.dir)
	return s
}

// file returns the path of the only store file with contents in a mount's
// directory, found through its header.
func (s *secretStore) file(m *rig.Mount, name string) (path string, h *envelope.Header) {
	s.t.Helper()
	var info struct{ ID string }
	if err := json.Unmarshal([]byte(s.h.Run("info", "--json", m.Path(name))), &info); err != nil {
		s.t.Fatal(err)
	}
	err := filepath.WalkDir(s.dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(d.Name(), ".kmsfs") || filepath.Base(filepath.Dir(p)) == ".kmsfs" {
			return err
		}
		b, err := os.ReadFile(p)
		if err != nil || len(b) < envelope.DefaultHeader {
			return err
		}
		if got, err := envelope.Parse(b[:envelope.DefaultHeader]); err == nil && got.File.String() == info.ID {
			path, h = p, got
		}
		return nil
	})
	if err != nil || h == nil {
		s.t.Fatalf("no store file has the id %s: %v", info.ID, err)
	}
	return path, h
}

// secrets are the keys of one file by name, derived as docs/format.md says.
func (s *secretStore) secrets(h *envelope.Header) map[string][]byte {
	s.t.Helper()
	k, err := keyring.Open(s.keyring, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	defer k.Close()
	r := h.Recipients[0]
	dek, err := k.Decrypt(context.Background(), r.Wrapped, keywrap.Context{
		Store: h.Store.String(), Class: r.Class, Purpose: keywrap.PurposeData, ID: h.File.String()})
	if err != nil {
		s.t.Fatal(err)
	}
	defer dek.Wipe()
	prk, err := hkdf.Extract(sha256.New, dek.Bytes(), append(bytes.Clone(h.Store[:]), h.File[:]...))
	if err != nil {
		s.t.Fatal(err)
	}
	expand := func(info string) []byte {
		out, err := hkdf.Expand(sha256.New, prk, info, 32)
		if err != nil {
			s.t.Fatal(err)
		}
		return out
	}
	out := map[string][]byte{"data key": bytes.Clone(dek.Bytes()), "PRK": prk, "header key": expand("kmsfs v1 header")}
	for i, last := range []string{"\x00", "\x00", "\x01"} {
		info := string(binary.BigEndian.AppendUint64([]byte("kmsfs v1 chunk"), uint64(i))) + last
		out[fmt.Sprintf("chunk key %d", i)] = expand(info)
	}
	return out
}

// inMemory returns which of the secrets lie in a process's memory, with the
// number of places, and how much was searched.
func inMemory(t *testing.T, pid int, secrets map[string][]byte) (found map[string]int, searched int64) {
	t.Helper()
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	found = map[string]int{}
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var from, to int64
		var mode string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &mode); err != nil || !strings.HasPrefix(mode, "rw") {
			continue
		}
		const step, overlap = 1 << 20, 64
		buf := make([]byte, step+overlap)
		for at := from; at < to; at += step {
			n, _ := mem.ReadAt(buf[:min(int64(len(buf)), to-at)], at) // holes of a mapping are not readable
			searched += int64(min(n, step))
			for name, secret := range secrets {
				for i := 0; ; i++ {
					j := bytes.Index(buf[i:n], secret)
					if i += j; j < 0 || i >= step {
						break
					}
					found[name]++
				}
			}
		}
	}
	return found, searched
}

// wantAbsent wants none of a file's lasting keys in memory, soon: keys are wiped
// when the kernel has told of the close, and when the cache time is over. Chunk
// keys are wiped where kmsfs holds them; copies in the key schedules of the AES
// implementation stay until the garbage collector reuses their place, and the
// test tells how many.
func wantAbsent(t *testing.T, pid int, secrets map[string][]byte) {
	t.Helper()
	lasting := []string{"data key", "PRK", "header key"}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		found, searched := inMemory(t, pid, secrets)
		left := 0
		for _, name := range lasting {
			left += found[name]
		}
		if left == 0 && searched > 1<<20 {
			t.Logf("searched %d KiB; left in memory: %v", searched>>10, found)
			return
		}
		if time.Now().After(end) {
			t.Fatalf("searched %d KiB; still in memory: %v", searched>>10, found)
		}
	}
}

// TestSecretsInMemory: while a file is open its key is in memory, in locked
// memory and nowhere else; after close and the class's cache time it is not.
func TestSecretsInMemory(t *testing.T) {
	s := newSecretStore(t, filepath.Join(t.TempDir(), "store"))
	m := s.h.Mount(s.dir)
	for _, class := range []string{"brief", "none"} {
		if err := os.Mkdir(m.Path(class), 0o755); err != nil {
			t.Fatal(err)
		}
		m.Put(class+"/f", bytes.Repeat([]byte(secretText), 10_000/len(secretText)))
	}
	for _, class := range []string{"brief", "none"} {
		t.Run("written, "+class, func(t *testing.T) {
			_, h := s.file(m, class+"/f")
			wantAbsent(t, m.PID, s.secrets(h))
		})
	}
	m.Unmount()
	m.Again()
	for _, class := range []string{"brief", "none"} {
		t.Run("read, "+class, func(t *testing.T) {
			_, h := s.file(m, class+"/f")
			secrets := s.secrets(h)
			if found, _ := inMemory(t, m.PID, secrets); len(found) != 0 {
				t.Errorf("before the first open: %v", found)
			}
			f, err := os.Open(m.Path(class + "/f"))
			if err != nil {
				t.Fatal(err)
			}
			if b := make([]byte, 9000); !readFull(f, b) || !bytes.HasPrefix(b, []byte(secretText)) {
				t.Error("the file does not read back")
			}
			found, searched := inMemory(t, m.PID, secrets)
			t.Logf("open: searched %d KiB, found %v", searched>>10, found)
			if found["PRK"] == 0 {
				t.Error("the search does not find the key of an open file: it proves nothing")
			}
			if locked := lockedMemory(t, m.PID); locked == 0 {
				t.Error("no memory is locked")
			}
			if found["data key"] != 0 {
				t.Errorf("the data key itself is kept %d times; only what is derived from it is needed", found["data key"])
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			wantAbsent(t, m.PID, secrets)
		})
	}
	t.Run("no core, no debugger", func(t *testing.T) { checkHidden(t, m.PID) })
	m.Unmount()
}

func readFull(f *os.File, b []byte) bool {
	n, err := f.ReadAt(b, 0)
	return err == nil && n == len(b)
}

// lockedMemory returns VmLck, in KiB.
func lockedMemory(t *testing.T, pid int) (kib int) {
	t.Helper()
	for line := range strings.Lines(procFile(t, pid, "status")) {
		_, _ = fmt.Sscanf(line, "VmLck: %d kB", &kib)
	}
	return kib
}

func procFile(t *testing.T, pid int, name string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// checkHidden wants the pages with keys locked and out of core dumps, core
// dumps off, and the process not dumpable, which also keeps its own user's
// debuggers out.
func checkHidden(t *testing.T, pid int) {
	var region []string
	pages := 0
	for line := range strings.Lines(procFile(t, pid, "smaps")) {
		if f := strings.Fields(line); len(f) > 1 && strings.Contains(f[0], "-") && !strings.HasSuffix(f[0], ":") {
			region = f
		} else if f[0] == "VmFlags:" && slices.Contains(f, "lo") {
			pages++
			if !slices.Contains(f, "dd") {
				t.Errorf("locked region %v may be dumped: %v", region, f)
			}
		}
	}
	if pages == 0 {
		t.Error("no locked region")
	}
	for line := range strings.Lines(procFile(t, pid, "limits")) {
		if strings.HasPrefix(line, "Max core file size") && !slices.Equal(strings.Fields(line)[4:6], []string{"0", "0"}) {
			t.Errorf("core dumps are possible: %s", line)
		}
	}
	// The kernel gives the files of a process that is not dumpable to root.
	// (Under root's own processes the owner is root anyway: proc(5).)
	script := `import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
pid, uid = int(sys.argv[1]), 65534
os.setgroups([]); os.setgid(uid); os.setuid(uid)
sys.exit(0 if libc.ptrace(16, pid, None, None) == 0 else 7)`
	h := rig.NewHome(t)
	if r := h.Exec(nil, "python3", "-c", script, fmt.Sprint(pid)); r.Code != 7 {
		t.Errorf("another user attaches: exit %d %s", r.Code, r.Stderr)
	}
}

// TestSecretsInMemoryOfOwnUser: a debugger of the user who mounted does not get
// at the keys.
func TestSecretsInMemoryOfOwnUser(t *testing.T) {
	rig.Need(t, "root", "fuse", "python3")
	dir := t.TempDir()
	for d := dir; d != "/tmp" && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "kmsfs")
	b, err := os.ReadFile(rig.Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bin, b, 0o755); err != nil {
		t.Fatal(err)
	}
	// A foreground command that waits for its standard input is enough: every
	// kmsfs process hides its memory before anything else.
	script := `import ctypes, os, subprocess, sys, time
os.setgroups([]); os.setgid(65534); os.setuid(65534)
libc = ctypes.CDLL(None, use_errno=True)
def attach(argv):
    p = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={"HOME": sys.argv[2], "PATH": "/usr/bin:/bin"})
    time.sleep(1)
    try:
        open("/proc/%d/mem" % p.pid, "rb").close()
        ok = True
    except PermissionError:
        ok = False
    p.kill()
    return ok
print("cat", attach(["cat"]))
print("kmsfs", attach([sys.argv[1], "keyring", "create", "--passphrase-fd", "0", "--passphrase", "x"]))`
	r := rig.NewHome(t).Exec(nil, "python3", "-c", script, bin, dir)
	if r.Code != 0 || !strings.Contains(r.Stdout, "cat True") {
		t.Fatalf("the attempt works on no process: %s%s", r.Stdout, r.Stderr)
	}
	if !strings.Contains(r.Stdout, "kmsfs False") {
		t.Errorf("a process of the same user opens the memory of kmsfs: %s", r.Stdout)
	}
}

// TestSecretsInLog: under damage, denial and a full disk, neither the log nor
// the output of commands holds a key, plaintext, or a plaintext name.
func TestSecretsInLog(t *testing.T) {
	rig.Need(t, "root", "fuse")
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.Mkdir(disk, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
	s := newSecretStore(t, filepath.Join(disk, "store"))
	logFile := filepath.Join(t.TempDir(), "log")
	m := s.h.Mount(s.dir, "--log-file", logFile, "--log-level", "debug")
	var output strings.Builder
	if err := os.Mkdir(m.Path("none"), 0o755); err != nil {
		t.Fatal(err)
	}
	contents := bytes.Repeat([]byte(secretText), 20_000/len(secretText))
	secrets := map[string][]byte{"plaintext": []byte(secretText), "plaintext name": []byte(secretName)}
	for _, name := range []string{"none/" + secretName + "-damaged", "none/" + secretName + "-denied"} {
		m.Put(name, contents)
		_, h := s.file(m, name)
		for what, secret := range s.secrets(h) {
			secrets[name+": "+what] = secret
		}
	}
	mustFail := func(what string, want unix.Errno, err error) {
		t.Helper()
		if errno := errnoOf(err); errno != want {
			t.Errorf("%s: %s, want %s", what, errnoName(errno), errnoName(want))
		}
	}

	err := os.WriteFile(m.Path("none/"+secretName+"-full"), bytes.Repeat([]byte(secretText), 4<<20/len(secretText)), 0o600)
	mustFail("a full disk", unix.ENOSPC, err)
	if err := os.Remove(m.Path("none/" + secretName + "-full")); err != nil {
		t.Fatal(err)
	}

	path, _ := s.file(m, "none/"+secretName+"-damaged")
	m.Unmount()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	m.Again("--log-file", logFile, "--log-level", "debug")
	_, err = os.ReadFile(m.Path("none/" + secretName + "-damaged"))
	mustFail("damage", unix.EIO, err)
	s.h.Run("keyring", "disable", "none")
	_, err = os.ReadFile(m.Path("none/" + secretName + "-denied"))
	mustFail("a disabled key", unix.ENOKEY, err)
	m.Unmount()
	for _, args := range [][]string{{"--log-level", "debug", "fsck", s.dir}, {"--log-level", "debug", "cat", s.dir, "none/no-such-file"}} {
		r := s.h.Try(args...)
		if r.Code == 0 {
			t.Errorf("%v succeeds", args)
		}
		output.WriteString(r.Stdout + r.Stderr)
	}

	log, err := os.ReadFile(logFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, errno := range []string{"EIO", "ENOKEY"} { // ENOSPC is the disk's own, and not logged
		if !bytes.Contains(log, []byte("errno="+errno)) {
			t.Errorf("the log tells of no %s:\n%s", errno, log)
		}
	}
	everything := append(log, output.String()...)
	for what, secret := range secrets {
		for form, text := range map[string]string{
			"in clear": string(secret), "in hexadecimal": hex.EncodeToString(secret), "in HEX": strings.ToUpper(hex.EncodeToString(secret)),
			"in base64": base64.RawStdEncoding.EncodeToString(secret), "as numbers": strings.Trim(fmt.Sprint(secret), "[]"), "quoted": fmt.Sprintf("%q", secret),
		} {
			if bytes.Contains(everything, []byte(text)) {
				t.Errorf("log or output hold %s %s", what, form)
			}
		}
	}
}
