package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// ordinary is a user without rights: nobody, with a home directory.
type ordinary struct {
	t      *testing.T
	dir    string // home
	kmsfs  string
	runner *rig.Home
}

func newOrdinary(t *testing.T) *ordinary {
	t.Helper()
	rig.Need(t, "root", "fuse", "runuser", "fusermount3")
	u := &ordinary{t: t, runner: rig.NewHome(t)}
	u.dir = filepath.Join(u.runner.Dir, "home")
	u.kmsfs = filepath.Join(u.runner.Dir, "kmsfs")
	u.runner.Sh(`mkdir "$1"; chown nobody "$1"; chmod 700 "$1"; cp "$2" "$3"; chmod 755 "$3"
		d=$(dirname "$3"); while [ "$d" != / ]; do chmod a+x "$d"; d=$(dirname "$d"); done`, u.dir, rig.Binary(t), u.kmsfs)
	t.Cleanup(func() {
		for _, m := range []string{"m", "m2"} {
			if dir := filepath.Join(u.dir, m); rig.Mounted(dir) {
				u.sh(`"$KMSFS" umount "$1"`, dir)
			}
		}
	})
	return u
}

// sh runs a script as the user, in the home directory, with nothing in the
// environment but HOME and PATH. $KMSFS is the program.
func (u *ordinary) sh(script string, args ...string) rig.Result {
	u.t.Helper()
	all := append([]string{"-u", "nobody", "--", "env", "-i", "-C", u.dir, "HOME=" + u.dir, "PATH=/usr/bin:/bin", "KMSFS=" + u.kmsfs,
		"bash", "-e", "-o", "pipefail", "-c", script, "bash"}, args...)
	return u.runner.Exec(nil, "runuser", all...)
}

