package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// isolated runs kmsfs doctor --json in a mount namespace of its own, after a
// shell script that may change it; $1 is the store.
func isolated(h *rig.Home, prepare string, args ...string) rig.Result {
	h.T.Helper()
	rig.Need(h.T, "root", "unshare")
	return h.Exec(nil, "unshare", append([]string{"--mount", "bash", "-e", "-c", prepare + "\n" + `exec "$KMSFS_UNDER_TEST" doctor --json "$@"`, "bash"}, args...)...)
}

// TestDoctorMachine: no FUSE, and file systems on which a store is in trouble.
func TestDoctorMachine(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root", "fuse")
	h, store := rig.NewHome(t), filepath.Join(t.TempDir(), "store")
	h.Run("init", store)
	h.Env = append(h.Env, "KMSFS_UNDER_TEST="+rig.Binary(t))
	r := isolated(h, `mount -t tmpfs none /dev`, store)
	wantFinding(t, r, "fuse.device", "/dev/fuse", "error", "does not exist", "modprobe fuse")
	wantOnly(t, r, "fuse.device")
	wantFinding(t, isolated(h, `mount -t tmpfs none /dev; touch /dev/fuse`, store), "fuse.device", "", "error", "not a device")
	wantOnly(t, isolated(h, `:`, store))

	r = isolated(h, `mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"`, store)
	wantFinding(t, r, "store.writable", store, "warning", "read-only", "--read-only")
	wantOnly(t, r, "store.writable")
	aside := t.TempDir()
	on := func(kind, options, then string) rig.Result {
		return isolated(h, fmt.Sprintf(`mount -t tmpfs none %[1]s; cp -a "$1" %[1]s/store; mount -t %[2]s -o %[3]s none "$1"; cp -a %[1]s/store/. "$1"/; %[4]s`,
			aside, kind, options, then), store)
	}
	wantFinding(t, on("tmpfs", "size=4m", ":"), "store.filesystem", store, "warning", "tmpfs")
	r = on("tmpfs", "size=256k", `cat /dev/zero > "$1"/fill 2>/dev/null || true`)
	wantFinding(t, r, "store.space", store, "error", "full", "make room")
	r = on("tmpfs", "size=4m,nr_inodes=40", `for i in $(seq 50); do touch "$1"/f$i 2>/dev/null || true; done`)
	wantFinding(t, r, "store.inodes", store, "error", "no inode left")
	r = on("ramfs", "mode=0700", ":")
	wantFinding(t, r, "store.filesystem", store, "warning", "ramfs")
	if f := findingOf(t, r, "store.xattrs", store); f.Level != "warning" && f.Level != "ok" {
		t.Errorf("extended attributes on ramfs: %+v", f)
	}
}

