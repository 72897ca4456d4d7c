package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/rig"
)

// conditionJSON is what kmsfs status and kmsfs health say of a store.
type conditionJSON struct {
	State  string `json:"state"`
	Damage struct {
		Count       uint64
		First, Last *time.Time
		Recent      []struct {
			Ino         uint64
			Class, Kind string
			Count       uint64
		}
	}
	Halt *struct{ Reason string }
}

func conditionOf(t *testing.T, m *rig.Mount) conditionJSON {
	t.Helper()
	var all struct {
		Mounts []struct {
			Status struct{ Condition conditionJSON }
		}
	}
	if err := json.Unmarshal([]byte(m.Home.Run("status", "--json", m.Dir)), &all); err != nil || len(all.Mounts) != 1 {
		t.Fatalf("status: %v", err)
	}
	return all.Mounts[0].Status.Condition
}

// conditionFile finds the store file of a file on the mount by its inode number,
// as docs/operations.md says.
func conditionFile(t *testing.T, m *rig.Mount, name string) (path string, ino uint64) {
	t.Helper()
	inode := func(i fs.FileInfo) uint64 { return i.Sys().(*syscall.Stat_t).Ino }
	st, err := os.Stat(m.Path(name))
	if err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(m.Store, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if i, err := d.Info(); err == nil && inode(i) == inode(st) {
			path = p
		}
		return nil
	})
	if err != nil || path == "" {
		t.Fatalf("no store file of inode %d: %v", inode(st), err)
	}
	return path, inode(st)
}

// TestConditionAfterDamage: one chunk is damaged, its reads fail, the mount says
// so until it ends, and everything else goes on.
func TestConditionAfterDamage(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		rig.Need(t, "root", "fuse")
		const chunk = 4096
		h := rig.NewHome(t)
		store := filepath.Join(t.TempDir(), "S")
		h.Run("init", "--placement", p.String(), "--chunk-size", "4KiB", store)
		m := h.Mount(store)
		data := bytes.Repeat([]byte("0123456789abcdef"), 5*chunk/16)
		m.Put("secret plan", data)
		m.Put("other", data)
		path, ino := conditionFile(t, m, "secret plan")
		m.Unmount()
		base := map[envelope.Placement]int64{envelope.Prefix: 1024, envelope.Xattr: 0, envelope.Sidecar: 16}[p]
		flipByte(t, path, base+1*(chunk+32)+100)
		addr := freeAddress(t)
		m.Again("--metrics", addr)
		if c := conditionOf(t, m); c.State != "sound" || c.Damage.Count != 0 {
			t.Errorf("before it is read: got %+v, want sound", c)
		}
		f, err := os.OpenFile(m.Path("secret plan"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
			t.Fatal(err)
		}
		conditionReads(t, f, data, chunk)
		c := conditionOf(t, m)
		if c.State != "damaged" || c.Damage.Count == 0 || c.Damage.First == nil || c.Damage.Last.Before(*c.Damage.First) || c.Halt != nil {
			t.Errorf("got %+v, want damaged", c)
		}
		if r := c.Damage.Recent; len(r) != 1 || r[0].Ino != ino || r[0].Class != "general" || r[0].Kind != "integrity" || r[0].Count != c.Damage.Count {
			t.Errorf("recent: got %+v, want inode %d", r, ino)
		}
		conditionGoesOn(t, m, f, data, chunk)
		for _, flags := range [][]string{nil, {"--since", "0"}, {"--json"}} {
			r := h.Try(append(append([]string{"health"}, flags...), m.Dir)...)
			if r.Code != 4 || strings.Contains(r.Stdout+r.Stderr, "plan") {
				t.Errorf("health %q: got exit code %d, want 4 and no name: %s%s", flags, r.Code, r.Stdout, r.Stderr)
			}
		}
		if text := h.Run("status", m.Dir); !strings.Contains(text, fmt.Sprintf("inode    %d", ino)) || strings.Contains(text, "plan") {
			t.Errorf("status: got %s, want inode %d and no name", text, ino)
		}
		after := scrape(t, addr)
		if after.sum("kmsfs_store_damaged") != 1 || after.sum("kmsfs_integrity_failure_last_timestamp_seconds") < 1e9 || after.sum("kmsfs_writes_halted") != 0 {
			t.Error("the metrics do not say that the store is damaged")
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		m.Unmount()
		m.Again()
		if c := conditionOf(t, m); c.State != "sound" {
			t.Errorf("a new mount: got %+v, want sound", c)
		}
		h.Run("health", m.Dir)
		m.Unmount()
		fsck(t, h, store, 4)
	})
}

