package cryptfs

import (
	"maps"
	"os"
	"slices"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keymem"
)

// Status is what `kmsfs status` tells about a volume.
type Status struct {
	PID        int            `json:"pid"`
	Store      string         `json:"store"` // path
	ID         string         `json:"id"`
	Format     int            `json:"format"`
	Placement  string         `json:"placement"`
	HeaderSize int            `json:"header_size"`
	Suite      string         `json:"suite"`
	ReadOnly   bool           `json:"read_only"`
	KeysLocked bool           `json:"keys_locked"` // key memory is locked
	Classes    []ClassStatus  `json:"classes"`
	Keys       envelope.Stats `json:"key_service"`
	Counters   Counters       `json:"counters"`
	Condition  Condition      `json:"condition"`
}

// ClassStatus is what is true of one class.
type ClassStatus struct {
	Name      string   `json:"name"`
	Keys      []string `json:"keys"` // the first makes data keys
	Names     string   `json:"names"`
	ChunkSize int      `json:"chunk_size"`      // bytes
	Cache     string   `json:"cache"`           // Go duration
	Available bool     `json:"available"`       // its name key is unwrapped
	Error     string   `json:"error,omitempty"` // why not
}

// Counters count since the volume was opened.
type Counters struct {
	OpenFiles      int    `json:"open_files"`
	KnownNodes     int    `json:"known_nodes"`
	BytesRead      uint64 `json:"bytes_read"`
	BytesWritten   uint64 `json:"bytes_written"`
	Integrity      uint64 `json:"integrity_failures"`
	Repairs        uint64 `json:"repairs"`
	ForeignEntries uint64 `json:"foreign_entries"` // entries and attributes left out
}

// Status tells about the volume now.
func (v *Volume) Status() Status {
	v.ns.RLock()
	classes := maps.Clone(v.classes)
	v.ns.RUnlock()
	s := Status{
		PID: os.Getpid(), Store: v.path, ID: v.layout.ID.String(), Format: envelope.FormatVersion, Placement: v.layout.Placement.String(),
		HeaderSize: v.layout.HeaderSize, Suite: v.layout.Suite.String(), ReadOnly: v.conf.ReadOnly,
		KeysLocked: keymem.Locked(), Keys: v.keys.Stats(), Condition: v.condition(),
	}
	for _, name := range slices.Sorted(maps.Keys(classes)) {
		c := classes[name]
		s.Classes = append(s.Classes, c.status())
	}
	v.nodes.mu.Lock()
	s.Counters.KnownNodes = len(v.nodes.byKey)
	v.nodes.mu.Unlock()
	s.Counters.OpenFiles = len(v.openFiles())
	s.Counters.BytesRead = v.counters.read.Load()
	s.Counters.BytesWritten = v.counters.written.Load()
	s.Counters.Integrity = v.counters.integrity.Load()
	s.Counters.Repairs = v.counters.repairs.Load()
	s.Counters.ForeignEntries = v.counters.foreign.Load()
	return s
}

func (c *class) status() ClassStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	return ClassStatus{
		Name: c.name, Keys: c.ec.Keys, Names: string(c.conf.Names), ChunkSize: c.geo.ChunkSize,
		Cache: c.conf.Cache.String(), Available: c.cipher != nil, Error: c.failure,
	}
}
