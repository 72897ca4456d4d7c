package cryptfs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// attrsOf calls f with access to a node's attributes in the store.
func (v *Volume) attrsOf(n *Node, f func(a backing.Attrs) error) error {
	v.ns.RLock()
	defer v.ns.RUnlock()
	if n == v.nodes.root {
		return f(v.root.Attrs(""))
	}
	l, ok := n.where()
	if !ok {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.file == nil {
			return unix.ESTALE
		}
		return n.file.disk.useHeld(func(d *backing.File) error { return f(d.Attrs()) })
	}
	dir, err := v.use(l.parent)
	if err != nil {
		return err
	}
	defer dir.release()
	st, err := dir.Stat(l.entry)
	if err == nil && keyOf(st) != n.key {
		err = unix.ESTALE
	}
	if err != nil {
		return err
	}
	return f(dir.Attrs(l.entry))
}

// nodeClass returns the class whose keys a node's attributes are under: that of
// the directory that it is in, of the root its own.
func (v *Volume) nodeClass(ctx context.Context, n *Node) (*class, *nameenc.Cipher, error) {
	n.mu.Lock()
	cl := n.class
	n.mu.Unlock()
	if cl == nil {
		if _, err := v.load(ctx, n); err != nil {
			return nil, nil, err
		}
		cl = n.dirClass()
	}
	cipher, err := v.names(ctx, cl)
	return cl, cipher, err
}

// sealAttr returns the name in the store of an attribute of the user namespace.
func sealAttr(cl *class, c *nameenc.Cipher, name string) (string, error) {
	plain := strings.TrimPrefix(name, plainPrefix)
	if cl.plain {
		return name, nil
	}
	enc, err := c.EncryptAttrName(plain)
	return sealedAttr + enc, err
}

// Getxattr returns an attribute, or ENODATA. Attributes of the user namespace
// are decrypted; user.kmsfs.* tell about the file; others are the store's own.
func (v *Volume) Getxattr(ctx context.Context, n *Node, name string) ([]byte, error) {
	if strings.HasPrefix(name, attrPrefix) {
		return v.virtual(n, name)
	}
	if name == capabilityAttr && n.bare.Load() { // asked before the first write to every file
		return nil, unix.ENODATA
	}
	var out []byte
	if !strings.HasPrefix(name, plainPrefix) {
		err := v.attrsOf(n, func(a backing.Attrs) (err error) { out, err = a.Get(name); return err })
		return out, err
	}
	cl, cipher, err := v.nodeClass(ctx, n)
	if err != nil {
		return nil, err
	}
	sealed, err := sealAttr(cl, cipher, name)
	if err != nil {
		return nil, err
	}
	if err := v.attrsOf(n, func(a backing.Attrs) (err error) { out, err = a.Get(sealed); return err }); err != nil {
		return nil, err
	}
	out, err = cipher.DecryptAttrValue(strings.TrimPrefix(name, plainPrefix), out)
	return out, v.note(n, wrapf(err, "attribute of %d", n.key.ino))
}

// Setxattr sets an attribute. Values of the user namespace are always
// encrypted, their names where the class encrypts names. Setting
// user.kmsfs.class on an empty directory classifies it.
func (v *Volume) Setxattr(ctx context.Context, n *Node, name string, value []byte, flags int, c Caller) error {
	if err := v.mayChange(); err != nil {
		return err
	}
	n.bare.Store(false)
	if n == v.nodes.root && (strings.HasPrefix(name, RewrapAttr) || name == RewrapKeysAttr) {
		return v.setRewrap(ctx, name, value, c)
	}
	if name == classAttr {
		if c.Uid != 0 && int(c.Uid) != os.Geteuid() {
			return unix.EPERM
		}
		return v.Classify(ctx, n, string(value))
	}
	if strings.HasPrefix(name, attrPrefix) {
		return ErrReserved
	}
	if name == aclDefaultAttr && n.dir != nil {
		defer n.forgetACL()
	}
	if !strings.HasPrefix(name, plainPrefix) {
		v.touched(n.key)
		return v.attrsOf(n, func(a backing.Attrs) error { return a.Set(name, value, flags) })
	}
	cl, cipher, err := v.nodeClass(ctx, n)
	if err != nil {
		return err
	}
	sealed, err := sealAttr(cl, cipher, name)
	if fault.Of(err) == fault.TooLong {
		return unix.ERANGE // as setxattr(2) says of a name
	}
	if err != nil {
		return err
	}
	value, err = cipher.EncryptAttrValue(strings.TrimPrefix(name, plainPrefix), value)
	if fault.Of(err) == fault.TooLong {
		return unix.E2BIG // and of a value
	}
	if err != nil {
		return err
	}
	v.touched(n.key)
	return v.attrsOf(n, func(a backing.Attrs) error { return a.Set(sealed, value, flags) })
}

