package integration

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// usersScript does in $1, as several users, what modes, groups and ACLs decide
// about, and prints what came of it. u runs a command as user 4711, who is in the
// groups 4711, 4800 and 4801; v as 4712, who is in 4712 and 4801; w as 4713, who
// is in no group but their own.
const usersScript = `
cd "$1"
exec 2>&1
u() { setpriv --reuid 4711 --regid 4711 --groups 4800,4801 "$@"; }
v() { setpriv --reuid 4712 --regid 4712 --groups 4801 "$@"; }
w() { setpriv --reuid 4713 --regid 4713 --clear-groups "$@"; }
try() { # prints how a command ends, without the words of it that name the directory
	local out code=0
	out=$("$@" 2>&1) || code=$?
	echo "$* -> $code ${out##*: }"
}
show() { stat -c '%n %u:%g %a %F' "$@"; }

echo "== umask"
mkdir -m 777 umask
chmod 777 umask
for mask in 000 022 027 077 0777; do
	u sh -c "umask $mask; echo x > umask/file$mask; mkdir umask/dir$mask; mkfifo umask/fifo$mask; ln -s x umask/link$mask"
done
show umask/*

echo "== setgid directory"
mkdir setgid
chown 4711:4801 setgid
chmod 2775 setgid
v sh -c 'umask 002; echo v > setgid/file; mkdir setgid/sub; echo v > setgid/sub/file; ln -s x setgid/link; mkfifo setgid/fifo'
show setgid setgid/* setgid/sub/*
try w sh -c 'echo w > setgid/w'
try v chmod 2755 setgid/file
show setgid/file
try u chmod 2770 setgid
show setgid
chown 4711:4999 setgid
try u chmod 2771 setgid # not in the group: setgid is cleared
show setgid

echo "== sticky"
mkdir sticky
chmod 1777 sticky
u sh -c 'echo u > sticky/u; echo u > sticky/u2; mkdir sticky/udir'
v sh -c 'echo v > sticky/v'
try v rm -f sticky/u
try v mv sticky/u sticky/moved
try v mv sticky/v sticky/u2
try v rmdir sticky/udir
try v ln sticky/v sticky/v2
try u mv sticky/u sticky/u2
try u rmdir sticky/udir
chown 4712 sticky
try v rm -f sticky/u2 # the directory's owner may
show sticky/*

echo "== groups"
mkdir -m 755 groups
echo secret > groups/file
chown 0:4801 groups/file
chmod 640 groups/file
try u cat groups/file
try v cat groups/file
try w cat groups/file
chmod 604 groups/file
try v cat groups/file # the group's bits count, not the others'
try w cat groups/file
mkdir groups/dir
chown 0:4800 groups/dir
chmod 710 groups/dir
echo x > groups/dir/x
try u cat groups/dir/x
try u ls groups/dir
try v cat groups/dir/x

echo "== owners"
mkdir -m 777 owners
chmod 777 owners
u sh -c 'echo x > owners/file; chmod 6755 owners/file'
show owners/file
try u chgrp 4801 owners/file # a group of theirs; setuid and setgid go
show owners/file
try u chgrp 4999 owners/file
try u chown 4712 owners/file
try v chgrp 4801 owners/file
u chmod 6775 owners/file
chmod 6777 owners/file
try v sh -c 'echo more >> owners/file' # so they do when somebody writes
show owners/file
chmod 6777 owners/file
try v truncate -s 1 owners/file
show owners/file
chmod 2767 owners/file # not group-executable: setgid stays
try v sh -c 'echo more >> owners/file'
show owners/file
chmod 6777 owners/file
chown 4713 owners/file # root's chown clears them as well
show owners/file
mkdir owners/dir
chmod 6777 owners/dir
chown 4711:4800 owners/dir # not those of a directory
show owners/dir
try v touch -d 2001-02-03 owners/file # times need the owner, "now" needs write access
try v touch owners/file
try w chmod 600 owners/dir

echo "== ACLs"
mkdir acl
chmod 750 acl
setfacl -m u:4711:rwx,g:4801:rx,d:u:4713:rw,d:g:4800:rwx,d:m::rwx,d:o::- acl
getfacl -cn acl
u sh -c 'umask 077; echo u > acl/file; mkdir acl/sub; mkfifo acl/fifo; ln -s x acl/link'
for name in file sub fifo; do getfacl -cn "acl/$name"; done
show acl/*
v ls acl
try v sh -c 'echo v > acl/v'
try w cat acl/file
u sh -c 'echo below > acl/sub/file'
getfacl -cn acl/sub/file
setfacl -m u:4713:x acl acl/sub
try w cat acl/file
try w sh -c 'echo w >> acl/file'
u chmod 600 acl/file # the mask
getfacl -cn acl/file
try w cat acl/file
try v setfacl -m u:4712:rwx acl/file
try u setfacl -b acl/file
getfacl -cn acl/file
u chmod 2755 acl/sub
chown 4711:4999 acl/sub
u setfacl -m u:4712:r acl/sub # sets the mode: setgid goes, the group is not theirs
show acl/sub
setfacl -k acl
u sh -c 'umask 027; echo u > acl/plain'
getfacl -cn acl/plain
`

