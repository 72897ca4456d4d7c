package journal

import "github.com/kmsfs/kmsfs/crypto/fault"

var (
	// ErrAborted means that a sync of the journal or of the store failed: what
	// the kernel had in memory may be gone, so nothing more is promised until
	// the store is opened again. It has no kind and comes with EIO.
	ErrAborted = fault.New(fault.None, "journal: stopped after a failed sync")
	// ErrClosed means a call after Close.
	ErrClosed = fault.New(fault.Invalid, "journal: closed")
	// ErrBegun means a call that is for a log in which no epoch has begun.
	ErrBegun = fault.New(fault.Invalid, "journal: an epoch has begun")
	// ErrRecovering means a checkpoint before Recovered.
	ErrRecovering = fault.New(fault.Invalid, "journal: recovery is not over")
	// ErrEntry means an entry that the format does not allow.
	ErrEntry = fault.New(fault.Invalid, "journal: entry that no record can hold")
	// ErrEntryTooLong means an entry of more operations or bytes than a record holds.
	ErrEntryTooLong = fault.New(fault.TooLong, "journal: entry is longer than a record may be")
	// ErrNewer means a segment of a format version that this program does not know.
	ErrNewer = fault.New(fault.Unsupported, "journal: made by a newer version of kmsfs")
	// ErrMissing means that records which a crash left for recovery are gone:
	// a segment was removed, damaged, or put in the other's place.
	ErrMissing = fault.New(fault.Integrity, "journal: a segment that recovery needs is missing or damaged")
	// ErrEpochs means that the last epoch number is used up.
	ErrEpochs = fault.New(fault.Unsupported, "journal: no epoch number is left")
)
