package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/cryptfs"
	"github.com/kmsfs/kmsfs/integration/rig"
)

const mib = 1 << 20

// peak returns the most memory that the serving process ever had resident.
func peak(t *testing.T, m *rig.Mount) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.PID))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var kb int64
		if n, _ := fmt.Sscanf(line, "VmHWM: %d kB", &kb); n == 1 {
			return kb << 10
		}
	}
	t.Fatal("no VmHWM")
	return 0
}

func wantPeak(t *testing.T, m *rig.Mount, what string, limit int64) {
	t.Helper()
	got := peak(t, m)
	t.Logf("%s: %d MiB at most, %d MiB now", what, got/mib, m.RSS()/mib)
	if got > limit {
		t.Errorf("%s: the mount took %d MiB, want at most %d", what, got/mib, limit/mib)
	}
}

// memoryStore makes a store on a tmpfs, so that what is measured is not the
// disk.
func memoryStore(t *testing.T, h *rig.Home, size string, initArgs ...string) string {
	t.Helper()
	rig.Need(t, "root", "fuse")
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount of the test's disk: %v", err)
		}
	})
	store := filepath.Join(dir, "S")
	h.Run(append(append([]string{"init"}, initArgs...), store)...)
	return store
}

// ext4Store makes a store on a small ext4 of its own, on a loop device.
func ext4Store(t *testing.T, h *rig.Home, size string, initArgs ...string) string {
	t.Helper()
	rig.Need(t, "root", "fuse", "mkfs.ext4")
	dir := t.TempDir()
	h.Sh(`truncate -s "$2" "$1"/image; mkfs.ext4 -q -b 4096 "$1"/image; mkdir "$1"/disk`, dir, size)
	if r := h.TrySh(`mount -o loop "$1"/image "$1"/disk`, dir); r.Code != 0 {
		t.Log(r.Stderr)
		rig.Need(t, "loop devices")
	}
	t.Cleanup(func() { h.Sh(`umount "$1"/disk`, dir) })
	store := filepath.Join(dir, "disk/S")
	h.Run(append(append([]string{"init"}, initArgs...), store)...)
	return store
}

// TestMemory wants a mount to be small when idle, and not to grow with the size
// of a file.
func TestMemory(t *testing.T) {
	t.Parallel()
	h := rig.NewHome(t)
	m := h.Mount(memoryStore(t, h, "3g"))
	h.Sh(`ls -la "$1"; echo x > "$1"/x; cat "$1"/x`, m.Dir)
	wantPeak(t, m, "idle", 40*mib)
	h.Sh(`dd if=/dev/zero of="$1"/big bs=1M count=2048 status=none`, m.Dir)
	wantPeak(t, m, "writing 2 GiB", 200*mib)
	h.Sh(`dd if="$1"/big of=/dev/null bs=1M status=none
		dd if=/dev/zero of="$1"/big bs=4k count=20000 conv=notrunc status=none
		cp "$1"/big /dev/null & cat "$1"/big > /dev/null & cat "$1"/big > /dev/null & wait
		test "$(stat -c %s "$1"/big)" = 2147483648; rm "$1"/big`, m.Dir)
	wantPeak(t, m, "reading it four times, and rewriting", 200*mib)
	m.Unmount()
}

// TestMemoryManyFiles visits 100,000 files, in a large directory and in many,
// and with INTEGRATION_FULL=1 a million, which take less than 400 MiB. What the
// kernel remembers of them the mount has too, up to a limit.
func TestMemoryManyFiles(t *testing.T) {
	t.Parallel()
	files, disk, limit := 100_000, "1g", int64(200*mib)
	if full() {
		files, disk, limit = 1_000_000, "4g", 400*mib
	}
	h := rig.NewHome(t)
	store := memoryStore(t, h, disk+",nr_inodes=0")
	s := &victimStore{t: t, h: h, dir: store}
	s.makeFiles("large", files/2)
	for i := range 50 {
		s.makeFiles(fmt.Sprintf("dir%d", i), files/100)
	}
	m := h.Mount(store)
	for range 2 {
		n := 0
		err := filepath.WalkDir(m.Dir, func(_ string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			n++
			_, err = d.Info() // lstat(2)
			return err
		})
		if err != nil || n != files {
			t.Errorf("listed %d files, want %d: %v", n, files, err)
		}
		wantPeak(t, m, fmt.Sprintf("visiting %d files", files), limit)
	}
	if got := strings.TrimSpace(h.Sh(`ls -l "$1"/dir7 | grep -c 'file number'`, m.Dir)); got != fmt.Sprint(files/100) {
		t.Errorf("ls -l lists %s files", got)
	}
	var status struct {
		Counters struct {
			KnownNodes int `json:"known_nodes"`
		} `json:"counters"`
	}
	if err := json.Unmarshal([]byte(h.Run("status", "--json", m.Dir)), &status); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d nodes known", status.Counters.KnownNodes)
	m.Unmount()
}