// must runs a script that must succeed.
func (u *ordinary) must(script string, args ...string) string {
	u.t.Helper()
	r := u.sh(script, args...)
	if r.Code != 0 {
		u.t.Fatalf("exit %d of:\n%s\n%s%s", r.Code, script, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// TestUserFirstSession is a first session without root.
func TestUserFirstSession(t *testing.T) {
	t.Parallel()
	u := newOrdinary(t)
	u.must(`"$KMSFS" init store; mkdir m; "$KMSFS" mount store m
		echo hello > m/file; mkdir m/dir; cp -a /usr/share/doc/bash m/dir/; ln m/file m/link; ln -s file m/sym
		mkfifo m/fifo; chmod 640 m/file; touch -d 2001-01-01 m/file; test "$(stat -c %U:%a m/file)" = nobody:640
		setfattr -n user.x -v y m/file; test "$(stat -c %Y m/file)" = 978307200
		"$KMSFS" status | grep store >/dev/null; "$KMSFS" info m/file | grep keyring:general >/dev/null; df m > df.out
		"$KMSFS" umount m; "$KMSFS" mount store m
		diff -r --no-dereference /usr/share/doc/bash m/dir/bash; cat m/sym; "$KMSFS" umount m
		"$KMSFS" fsck store; "$KMSFS" ls store > /dev/null; "$KMSFS" cat store file
		test -f .config/kmsfs/keyring.json; test "$(stat -c %a .config/kmsfs/keyring.json)" = 600
		test "$(stat -c %a .config/kmsfs)" = 700; test -d .local/state/kmsfs; test "$(stat -c %a store)" = 700
		! grep -rqa hello store`)
	if rig.Mounted(filepath.Join(u.dir, "m")) {
		t.Error("still mounted")
	}
}

// TestUserModes: what the modes of files forbid is forbidden, and what their
// owner may, works: the mode is the mount's, not a lock on the store.
func TestUserModes(t *testing.T) {
	t.Parallel()
	u := newOrdinary(t)
	u.must(`"$KMSFS" init --placement sidecar store; mkdir m; "$KMSFS" mount store m
		echo secret > m/shut; chmod 000 m/shut; ! cat m/shut 2>/dev/null; chmod 400 m/shut; cat m/shut
		! (echo x > m/shut) 2>/dev/null; mv m/shut m/moved; ln m/moved m/again; rm m/again
		echo x > m/writeonly; chmod 200 m/writeonly; echo more >> m/writeonly; ! cat m/writeonly 2>/dev/null
		mkdir m/d; echo in > m/d/f; chmod 500 m/d; ! touch m/d/new 2>/dev/null; cat m/d/f; chmod 000 m/d; ! ls m/d 2>/dev/null; chmod 700 m/d
		! mknod m/dev c 1 3 2>/dev/null; ! chown root m/moved 2>/dev/null
		"$KMSFS" umount m; "$KMSFS" mount store m; cat m/moved m/d/f; chmod 600 m/writeonly; test "$(cat m/writeonly)" = "x
more"; "$KMSFS" umount m; "$KMSFS" fsck store`)
}

// TestUserRefused wants a clear answer to what takes more than an ordinary user
// has.
func TestUserRefused(t *testing.T) {
	t.Parallel()
	u := newOrdinary(t)
	u.must(`"$KMSFS" init store; mkdir m m2 closed; echo data > data; chmod 755 m
		"$KMSFS" mount store m; cp data m/; "$KMSFS" umount m`)
	want := func(what string, code int, script string) {
		t.Helper()
		r := u.sh(script)
		wantFailure(t, r, code)
		if t.Failed() {
			t.Log(what)
		}
	}
	conf, err := os.ReadFile("/etc/fuse.conf")
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if !bytes.Contains(append([]byte("\n"), conf...), []byte("\nuser_allow_other")) {
		want("allow_other", 1, `exec "$KMSFS" mount --allow-other store m`)
	}
	want("a mountpoint of somebody else", 1, `exec "$KMSFS" mount -o nonempty store /usr/share/doc/bash`)
	want("init where one may not write", 1, `exec "$KMSFS" init /usr/share/doc/bash/store`)
	want("a store of somebody else", 1, `exec "$KMSFS" ls /root/store`)
	want("a second mount", 6, `"$KMSFS" mount store m; "$KMSFS" mount store m2 || { c=$?; "$KMSFS" umount m; exit $c; }`)

	// Root cannot look into a user's mount, and is told nothing of it.
	u.must(`"$KMSFS" mount store m`)
	if _, errno := readAll(filepath.Join(u.dir, "m/data")); errno != unix.EACCES {
		t.Errorf("root reads a user's mount: %s, want EACCES", errnoName(errno))
	}
	u.must(`"$KMSFS" umount m`)

	// A store that the user may only read.
	u.must(`chmod -R a-w store`)
	want("a store without write permission", 1, `exec "$KMSFS" mount store m`)
	if got := u.must(`"$KMSFS" mount --read-only store m; cat m/data; ! touch m/new 2>/dev/null; "$KMSFS" umount m; "$KMSFS" cat store data; "$KMSFS" fsck store >&2`); got != "data\ndata\n" {
		t.Errorf("read-only: %q", got)
	}
	u.must(`chmod -R u+w store`)
}

// TestUserEnvironment: XDG variables are followed, and without any home
// directory the message says what to set.
func TestUserEnvironment(t *testing.T) {
	t.Parallel()
	u := newOrdinary(t)
	u.must(`export XDG_CONFIG_HOME=$HOME/c XDG_STATE_HOME=$HOME/s; "$KMSFS" init store; mkdir m; "$KMSFS" mount store m; "$KMSFS" umount m
		test -f c/kmsfs/keyring.json; test -f c/kmsfs/known-stores; ls s/kmsfs/*.log; test ! -e .config; test ! -e .local`)
	r := u.sh(`unset HOME; exec "$KMSFS" ls store`)
	if r.Code == 0 || !strings.Contains(r.Stderr, "kmsfs: error: ") || !strings.Contains(r.Stderr, "kmsfs: hint: ") {
		t.Errorf("without HOME: exit %d: %s", r.Code, r.Stderr)
	}
}
