package cryptfs

import (
	"context"
	"errors"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// longLinkLen is the length of a symlink in the store whose encrypted target is
// too long for one: it names the file beside it that holds the target. No
// encrypted target has this length.
const longLinkLen = len(targetPrefix) + 2*idLen

// isTargetFile reports whether a symlink's contents name such a file. They come
// from the store, and must not lead anywhere else.
func isTargetFile(raw string) bool {
	id, ok := strings.CutPrefix(raw, targetPrefix)
	if !ok {
		return false
	}
	_, err := envelope.ParseID(id)
	return err == nil
}

func isLongLink(st backing.Stat) bool {
	return st.Type() == unix.S_IFLNK && st.Size == int64(longLinkLen)
}

// lstat is dir.Stat, with the length of the encrypted target as the size of a
// symlink whose target is in a file of its own.
func lstat(dir *backing.Dir, entry string) (backing.Stat, error) {
	st, err := dir.Stat(entry)
	if err != nil || !isLongLink(st) {
		return st, err
	}
	raw, err := dir.Readlink(entry)
	if err != nil || !isTargetFile(raw) {
		return st, err
	}
	target, err := dir.Stat(raw)
	if errors.Is(err, unix.ENOENT) {
		return st, nil // readlink tells of the damage
	}
	st.Size = target.Size
	return st, err
}

// Symlink makes a symbolic link.
func (v *Volume) Symlink(ctx context.Context, dir *Node, name, target string, c Caller) (*Node, Attr, error) {
	cipher, err := v.loadForWrite(ctx, dir)
	if err != nil {
		return nil, Attr{}, err
	}
	raw, long := target, ""
	if !dir.dirClass().plain {
		if raw, err = cipher.EncryptTarget(target); err != nil {
			return nil, Attr{}, err
		}
		if nameenc.IsLongTarget(raw) {
			raw, long = targetPrefix+envelope.NewID().String(), raw
		}
	}
	return v.made(dir, cipher, name, func(d *backing.Dir, entry string) error {
		if long != "" { // before the link that names it
			if err := d.WriteNew(raw, []byte(long), 0o600, true); err != nil {
				return err
			}
		}
		err := d.Symlink(raw, entry)
		if err == nil {
			if err = v.own(d, entry, unix.S_IFLNK, c); err != nil {
				_ = d.Unlink(entry)
			}
		}
		if err != nil && long != "" {
			_ = d.Unlink(raw)
		}
		return err
	})
}

// Readlink returns a symlink's target.
func (v *Volume) Readlink(n *Node) (string, error) {
	if n.typ != unix.S_IFLNK {
		return "", unix.EINVAL
	}
	v.ns.RLock()
	defer v.ns.RUnlock()
	l, ok := n.where()
	if !ok {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.ghost == nil || n.ghost.target == "" {
			return "", unix.ESTALE
		}
		return n.ghost.target, nil
	}
	dir, err := v.use(l.parent)
	if err != nil {
		return "", err
	}
	defer dir.release()
	n.mu.Lock()
	cl := n.class
	n.mu.Unlock()
	cipher, err := cl.unwrapped()
	if err != nil {
		return "", err
	}
	target, err := readTarget(dir.Dir, l.entry, cl, cipher)
	return target, v.note(n, wrapf(err, "symlink %d", n.key.ino))
}

// readTarget reads and decrypts a symlink's target.
func readTarget(dir *backing.Dir, entry string, cl *class, cipher *nameenc.Cipher) (string, error) {
	raw, err := dir.Readlink(entry)
	if err != nil || cl.plain {
		return raw, err
	}
	if isTargetFile(raw) {
		b, err := dir.ReadFile(raw, nameenc.MaxStoredTarget)
		if errors.Is(err, unix.ENOENT) {
			return "", ErrName
		}
		if err != nil {
			return "", err
		}
		raw = string(b)
	}
	return cipher.DecryptTarget(raw)
}

// unwrapped returns the name cipher of a class that something was looked up in
// already, so that it is there.
func (c *class) unwrapped() (*nameenc.Cipher, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cipher == nil {
		return nil, unix.EACCES
	}
	return c.cipher, nil
}
