package integration

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

func isErrno(err error, want unix.Errno) bool { return errors.Is(err, want) }

// mounted syncs a store that is mounted and idle.
func (b *bucket) mounted(t *testing.T) {
	m := b.store()
	b.h.Sh(`mkdir -p "$1"/d/empty`, m.Dir)
	put(t, m.Path("d", "f"), noise(200_000, 1))
	put(t, m.Path("g"), noise(10, 2))
	want := contents(readTree(t, m.Dir))
	for _, tool := range []syncTool{awsSync, rcloneSync} {
		b.h.Sh(tool.up, m.Store, b.name+"/"+strings.Fields(tool.name)[0])
	}
	m.Put("later", []byte("later"))
	for _, tool := range []syncTool{awsSync, rcloneSync} {
		path := filepath.Join(b.dir, tool.name)
		b.h.Sh(tool.down, path, b.name+"/"+strings.Fields(tool.name)[0])
		restored := b.h.Mount(path) // beside the mount of the original
		mustEqual(t, tool.name, contents(readTree(t, restored.Dir)), want)
		restored.Unmount()
		b.h.Run("fsck", path)
	}
}

// edited is a file in a mounted store, and two copies of the store in the
// bucket, one of each tool.
type edited struct {
	*bucket
	t   *testing.T
	m   *rig.Mount
	now []byte // the file's contents
}

func (e *edited) sync() {
	e.t.Helper()
	e.h.Sh(awsSync.up, e.m.Store, e.name+"/aws")
	e.h.Sh(rcloneSync.up, e.m.Store, e.name+"/rclone")
}

// holds checks which contents a tool's copy has.
func (e *edited) holds(prefix string, tool syncTool, what string, want []byte) {
	e.t.Helper()
	path, err := os.MkdirTemp(e.dir, "R")
	if err != nil {
		e.t.Fatal(err)
	}
	e.h.Sh(tool.down, path, e.name+"/"+prefix)
	if got := []byte(e.h.Run("cat", path, "/f")); !bytes.Equal(got, want) {
		e.t.Errorf("%s: %s is not in the bucket", tool.name, what)
	}
}

// replace copies other contents of the same size over the file, with a time long
// past, and returns the old ones.
func (e *edited) replace(seed uint64) (old []byte) {
	e.t.Helper()
	old, e.now = e.now, noise(len(e.now), seed)
	src := filepath.Join(e.dir, "src")
	put(e.t, src, e.now)
	if err := os.Chtimes(src, time.Unix(1e9, 0), time.Unix(1e9, 0)); err != nil {
		e.t.Fatal(err)
	}
	e.h.Sh(`rsync -a --ignore-times "$1" "$2"`, src, e.m.Path("f"))
	return old
}

// edits shows which changes of the same size a sync sees.
func (b *bucket) edits(t *testing.T) {
	e := &edited{bucket: b, t: t, m: b.store(), now: noise(100_000, 0)}
	put(t, e.m.Path("f"), e.now)
	e.sync()
	// An edit in place: both see it.
	time.Sleep(1100 * time.Millisecond) // S3's times have whole seconds
	e.h.Sh(`printf 'an edit' | dd of="$1" bs=1 seek=50000 conv=notrunc status=none`, e.m.Path("f"))
	copy(e.now[50_000:], "an edit")
	e.sync()
	e.holds("aws", awsSync, "an edit in place", e.now)
	e.holds("rclone", rcloneSync, "an edit in place", e.now)

	// The trap: other contents, the same size, an old time (rsync -a, cp -p,
	// tar -x, touch -d). aws s3 sync does not see it, with no flag; rclone does.
	old := e.replace(1)
	e.sync()
	b.h.Sh(awsSync.up+` --exact-timestamps`, e.m.Store, b.name+"/aws")
	e.holds("aws", awsSync, "the file before the trap, still", old)
	e.holds("rclone", rcloneSync, "a change with an old time", e.now)

	// The narrower trap: also the time is as it was. rclone needs --checksum.
	old = e.replace(2)
	e.sync()
	e.holds("rclone", rcloneSync, "the file before the narrower trap, still", old)
	b.h.Sh(rcloneSync.up+` --checksum`, e.m.Store, b.name+"/rclone")
	e.holds("rclone", rcloneSync, "a change with the same time", e.now)
	// What helps with aws: copying everything.
	b.h.Sh(`aws --endpoint-url "$S3" s3 cp --recursive --no-follow-symlinks --only-show-errors "$1" "s3://$2"`, e.m.Store, b.name+"/aws")
	e.holds("aws", awsSync, "what was copied", e.now)
}

