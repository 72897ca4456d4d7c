package envelope

import "github.com/kmsfs/kmsfs/crypto/keymem"

// NewFileKey lets the vectors derive from a data key of their own.
func NewFileKey(dek []byte, store, file ID) (*FileKey, error) {
	return newFileKey(keymem.Copy(dek), store, file)
}

// Remembered counts calls under way, failures and keys.
func (m *Manager) Remembered() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.cache.entries)
}
