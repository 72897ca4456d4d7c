package envelope

import (
	"context"
	"errors"
	"fmt"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// The sources of a key, as Use.Source names them.
const (
	SourceCall   = "call"        // a call of its own
	SourceJoined = "shared-call" // a call that another caller had begun
	SourceCache  = "cache"       // remembered: a key in the cache, or a failure of the last second
	SourcePool   = "pool"        // made ahead of need
	SourceBranch = "branch"      // made under a branch key that was at hand
	SourceOpen   = "open-file"   // at work already: another opener has it. Not the Manager's; its callers say so
)

// Use tells of one Create or Open. It holds nothing secret.
type Use struct {
	Op       string // "create" or "open"
	Class    string
	Purpose  keywrap.Purpose
	File     ID     // the file, name key or store
	Branch   ID     // what the calls name instead of File where the key is shared; else zero
	Key      string // URI of the key that unwrapped or generated, "" if none was asked
	Source   string // one of the sources, "" if refused before any
	Requests []string
	// Requests are the request ids of the calls that the key came from, however
	// long ago; after a failure, of those that failed.

	Err error // nil: the key is about to be handed out
}

// CallRecord tells of one call to the key service. It holds nothing secret.
type CallRecord struct {
	Op         string // keywrap.OpGenerate, …
	Class      string // the encryption context's; the new one's for ReEncrypt
	Purpose    keywrap.Purpose
	ID         ID     // the encryption context's: of a file, name key, store or branch
	Key        string // URI; the destination's for ReEncrypt
	Attempts   []keywrap.Attempt
	Background bool // nobody waits for it
	Err        error
}

// origin says how a key came to be at hand.
type origin struct {
	key, source string
	requests    []string
}

// observed tells Options.Observe of u, whose outcome is k or err, and returns
// what the caller gets.
func (m *Manager) observed(ctx context.Context, u Use, from origin, k *FileKey, err error) (*FileKey, error) {
	if m.opts.Observe == nil {
		return k, err
	}
	u.Key, u.Source, u.Requests, u.Err = from.key, from.source, from.requests, err
	var ce *keywrap.CallError
	if errors.As(err, &ce) && ce.Key != "" {
		u.Key = ce.Key
	}
	refusal := m.opts.Observe(ctx, u)
	if err == nil && refusal != nil {
		k.Wipe()
		return nil, fmt.Errorf("file %v: use of its key: %w", u.File, refusal)
	}
	return k, err
}

// requestIDs returns the ids of the attempts that count: of a failed call all,
// of another those that succeeded.
func requestIDs(attempts []keywrap.Attempt, err error) (ids []string) {
	for _, a := range attempts {
		if a.RequestID != "" && (err != nil || a.Code == "") {
			ids = append(ids, a.RequestID)
		}
	}
	return ids
}
