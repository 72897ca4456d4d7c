package report

import (
	"cmp"
	"slices"
	"time"
)

// Data is the contents of a page. Zero times are unknown and shown as such.
type Data struct {
	StoreID string    // hexadecimal
	Store   string    // path of the ciphertext directory
	Made    time.Time // when the page's facts were gathered
	Version string    // of the program

	Classes []Class
	Keys    []Key

	// Counted says that files and bytes are known. If they are not, the page
	// says so instead of showing zeros. Uncounted are files whose header could
	// not be read: they depend on keys that nobody knows.
	Counted   bool
	Uncounted uint64

	Log      *Log     // nil: there is no audit log
	Activity Activity // from the log, see Collector
}

// Class is one data classification.
type Class struct {
	Name     string
	Keys     []string // URIs, the first makes data keys
	Retired  []string // URIs that only unwrap
	Names    string   // "encrypted" or "plain"
	DataKeys string   // "per-file" or "shared"
	Cache    time.Duration
}

// Key is one key of a key service.
type Key struct {
	URI        string
	State      string // as the service names it: enabled, disabled, pending-deletion, …; "" if it was not told
	Error      string // why the service told nothing
	Created    time.Time
	Rotation   bool      // automatic rotation is on
	Rotated    time.Time // newest key material
	DeletionAt time.Time // when it goes, if pending deletion
	LastUsed   time.Time // by this store, as far as the log goes back

	Uses      []Dependence // by class
	Materials []Material   // by key material, where the service names it
	NameKeys  []string     // classes whose name key has a copy under the key
	StoreKeys []string     // classes whose copy of the store key is under it
}

// Dependence is what depends on a key, for one class: files with a copy of
// their data key under it, and their plaintext bytes.
type Dependence struct {
	Class     string
	Files     uint64
	Bytes     uint64
	OnlyFiles uint64 // of these, the files that no other key opens
	OnlyBytes uint64
}

// Material is one key material (key version).
type Material struct {
	ID    string
	Files uint64
	Bytes uint64
}

// PendingDeletion reports whether the key is going.
func (k *Key) PendingDeletion() bool { return k.State == "pending-deletion" || !k.DeletionAt.IsZero() }

// Totals sums up Uses.
func (k *Key) Totals() (d Dependence) {
	for _, u := range k.Uses {
		d.Files += u.Files
		d.Bytes += u.Bytes
		d.OnlyFiles += u.OnlyFiles
		d.OnlyBytes += u.OnlyBytes
	}
	return d
}

// Log is what verifying the audit log found.
type Log struct {
	Path     string
	Files    int
	Lines    uint64
	First    uint64 // number of the first line that is there
	Last     uint64
	Head     string // hash of the last line: to be noted
	From, To time.Time
	Lost     uint64   // events that could not be written
	Problems []string // not empty: the chain is broken
	Warnings []string
}

// Activity is key use over time, as a log tells it.
type Activity struct {
	Hours     []Hour // ascending, hours without anything left out
	Denials   []Denial
	Integrity []Damage
	Users     []User

	Calls     uint64 // calls to the key service that succeeded
	Cached    uint64 // keys handed out without a call
	Denied    uint64 // keys refused, for whatever reason
	Damaged   uint64 // integrity events
	MoreUsers int    // users that the list has no room for
	MoreDeny  int    // groups of denials likewise
}

// Hour counts the events of one hour.
type Hour struct {
	Start  time.Time // UTC
	Calls  uint64
	Cached uint64
	Denied uint64
}

// Denial is a group of refusals that differ in nothing but time and file.
type Denial struct {
	Class, Key, Op string
	Result         string // kind of failure
	Code           string // the key service's own error code
	Detail         string
	UID            string // "" for work that is done for nobody
	Program        string
	Count          uint64
	First, Last    time.Time
	Request        string // request id of the last
	File           string // file id of the last
}

// Damage is one integrity event.
type Damage struct {
	Time    time.Time
	Class   string
	File    string // file id
	Op      string
	Detail  string
	UID     string
	Program string
}

// User is who used the keys of a class.
type User struct {
	UID, Program, Class string
	Used                uint64 // keys handed out
	Denied              uint64
	Last                time.Time
}

// pending returns the keys that are going, those with dependents first.
func (d *Data) pending() (out []Key) {
	for _, k := range d.Keys {
		if k.PendingDeletion() {
			out = append(out, k)
		}
	}
	slices.SortStableFunc(out, func(a, b Key) int { return cmp.Compare(b.Totals().OnlyFiles, a.Totals().OnlyFiles) })
	return out
}
