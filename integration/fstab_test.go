package integration

import (
	"strings"
	"testing"

	"github.com/kmsfs/kmsfs/integration/rig"
)

// TestFstab: mount(8) finds the helper by the type in /etc/fstab, for root and
// for a user whom the option lets mount.
//
// S-56
func TestFstab(t *testing.T) {
	rig.Need(t, "mount", "umount", "findmnt")
	r := apart(t, rig.NewHome(t), `
cp -a /usr/sbin "$1/sbin"
ln -s "$1/kmsfs" "$1/sbin/mount.fuse.kmsfs"
mount --bind "$1/sbin" /usr/sbin
trap 'cd /; for m in all later "with space" theirs; do umount -l "$1/home/$m" 2>/dev/null || :; done' EXIT
mkdir all later 'with space' theirs
chown nobody theirs
for store in store1 store2 'store 3'; do kmsfs init --keyring "$1/keys" --known-stores "$1/known" "$store" >/dev/null 2>&1; done
user "$1" kmsfs init --keyring keys --known-stores known store4 >/dev/null 2>&1
own="keyring=$1/keys,known_stores=$1/known,log_file=$1/log"
cat >"$1/fstab" <<END
# comment
$1/home/store1      $1/home/all           fuse.kmsfs  $own,defaults,allow_other,_netdev,nofail,noexec,x-systemd.requires=network-online.target  0 0
$1/home/store2      $1/home/later         fuse.kmsfs  $own,noauto,ro  0 0
$1/home/store\0403  $1/home/with\040space fuse.kmsfs  $own,nosuid,nodev  0 0
$1/home/store4      $1/home/theirs        fuse.kmsfs  noauto,user,keyring=$1/home/keys,known_stores=$1/home/known,log_file=$1/home/log  0 0
END
mount --bind "$1/fstab" /etc/fstab
list() { for m in all later "with space" theirs; do echo "$m: $(findmnt -no FSTYPE,OPTIONS "$PWD/$m" || echo no)"; done; }
mount -a
list
echo "hello" > all/file
cp /bin/true all/true
echo "noexec: $(ends all/true)"
mount -a # a second time: they are there
findmnt -rno TARGET -t fuse.kmsfs | grep -c "^$1/"
mount "$1/home/later"
list | grep later
echo "read-only: $(ends touch later/file)"
echo "in use: $(cd all; exec 9<file; ends umount "$1/home/all")"
umount "$1/home/all"
umount "$1/home/later"
umount "$1/home/with space"
list
echo "busy: $(ends kmsfs fsck --keyring "$1/keys" --known-stores "$1/known" store1 | head -c 2)"
mount "$1/home/all"
cat all/file
umount all

echo "a user's"
user "$1" mount "$1/home/theirs"
list | grep theirs | sed 's/,group_id.*//'
user "$1" sh -c 'echo theirs > theirs/file; cat theirs/file'
user "$1" umount "$1/home/theirs"
user "$1" mount "$1/home/all" 2>/dev/null || echo "not theirs"
list
trap - EXIT
`)
	want := `all: fuse.kmsfs rw,noexec,relatime,user_id=0,group_id=0,default_permissions,allow_other
later: no
with space: fuse.kmsfs rw,nosuid,nodev,relatime,user_id=0,group_id=0,default_permissions
theirs: no
noexec: 126 Permission denied
2
later: fuse.kmsfs ro,relatime,user_id=0,group_id=0,default_permissions
read-only: 1 Read-only file system
in use: 32 target is busy.
all: no
later: no
with space: no
theirs: no
busy: 0 
hello
a user's
theirs: fuse.kmsfs rw,nosuid,nodev,noexec,relatime,user_id=65534
theirs
not theirs
all: no
later: no
with space: no
theirs: no
`
	got := strings.ReplaceAll(r.Stdout, ",max_read=1048576", "")
	if r.Code != 0 || got != want {
		t.Errorf("exit %d, %s\n got %s\nwant %s", r.Code, r.Stderr, got, want)
	}
}
