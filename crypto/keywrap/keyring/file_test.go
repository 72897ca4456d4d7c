package keyring_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap/keyring"
)

func TestFilesThatAreRefused(t *testing.T) {
	dir := t.TempDir()
	_, err := keyring.Open(filepath.Join(dir, "none"), nil)
	wantErr(t, err, keyring.ErrNoFile, fault.KeyMissing)
	wantErr(t, err, os.ErrNotExist, fault.KeyMissing)
	_, err = keyring.Open(dir, nil)
	wantErr(t, err, keyring.ErrFormat, fault.BadFormat)
	fifo := filepath.Join(dir, "fifo")
	must(t, syscall.Mkfifo(fifo, 0o600))
	_, err = keyring.Open(fifo, nil)
	wantErr(t, err, keyring.ErrFormat, fault.BadFormat)
	big := filepath.Join(dir, "big")
	must(t, os.WriteFile(big, nil, 0o600))
	must(t, os.Truncate(big, 1<<40))
	_, err = keyring.Open(big, nil)
	wantErr(t, err, keyring.ErrFormat, fault.BadFormat)

	path, k := newFile(t, nil)
	must(t, k.CreateKey("a"))
	_, err = keyring.Create(path, nil)
	wantErr(t, err, keyring.ErrExists, fault.Conflict)
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o602, 0o644, 0o666} {
		must(t, os.Chmod(path, mode))
		_, err = keyring.Open(path, nil)
		wantErr(t, err, keyring.ErrPermissions, fault.Forbidden)
		_, err = k.GenerateDataKey(context.Background(), "keyring:a", sample)
		wantErr(t, err, keyring.ErrPermissions, fault.Forbidden)
	}
	must(t, os.Chmod(path, 0o400))
	generate(t, k, "keyring:a")
}

// A mount must not go on with keys that the file no longer holds.
func TestFileGoneOrBroken(t *testing.T) {
	path, k := newFile(t, nil)
	must(t, k.CreateKey("a"))
	dk := generate(t, k, "keyring:a")
	data, err := os.ReadFile(path)
	must(t, err)

	must(t, os.Rename(path, path+".away"))
	_, err = k.Decrypt(context.Background(), dk.Wrapped, sample)
	wantErr(t, err, keyring.ErrNoFile, fault.KeyMissing)
	wantErr(t, k.CreateKey("b"), keyring.ErrNoFile, fault.KeyMissing)
	must(t, os.Rename(path+".away", path))
	wantOpen(t, k, dk)

	must(t, os.WriteFile(path, data[:len(data)/2], 0o600)) // in place, as an editor might
	_, err = k.Decrypt(context.Background(), dk.Wrapped, sample)
	wantErr(t, err, keyring.ErrFormat, fault.BadFormat)
	wantErr(t, k.Rotate("a"), keyring.ErrFormat, fault.BadFormat)
	must(t, os.WriteFile(path, data, 0o600))
	wantOpen(t, k, dk)
}

// A crash between writing and renaming leaves a temporary file: the next change
// overwrites it.
func TestLeftoverTemporary(t *testing.T) {
	path, k := newFile(t, nil)
	must(t, os.WriteFile(path+".tmp", []byte("torn"), 0o644))
	must(t, k.CreateKey("a"))
	if _, err := os.Lstat(path + ".tmp"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("temporary file: %v, want none", err)
	}
	generate(t, open(t, path, nil), "keyring:a")
}

// A change that cannot be written leaves the old file and the old keys.
func TestFailedWrite(t *testing.T) {
	path, k := newFile(t, []byte(passphrase))
	must(t, k.CreateKey("a"))
	dk := generate(t, k, "keyring:a")
	before, err := os.ReadFile(path)
	must(t, err)
	must(t, os.MkdirAll(filepath.Join(path+".tmp", "in the way"), 0o700))
	if err := k.Rotate("a"); err == nil {
		t.Fatal("Rotate works, want an error")
	}
	if err := k.ChangePassphrase([]byte("new")); err == nil {
		t.Fatal("ChangePassphrase works, want an error")
	}
	after, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(after, before) {
		t.Error("a failed change altered the file")
	}
	wantOpen(t, k, dk)
	if info, err := k.Info("a"); err != nil || info.Versions != 1 {
		t.Errorf("Info = %+v, %v", info, err)
	}
	must(t, os.RemoveAll(path+".tmp"))
	must(t, k.Rotate("a"))
}

func TestSymbolicLink(t *testing.T) {
	path, k := newFile(t, nil)
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(path, link))
	via := open(t, link, nil)
	must(t, via.CreateKey("a"))
	if fi, err := os.Lstat(link); err != nil || fi.Mode()&os.ModeSymlink == 0 {
		t.Errorf("a change replaced the link: %v, %v", fi, err)
	}
	generate(t, k, "keyring:a")
	if via.Path() != k.Path() {
		t.Errorf("Path = %q, want %q", via.Path(), k.Path())
	}
}