// TestDoctorRecord: what can be wrong with the operand.
func TestDoctorRecord(t *testing.T) {
	t.Parallel()
	h, store := rig.NewHome(t), filepath.Join(t.TempDir(), "store")
	h.Run("init", store)
	want := func(path string, words ...string) {
		t.Helper()
		r := doctor(h, path)
		wantFinding(t, r, "store.record", "", "error", words...)
		wantOnly(t, r, "store.record")
		if f := findingOf(t, r, "fuse.device", ""); f.Level != "ok" {
			t.Errorf("the machine was not looked at: %+v", f)
		}
	}
	want(t.TempDir(), "not a kmsfs store", "kmsfs init")
	want(filepath.Join(t.TempDir(), "none"), "does not exist")
	want(filepath.Join(h.Dir, ".config/kmsfs/keyring.json"), "not a kmsfs store")
	for _, job := range []string{"rekey", "reclassify"} {
		dir := filepath.Join(store, ".kmsfs", job)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		put(t, filepath.Join(dir, "job"), nil)
		r := doctor(h, store)
		wantFinding(t, r, "store.jobs", store, "warning", job, "not finished")
		wantOnly(t, r, "store.jobs")
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	wantFinding(t, doctor(h, store), "store.jobs", store, "ok")
	put(t, filepath.Join(store, ".kmsfs/rewrap"), []byte("x"))
	wantFinding(t, doctor(h, store), "store.jobs", store, "warning", "rewrap", "goes on")
	put(t, filepath.Join(store, ".kmsfs/rewrap"), nil)
	wantFinding(t, doctor(h, store), "store.jobs", store, "ok")
	record := filepath.Join(store, ".kmsfs/store")
	// A key in a token, for a program without PKCS#11: doctor verifies nothing.
	token := "pkcs11:token=t;object=o"
	other, known := filepath.Join(t.TempDir(), "store"), filepath.Join(h.Dir, ".config/kmsfs/known-stores")
	h.Sh(`cp -a "$1" "$2"; sed -i "s/keyring:general/$4/g" "$2/.kmsfs/store"; cp "$3" "$3.new"; sed -i "s/keyring:general/$4/g; s|$1|$2|" "$3.new"`, store, other, known, token)
	r := doctor(h, "--known-stores", known+".new", other)
	wantFinding(t, r, "store.known", other, "ok")
	wantFinding(t, r, "pkcs11.module", "", "error", "without PKCS#11", "make build-pkcs11")
	wantOnly(t, r, "pkcs11.module")
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	put(t, record, text[:len(text)-2])
	want(store, "second copy", "fsck --repair")
	if err := os.Remove(filepath.Join(store, ".kmsfs.store")); err != nil {
		t.Fatal(err)
	}
	put(t, record, text)
	wantFinding(t, doctor(h, store), "store.record", store, "ok", "no second copy")
	for _, tc := range []struct {
		text  []byte
		words []string
	}{
		{bytes.Replace(text, []byte("kmsfs store 1\n"), []byte("kmsfs store 999\n"), 1), []string{"newer"}},
		{text[:len(text)-2], []string{"backup"}},
		{nil, []string{"not a kmsfs store"}},
	} {
		put(t, record, tc.text)
		want(store, tc.words...)
	}
}

// TestDoctorMounts: a mount that answers, one that does not, and what a killed
// one leaves.
func TestDoctorMounts(t *testing.T) {
	t.Parallel()
	s, key := doctorStore(t)
	m := s.mount()
	for _, path := range []string{s.dir, m.Dir} {
		r := doctor(s.h, path)
		wantOnly(t, r)
		wantFinding(t, r, "store.mounts", m.Dir, "ok", fmt.Sprint("process ", m.PID))
		wantFinding(t, r, "key.state", key, "ok")
	}
	if err := unix.Kill(m.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{s.dir, m.Dir} {
		r := doctor(s.h, "--timeout", "1s", path)
		wantFinding(t, r, "store.mounts", m.Dir, "error", "does not answer", "kmsfs umount")
		wantOnly(t, r, "store.mounts")
	}
	if err := unix.Kill(m.PID, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(m.Path("open"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(bytes.Repeat([]byte("x"), 100_000)); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	wantFinding(t, doctor(s.h, s.dir), "store.writing", "", "ok", "the mount has changed something")
	if err := unix.Kill(m.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = f.Close() // there is nobody to answer
	eventually(t, "the dead mount", func() error { _, err := os.Stat(m.Path("absent")); return err }, unix.ENOTCONN)
	r := doctor(s.h, m.Dir)
	wantFinding(t, r, "store.mounts", m.Dir, "error", "kmsfs umount")
	wantOnly(t, r, "store.mounts")
	m.Unmount()
	r = doctor(s.h, s.dir)
	wantFinding(t, r, "store.writing", "", "info", "the next mount finishes")
	m.Again()
	m.Unmount()
	wantFinding(t, doctor(s.h, s.dir), "store.writing", "", "ok")
}

// TestDoctorOrdinaryUser: what only a user without rights can find.
func TestDoctorOrdinaryUser(t *testing.T) {
	t.Parallel()
	u := newOrdinary(t)
	u.must(`"$KMSFS" init s`)
	store := filepath.Join(u.dir, "s")
	r := u.sh(`"$KMSFS" doctor --json s`)
	wantOnly(t, r)
	wantFinding(t, r, "fuse.helper", "", "ok", "installed")
	r = u.sh(`ulimit -l 0; "$KMSFS" doctor --json s`)
	wantFinding(t, r, "memory.locked", "", "warning", "cannot be locked", "ulimit -l")
	wantOnly(t, r, "memory.locked")
	wantFinding(t, u.sh(`PATH=/bin-that-is-not "$KMSFS" doctor --json s`), "fuse.helper", "", "error", "package fuse3")
	u.runner.Sh(`chown -R root "$1"; chmod 755 "$1" "$1"/.kmsfs; chmod 644 "$1"/.kmsfs/store`, store)
	r = u.sh(`"$KMSFS" doctor --json s`)
	wantFinding(t, r, "store.writable", store, "warning", "may not write", "--read-only")
	wantOnly(t, r, "store.writable")
	u.runner.Sh(`chmod 600 "$1"/.kmsfs/store`, store)
	r = u.sh(`"$KMSFS" doctor --json s`)
	wantFinding(t, r, "store.record", store, "error", "may not read", "owner")
	wantOnly(t, r, "store.record")
}
