package cryptfs

import (
	"encoding/binary"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
)

// identity is what the kernel knows a node by: the number, and the generation
// that tells apart files which get the same number one after the other. The
// kernel makes file handles of the two (name_to_handle_at(2), NFS), so that they
// follow from the store alone: a handle outlives the node and the mount.
//
//	bit 63      1: passing, counted up; its handles end with the node
//	bits 48-62  tag
//	bits 0-47   inode number in the store
//
// Tag and generation are a MAC of the inode's number, birth and the handle that
// the store's file system has for it. So no other file that got the number has
// the same identity, and nobody can make up a handle who was not given it.
type identity struct {
	id         uint64
	generation uint32
}

const (
	handleKeyInfo = "kmsfs v1 handle"
	inoBits       = 48
	passing       = 1 << 63
)

// openIdentities makes the key of identities. It comes before the root's node.
func (v *Volume) openIdentities(storeKey *envelope.FileKey) (err error) {
	v.identKey, err = subKey(storeKey, handleKeyInfo)
	return err
}

// identify returns the identity of an inode, given its stat and what tells the
// handle that the store's file system has for it; id is 0 if it has none that
// lasts. That is so on a file system which neither knows births nor has handles,
// and for what is mounted within the store.
func (v *Volume) identify(st backing.Stat, handle func() []byte) func() identity {
	return func() identity {
		if st.Dev != v.nodes.root.key.dev || st.Ino >= 1<<inoBits {
			return identity{}
		}
		h, born := handle(), keyOf(st).born
		if h == nil && born == 0 {
			return identity{}
		}
		b := binary.BigEndian.AppendUint64(make([]byte, 0, 64), st.Ino)
		b = binary.BigEndian.AppendUint64(b, uint64(born))
		mac := hmacSum(v.identKey, append(b, h...))
		id := binary.BigEndian.Uint64(mac[:8])>>(inoBits+1)<<inoBits | st.Ino
		if id <= RootID {
			return identity{}
		}
		return identity{id, binary.BigEndian.Uint32(mac[8:])}
	}
}
