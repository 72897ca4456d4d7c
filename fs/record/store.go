package record

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/classify"
)

const (
	storeMagic = "kmsfs store "
	// MaxStore bounds a store record, in bytes.
	MaxStore = 4 << 20
)

// Store is the store record: what the whole store is, and how to open it.
//
// On disk it is four lines: "kmsfs store 1", the body (JSON), "mac HEX", and
// the wrapped keys (JSON). The MAC covers the first two. Wrapped keys are
// outside it, because a rewrap changes them without seeing a key; each is a
// header block that commits to the key in it.
type Store struct {
	Body StoreBody
	MAC  [MACLen]byte
	Keys StoreKeys
}

// StoreBody is the authenticated part.
type StoreBody struct {
	ID         string              `json:"id"`      // envelope.ID in hexadecimal
	Created    time.Time           `json:"created"` // UTC
	Placement  string              `json:"placement"`
	HeaderSize int                 `json:"header_size"` // bytes
	Suite      string              `json:"suite"`
	Policy     json.RawMessage     `json:"policy"`            // classify.Policy without its rules, as its Marshal writes it
	Rules      []byte              `json:"rules"`             // the rules, encrypted: they hold plaintext paths
	Keys       map[string][]string `json:"keys"`              // class -> key URIs, aliases resolved; the first makes data keys
	Retired    map[string][]string `json:"retired,omitempty"` // class -> those of its Keys that only unwrap; classes with none are absent
	Names      map[string]string   `json:"names"`             // class -> commitment of its name key, in hexadecimal
}

// StoreKeys holds header blocks by class: the store key wrapped for each class,
// and each class's name key (second copy).
type StoreKeys struct {
	Store map[string][]byte `json:"store"`
	Names map[string][]byte `json:"names"`
}

// Signed returns the bytes that the MAC covers.
func (s *Store) Signed() ([]byte, error) {
	body, err := json.Marshal(s.Body)
	if err != nil {
		return nil, fmt.Errorf("store record: %w", err)
	}
	b := strconv.AppendInt([]byte(storeMagic), Version, 10)
	b = append(b, '\n')
	return append(append(b, body...), '\n'), nil
}

// Encode returns the record as it is stored, or ErrTooLarge.
func (s *Store) Encode() ([]byte, error) {
	b, err := s.Signed()
	if err != nil {
		return nil, err
	}
	b = append(append(b, "mac "...), hex.EncodeToString(s.MAC[:])...)
	keys, err := json.Marshal(s.Keys)
	if err != nil {
		return nil, fmt.Errorf("store record: %w", err)
	}
	b = append(append(append(b, '\n'), keys...), '\n')
	if len(b) > MaxStore {
		return nil, fmt.Errorf("%d bytes: %w", len(b), ErrTooLarge)
	}
	return b, nil
}

// ParseStore reads a store record: its form, not its MAC. Errors are
// ErrNoStore, ErrNewer and ErrFormat.
func ParseStore(b []byte) (*Store, error) {
	if !bytes.HasPrefix(b, []byte(storeMagic)) {
		return nil, ErrNoStore
	}
	if len(b) > MaxStore {
		return nil, fmt.Errorf("store record of %d bytes: %w", len(b), ErrFormat)
	}
	lines := bytes.SplitN(b, []byte("\n"), 6)
	v, err := strconv.ParseInt(string(lines[0][len(storeMagic):]), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("store record: first line: %w", ErrFormat)
	}
	if v != Version {
		return nil, versionError("store record", v)
	}
	if len(lines) != 5 || len(lines[4]) != 0 {
		return nil, fmt.Errorf("store record has not four lines: %w", ErrFormat)
	}
	s := &Store{}
	if err := strictJSON(lines[1], &s.Body); err != nil {
		return nil, err
	}
	mac, ok := bytes.CutPrefix(lines[2], []byte("mac "))
	if !ok || len(mac) != 2*MACLen {
		return nil, fmt.Errorf("store record: MAC line: %w", ErrFormat)
	}
	if _, err := hex.Decode(s.MAC[:], mac); err != nil {
		return nil, fmt.Errorf("store record: MAC line: %w", ErrFormat)
	}
	if err := strictJSON(lines[3], &s.Keys); err != nil {
		return nil, err
	}
	_, east := s.Body.Created.Zone()
	if again, err := s.Encode(); err != nil || east != 0 || !bytes.Equal(again, b) {
		return nil, fmt.Errorf("store record is not in canonical form: %w", ErrFormat)
	}
	return s, nil
}

