package cryptfs

import (
	"context"
	"log/slog"
	"time"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/classify"
	"github.com/kmsfs/kmsfs/fs/journal"
	"github.com/kmsfs/kmsfs/fs/lease"
)

// Config says which store to open and how.
type Config struct {
	Store    string              // path of the store
	Provider keywrap.Provider    // the key services
	Keys     map[string][]string // class -> key URIs that this machine has pinned; the store's must be the same
	ReadOnly bool                // no lock, no repair, no change
	Alone    bool                // read-only, but with nobody else at the store
	// Recover has a read-only Open finish what a crash left, as one for writing
	// does, if nobody has the store and it can be written.
	Recover bool
	// WriteOnly lets files be made, written and named, and none be read: for a
	// principal that may unwrap keys for names and for the store record only. The
	// key of a file goes when its last handle does.
	WriteOnly bool
	// LeaseInterval is how often the store's lease is renewed, 0: lease.DefaultInterval.
	// Another machine waits for three and a half of them after this one died.
	LeaseInterval time.Duration
	Log           *slog.Logger // nil: nothing is logged. Plaintext names never are.
	// SameKey tells that two key URIs are one key, such as replicas of a
	// multi-Region key; nil: only equal URIs are.
	SameKey func(a, b string) bool

	// Classified is told when a directory was given a class; it may be nil.
	Classified func(ctx context.Context, class string)

	// What follows goes to the key manager: see envelope.Options.
	Pool       int // data keys ahead of need in each class; 0: its default, negative: none
	Observe    func(ctx context.Context, u envelope.Use) error
	Call       func(ctx context.Context, c envelope.CallRecord) error
	Background func(ctx context.Context) context.Context
	Journal    journal.Options
	Tap        backing.Tap             // tests: in place of every operation on the store's disk; nil: none
	mend       bool                    // second copies of the store record count as well: for fsck
	machine    *lease.Identity         // tests: on whose machine the volume is; nil: this one
	onStep     func(what string) error // tests: called before each change that a job makes
}

// InitConfig says what store to make.
type InitConfig struct {
	Store      string // absent or an empty directory
	Policy     *classify.Policy
	Placement  envelope.Placement
	HeaderSize int // bytes, a power of two
	Suite      dare.Suite
	Provider   keywrap.Provider
	Log        *slog.Logger
}

// Info is what a store record says of its store.
type Info struct {
	ID         envelope.ID
	Format     int
	Placement  envelope.Placement
	HeaderSize int
	Suite      dare.Suite
	Policy     *classify.Policy
	Keys       map[string][]string // class -> key URIs, aliases resolved, the retired ones last
	Retired    map[string][]string // class -> those of its keys that only unwrap
	Verified   bool                // the record's MAC was checked
}

// Names of what a store keeps for itself.
const (
	internalPrefix = ".kmsfs"
	metaDir        = ".kmsfs"
	storeFile      = "store"   // in metaDir
	classesDir     = "classes" // in metaDir
	lockFile       = "lock"    // in metaDir
	journalDir     = "journal" // in metaDir
	dirFile        = ".kmsfs.dir"
	longEntry      = ".kmsfs.l."
	longName       = ".kmsfs.n."
	sidecarPrefix  = ".kmsfs.h."
	targetPrefix   = ".kmsfs.t."

	headerAttr     = "user.kmsfs.header"
	dirAttr        = "user.kmsfs.dir"
	capabilityAttr = "security.capability"
	attrPrefix     = "user.kmsfs."
	sealedAttr     = "user.kmsfs.x."
	classAttr      = "user.kmsfs.class"
	keyAttr        = "user.kmsfs.key"
	idAttr         = "user.kmsfs.id"
	statusAttr     = "user.kmsfs.status"
	healthAttr     = "user.kmsfs.health"
	plainPrefix    = "user."
)