// makeFiles makes a directory of empty files, in this process: through a mount
// it takes long, and that is not what is measured.
func (s *victimStore) makeFiles(dir string, n int) {
	s.t.Helper()
	ctx := context.Background()
	v := s.openFor(false)
	defer func() {
		if err := v.Close(); err != nil {
			s.t.Error(err)
		}
	}()
	d, _, err := v.Mkdir(ctx, v.Root(), dir, 0o755, cryptfs.Caller{})
	if err != nil {
		s.t.Fatal(err)
	}
	defer v.Forget(d, 1)
	for i := range n {
		f, _, err := v.Mknod(ctx, d, fmt.Sprintf("file number %d", i), unix.S_IFREG|0o644, 0, cryptfs.Caller{})
		if err != nil {
			s.t.Fatal(err)
		}
		v.Forget(f, 1)
	}
}

// fill writes to new files until the disk is full and returns how often a write,
// an fsync or a close said so.
func fill(t *testing.T, m *rig.Mount, size int) (full int) {
	t.Helper()
	for i := range 10_000 {
		err := writeSynced(m.Path(fmt.Sprintf("fill%d", i)), bytes.Repeat([]byte{byte(i)}, size))
		if err == nil {
			continue
		}
		if errno := errnoOf(err); errno != unix.ENOSPC {
			t.Fatalf("a full disk: %v, want ENOSPC", err)
		}
		if full++; full == 20 {
			return full
		}
	}
	t.Fatal("the disk does not fill")
	return 0
}

func writeSynced(path string, data []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		_ = f.Close()
		return err
	}
	if err := f.Sync(); err != nil {
		_ = f.Close()
		return err
	}
	return f.Close()
}

// writeWhenFreed writes a file soon after others were removed. The room of a
// removed file is free when the kernel has told the mount to forget it, which
// is a moment after unlink(2) returns.
func writeWhenFreed(t *testing.T, path string, data []byte) {
	t.Helper()
	var err error
	for range 50 {
		if err = writeSynced(path, data); errnoOf(err) != unix.ENOSPC {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		t.Errorf("after making room: %v", err)
	}
}

// TestFullDiskLosesNothing: whoever writes to a full disk is told so, nothing that was there
// is lost, and room that is made can be used.
func TestFullDiskLosesNothing(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		for name, disk := range map[string]func(*testing.T, *rig.Home, string, ...string) string{"tmpfs": memoryStore, "ext4": ext4Store} {
			t.Run(name, func(t *testing.T) {
				h := rig.NewHome(t)
				fullDisk(t, h, disk(t, h, "24m", "--placement", p.String(), "--chunk-size", "4KiB"))
			})
		}
	})
}