// Layout is the body in the types that the rest of the program uses.
type Layout struct {
	ID         envelope.ID
	Placement  envelope.Placement
	HeaderSize int
	Suite      dare.Suite
	Policy     *classify.Policy // without rules, until those are decrypted
}

// Layout checks the body's values against each other; errors are ErrFormat.
func (s *Store) Layout() (*Layout, error) {
	bad := func(what string, err error) (*Layout, error) {
		// ErrFormat comes first: what err is in an argument, it is not here.
		return nil, fmt.Errorf("%w: %s: %w", ErrFormat, what, err)
	}
	var l Layout
	var err error
	if l.ID, err = envelope.ParseID(s.Body.ID); err != nil {
		return bad("id", err)
	}
	if l.ID.IsZero() {
		return nil, fmt.Errorf("store record: id of zeros: %w", ErrFormat)
	}
	if l.Placement, err = envelope.ParsePlacement(s.Body.Placement); err != nil {
		return bad("placement", err)
	}
	if l.Suite, err = dare.ParseSuite(s.Body.Suite); err != nil {
		return bad("suite", err)
	}
	if l.Policy, err = classify.Parse(s.Body.Policy); err != nil {
		return bad("policy", err)
	}
	if len(l.Policy.Directories) > 0 {
		return nil, fmt.Errorf("store record: rules in plaintext: %w", ErrFormat)
	}
	l.HeaderSize = s.Body.HeaderSize
	if !HeaderSizeOK(l.HeaderSize) {
		return nil, fmt.Errorf("store record: header size %d: %w", l.HeaderSize, ErrFormat)
	}
	for _, class := range l.Policy.Names() {
		if len(s.Body.Keys[class]) == 0 {
			return nil, fmt.Errorf("store record: class %s has no key: %w", class, ErrFormat)
		}
	}
	for class, retired := range s.Body.Retired {
		if _, ok := l.Policy.Classes[class]; !ok || len(retired) == 0 {
			return nil, fmt.Errorf("store record: retired keys of class %s: %w", class, ErrFormat)
		}
		if err := checkRetired(s.Body.Keys[class], retired); err != nil {
			return nil, fmt.Errorf("store record: class %s: %w", class, err)
		}
	}
	return &l, nil
}

// checkRetired holds retired to being the end of keys, and not all of them.
func checkRetired(keys, retired []string) error {
	n := len(keys) - len(retired)
	if n < 1 || !slices.Equal(keys[n:], retired) {
		return fmt.Errorf("retired keys are not the last of its keys: %w", ErrFormat)
	}
	return nil
}

// Active returns the keys of a class that new data keys are wrapped under, the
// first of which makes them: Body.Keys without the retired ones. s.Layout has
// succeeded.
func (s *Store) Active(class string) []string {
	keys := s.Body.Keys[class]
	n := len(keys) - len(s.Body.Retired[class])
	return keys[:n:n]
}

// HeaderSizeOK reports whether n may be a store's header size: a power of two
// from envelope.MinHeader to envelope.MaxHeader.
func HeaderSizeOK(n int) bool {
	return n >= envelope.MinHeader && n <= envelope.MaxHeader && n&(n-1) == 0
}

func strictJSON(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("store record: JSON: %w", ErrFormat)
	}
	if dec.More() {
		return fmt.Errorf("store record: more after the JSON: %w", ErrFormat)
	}
	return nil
}
