package keywrap

import (
	"context"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
)

// DataKeyLen is the length of every data key, in bytes.
const DataKeyLen = 32

// Purpose says what a data key is for. It is part of the encryption context,
// so that a policy can allow names and refuse contents.
type Purpose string

// The purposes.
const (
	PurposeData  Purpose = "data"  // contents of one file
	PurposeNames Purpose = "names" // names, links and directory records of one class
	PurposeStore Purpose = "store" // the store record
)

// Context is the encryption context of a call: exactly four pairs, which show
// in the key service's audit log in plaintext. Store and ID are lower-case
// hexadecimal.
type Context struct {
	Store   string
	Class   string
	Purpose Purpose
	ID      string // file id, or the id of the name key or the store
}

// Map returns the pairs as they go to the key service.
func (c Context) Map() map[string]string {
	return map[string]string{
		"kmsfs:store":   c.Store,
		"kmsfs:class":   c.Class,
		"kmsfs:purpose": string(c.Purpose),
		"kmsfs:id":      c.ID,
	}
}

// Wrapped is a data key under a key of the service. It is not secret.
type Wrapped struct {
	Key      string // key URI as the service names it: an ARN, never an alias
	Blob     []byte // ciphertext, opaque
	Material string // key-material id (key version), where the service gives one
}

// DataKey is a fresh data key with its wrapped form. The receiver owns Plain.
type DataKey struct {
	Plain   *keymem.Key
	Wrapped Wrapped
}

// State is the state of a key at the service.
type State string

// The states.
const (
	Enabled         State = "enabled"
	Disabled        State = "disabled"
	PendingDeletion State = "pending-deletion"
	Unavailable     State = "unavailable" // any other state, such as pending import
)

// Description is what a service tells about a key.
type Description struct {
	Key         string    // resolved key URI: for an alias, the key's own
	State       State     // whether it can be used
	Created     time.Time // zero if unknown
	DeletionAt  time.Time // when it goes, if pending deletion
	Rotation    bool      // automatic rotation is on
	Rotated     time.Time // newest key material, zero if unknown
	Material    string    // id of the newest key material, "" if unknown
	Description string    // the service's own text, for people
}

// Provider is a key service. All methods are safe for concurrent use, honour
// the context's deadline, and answer failures as *CallError around a sentinel
// of this package. Key arguments are URIs of this provider.
type Provider interface {
	// GenerateDataKey makes a data key of DataKeyLen bytes under key (a URI or
	// an alias). The result's Wrapped.Key is the key's own URI.
	GenerateDataKey(ctx context.Context, key string, ec Context) (DataKey, error)
	// Encrypt wraps an existing data key under key, for a further recipient.
	// plain stays the caller's.
	Encrypt(ctx context.Context, key string, ec Context, plain *keymem.Key) (Wrapped, error)
	// Decrypt unwraps w. The service is told w.Key and uses no other key. The
	// caller owns the result.
	Decrypt(ctx context.Context, w Wrapped, ec Context) (*keymem.Key, error)
	// ReEncrypt wraps the data key in w under key and context to, without the
	// plaintext leaving the service (or, for the embedded keyring, the provider).
	ReEncrypt(ctx context.Context, w Wrapped, from Context, key string, to Context) (Wrapped, error)
	// Describe resolves a URI or alias and tells about the key. It needs no
	// right to use the key.
	Describe(ctx context.Context, key string) (Description, error)
}
