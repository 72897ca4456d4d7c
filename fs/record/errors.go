package record

import "github.com/kmsfs/kmsfs/crypto/fault"

var (
	// ErrFormat means bytes that no encoder of this package writes.
	ErrFormat = fault.New(fault.BadFormat, "record: malformed record")
	// ErrNewer means a format version that this program does not know.
	ErrNewer = fault.New(fault.Unsupported, "record: made by a newer version of kmsfs")
	// ErrTooLarge means a store record that no reader would take: too many
	// classes, rules or keys.
	ErrTooLarge = fault.New(fault.TooLong, "record: store record is larger than its format allows")
	// ErrNoStore means that the file is no store record at all.
	ErrNoStore = fault.New(fault.Invalid, "record: not a kmsfs store")
)
