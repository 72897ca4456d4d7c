package keyring

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// UnprotectedWarning is what a user should read when a keyring is made without
// a passphrase.
const UnprotectedWarning = "The keyring has no passphrase: its keys lie in the file in clear. " +
	"It does not protect against anyone who can read the file: root, backups of your home directory, " +
	"a stolen or discarded disk. Keep it away from the store and its copies, and back it up: " +
	"without it the store cannot be opened by anyone."

// Keyring is an open keyring: the keywrap.Provider for "keyring:NAME" and the
// means to administer its keys. Methods are safe for concurrent use.
//
// Before every operation it looks whether another process replaced the file and
// reads it again if so: keys that were created, rotated, disabled or deleted
// elsewhere count from then on. If the file is gone or bad, operations fail; the
// keys read before are not used any more.
type Keyring struct {
	path string // "" is in memory
	pass func() ([]byte, error)
	now  func() time.Time

	mu      sync.Mutex // guards what follows; mutations take the file lock first
	closed  bool
	file    *os.File // the file as read, kept open: see readFile
	id      fileID
	current *contents
	failure error // of reading the file that id names; current is nil

	sealedBy *protection // what key was derived with
	key      *keymem.Key // of the sealed body, nil if there is none
}

var (
	_ keywrap.Provider = (*Keyring)(nil)
	_ keywrap.Checker  = (*Keyring)(nil)
)

// NewMemory returns an empty keyring that is never written anywhere.
func NewMemory() *Keyring {
	return &Keyring{now: time.Now, current: &contents{keys: map[string]*entry{}}}
}

// Create makes an empty keyring file, and its directory (mode 0700) if need be.
// A nil pass makes it unprotected: show UnprotectedWarning. pass stays the
// caller's, to wipe. ErrExists means that path exists.
func Create(path string, pass []byte) (*Keyring, error) {
	if pass != nil && len(pass) == 0 {
		return nil, ErrEmptyPassphrase
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	k := &Keyring{path: filepath.Join(dir, filepath.Base(path)), now: time.Now}
	unlock, err := lockFile(k.path, lockWait)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := os.Lstat(k.path); err == nil {
		return nil, fmt.Errorf("%s: %w", k.path, ErrExists)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	c := &contents{keys: map[string]*entry{}}
	if pass != nil {
		c.protection = newProtection()
		k.setKey(c.protection, c.protection.derive(pass))
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.write(c, k.key); err != nil {
		k.close()
		return nil, err
	}
	return k, nil
}

// Open opens the keyring at path; a symbolic link there is followed once, now.
// pass is called only if the file is protected: here, and again when another
// process has changed the passphrase, when operations wait for it. Its result is
// wiped after use. A nil pass means that there is none to ask for.
func Open(path string, pass func() ([]byte, error)) (*Keyring, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fileError(err)
	}
	if real, err = filepath.Abs(real); err != nil {
		return nil, fileError(err)
	}
	k := &Keyring{path: real, pass: pass, now: time.Now}
	if _, err := k.read(); err != nil {
		_ = k.Close()
		return nil, fmt.Errorf("open keyring: %w", err)
	}
	return k, nil
}

// Close wipes what can be wiped and forgets the keys; later calls fail with
// ErrClosed. The file is not touched.
func (k *Keyring) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.close()
	return nil
}

func (k *Keyring) close() {
	if k.file != nil {
		_ = k.file.Close()
	}
	k.setKey(nil, nil)
	k.file, k.current, k.failure, k.closed = nil, nil, nil, true
}

// Path returns the file's path with symbolic links resolved, "" in memory.
func (k *Keyring) Path() string { return k.path }

// Protected reports whether the file is under a passphrase.
func (k *Keyring) Protected() (bool, error) {
	c, err := k.read()
	return err == nil && c.protection != nil, err
}

// read returns the contents as they are now.
func (k *Keyring) read() (*contents, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.refresh()
}

// refresh reads the file again if it is not the one last read. A file that
// failed is not read again until it changes, so that a wrong passphrase does
// not cost a key derivation for every operation.
func (k *Keyring) refresh() (*contents, error) {
	if k.closed {
		return nil, ErrClosed
	}
	if k.path == "" {
		return k.current, nil
	}
	fi, err := os.Stat(k.path)
	if err != nil {
		return nil, fileError(err)
	}
	if k.file != nil && idOf(fi) == k.id {
		return k.current, k.failure
	}
	return k.load()
}

func (k *Keyring) load() (*contents, error) {
	f, id, data, err := readFile(k.path)
	if err != nil {
		return nil, err
	}
	var fresh *keymem.Key
	c, err := parse(data, func(p *protection) (*keymem.Key, error) {
		if k.key != nil && p.equal(k.sealedBy) {
			return k.key, nil
		}
		var err error
		fresh, err = k.ask(p)
		return fresh, err
	})
	switch {
	case err != nil: // the key at hand may fit the next version of the file
		fresh.Wipe()
	case c.protection == nil:
		k.setKey(nil, nil)
	case fresh != nil:
		k.setKey(c.protection, fresh)
	}
	if k.file != nil {
		_ = k.file.Close()
	}
	k.file, k.id, k.current, k.failure = f, id, c, err
	return c, err
}

// ask derives the key for a body sealed with p from the passphrase.
func (k *Keyring) ask(p *protection) (*keymem.Key, error) {
	if k.pass == nil {
		return nil, ErrNeedPassphrase
	}
	pass, err := k.pass()
	defer clear(pass)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNeedPassphrase, err)
	}
	if len(pass) == 0 {
		return nil, ErrNeedPassphrase
	}
	return p.derive(pass), nil
}

func (k *Keyring) setKey(p *protection, key *keymem.Key) {
	k.key.Wipe()
	k.sealedBy, k.key = p, key
}

// write puts c in the file's place and reads it back, so that a Keyring never
// works with something that the next process could not open.
func (k *Keyring) write(c *contents, key *keymem.Key) error {
	data, err := c.encode(key)
	if err != nil {
		return err
	}
	defer clear(data)
	if err := replaceFile(k.path, data); err != nil {
		return err
	}
	if key != k.key {
		k.setKey(c.protection, key)
	}
	_, err = k.load()
	return err
}
