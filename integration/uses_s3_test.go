package integration

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

const versitygw = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"

// TestS3 syncs stores to an S3 service and back with the tools that people
// use. docs/s3.md tells what it finds.
func TestS3(t *testing.T) {
	t.Parallel()
	rig.Need(t, "root", "fuse", "aws", "rclone", "rsync", "setfacl", "setfattr")
	g := startGateway(t)
	for i, c := range []struct {
		name string
		test func(t *testing.T, s *bucket)
	}{
		{"aws, header", func(t *testing.T, s *bucket) { s.roundTrip(t, awsSync, "header") }},
		{"aws, sidecar", func(t *testing.T, s *bucket) { s.roundTrip(t, awsSync, "sidecar") }},
		{"rclone, header", func(t *testing.T, s *bucket) { s.roundTrip(t, rcloneSync, "header") }},
		{"rclone, sidecar", func(t *testing.T, s *bucket) { s.roundTrip(t, rcloneSync, "sidecar") }},
		{"aws, xattr", func(t *testing.T, s *bucket) { s.losesHeaders(t, awsSync) }},
		{"rclone, xattr", func(t *testing.T, s *bucket) { s.losesHeaders(t, rcloneSync) }},
		{"mounted", func(t *testing.T, s *bucket) { s.mounted(t) }},
		{"edits", func(t *testing.T, s *bucket) { s.edits(t) }},
		{"old restore", func(t *testing.T, s *bucket) { s.intoOldCopy(t) }},
		{"versions", func(t *testing.T, s *bucket) { s.versions(t) }},
		{"other machine", func(t *testing.T, s *bucket) { s.otherMachine(t) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.test(t, g.bucket(t, i))
		})
	}
}

// syncTool copies the store $1 to the bucket $2 (up), and back from the bucket
// $2 to $1 (down).
type syncTool struct {
	name, up, down string
	skips          int  // exit code where the store has what the tool cannot copy
	links, mtimes  bool // keeps symlinks, files' times
}

var (
	awsSync = syncTool{name: "aws s3 sync", up: `aws --endpoint-url "$S3" s3 sync --only-show-errors --no-follow-symlinks --delete "$1" "s3://$2"`,
		down: `aws --endpoint-url "$S3" s3 sync --only-show-errors "s3://$2" "$1"`, skips: 2}
	rcloneSync = syncTool{name: "rclone sync", up: `rclone sync --links "$1" "s3:$2"`,
		down: `rclone sync --links "s3:$2" "$1"`, links: true, mtimes: true}
)

// gateway is an S3 service on loopback.
type gateway struct{ env []string }

