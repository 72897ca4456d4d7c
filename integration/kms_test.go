package integration

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/aws/aws-sdk-go-v2/service/kms"
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/integration/kmsd/kmsserver"
)

// TestKMSOneCallPerFile: in a class without a cache every open is a call for
// that very file, and nothing else is a call.
func TestKMSOneCallPerFile(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newKMSStore(t, p, []string{"phi"}, map[string]kmsClass{"phi": {cache: "0s"}})
		m := s.mount()
		const files = 100
		for i := range files {
			m.Put(fmt.Sprintf("f%d", i), fmt.Appendf(nil, "contents of file %d", i))
		}
		made := s.contextIDs("GenerateDataKey") // and perhaps keys ahead of need
		if got := s.calls(); got["Decrypt"]+got["Encrypt"]+got["ReEncrypt"] != 0 {
			t.Errorf("creating and writing: %v", got)
		}
		s.again(m)
		ids := map[string]bool{}
		for i := range files {
			got, errno := readAll(m.Path(fmt.Sprintf("f%d", i)))
			if want := fmt.Sprintf("contents of file %d", i); errno != 0 || string(got) != want {
				t.Fatalf("%q, %s; want %q", got, errnoName(errno), want)
			}
		}
		store := s.storeID()
		for _, c := range s.kms.Calls() {
			ec := c.EncryptionContext
			if c.EventName != "Decrypt" || c.KeyID != s.arn["phi"] || c.ErrorCode != "" {
				t.Fatalf("%s of %s: %s", c.EventName, c.KeyID, c.ErrorCode)
			}
			if len(ec) != 4 || ec["kmsfs:store"] != store || ec["kmsfs:class"] != "phi" || ec["kmsfs:purpose"] != "data" {
				t.Errorf("encryption context %v", ec)
			}
			ids[ec["kmsfs:id"]] = true
		}
		for i := range files {
			if id := s.info(m.Path(fmt.Sprintf("f%d", i))).ID; !ids[id] || !made[id] {
				t.Errorf("no call for file id %s: made %v, opened %v", id, made[id], ids[id])
			}
		}
		s.wantCalls("opening", map[string]int{"Decrypt": files})
		readAll(m.Path("f0"))
		s.wantCalls("opening again", map[string]int{"Decrypt": 1})
		m.Unmount()
	})
}

// TestKMSNoCalls counts the calls of what must make none.
func TestKMSNoCalls(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newKMSStore(t, p, []string{"phi"}, map[string]kmsClass{"phi": {cache: "0s"}})
		m := s.mount("d")
		for i := range 10 {
			m.Put(fmt.Sprintf("f%d", i), bytes.Repeat([]byte("x"), 20_000))
		}
		s.h.Sh(`ln -s f1 "$1"/link; touch "$1"/empty`, m.Dir)
		s.again(m)
		f, err := os.OpenFile(m.Path("f0"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		s.wantCalls("open", map[string]int{"Decrypt": 1})
		never := func(what string, do func() error) {
			t.Helper()
			if err := do(); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			s.wantCalls(what, nil)
		}
		sh := func(script string) func() error {
			return func() error { s.h.Sh(`cd "$1"; `+script, m.Dir); return nil }
		}
		never("stat", sh(`stat f1 f2 link`))
		never("readdir", sh(`ls -lR . ; find . -size +1`))
		never("readlink", sh(`readlink link`))
		never("rename", sh(`mv f1 g1; mv f2 d/f2; mv d/f2 f2`))
		never("link", sh(`ln f3 d/h3`))
		never("unlink", sh(`rm f4 d/h3`))
		never("chmod, chown, utimes", sh(`chmod 600 f5; chown 1:1 f5; python3 -c 'import os; os.utime("f5", (1, 2))'`))
		never("xattrs", sh(`setfattr -n user.a -v b f5; getfattr -d f5; getfattr -n user.kmsfs.key f5; setfattr -x user.a f5`))
		never("mkdir, rmdir, mkfifo, symlink", sh(`mkdir e; rmdir e; mkfifo p; ln -s x y`))
		never("cut to nothing", sh(`python3 -c 'import os; os.truncate("f6", 0)'`))
		never("reading an empty file", sh(`cat empty`))
		never("statfs", sh(`df .`))
		never("write", func() error { _, err := f.WriteAt(bytes.Repeat([]byte("y"), 50_000), 10); return err })
		never("read", func() error { _, err := f.ReadAt(make([]byte, 1000), 30_000); return err })
		never("truncate of an open file", func() error { return f.Truncate(12_345) })
		never("fallocate", func() error {
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 4096, 4096)
		})
		never("fsync", f.Sync)
		never("close", f.Close)
		m.Unmount()
		s.wantCalls("unmount", nil)
	})
}