// conditionReads reads all chunks of a file whose second one is damaged.
func conditionReads(t *testing.T, f *os.File, data []byte, chunk int) {
	t.Helper()
	for i := range len(data) / chunk {
		got := make([]byte, chunk)
		_, err := f.ReadAt(got, int64(i*chunk))
		switch {
		case i == 1 && !errors.Is(err, unix.EIO):
			t.Errorf("the damaged chunk: got %v, want EIO", err)
		case i != 1 && (err != nil || !bytes.Equal(got, data[i*chunk:(i+1)*chunk])):
			t.Errorf("chunk %d: got %v, want its contents", i, err)
		}
	}
}

// conditionGoesOn uses the mount beside the damaged chunk.
func conditionGoesOn(t *testing.T, m *rig.Mount, f *os.File, data []byte, chunk int) {
	t.Helper()
	check := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err := f.WriteAt([]byte("new"), int64(3*chunk+5))
	check("write to another chunk", errors.Join(err, f.Sync()))
	_, err = f.WriteAt(data[:10], int64(len(data)))
	check("append", errors.Join(err, f.Sync()))
	if got, err := os.ReadFile(m.Path("other")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("another file: %v", err)
	}
	check("overwrite another file", os.WriteFile(m.Path("other"), data[:100], 0o644))
	check("a new file", os.WriteFile(m.Path("new"), data, 0o644))
	check("rename", os.Rename(m.Path("new"), m.Path("newer")))
	check("rename the damaged file", os.Rename(m.Path("secret plan"), m.Path("plan b")))
	check("mkdir", os.Mkdir(m.Path("dir"), 0o755))
	check("unlink", os.Remove(m.Path("newer")))
	if _, err := os.ReadDir(m.Dir); err != nil {
		t.Errorf("readdir: %v", err)
	}
}

// flipByte changes a bit of a file.
func flipByte(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	_, rerr := f.ReadAt(b[:], at)
	b[0] ^= 1
	_, werr := f.WriteAt(b[:], at)
	if err := errors.Join(rerr, werr, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestConditionAfterOtherDamage: damage to what is not a chunk shows as well.
func TestConditionAfterOtherDamage(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		whole := newVictim(t, p, "sub/a", "b")
		m := whole.h.Mount(whole.dir)
		if err := os.Symlink("where/it/leads", m.Path("link")); err != nil {
			t.Fatal(err)
		}
		m.Unmount()
		for name, e := range readTree(t, whole.dir) {
			if e.mode&unix.S_IFMT == unix.S_IFLNK {
				whole.entries["link"] = name
			}
		}
		for what, c := range map[string]struct {
			damage func(s *victimStore)
			use    func(m *rig.Mount) error
		}{
			"header": {
				damage: func(s *victimStore) {
					h := s.header("sub/a")
					h[len(h)/3] ^= 1
					s.setHeader("sub/a", h)
				},
				use: func(m *rig.Mount) error { _, err := os.ReadFile(m.Path("sub/a")); return err },
			},
			"end": {
				damage: func(s *victimStore) { b := s.body("sub/a"); s.setBody("sub/a", b[:len(b)-7]) },
				use:    func(m *rig.Mount) error { _, err := os.ReadFile(m.Path("sub/a")); return err },
			},
			"symlink": {
				damage: func(s *victimStore) {
					target, err := os.Readlink(s.path("link"))
					if err != nil {
						t.Fatal(err)
					}
					other := byte('A')
					if target[4] == other {
						other = 'B'
					}
					damaged := target[:4] + string(other) + target[5:]
					if err := errors.Join(os.Remove(s.path("link")), os.Symlink(damaged, s.path("link"))); err != nil {
						t.Fatal(err)
					}
				},
				use: func(m *rig.Mount) error { _, err := os.Readlink(m.Path("link")); return err },
			},
		} {
			t.Run(what, func(t *testing.T) {
				s := whole.copy(t)
				c.damage(s)
				m := s.h.Mount(s.dir)
				if c := conditionOf(t, m); c.State != "sound" {
					t.Errorf("before it is used: got %+v, want sound", c)
				}
				if err := c.use(m); !errors.Is(err, unix.EIO) {
					t.Errorf("using it: got %v, want EIO", err)
				}
				if c := conditionOf(t, m); c.State != "damaged" || c.Damage.Count == 0 || len(c.Damage.Recent) != 1 {
					t.Errorf("after it was used: got %+v, want damaged", c)
				}
				if got, err := os.ReadFile(m.Path("b")); err != nil || !bytes.Equal(got, s.plain["b"]) {
					t.Errorf("another file: %v", err)
				}
				if r := s.h.Try("health", m.Dir); r.Code != 4 {
					t.Errorf("health: got exit code %d, want 4: %s", r.Code, r.Stderr)
				}
				m.Unmount()
			})
		}
	})
}