// startGateway runs versitygw, the one on PATH or one that it installs.
func startGateway(t *testing.T) *gateway {
	t.Helper()
	program, err := exec.LookPath("versitygw")
	if err != nil {
		bin := t.TempDir()
		install := exec.Command("go", "install", versitygw)
		install.Env = append(os.Environ(), "GOBIN="+bin, "GOFLAGS=")
		if out, err := install.CombinedOutput(); err != nil {
			t.Logf("go install: %v\n%s", err, out)
			rig.Need(t, "versitygw")
		}
		program = filepath.Join(bin, "versitygw")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	_ = l.Close()
	cmd := exec.Command(program, "--access", "key", "--secret", "secretsecret", "--port", addr, "--quiet", "posix",
		"--versioning-dir", t.TempDir(), t.TempDir())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() })
	for range 500 {
		if c, err := net.Dial("tcp", addr); err == nil {
			_ = c.Close()
			return &gateway{env: []string{
				"AWS_ACCESS_KEY_ID=key", "AWS_SECRET_ACCESS_KEY=secretsecret", "AWS_SESSION_TOKEN=",
				"AWS_REGION=us-east-1", "AWS_DEFAULT_REGION=us-east-1", "S3=http://" + addr, "AWS_PAGER=",
				"AWS_CA_BUNDLE=", "NO_PROXY=127.0.0.1", "no_proxy=127.0.0.1",
				"RCLONE_CONFIG_S3_TYPE=s3", "RCLONE_CONFIG_S3_PROVIDER=Other", "RCLONE_CONFIG_S3_ENV_AUTH=true",
				"RCLONE_CONFIG_S3_ENDPOINT=http://" + addr, "RCLONE_CONFIG=/nonexistent/rclone.conf",
			}}
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("versitygw does not listen")
	return nil
}

// bucket is a versioned bucket and a user who may write it.
type bucket struct {
	h    *rig.Home
	name string
	dir  string
}

func (g *gateway) bucket(t *testing.T, i int) *bucket {
	t.Helper()
	b := &bucket{h: rig.NewHome(t, g.env...), name: fmt.Sprintf("bucket-%d", i), dir: t.TempDir()}
	b.h.Sh(`aws --endpoint-url "$S3" s3 mb "s3://$1"; aws --endpoint-url "$S3" s3api put-bucket-versioning --bucket "$1" --versioning-configuration Status=Enabled`, b.name)
	return b
}

// store makes a mounted store at S.
func (b *bucket) store(flags ...string) *rig.Mount {
	b.h.T.Helper()
	path := filepath.Join(b.dir, "S")
	b.h.Run(append(append([]string{"init"}, flags...), path)...)
	return b.h.Mount(path)
}

// restore copies the bucket to a new directory and returns it.
func (b *bucket) restore(tool syncTool, name string) string {
	b.h.T.Helper()
	path := filepath.Join(b.dir, name)
	if err := os.Mkdir(path, 0o700); err != nil {
		b.h.T.Fatal(err)
	}
	b.h.Sh(tool.down, path, b.name)
	return path
}

// roundTrip takes a tree with everything in it to the bucket and back.
func (b *bucket) roundTrip(t *testing.T, tool syncTool, placement string) {
	m := b.store("--placement", placement)
	hardTree(t, b.h, m.Path("tree"))
	put(t, m.Path("tree", "large"), noise(9<<20, 9)) // more than one part
	setTimes(t, m.Path("tree"))
	want := readTree(t, m.Path("tree"))
	m.Unmount()
	if r := b.h.TrySh(tool.up, m.Store, b.name); r.Code != tool.skips {
		t.Fatalf("%s: exit %d, want %d for what it skips\n%s%s", tool.name, r.Code, tool.skips, r.Stdout, r.Stderr)
	}
	restored := b.h.Mount(b.restore(tool, "R")) // the same store at another path: no question
	got := readTree(t, restored.Path("tree"))
	mustEqual(t, "names and contents", contents(got), contents(want))
	tool.checkLosses(t, got, want)
	var st unix.Stat_t
	if err := unix.Stat(restored.Path("tree", "links", "sparse"), &st); err != nil || st.Blocks*512 < st.Size {
		t.Errorf("a sparse file: got %d bytes on %d of disk, %v; the tools fill holes", st.Size, st.Blocks*512, err)
	}
	// What were hard links are files of their own now, also where they share a
	// sidecar: what happens to one does not touch the others.
	links := restored.Path("tree", "links")
	b.h.Sh(`cd "$1"; rm a; : >big; echo more >>big; cat b ../a/b/c/third | cmp - <(printf 'one\none\n')`, links)
	if got, want := entryOf(t, links+"/big2"), want["links/big2"]; got.sum != want.sum {
		t.Errorf("links/big2 changed with links/big")
	}
	restored.Unmount()
	// Lost: the copies in attributes, and symlinks, of which the long one leaves
	// its target's file behind. Both can be mended.
	out := b.h.Run("fsck", restored.Store)
	if !strings.Contains(out, "second-copy") || strings.Contains(out, "orphan") == tool.links {
		t.Errorf("fsck: %s", out)
	}
	b.h.Run("fsck", "--repair", restored.Store)
	// One pair of what were hard links is as it was, and has one file id.
	if out := b.h.Run("fsck", restored.Store); strings.Count(out, "\n") != 2 || strings.Count(out, ": duplicate: ") != 1 {
		t.Errorf("fsck after repair: %s", out)
	}
}

func entryOf(t *testing.T, path string) entry {
	t.Helper()
	e, _, err := readEntry(path)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// contents keeps of a tree what every tool keeps: directories and files, with
// names and contents.
func contents(t tree) tree {
	out := tree{}
	for name, e := range t {
		if typ := e.mode & unix.S_IFMT; typ == unix.S_IFREG || typ == unix.S_IFDIR {
			out[name] = entry{mode: typ, size: e.size, sum: e.sum}
		}
	}
	return out
}

// checkLosses checks the table of docs/s3.md, line by line.
func (tool syncTool) checkLosses(t *testing.T, got, want tree) {
	t.Helper()
	for name, w := range want {
		g, there := got[name]
		switch w.mode & unix.S_IFMT {
		case unix.S_IFLNK:
			if there != tool.links || g.target != w.target && there {
				t.Errorf("symlink %q: got %v %q, want %v", name, there, g.target, tool.links)
			}
			continue
		case unix.S_IFREG, unix.S_IFDIR:
		default:
			if there {
				t.Errorf("%q: a special file was kept", name)
			}
			continue
		}
		regular := w.mode&unix.S_IFMT == unix.S_IFREG
		if len(g.xattrs) > 0 || g.uid != 0 || strings.Contains(g.links, "\x00") ||
			regular && g.mode != unix.S_IFREG|0o644 || !regular && g.mode != unix.S_IFDIR|0o755 {
			t.Errorf("%q: something else is kept than docs/s3.md says: %+v", name, g)
		}
		if kept := g.mtime == w.mtime; kept != (tool.mtimes && regular) && !(tool.mtimes && g.mtime/1e9 == w.mtime/1e9) {
			t.Errorf("%q: time: got %d, want %d kept: %v", name, g.mtime, w.mtime, tool.mtimes)
		}
	}
}

// losesHeaders shows that placement xattr does not go with these tools: names
// come back, contents do not, and nothing is made up.
func (b *bucket) losesHeaders(t *testing.T, tool syncTool) {
	m := b.store("--placement", "xattr")
	put(t, m.Path("f"), noise(100_000, 1))
	put(t, m.Path("empty"), nil)
	m.Unmount()
	b.h.Sh(tool.up, m.Store, b.name)
	restored := b.h.Mount(b.restore(tool, "R"))
	if names := namesIn(t, restored.Dir); !slices.Equal(names, []string{"empty", "f"}) {
		t.Errorf("got %q", names)
	}
	if _, err := os.ReadFile(restored.Path("f")); !isErrno(err, unix.EIO) {
		t.Errorf("a file without its header: got %v, want %v", err, unix.EIO)
	}
	restored.Unmount()
	if r := b.h.Try("fsck", restored.Store); r.Code == 0 || !strings.Contains(r.Stdout, "no user.kmsfs.header") {
		t.Errorf("fsck: exit %d\n%s", r.Code, r.Stdout)
	}
}

func namesIn(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range list {
		out = append(out, e.Name())
	}
	return out
}
