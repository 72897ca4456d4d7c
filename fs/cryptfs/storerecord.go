package cryptfs

import (
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/keymem"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/record"
)

const (
	recordKeyInfo  = "kmsfs v1 store record"
	journalKeyInfo = "kmsfs v1 journal"
)

// Inspect reads the record of the store at path. Nothing of it is verified:
// whoever can write the store can have written it. The policy comes without its
// rules, which take a key. Errors: ErrNoStore,
// ErrNewerFormat, record.ErrFormat.
func Inspect(path string) (*Info, error) {
	root, err := backing.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = root.Close() }()
	rec, layout, err := readRecord(root)
	if err != nil {
		return nil, err
	}
	return newInfo(rec, layout, false), nil
}

func newInfo(rec *record.Store, l *record.Layout, verified bool) *Info {
	return &Info{
		ID: l.ID, Format: record.Version, Placement: l.Placement, HeaderSize: l.HeaderSize,
		Suite: l.Suite, Policy: l.Policy, Keys: rec.Body.Keys, Retired: rec.Body.Retired, Verified: verified,
	}
}

// readRecord reads the first copy of the record. That there is a second one where
// the first is of no use is all that anybody but fsck wants to know: what is
// damaged is mended by somebody who looks at it, and not passed over.
func readRecord(root *backing.Dir) (*record.Store, *record.Layout, error) {
	rec, layout, err := readFirstRecord(root)
	if errors.Is(err, ErrNoStore) || isDamage(err) {
		if _, _, cerr := readCopy(root); cerr == nil {
			return nil, nil, fmt.Errorf("%w (%v)", ErrRecordLost, err)
		}
	}
	return rec, layout, err
}

func readFirstRecord(root *backing.Dir) (*record.Store, *record.Layout, error) {
	meta, err := root.OpenDir(metaDir)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil, ErrNoStore
	}
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = meta.Close() }()
	b, err := meta.ReadFile(storeFile, record.MaxStore)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil, ErrNoStore
	}
	if err != nil {
		return nil, nil, err
	}
	rec, err := record.ParseStore(b)
	switch {
	case errors.Is(err, record.ErrNoStore):
		return nil, nil, ErrNoStore
	case errors.Is(err, record.ErrNewer):
		return nil, nil, fmt.Errorf("%w: %w", ErrNewerFormat, err)
	case err != nil:
		return nil, nil, err
	}
	layout, err := rec.Layout()
	return rec, layout, err
}

// subKey expands a key of the store key for one use.
func subKey(storeKey *envelope.FileKey, info string) (*keymem.Key, error) {
	b, err := hkdf.Expand(sha256.New, storeKey.PRK().Bytes(), info, sha256.Size)
	if err != nil {
		return nil, err
	}
	return keymem.Take(b), nil
}

func hmacSum(key *keymem.Key, parts ...[]byte) (sum [record.MACLen]byte) {
	h := hmac.New(sha256.New, key.Bytes())
	for _, p := range parts {
		h.Write(p)
	}
	h.Sum(sum[:0])
	return sum
}

// signRecord sets the record's MAC.
func signRecord(rec *record.Store, storeKey *envelope.FileKey) error {
	mac, err := recordMAC(rec, storeKey)
	rec.MAC = mac
	return err
}

func recordMAC(rec *record.Store, storeKey *envelope.FileKey) (mac [record.MACLen]byte, err error) {
	signed, err := rec.Signed()
	if err != nil {
		return mac, err
	}
	key, err := subKey(storeKey, recordKeyInfo)
	if err != nil {
		return mac, err
	}
	defer key.Wipe()
	return hmacSum(key, signed), nil
}

// openRecord unwraps the store key through any class that can, checks the record
// with it, and decrypts its rules into l.Policy. The caller owns the key.
func openRecord(ctx context.Context, keys *envelope.Manager, rec *record.Store, l *record.Layout, classes map[string]*class) (*envelope.FileKey, error) {
	var first error
	for _, name := range l.Policy.Names() {
		key, err := openStoreKey(ctx, keys, rec, l, classes[name])
		if err == nil {
			mac, err := recordMAC(rec, key)
			if err == nil && !hmac.Equal(mac[:], rec.MAC[:]) {
				err = ErrRecord
			}
			if err == nil {
				err = getRules(rec, l.Policy, key)
			}
			if err != nil {
				key.Wipe()
				return nil, err
			}
			return key, nil
		}
		if first == nil {
			first = fmt.Errorf("store key, class %s: %w", name, err)
		}
	}
	return nil, first
}

func openStoreKey(ctx context.Context, keys *envelope.Manager, rec *record.Store, l *record.Layout, c *class) (*envelope.FileKey, error) {
	h, err := envelope.Parse(rec.Keys.Store[c.name])
	if err != nil {
		return nil, err
	}
	if h.Store != l.ID || h.File != l.ID {
		return nil, ErrHeader
	}
	return keys.Open(ctx, c.keys(), keywrap.PurposeStore, h)
}

// nameHeaders reads a class's wrapped name key: both copies, its own file's
// first, as far as they are good. Which name key is the right one stands in the
// record's signed part; the recipients are outside that, so a copy that looks
// good may still not open.
func nameHeaders(meta *backing.Dir, rec *record.Store, l *record.Layout, name string) (out []*envelope.Header, err error) {
	want, err := hex.DecodeString(rec.Body.Names[name])
	if err != nil || len(want) != sha256.Size {
		return nil, fmt.Errorf("name key of class %s: %w", name, ErrRecord)
	}
	var first error
	for _, read := range []func() ([]byte, error){
		func() ([]byte, error) { return readClassFile(meta, name) },
		func() ([]byte, error) { return rec.Keys.Names[name], nil },
	} {
		b, err := read()
		if err == nil {
			var h *envelope.Header
			if h, err = envelope.Parse(b); err == nil && (h.Store != l.ID || !hmac.Equal(h.Commitment[:], want)) {
				err = ErrHeader
			}
			if err == nil {
				out = append(out, h)
				continue
			}
		}
		if first == nil || errors.Is(first, unix.ENOENT) {
			first = fmt.Errorf("name key of class %s: %w", name, err)
		}
	}
	if len(out) > 0 {
		return out, nil
	}
	return nil, first
}

func readClassFile(meta *backing.Dir, name string) ([]byte, error) {
	dir, err := meta.OpenDir(classesDir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	return dir.ReadFile(name, envelope.MaxHeader)
}
