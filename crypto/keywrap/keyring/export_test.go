package keyring

import "time"

// The real work factors cost 64 MiB and tens of milliseconds for each of
// hundreds of files.
func init() { workFactors = protection{Passes: 1, MemoryKiB: 64, Threads: 1} }

// SetClock makes k live at another time.
func (k *Keyring) SetClock(now func() time.Time) { k.now = now }
