package envelope

import "github.com/kmsfs/kmsfs/crypto/keymem"

// NewFileKey lets the vectors derive from a data key of their own.
func NewFileKey(dek []byte, store, file ID) (*FileKey, error) {
	return newFileKey(keymem.Copy(dek), store, file)
}

// Seal wraps dek for h's file under a branch key, and Unseal unwraps it.
func Seal(branchKey []byte, class string, h *Header, dek []byte) (*FileKey, error) {
	b, err := NewFileKey(branchKey, h.Store, h.Branch)
	if err != nil {
		return nil, err
	}
	defer b.Wipe()
	return seal(b.prk, class, h, keymem.Copy(dek))
}

func Unseal(branchKey []byte, class string, h *Header) (*FileKey, error) {
	b, err := NewFileKey(branchKey, h.Store, h.Branch)
	if err != nil {
		return nil, err
	}
	return unseal(b.prk, class, h)
}

// Remembered counts calls under way, failures and keys.
func (m *Manager) Remembered() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.cache.entries)
}
