package doctor

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// family is what a kind of file system means to a store.
type family int

const (
	local   family = iota
	memory         // gone with the machine's power
	network        // somebody else may write at the same time
	other          // on top of something else
	poor           // no POSIX file system
)

// magics are the file systems that statfs(2) tells apart (linux/magic.h, and the
// file systems' own headers).
var magics = map[uint32]struct {
	name string
	family
}{
	unix.EXT4_SUPER_MAGIC: {"ext4", local}, unix.XFS_SUPER_MAGIC: {"xfs", local}, unix.BTRFS_SUPER_MAGIC: {"btrfs", local},
	unix.F2FS_SUPER_MAGIC: {"f2fs", local}, 0x2fc12fc1: {"zfs", local}, 0xca451a4e: {"bcachefs", local},
	unix.TMPFS_MAGIC: {"tmpfs", memory}, unix.RAMFS_MAGIC: {"ramfs", memory},
	unix.NFS_SUPER_MAGIC: {"nfs", network}, unix.CIFS_SUPER_MAGIC: {"cifs", network}, unix.SMB2_SUPER_MAGIC: {"smb3", network},
	unix.SMB_SUPER_MAGIC: {"smb", network}, unix.CEPH_SUPER_MAGIC: {"ceph", network}, unix.AFS_SUPER_MAGIC: {"afs", network},
	unix.V9FS_MAGIC: {"9p", network}, 0x0bd00bd0: {"lustre", network}, 0x47504653: {"gpfs", network}, 0x6a656a63: {"virtiofs", other},
	unix.OVERLAYFS_SUPER_MAGIC: {"overlay", other}, unix.FUSE_SUPER_MAGIC: {"fuse", other}, unix.ECRYPTFS_SUPER_MAGIC: {"ecryptfs", other},
	unix.MSDOS_SUPER_MAGIC: {"vfat", poor}, unix.EXFAT_SUPER_MAGIC: {"exfat", poor}, 0x5346544e: {"ntfs", poor}, 0x7366746e: {"ntfs3", poor},
}

// fileSystem looks at the file system that the store at path is on.
func fileSystem(path string, placement envelope.Placement) []Finding {
	d, err := backing.OpenRoot(path)
	if err != nil {
		return one("store.filesystem", Error, path, err.Error(), "check the path and its permissions")
	}
	defer func() { _ = d.Close() }()
	st, err := d.Statfs()
	if err != nil {
		return one("store.filesystem", Error, path, err.Error(), "check the file system")
	}
	out := kind(path, uint32(st.Type))
	out = append(out, space(path, &st)...)
	out = append(out, writable(path, &st)...)
	out = append(out, xattrs(path, d, placement)...)
	return append(out, caseSensitive(path, d)...)
}

func kind(path string, magic uint32) []Finding {
	const check = "store.filesystem"
	m, ok := magics[magic]
	if !ok {
		return one(check, Info, path, fmt.Sprintf("a file system that is not known here (%#x)", magic), "")
	}
	switch m.family {
	case memory:
		return one(check, Warning, path, m.name+": the store is gone when the machine stops", "move it to a disk")
	case network:
		return one(check, Warning, path, m.name+": another machine may mount the same store without being refused, and a server may lose what was not synced",
			"mount the store on one machine at a time, read-only on others")
	case other:
		return one(check, Info, path, m.name+": durability and attributes are those of what lies below", "")
	case poor:
		return one(check, Error, path, m.name+" has neither permissions nor hard links, and its names ignore case", "move the store to ext4, xfs, btrfs or zfs")
	}
	return one(check, OK, path, m.name, "")
}

// space warns when less than a twentieth is left, unless that is a lot.
func space(path string, st *unix.Statfs_t) []Finding {
	const plenty = 20 << 30
	size := uint64(st.Frsize)
	free, total := st.Bavail*size, st.Blocks*size
	out := one("store.space", OK, path, bytesText(free)+" free", "")
	switch {
	case free == 0:
		out = one("store.space", Error, path, "the disk is full", "make room")
	case free < total/20 && free < plenty:
		out = one("store.space", Warning, path, fmt.Sprintf("only %s of %s free", bytesText(free), bytesText(total)), "make room")
	}
	switch { // btrfs and others count no inodes
	case st.Files > 0 && st.Ffree == 0:
		out = append(out, one("store.inodes", Error, path, "the file system has no inode left: no file can be made", "remove files, or make the file system anew with more inodes")...)
	case st.Files > 0 && st.Ffree < st.Files/100:
		out = append(out, one("store.inodes", Warning, path, fmt.Sprintf("only %d of %d inodes free", st.Ffree, st.Files), "remove files, or make the file system anew with more inodes")...)
	default:
		out = append(out, one("store.inodes", OK, path, "enough inodes", "")...)
	}
	return out
}

func writable(path string, st *unix.Statfs_t) []Finding {
	const check = "store.writable"
	if st.Flags&unix.ST_RDONLY != 0 {
		return one(check, Warning, path, "the file system is read-only", "mount the store with --read-only, or: mount -o remount,rw")
	}
	err := unix.Access(path, unix.W_OK|unix.X_OK)
	switch {
	case errors.Is(err, unix.EROFS):
		return one(check, Warning, path, "the file system is read-only", "mount the store with --read-only, or: mount -o remount,rw")
	case err != nil:
		return one(check, Warning, path, "this user may not write the store: "+err.Error(), "mount the store with --read-only, or as its owner")
	}
	return one(check, OK, path, "can be written", "")
}

// xattrs asks for an attribute: where there are none the answer is not "no such
// attribute".
func xattrs(path string, d *backing.Dir, placement envelope.Placement) []Finding {
	const check = "store.xattrs"
	_, err := d.Attrs("").Get("user.kmsfs.dir")
	switch {
	case err == nil, errors.Is(err, unix.ENODATA):
		return one(check, OK, path, "extended attributes work", "")
	case errors.Is(err, unix.EOPNOTSUPP) && placement == envelope.Xattr:
		return one(check, Error, path, "the file system has no extended attributes, in which this store keeps its headers",
			"copy the store back from where it was with a tool that keeps extended attributes, to a file system that has them")
	case errors.Is(err, unix.EOPNOTSUPP):
		return one(check, Warning, path, "the file system has no extended attributes: none on the mount either, and no second copy of directory records",
			"move the store to a file system with user extended attributes")
	}
	return one(check, Warning, path, "extended attributes: "+err.Error(), "check the file system")
}

// caseSensitive looks for the store's own directory under another name:
// encrypted names differ in case alone.
func caseSensitive(path string, d *backing.Dir) []Finding {
	const check = "store.case"
	if _, err := d.Stat(".KMSFS"); err == nil {
		return one(check, Error, path, "names that differ in upper and lower case alone are the same: files would replace one another",
			"move the store to a directory that tells them apart (ext4: without chattr +F)")
	}
	return one(check, OK, path, "names keep upper and lower case apart", "")
}
