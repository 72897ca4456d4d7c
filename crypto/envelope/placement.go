package envelope

import "fmt"

// Placement says where the header of a store's files lies. A store has one,
// chosen at init. The values are stored in the store record.
type Placement uint8

// The placements. The zero Placement is none.
const (
	Prefix  Placement = 1 // "header": the first bytes of the store file
	Xattr   Placement = 2 // "xattr": the extended attribute XattrName
	Sidecar Placement = 3 // "sidecar": a file of its own, SidecarName, in the same directory
)

// XattrName is the extended attribute that holds the header under Xattr.
const XattrName = "user.kmsfs.header"

// SidecarPrefix begins the name of every sidecar file.
const SidecarPrefix = ".kmsfs.h."

var placementNames = [...]string{Prefix: "header", Xattr: "xattr", Sidecar: "sidecar"}

// ParsePlacement is the inverse of Placement.String. It answers ErrInvalid for
// other names.
func ParsePlacement(name string) (Placement, error) {
	for p := Prefix; p.Valid(); p++ {
		if placementNames[p] == name {
			return p, nil
		}
	}
	return 0, fmt.Errorf("placement %q (want header, xattr or sidecar): %w", name, ErrInvalid)
}

// Valid reports whether p is one of the placements above.
func (p Placement) Valid() bool { return p >= Prefix && p <= Sidecar }

// String returns "header", "xattr", "sidecar", or "unknown".
func (p Placement) String() string {
	if p.Valid() {
		return placementNames[p]
	}
	return "unknown"
}

// Base returns how many bytes of a store file come before its first chunk: the
// header under Prefix, none under Xattr, the file id under Sidecar.
func (p Placement) Base(headerSize int) int64 {
	switch p {
	case Prefix:
		return int64(headerSize)
	case Sidecar:
		return int64(len(ID{}))
	}
	return 0
}

// SidecarName returns the name of the file that holds the header of file under
// Sidecar.
func SidecarName(file ID) string { return SidecarPrefix + file.String() }

// MarshalText returns what String returns, and ErrInvalid for no placement.
func (p Placement) MarshalText() ([]byte, error) {
	if !p.Valid() {
		return nil, fmt.Errorf("placement %d: %w", uint8(p), ErrInvalid)
	}
	return []byte(p.String()), nil
}

// UnmarshalText parses as ParsePlacement does.
func (p *Placement) UnmarshalText(text []byte) error {
	v, err := ParsePlacement(string(text))
	if err == nil {
		*p = v
	}
	return err
}