// TestUsersAsBelow: several users on a mount see what they see in a directory of
// the store's file system, call by call.
//
// S-41 S-34 S-37
func TestUsersAsBelow(t *testing.T) {
	rig.Need(t, "setpriv", "setfacl")
	s := newSemantics(t, "--allow-other")
	letThrough(t, s.Dir)
	native := filepath.Join(filepath.Dir(s.Dir), "native")
	mkdirMode(t, native, 0o755)
	want := strings.Split(s.h.Sh(usersScript, native), "\n")
	for _, dir := range []string{"encrypted", "open/plain"} {
		mkdirMode(t, s.Path(dir), 0o755)
		got := strings.Split(s.h.Sh(usersScript, s.Path(dir)), "\n")
		if len(want) < 100 || len(got) != len(want) {
			t.Errorf("%s: %d lines, want %d, and at least 100", dir, len(got), len(want))
		}
		for i := range min(len(got), len(want)) {
			if got[i] != want[i] {
				t.Errorf("%s, line %d:\n got %s\nwant %s", dir, i+1, got[i], want[i])
			}
		}
	}
}

// letThrough lets every user walk to a directory.
func letThrough(t *testing.T, dir string) {
	t.Helper()
	for ; dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		if st, err := os.Stat(dir); err == nil && st.Mode().Perm()&0o001 == 0 {
			if err := os.Chmod(dir, st.Mode().Perm()|0o011); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// mkdirMode makes a directory whose mode is not subject to the umask.
func mkdirMode(t *testing.T, dir string, mode os.FileMode) {
	t.Helper()
	if err := os.Mkdir(dir, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, mode); err != nil {
		t.Fatal(err)
	}
}

// apart runs a script in a mount namespace of its own, in which every user may
// open /dev/fuse. $1 is a new directory that every user may walk to, with a
// program kmsfs in it; in it, user runs a command as the user nobody, whose home
// directory is $1/home, and ends prints how a command ends.
func apart(t *testing.T, h *rig.Home, script string) rig.Result {
	t.Helper()
	rig.Need(t, "root", "fuse", "setpriv", "fusermount3", "unshare")
	dir := t.TempDir()
	letThrough(t, dir)
	const before = `
mkdir "$1/dev" "$1/home"
mount -t tmpfs none "$1/dev"
mknod -m 666 "$1/dev/fuse" c 10 229
mount --bind "$1/dev/fuse" /dev/fuse
cp "$2" "$1/kmsfs"
chmod 755 "$1/kmsfs" "$1/home"
chown nobody "$1/home"
PATH="$1:$PATH" LC_ALL=C
cd "$1/home"
user() {
	env -u XDG_CONFIG_HOME -u XDG_STATE_HOME HOME="$1/home" setpriv --reuid nobody --regid "$(id -g nobody)" --clear-groups "${@:2}"
}
ends() { # how a command ends, and what its last words are
	local out code=0
	out=$("$@" 2>&1) || code=$?
	echo "$code ${out##*: }"
}
`
	return h.Exec(nil, "unshare", "--mount", "--propagation", "private", "bash", "-e", "-o", "pipefail", "-c",
		before+script, "bash", dir, rig.Binary(t))
}

// S-55
func TestMountOfAnOrdinaryUser(t *testing.T) {
	r := apart(t, rig.NewHome(t), `
mkdir m
chown nobody m
user "$1" kmsfs init store >/dev/null 2>&1
user "$1" kmsfs mount --pid-file pid store m 2>/dev/null
pid=$(cat pid)
trap 'umount -l m' EXIT
user "$1" sh -c 'umask 027; echo mine > m/file; mkdir m/dir; cat m/file; stat -c "%u %a" m/file'
for command in "stat m/file" "cat m/file" "ls m" "touch m/new"; do
	echo "root: $command: $(ends $command)"
	echo "other: $command: $(ends setpriv --reuid 4712 --regid 4712 --clear-groups $command)"
done
echo "chown: $(ends user "$1" chown 4712 m/file)"
user "$1" bash -c 'exec 9<m/file; kmsfs umount m 9<&-; echo "in use: $?"; kmsfs umount --lazy m 9<&-; echo "lazy: $?"; cat <&9' 2>&1
echo "afterwards: $(ends ls m)"
trap - EXIT
timeout 30 sh -c "while kill -0 $pid 2>/dev/null; do sleep 0.1; done" # it still writes in the store
`)
	want := `mine
65534 640
root: stat m/file: 1 Permission denied
other: stat m/file: 1 Permission denied
root: cat m/file: 1 Permission denied
other: cat m/file: 1 Permission denied
root: ls m: 2 Permission denied
other: ls m: 2 Permission denied
root: touch m/new: 1 Permission denied
other: touch m/new: 1 Permission denied
chown: 1 Operation not permitted
kmsfs: error: m is in use
kmsfs: hint: fuser -vm DIR/home/m shows by whom; --lazy detaches it all the same
in use: 6
lazy: 0
mine
afterwards: 0 
`
	got := regexp.MustCompile(` /\S*/home/m `).ReplaceAllString(r.Stdout, " DIR/home/m ")
	if r.Code != 0 || got != want {
		t.Errorf("exit %d, %s\n got %s\nwant %s", r.Code, r.Stderr, got, want)
	}
}