// fullDisk fills a store's disk, works on, and makes room again.
func fullDisk(t *testing.T, h *rig.Home, store string) {
	m := h.Mount(store)
	old := map[string][][]byte{} // the contents that each file may have
	for i := range 10 {
		name := fmt.Sprintf("old%d", i)
		data := bytes.Repeat([]byte{byte('a' + i)}, 30_000)
		old[name] = [][]byte{data}
		m.Put(name, data)
	}
	check := func(when string) {
		t.Helper()
		for name, want := range old {
			got, errno := readAll(m.Path(name))
			if errno != 0 || !slices.ContainsFunc(want, func(w []byte) bool { return bytes.Equal(got, w) }) {
				t.Errorf("%s: %s: %d bytes, %s", when, name, len(got), errnoName(errno))
			}
		}
	}
	open, err := os.OpenFile(m.Path("old0"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = open.Close() }()
	fill(t, m, 700_000)
	fill(t, m, 100)
	check("full")

	// In place, at the end, and by rename: it works, or says so, and then the
	// contents are the old ones or the new ones.
	change := func(what, name string, now []byte, do func() error) {
		t.Helper()
		err := do()
		if errno := errnoOf(err); errno != 0 && errno != unix.ENOSPC {
			t.Errorf("%s on a full disk: %v", what, err)
		}
		if err == nil {
			old[name] = nil
		}
		old[name] = append(old[name], now)
		check(what)
	}
	change("overwriting", "old0", append([]byte("in place"), old["old0"][0][8:]...), func() error {
		if _, err := open.WriteAt([]byte("in place"), 0); err != nil {
			return err
		}
		return open.Sync()
	})
	change("saving", "old1", []byte("saved"), func() error {
		if err := writeSynced(m.Path("tmp"), []byte("saved")); err != nil {
			return err
		}
		return os.Rename(m.Path("tmp"), m.Path("old1"))
	})
	change("truncating", "old3", old["old3"][0][:100], func() error { return os.Truncate(m.Path("old3"), 100) })
	if err := open.Close(); err != nil && errnoOf(err) != unix.ENOSPC {
		t.Error(err)
	}
	check("after changes")
	m.Unmount()
	// A file that could not be written out is finished by the next mount.
	for _, p := range fsck(t, h, store, -1).Problems {
		if p.Kind != "unfinished" && p.Kind != "orphan" {
			t.Errorf("fsck after the full disk: %+v", p)
		}
	}
	m.Again()
	check("after a remount")

	h.Sh(`rm "$1"/fill*`, m.Dir)
	now := bytes.Repeat([]byte("there is room again"), 10_000)
	writeWhenFreed(t, m.Path("new"), now)
	if got, errno := readAll(m.Path("new")); errno != 0 || !bytes.Equal(got, now) {
		t.Errorf("after making room: %d bytes, %s", len(got), errnoName(errno))
	}
	check("after making room")
	m.Unmount()
	fsck(t, h, store, 0)
}

// TestFullDiskMount: a store on a full disk mounts, and can be emptied.
func TestFullDiskMount(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		h := rig.NewHome(t)
		store := memoryStore(t, h, "16m", "--placement", p.String())
		m := h.Mount(store)
		m.Put("kept", []byte("kept"))
		m.Put("removed", bytes.Repeat([]byte("x"), 1<<20))
		m.Unmount()
		filler := filepath.Join(filepath.Dir(store), "filler")
		h.TrySh(`dd if=/dev/zero of="$1" bs=4k status=none`, filler)
		m.Again()
		if got, errno := readAll(m.Path("kept")); errno != 0 || string(got) != "kept" {
			t.Errorf("%q, %s", got, errnoName(errno))
		}
		if err := os.Remove(m.Path("removed")); err != nil {
			t.Error(err)
		}
		writeWhenFreed(t, m.Path("new"), []byte("new"))
		m.Unmount()
		fsck(t, h, store, 0)
	})
}

// TestReadOnlyStore mounts a store that lies on a read-only file system.
func TestReadOnlyStore(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newVictim(t, p, "a", "patients/a")
		if err := unix.Mount(s.dir, s.dir, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(s.dir, 0); err != nil {
				t.Errorf("unmount of the store: %v", err)
			}
		})
		if err := unix.Mount("", s.dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		r := s.h.Try("mount", s.dir, t.TempDir())
		wantFailure(t, r, 1)
		if !strings.Contains(r.Stderr, "--read-only") {
			t.Errorf("no hint of --read-only: %s", r.Stderr)
		}
		m := s.h.Mount(s.dir, "--read-only")
		for _, name := range []string{"a", "patients/a"} {
			if got, errno := readAll(m.Path(name)); errno != 0 || !bytes.Equal(got, s.plain[name]) {
				t.Errorf("%s: %s", name, errnoName(errno))
			}
		}
		for what, err := range map[string]error{
			"create": os.WriteFile(m.Path("new"), nil, 0o600), "write": os.WriteFile(m.Path("a"), nil, 0o600), "remove": os.Remove(m.Path("a")),
			"rename": os.Rename(m.Path("a"), m.Path("b")), "mkdir": os.Mkdir(m.Path("d"), 0o700), "chmod": os.Chmod(m.Path("a"), 0o600),
		} {
			if errno := errnoOf(err); errno != unix.EROFS {
				t.Errorf("%s: %s, want EROFS", what, errnoName(errno))
			}
		}
		m.Unmount()
		s.fsck(0)
		if res := s.h.Try("cat", s.dir, "a"); res.Code != 0 || res.Stdout != string(s.plain["a"]) {
			t.Errorf("cat: exit %d: %s", res.Code, res.Stderr)
		}
	})
}
