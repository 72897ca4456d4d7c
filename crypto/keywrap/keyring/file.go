package keyring

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// fileID tells one version of the file from the next. Writers replace the file,
// so the inode changes; the rest is for those that write in place, and for
// chmod.
type fileID struct {
	dev, ino uint64
	size     int64
	mtime    syscall.Timespec
	mode     fs.FileMode
}

func idOf(fi fs.FileInfo) fileID {
	id := fileID{size: fi.Size(), mode: fi.Mode()}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		id.dev, id.ino, id.mtime = uint64(st.Dev), st.Ino, st.Mtim
	}
	return id
}

// fileError gives an operating-system error a kind.
func fileError(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrNoFile, err)
	}
	return fmt.Errorf("%w: %w", ErrUnreadable, err)
}

// readFile opens path and reads it whole. The file stays open in the result: as
// long as it is, its inode number cannot come back as another file's. The
// caller closes it and wipes the data.
func readFile(path string) (f *os.File, id fileID, data []byte, err error) {
	// O_NONBLOCK: a fifo in the file's place must not hang the mount.
	f, err = os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, id, nil, fileError(err)
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	fi, err := f.Stat()
	if err != nil {
		return nil, id, nil, fileError(err)
	}
	switch {
	case !fi.Mode().IsRegular():
		return nil, id, nil, fmt.Errorf("%s is no regular file: %w", path, ErrFormat)
	case fi.Mode().Perm()&0o077 != 0:
		return nil, id, nil, fmt.Errorf("%s has mode %04o, use chmod 600: %w", path, fi.Mode().Perm(), ErrPermissions)
	case fi.Size() > maxFileLen:
		return nil, id, nil, fmt.Errorf("%s has %d bytes: %w", path, fi.Size(), ErrFormat)
	}
	data = make([]byte, fi.Size()) // one buffer of the right size: growing would leave copies
	if _, err = io.ReadFull(f, data); err != nil {
		clear(data)
		return nil, id, nil, fileError(err)
	}
	return f, idOf(fi), data, nil
}

// replaceFile puts data in path's place, durably: afterwards either the old or
// the new file is there, whole, whatever crashes. The caller holds the lock; a
// temporary file that a crash left is overwritten.
func replaceFile(path string, data []byte) (err error) {
	tmp := path + ".tmp"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(tmp)
		}
	}()
	if err := f.Chmod(0o600); err != nil { // the umask may have taken more away
		return err
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	if fi, err := f.Stat(); err != nil {
		return err
	} else if fi.Size() != int64(len(data)) {
		return fmt.Errorf("%s: %w", tmp, io.ErrShortWrite)
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	return errors.Join(err, d.Close())
}

// lockWait bounds the wait for another process's mutation, which takes
// milliseconds.
const (
	lockWait  = 10 * time.Second
	lockRetry = 10 * time.Millisecond
)

// lockFile takes the lock beside path, which orders mutations between processes
// and between the Keyrings of one. The lock file stays: removing it would let
// two processes lock two files of one name.
func lockFile(path string, wait time.Duration) (unlock func(), err error) {
	f, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	for waited := time.Duration(0); ; waited += lockRetry {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil // closing the only descriptor unlocks
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) || waited >= wait {
			break
		}
		time.Sleep(lockRetry)
	}
	_ = f.Close()
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, fmt.Errorf("%s.lock: %w", path, ErrLocked)
	}
	return nil, fmt.Errorf("lock %s.lock: %w", path, err)
}
