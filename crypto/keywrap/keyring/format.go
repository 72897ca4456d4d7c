package keyring

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

const (
	formatName    = "kmsfs-keyring"
	formatVersion = 1
	maxFileLen    = 4 << 20
	maxKeys       = 1000
	maxVersions   = 200 // of one key
)

type document struct {
	Format     string      `json:"format"`
	Version    int         `json:"version"`
	Protection *protection `json:"protection,omitempty"`
	Sealed     []byte      `json:"sealed,omitempty"`
	Keys       []keyRecord `json:"keys,omitzero"`
}

type body struct {
	Keys []keyRecord `json:"keys"`
}

type keyRecord struct {
	Name       string        `json:"name"`
	State      keywrap.State `json:"state"`
	Created    time.Time     `json:"created"`
	Rotated    time.Time     `json:"rotated,omitzero"`
	DeletionAt time.Time     `json:"deletion_at,omitzero"`
	Keyset     []byte        `json:"keyset"`
}

// contents is what a file says. It and its keys are not changed once made:
// a mutation makes a new one, so that readers need no lock.
type contents struct {
	protection *protection // nil without a passphrase
	keys       map[string]*entry
}

func (c *contents) clone() *contents {
	return &contents{protection: c.protection, keys: maps.Clone(c.keys)}
}

// parse reads a file. bodyKey is asked for the key of a sealed body, which
// stays its owner's. parse wipes data, which holds keys if it is not sealed.
func parse(data []byte, bodyKey func(*protection) (*keymem.Key, error)) (*contents, error) {
	defer clear(data)
	if len(data) > maxFileLen {
		return nil, fmt.Errorf("file of %d bytes: %w", len(data), ErrFormat)
	}
	var doc document
	if err := strictJSON(data, &doc); err != nil {
		return nil, err
	}
	defer wipeRecords(doc.Keys)
	if doc.Format != formatName || doc.Version != formatVersion {
		return nil, fmt.Errorf("format %.20q version %d: %w", doc.Format, doc.Version, ErrFormat)
	}
	if doc.Protection == nil {
		if doc.Sealed != nil || doc.Keys == nil {
			return nil, fmt.Errorf("neither protected nor in clear: %w", ErrFormat)
		}
		return build(nil, doc.Keys)
	}
	if doc.Keys != nil {
		return nil, fmt.Errorf("protected, with keys in clear: %w", ErrFormat)
	}
	if err := doc.Protection.check(); err != nil {
		return nil, err
	}
	key, err := bodyKey(doc.Protection)
	if err != nil {
		return nil, err
	}
	plain, err := doc.Protection.open(key, doc.Sealed)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	var b body
	err = strictJSON(plain, &b)
	defer wipeRecords(b.Keys)
	if err != nil {
		return nil, err
	}
	if b.Keys == nil {
		return nil, fmt.Errorf("body without keys: %w", ErrFormat)
	}
	return build(doc.Protection, b.Keys)
}

// strictJSON decodes one JSON value and nothing else. The decoder's own words
// are dropped: they can quote the input, which holds keys.
func strictJSON(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("bad JSON near byte %d: %w", dec.InputOffset(), ErrFormat)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("more than one JSON value: %w", ErrFormat)
	}
	return nil
}

func wipeRecords(recs []keyRecord) {
	for _, r := range recs {
		clear(r.Keyset)
	}
}

func build(p *protection, recs []keyRecord) (*contents, error) {
	if len(recs) > maxKeys {
		return nil, fmt.Errorf("%d keys: %w", len(recs), ErrFormat)
	}
	c := &contents{protection: p, keys: make(map[string]*entry, len(recs))}
	for _, r := range recs {
		e, err := r.entry()
		if err != nil {
			return nil, err
		}
		if c.keys[e.name] != nil {
			return nil, fmt.Errorf("two keys %q: %w", e.name, ErrFormat)
		}
		c.keys[e.name] = e
	}
	return c, nil
}

func (r keyRecord) entry() (*entry, error) {
	if !validName(r.Name) {
		return nil, fmt.Errorf("key name %.70q: %w", r.Name, ErrFormat)
	}
	switch r.State {
	case keywrap.Enabled, keywrap.Disabled, keywrap.PendingDeletion:
	default:
		return nil, fmt.Errorf("key %q: state %.20q: %w", r.Name, r.State, ErrFormat)
	}
	if r.Created.IsZero() || (r.State == keywrap.PendingDeletion) == r.DeletionAt.IsZero() {
		return nil, fmt.Errorf("key %q: dates do not fit its state: %w", r.Name, ErrFormat)
	}
	e := &entry{name: r.Name, state: r.State, created: r.Created, rotated: r.Rotated, deletionAt: r.DeletionAt}
	if err := e.readKeyset(r.Keyset); err != nil {
		return nil, fmt.Errorf("key %q: %w", r.Name, err)
	}
	return e, nil
}

// encode is the inverse of parse; key seals the body if c is protected. The
// caller wipes the result.
func (c *contents) encode(key *keymem.Key) ([]byte, error) {
	recs, err := c.records()
	defer wipeRecords(recs)
	if err != nil {
		return nil, err
	}
	doc := document{Format: formatName, Version: formatVersion, Protection: c.protection, Keys: recs}
	if c.protection != nil {
		plain, err := json.Marshal(body{Keys: recs})
		if err != nil {
			return nil, err
		}
		defer clear(plain)
		doc.Keys = nil
		if doc.Sealed, err = c.protection.seal(key, plain); err != nil {
			return nil, err
		}
	}
	return doc.marshal()
}

func (d document) marshal() ([]byte, error) {
	out, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return nil, err
	}
	if len(out) >= maxFileLen {
		clear(out)
		return nil, fmt.Errorf("file of %d bytes: %w", len(out), ErrFull)
	}
	return append(out, '\n'), nil
}

// records returns the keys by name. The caller wipes them, after an error too.
func (c *contents) records() ([]keyRecord, error) {
	recs := make([]keyRecord, 0, len(c.keys))
	for _, name := range slices.Sorted(maps.Keys(c.keys)) {
		e := c.keys[name]
		ks, err := e.writeKeyset()
		if err != nil {
			return recs, err
		}
		recs = append(recs, keyRecord{Name: name, State: e.state, Created: e.created, Rotated: e.rotated,
			DeletionAt: e.deletionAt, Keyset: ks})
	}
	return recs, nil
}