// intoOldCopy restores over an older copy: aws s3 sync leaves files of the same
// size that are older than the bucket's, unless it is told --exact-timestamps.
func (b *bucket) intoOldCopy(t *testing.T) {
	m := b.store()
	put(t, m.Path("f"), noise(1000, 1))
	m.Unmount()
	b.h.Sh(awsSync.up, m.Store, b.name)
	copied := filepath.Join(b.dir, "R")
	b.h.Sh(`cp -r "$1" "$2"`, m.Store, copied)
	m.Again()
	time.Sleep(1100 * time.Millisecond)
	put(t, m.Path("f"), noise(1000, 2))
	m.Unmount()
	b.h.Sh(awsSync.up, m.Store, b.name)
	read := func() []byte { return []byte(b.h.Run("cat", copied, "/f")) }
	b.h.Sh(awsSync.down, copied, b.name)
	if !bytes.Equal(read(), noise(1000, 1)) {
		t.Error("aws s3 sync replaced an older file of the same size: docs/s3.md says otherwise")
	}
	b.h.Sh(awsSync.down+` --exact-timestamps`, copied, b.name)
	if !bytes.Equal(read(), noise(1000, 2)) {
		t.Error("--exact-timestamps did not bring the bucket's file")
	}
}

// versions fetches an older version of a file out of a versioned bucket. It
// reads: that a whole file is an older one is not detected.
func (b *bucket) versions(t *testing.T) {
	m := b.store()
	put(t, m.Path("f"), noise(50_000, 1))
	entry := strings.TrimSpace(b.h.Sh(`cd "$1" && find . -inum "$(stat -c %i "$2")" -printf '%P\n'`, m.Store, m.Path("f")))
	b.h.Sh(awsSync.up, m.Store, b.name)
	time.Sleep(1100 * time.Millisecond)
	put(t, m.Path("f"), noise(60_000, 2))
	m.Unmount()
	b.h.Sh(awsSync.up, m.Store, b.name)
	b.h.Sh(`id=$(aws --endpoint-url "$S3" s3api list-object-versions --bucket "$1" --prefix="$2" --query 'Versions[?!IsLatest]|[0].VersionId' --output text)
		aws --endpoint-url "$S3" s3api get-object --bucket "$1" --key="$2" --version-id "$id" "$3/$2" >/dev/null`, b.name, entry, m.Store)
	m.Again()
	if !bytes.Equal(readFile(t, m.Path("f")), noise(50_000, 1)) {
		t.Error("the older version does not read")
	}
	m.Unmount()
	b.h.Run("fsck", m.Store)
}

// otherMachine opens a restored store where it is not known.
func (b *bucket) otherMachine(t *testing.T) {
	m := b.store()
	put(t, m.Path("f"), []byte("contents"))
	m.Unmount()
	b.h.Sh(rcloneSync.up, m.Store, b.name)
	restored := b.restore(rcloneSync, "R")
	other := rig.NewHome(t)
	b.h.Sh(`install -D -m 600 "$1"/.config/kmsfs/keyring.json "$2"/.config/kmsfs/keyring.json`, b.h.Dir, other.Dir)
	if r := other.Try("cat", restored, "/f"); r.Code == 0 || !strings.Contains(r.Stderr, "--trust") {
		t.Errorf("without trust: exit %d %s%s", r.Code, r.Stdout, r.Stderr)
	}
	there := other.Mount(restored, "--trust")
	if got := string(readFile(t, there.Path("f"))); got != "contents" {
		t.Errorf("got %q", got)
	}
}
