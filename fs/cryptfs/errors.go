package cryptfs

import (
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/fs/lease"
)

// FileError tells which file, directory or class an error is about. It wraps the
// reason.
type FileError struct {
	What  string      // if it is no file with an id: "new file", "name key", "directory 12"
	Class string      // that the file is of
	File  envelope.ID // zero if it is not known, or there is none
	Ino   uint64      // in the store, 0 if it is not known
	Err   error
}

func (e *FileError) Error() string {
	what := e.What
	if what == "" {
		what = "file"
	}
	if !e.File.IsZero() {
		what += " " + e.File.String()
	}
	if e.Ino != 0 {
		what = fmt.Sprintf("%s (inode %d)", what, e.Ino)
	}
	return fmt.Sprintf("%s of class %s: %v", what, e.Class, e.Err)
}

// Unwrap returns Err.
func (e *FileError) Unwrap() error { return e.Err }

var (
	// ErrNoStore means that there is no store in the directory.
	ErrNoStore = fault.New(fault.Invalid, "cryptfs: not a kmsfs store")
	// ErrNewerFormat means that a newer kmsfs made the store.
	ErrNewerFormat = fault.New(fault.Unsupported, "cryptfs: store has a newer format")
	// ErrNotEmpty means that a store cannot be made in a directory with files.
	ErrNotEmpty = fault.New(fault.Conflict, "cryptfs: directory is not empty")
	// ErrKeysChanged means that the store names other keys than this machine
	// has pinned for it.
	ErrKeysChanged = fault.New(fault.KeyRejected, "cryptfs: the store's keys are not those pinned on this machine")
	// ErrRecord means that the store record fails authentication.
	ErrRecord = fault.New(fault.Integrity, "cryptfs: store record fails authentication")
	// ErrRecordLost means that the store record is not there, or not whole, and its
	// second copy is: fsck restores one from the other.
	ErrRecordLost = fault.New(fault.Integrity, "cryptfs: the store record is missing or damaged, and its second copy is there")
	// ErrDirRecord means that a directory's record is missing or fails authentication.
	ErrDirRecord = fault.New(fault.Integrity, "cryptfs: directory record fails authentication")
	// ErrHeader means a header that is not this store's.
	ErrHeader = fault.New(fault.Integrity, "cryptfs: file header does not belong here")
	// ErrName means that a stored name fails authentication.
	ErrName = fault.New(fault.Integrity, "cryptfs: stored name fails authentication")
	// ErrLocked means that another process has the store mounted.
	ErrLocked = fault.New(fault.Conflict, "cryptfs: store is in use by another process")
	// ErrElsewhere means that another machine has the store mounted.
	ErrElsewhere = lease.ErrHeld
	// ErrHalted means that nothing more is written, because another machine may
	// have taken the store over or the disk takes nothing.
	ErrHalted = fault.New(fault.Forbidden, "cryptfs: the mount takes no changes any more")
	// ErrClassMismatch means that the policy and the directory's record disagree.
	ErrClassMismatch = fault.New(fault.Forbidden, "cryptfs: policy and directory record name different classes")
	// ErrWriteOnly means that a write-only volume was asked to read a file, or to
	// go on with one that is there.
	ErrWriteOnly = fault.New(fault.KeyDenied, "cryptfs: the mount is write-only")
	// ErrReserved means a name or attribute that kmsfs keeps for itself.
	ErrReserved = fault.New(fault.Forbidden, "cryptfs: name is reserved")
	// ErrCrossClass means that an operation would move a file to another class.
	ErrCrossClass = fault.New(fault.CrossClass, "cryptfs: source and target are of different classes")
	// ErrFixed means a directory that the policy names or that lies above one.
	ErrFixed = fault.New(fault.Forbidden, "cryptfs: the policy has a rule for this directory or one below it")
	// ErrNotEmptyDir means that only an empty directory can be classified.
	ErrNotEmptyDir = fault.New(fault.Forbidden, "cryptfs: directory is not empty")
	// ErrNoClass means a class that the policy does not have.
	ErrNoClass = fault.New(fault.Invalid, "cryptfs: no such class")
	// ErrKeyInUse means that a policy would drop a key that files may depend on.
	ErrKeyInUse = fault.New(fault.Forbidden, "cryptfs: files may be wrapped under the key that the policy drops")
	// ErrKeyState means that a key cannot be used for new files.
	ErrKeyState = fault.New(fault.KeyMissing, "cryptfs: key is not enabled")
	// ErrNoXattrs means that placement xattr needs user xattrs in the store.
	ErrNoXattrs = fault.New(fault.Unsupported, "cryptfs: the store's file system has no user extended attributes")
	// ErrJob means that the record of an interrupted job fails authentication.
	ErrJob = fault.New(fault.Integrity, "cryptfs: job record fails authentication")
	// ErrOtherJob means that another job of the kind is unfinished.
	ErrOtherJob = fault.New(fault.Conflict, "cryptfs: another job is unfinished")
	// ErrNoExchange means that the store's file system cannot exchange two directories.
	ErrNoExchange = fault.New(fault.Unsupported, "cryptfs: the store's file system cannot exchange two directories (RENAME_EXCHANGE)")
	// ErrIncomplete means that a tree keeps its class because some of it could not be copied.
	ErrIncomplete = fault.New(fault.Integrity, "cryptfs: some of the tree cannot be encrypted again")
)