func (n *Node) forgetACL() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dir.dacl = aclUnknown
}

// Removexattr removes an attribute, or ENODATA.
func (v *Volume) Removexattr(ctx context.Context, n *Node, name string) error {
	if err := v.mayChange(); err != nil {
		return err
	}
	if strings.HasPrefix(name, attrPrefix) {
		return ErrReserved
	}
	if name == aclDefaultAttr && n.dir != nil {
		defer n.forgetACL()
	}
	sealed := name
	if strings.HasPrefix(name, plainPrefix) {
		cl, cipher, err := v.nodeClass(ctx, n)
		if err != nil {
			return err
		}
		if sealed, err = sealAttr(cl, cipher, name); err != nil {
			return err
		}
	}
	v.touched(n.key)
	return v.attrsOf(n, func(a backing.Attrs) error { return a.Remove(sealed) })
}

// Listxattr returns the names of a node's attributes. The virtual ones are not
// among them: whatever copies attributes would copy them, or try to remove
// them from its copy.
func (v *Volume) Listxattr(ctx context.Context, n *Node) ([]string, error) {
	var raw []string
	err := v.attrsOf(n, func(a backing.Attrs) (err error) { raw, err = a.List(); return err })
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return nil, err
	}
	cl, cipher, err := v.nodeClass(ctx, n)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, name := range raw {
		enc, sealed := strings.CutPrefix(name, sealedAttr)
		switch {
		case sealed && !cl.plain:
			plain, err := cipher.DecryptAttrName(enc)
			if err != nil {
				v.counters.foreign.Add(1)
				v.log.Error("attribute left out", "ino", n.key.ino, "attribute", name, "error", err, "audit", true)
				continue
			}
			out = append(out, plainPrefix+plain)
		case strings.HasPrefix(name, attrPrefix):
		case strings.HasPrefix(name, plainPrefix) && !cl.plain: // nobody's
		default:
			out = append(out, name)
		}
	}
	return out, nil
}

// virtual answers the attributes that tell about a file. They read its header,
// which is no secret, and call no key service.
func (v *Volume) virtual(n *Node, name string) ([]byte, error) {
	if name == statusAttr && n.dir != nil {
		return json.Marshal(v.Status())
	}
	if name == healthAttr && n.dir != nil {
		return json.Marshal(v.Health(context.Background()))
	}
	if id, ok := strings.CutPrefix(name, RewrapAttr); ok && n == v.nodes.root {
		return v.rewrapOutcome(id)
	}
	if name == classAttr && n.dir != nil {
		if _, err := v.load(context.Background(), n); err != nil {
			return nil, err
		}
		return []byte(n.dirClass().name), nil
	}
	n.mu.Lock()
	cl := n.class
	n.mu.Unlock()
	if n.typ != unix.S_IFREG || cl == nil {
		return nil, unix.ENODATA
	}
	if name == classAttr {
		return []byte(cl.name), nil
	}
	if name != keyAttr && name != idAttr {
		return nil, unix.ENODATA
	}
	h, err := v.headerOf(n)
	if err != nil {
		return nil, err
	}
	if h == nil {
		return nil, nil // empty: no key
	}
	if name == idAttr {
		return []byte(h.File.String()), nil
	}
	var uris []string
	for _, r := range h.Recipients {
		uris = append(uris, r.Wrapped.Key)
	}
	return []byte(strings.Join(uris, "\n")), nil
}

// headerOf reads a file's header; nil for an empty file.
func (v *Volume) headerOf(n *Node) (*envelope.Header, error) {
	if f := n.openFile(); f != nil {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.cf.Size() == 0 || f.secrets.header == nil {
			return nil, nil
		}
		h := *f.secrets.header
		return &h, nil
	}
	disk, _, block, err := v.openDisk(n, false, true)
	if err != nil {
		return nil, err
	}
	_ = disk.Close()
	if block == nil {
		return nil, nil
	}
	h, err := envelope.Parse(block)
	if err != nil {
		return nil, fmt.Errorf("file %d: %w", n.key.ino, err)
	}
	return h, nil
}
