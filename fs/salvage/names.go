package salvage

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/record"
)

// maxLong bounds a ciphertext name, in bytes.
const maxLong = 400

// names is what a directory's names are read by.
type names struct {
	ids     []nameenc.DirID // of the directory's record, as its copies have it
	class   string          // of the record
	ciphers []*nameenc.Cipher
	plain   bool  // the record's class has names that are not encrypted
	known   bool  // plain is from an authentic store record
	missing error // why the class's own name key is not among ciphers
}

// readNames reads a directory's record from its two copies. Neither has to be
// authentic: a name is, that decrypts.
func (w *writer) readNames(d *backing.Dir) *names {
	n := &names{}
	seen := map[nameenc.DirID]bool{}
	for _, read := range []func() ([]byte, error){
		func() ([]byte, error) { return d.ReadFile(dirFile, record.MaxDir) },
		func() ([]byte, error) { return d.Attrs("").Get(dirAttr) },
	} {
		b, err := read()
		if err != nil {
			continue
		}
		if rec, err := record.ParseDir(b); err == nil && !seen[rec.ID] {
			seen[rec.ID] = true
			n.ids = append(n.ids, rec.ID)
			if n.class == "" {
				n.class = rec.Class
			}
		}
	}
	var others []*nameenc.Cipher
	for _, t := range w.s.stores {
		for class, list := range t.ciphers {
			if class == n.class {
				n.ciphers = append(n.ciphers, list...)
			} else {
				others = append(others, list...)
			}
		}
		if plain, known := t.plain(n.class); known {
			n.plain, n.known = plain, true
		}
		if err := t.failures[n.class]; err != nil && len(n.ciphers) == 0 {
			n.missing = err
		}
	}
	n.ciphers = append(n.ciphers, others...)
	return n
}

// name returns the plaintext name of an entry. h is the file's header, if it has
// one.
func (w *writer) name(n *names, d *backing.Dir, entry string, h *envelope.Header) (string, error) {
	enc := entry
	if hash, long := strings.CutPrefix(entry, longEntry); long {
		b, err := d.ReadFile(longName+hash, maxLong)
		if err != nil {
			return "", fmt.Errorf("long name: %w: %w", ErrName, err)
		}
		if enc = string(b); nameenc.LongHash(enc) != hash {
			return "", fmt.Errorf("long name: %w", ErrName)
		}
	}
	for _, id := range n.ids {
		for _, c := range n.ciphers {
			if name, err := c.DecryptName(id, enc); err == nil {
				return name, nil
			}
		}
	}
	if enc == entry && w.plainName(n, entry, h) {
		return entry, nil
	}
	switch {
	case n.missing != nil:
		return "", n.missing
	case len(n.ids) == 0:
		return "", fmt.Errorf("the directory has no record: %w", ErrName)
	}
	return "", ErrName
}

// plainName reports whether an entry is a name as it was given: where the store
// record says so, or, without one, where a directory of a store has an entry that
// no encryption makes.
func (w *writer) plainName(n *names, entry string, h *envelope.Header) bool {
	if n.known {
		return n.plain
	}
	if len(n.ids) > 0 {
		return !looksEncrypted(entry)
	}
	if h == nil {
		return false
	}
	if t := w.s.stores[h.Store]; t != nil {
		for _, class := range classesOf(h) {
			if plain, _ := t.plain(class); plain {
				return true
			}
		}
	}
	return false
}

// looksEncrypted reports whether a string may be a ciphertext name: base64url of
// a tag and padded text.
func looksEncrypted(s string) bool {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	return err == nil && len(b) >= 32 && len(b)%16 == 0
}

// target returns a symlink's target.
func (n *names) target(d *backing.Dir, entry string) (string, error) {
	raw, err := d.Readlink(entry)
	if err != nil {
		return "", err
	}
	if id, long := strings.CutPrefix(raw, targetPrefix); long {
		if _, err := envelope.ParseID(id); err == nil {
			b, err := d.ReadFile(raw, nameenc.MaxStoredTarget)
			if err != nil {
				return "", fmt.Errorf("%w: %w", ErrTarget, err)
			}
			raw = string(b)
		}
	}
	if n.known && n.plain {
		return raw, nil
	}
	for _, c := range n.ciphers {
		if target, err := c.DecryptTarget(raw); err == nil {
			return target, nil
		}
	}
	if !n.known && len(n.ids) > 0 && !looksEncrypted(raw) && !encryptedTarget(raw) {
		return raw, nil
	}
	if n.missing != nil {
		return "", n.missing
	}
	return "", ErrTarget
}

// encryptedTarget reports whether a string may be an encrypted target.
func encryptedTarget(s string) bool {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	return err == nil && len(b) > 32
}

// attrs copies a file's extended attributes with set, and tells which it could
// not.
func (n *names) attrs(a backing.Attrs, set func(name string, value []byte) error) (failed []error) {
	list, err := a.List()
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return []error{err}
	}
	for _, name := range list {
		if strings.HasPrefix(name, ownAttr) && !strings.HasPrefix(name, sealedAttr) {
			continue
		}
		value, err := a.Get(name)
		if err == nil {
			var plain string
			if plain, value, err = n.attr(name, value); err == nil {
				err = set(plain, value)
			}
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", name, err))
		}
	}
	return failed
}

// attr decrypts an attribute; those that are no user's are as they are.
func (n *names) attr(name string, value []byte) (string, []byte, error) {
	if !strings.HasPrefix(name, userAttr) {
		return name, value, nil
	}
	for _, c := range n.ciphers {
		plain := strings.TrimPrefix(name, userAttr)
		if enc, sealed := strings.CutPrefix(name, sealedAttr); sealed {
			var err error
			if plain, err = c.DecryptAttrName(enc); err != nil {
				continue
			}
		}
		if out, err := c.DecryptAttrValue(plain, value); err == nil {
			return userAttr + plain, out, nil
		}
	}
	if n.missing != nil {
		return "", nil, n.missing
	}
	return "", nil, nameenc.ErrAuth
}