// TestKMSConcurrentOpens: many that open one cold file at once make one call,
// also where nothing is kept after it.
func TestKMSConcurrentOpens(t *testing.T) {
	t.Parallel()
	for _, cache := range []string{"0s", "5m"} {
		t.Run(cache, func(t *testing.T) {
			t.Parallel()
			s := newKMSStore(t, envelope.Prefix, []string{"phi"}, map[string]kmsClass{"phi": {cache: cache}})
			m := s.mount()
			m.Put("hot", bytes.Repeat([]byte("z"), 10_000))
			s.again(m)
			s.faults(kmsserver.Faults{LatencyMS: 2500}) // the time that they have to come
			if cache == "5m" {                          // whoever comes later is answered from the cache
				out := s.h.Sh(`for i in $(seq 50); do cat "$1"/hot | wc -c & done; wait`, m.Dir)
				if n := strings.Count(out, "10000"); n != 50 {
					t.Errorf("%d of 50 processes read the file", n)
				}
			} else {
				var wg sync.WaitGroup
				for range 50 {
					wg.Go(func() {
						if got, errno := readAll(m.Path("hot")); errno != 0 || len(got) != 10_000 {
							t.Errorf("%d bytes, %s", len(got), errnoName(errno))
						}
					})
				}
				wg.Wait()
			}
			s.wantCalls("fifty opens at once", map[string]int{"Decrypt": 1})
			m.Unmount()
		})
	}
}

// TestKMSCache: within the cache time a file opens without a call, and another
// mount begins with an empty cache.
func TestKMSCache(t *testing.T) {
	t.Parallel()
	s := newKMSStore(t, envelope.Prefix, []string{"short", "long"}, map[string]kmsClass{"short": {cache: "1s"}, "long": {cache: "5m"}})
	m := s.mount("long")
	m.Put("a", []byte("a"))
	m.Put("long/a", []byte("a"))
	s.again(m)
	read := func() { s.h.Sh(`cat "$1"/a "$1"/long/a`, m.Dir) }
	read()
	s.wantCalls("cold", map[string]int{"Decrypt": 2})
	s.h.Sh(`cat "$1"/long/a; sleep 1.2`, m.Dir)
	s.wantCalls("warm", nil)
	read()
	s.wantCalls("after the cache time of one", map[string]int{"Decrypt": 1})
	s.again(m)
	read()
	s.wantCalls("after a remount", map[string]int{"Decrypt": 2})
	m.Unmount()
}

// TestKMSAlias: an alias in the policy stands for the key that it named at init.
func TestKMSAlias(t *testing.T) {
	t.Parallel()
	server := kmsserver.StartT(t, kmsserver.Options{})
	first, err := server.CreateKey(kmsserver.KeyOptions{Alias: "alias/phi"})
	if err != nil {
		t.Fatal(err)
	}
	s := newKMSStoreAt(t, server, envelope.Prefix, []string{"phi"}, map[string]kmsClass{"phi": {keys: []string{"alias/phi"}}})
	m := s.mount()
	m.Put("before", []byte("x"))
	second, err := server.CreateKey(kmsserver.KeyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	alias := "alias/phi"
	if _, err := admin(server).UpdateAlias(context.Background(), &kms.UpdateAliasInput{AliasName: &alias, TargetKeyId: &second}); err != nil {
		t.Fatal(err)
	}
	m.Put("after", []byte("x"))
	s.again(m)
	m.Put("after a remount", []byte("x"))
	for _, name := range []string{"before", "after", "after a remount"} {
		if got, errno := readAll(m.Path(name)); errno != 0 || string(got) != "x" {
			t.Errorf("%s: %s", name, errnoName(errno))
		}
		if keys := s.info(m.Path(name)).Keys; len(keys) != 1 || keys[0] != first {
			t.Errorf("%s: keys %q, want %s", name, keys, first)
		}
	}
	for _, c := range s.kms.Calls() {
		if c.KeyID != first {
			t.Errorf("%s of %s, want only %s", c.EventName, c.KeyID, first)
		}
	}
	m.Unmount()
}

// TestKMSRotation: after a rotation nothing need be done: old files read, new
// ones are under the new material.
func TestKMSRotation(t *testing.T) {
	eachPlacement(t, func(t *testing.T, p envelope.Placement) {
		s := newKMSStore(t, p, []string{"phi"}, map[string]kmsClass{"phi": {cache: "0s"}})
		m := s.mount()
		m.Put("old", []byte("old"))
		key := s.arn["phi"]
		if _, err := admin(s.kms).RotateKeyOnDemand(context.Background(), &kms.RotateKeyOnDemandInput{KeyId: &key}); err != nil {
			t.Fatal(err)
		}
		m.Put("new", []byte("new"))
		s.h.Sh(`printf ', and more' >> "$1"/old`, m.Dir)
		s.again(m)
		material := map[string]string{}
		for name, want := range map[string]string{"old": "old, and more", "new": "new"} {
			if got, errno := readAll(m.Path(name)); errno != 0 || string(got) != want {
				t.Errorf("%s: %q, %s", name, got, errnoName(errno))
			}
			for _, c := range s.kms.Calls() {
				material[name] = c.KeyMaterialID
			}
			s.kms.ResetCalls()
		}
		if material["old"] == "" || material["old"] == material["new"] {
			t.Errorf("material ids %v, want two", material)
		}
		m.Unmount()
		s.fsck(0)
	})
}
