package envelope

import "github.com/kmsfs/kmsfs/crypto/keymem"

// NewFileKey lets the vectors derive from a data key of their own.
func NewFileKey(dek []byte, store, file ID) (*FileKey, error) {
	return newFileKey(keymem.Copy(dek), store, file)
}
