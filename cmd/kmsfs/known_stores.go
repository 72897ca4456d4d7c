package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
)

// The known-stores file is text: a first line that names the format, then one
// JSON object for each store. Blank lines and lines that begin with # are
// ignored, and lost when the file is next written.
const (
	knownStoresHeader = "# kmsfs known-stores 1"
	maxKnownFile      = 4 << 20 // bytes
	maxKnownLine      = 64 << 10
	maxKnownKeys      = 64 // keys of one class; a header holds 8, aliases may add some
)

// knownStore is what this machine trusts about one store.
type knownStore struct {
	ID   string              `json:"id"`   // store id
	Keys map[string][]string `json:"keys"` // class → key URIs that the store may use
	Path string              `json:"path"` // where it was last opened; "" if another store took the place
	Time time.Time           `json:"time"` // when the keys were trusted
}

// knownStores is the content of a known-stores file, in the file's order.
type knownStores struct {
	stores []knownStore
}

// parseKnownStores reads a file's content. It accepts nothing that it would
// not write itself, apart from blank lines and comments.
func parseKnownStores(content []byte) (*knownStores, error) {
	k := &knownStores{}
	lines := bufio.NewScanner(bytes.NewReader(content))
	lines.Buffer(nil, maxKnownLine)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if n == 1 {
			if line != knownStoresHeader {
				return nil, fmt.Errorf("line 1 is not %q: %w", knownStoresHeader, errKnownStores)
			}
			continue
		}
		if line == "" || line[0] == '#' {
			continue
		}
		s, err := parseKnownStore(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %v: %w", n, err, errKnownStores)
		}
		if k.byID(s.ID) != nil {
			return nil, fmt.Errorf("line %d: store %s is there twice: %w", n, s.ID, errKnownStores)
		}
		k.stores = append(k.stores, s)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%v: %w", err, errKnownStores)
	}
	return k, nil
}

func parseKnownStore(line string) (knownStore, error) {
	dec := json.NewDecoder(strings.NewReader(line))
	dec.DisallowUnknownFields()
	var s knownStore
	if err := dec.Decode(&s); err != nil {
		return s, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return s, errors.New("more than one JSON object")
	}
	id, err := envelope.ParseID(s.ID)
	if err != nil || id.String() != s.ID {
		return s, errors.New("no store id")
	}
	if len(s.Keys) == 0 {
		return s, errors.New("no classes")
	}
	for class, keys := range s.Keys {
		if class == "" || len(keys) == 0 || len(keys) > maxKnownKeys || slices.Contains(keys, "") {
			return s, fmt.Errorf("class %q has no proper list of keys", class)
		}
	}
	if s.Path != "" && (!filepath.IsAbs(s.Path) || strings.ContainsRune(s.Path, 0)) {
		return s, errors.New("path is not absolute")
	}
	return s, nil
}

// encode returns the file's content.
func (k *knownStores) encode() ([]byte, error) {
	var b bytes.Buffer
	b.WriteString(knownStoresHeader + "\n")
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	for _, s := range k.stores {
		if err := enc.Encode(s); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), nil
}

func (k *knownStores) byID(id string) *knownStore {
	i := slices.IndexFunc(k.stores, func(s knownStore) bool { return s.ID == id })
	if i < 0 {
		return nil
	}
	return &k.stores[i]
}

func (k *knownStores) byPath(path string) *knownStore {
	i := slices.IndexFunc(k.stores, func(s knownStore) bool { return s.Path == path })
	if i < 0 {
		return nil
	}
	return &k.stores[i]
}

// put adds s or replaces the entry of the same id. The path becomes s's alone.
func (k *knownStores) put(s knownStore) {
	for i := range k.stores {
		if k.stores[i].Path == s.Path {
			k.stores[i].Path = ""
		}
	}
	if old := k.byID(s.ID); old != nil {
		*old = s
		return
	}
	k.stores = append(k.stores, s)
}

// remove deletes the entry of id and reports whether there was one.
func (k *knownStores) remove(id string) bool {
	before := len(k.stores)
	k.stores = slices.DeleteFunc(k.stores, func(s knownStore) bool { return s.ID == id })
	return len(k.stores) < before
}

// loadKnownStores reads the file at path; one that does not exist is empty. A
// file that others may write is refused: it is what the trust rests on.
func loadKnownStores(path string) (*knownStores, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return &knownStores{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file: %w", path, errKnownStores)
	}
	if st.Mode().Perm()&0o022 != 0 {
		return nil, fail(errKnownStores, fmt.Sprintf("%s may be written by others (mode %04o)", path, st.Mode().Perm()),
			"check its content, then chmod 600 "+path)
	}
	content, err := io.ReadAll(io.LimitReader(f, maxKnownFile+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(content) > maxKnownFile {
		return nil, fmt.Errorf("%s is larger than %d bytes: %w", path, maxKnownFile, errKnownStores)
	}
	k, err := parseKnownStores(content)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return k, nil
}

// updateKnownStores changes the file under a lock and replaces it atomically:
// after a crash it has its old or its new content. Nothing is written if change
// answers false or an error.
func updateKnownStores(path string, change func(*knownStores) (bool, error)) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	unlock, err := lockFile(path + ".lock")
	if err != nil {
		return err
	}
	defer unlock()
	k, err := loadKnownStores(path)
	if err != nil {
		return err
	}
	changed, err := change(k)
	if err != nil || !changed {
		return err
	}
	content, err := k.encode()
	if err != nil {
		return err
	}
	return replaceFile(path, content, 0o600)
}

// lockFile waits for the exclusive lock on path, which it makes if need be.
// The lock is on a file of its own, because the file it guards is replaced.
func lockFile(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err == nil {
			return func() { _ = f.Close() }, nil // closing gives the lock back
		}
		if !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, &os.PathError{Op: "lock", Path: path, Err: err}
		}
	}
}

// replaceFile writes content to a temporary file beside path and renames it
// over path, both synced.
func replaceFile(path string, content []byte, mode os.FileMode) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
