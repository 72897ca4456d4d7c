package cryptfs

import (
	"bytes"
	"context"
	"crypto/hmac"
	"encoding/hex"
	"errors"
	"fmt"
	"path"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/fault"
	"github.com/kmsfs/kmsfs/crypto/keywrap"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/record"
	"github.com/kmsfs/kmsfs/fs/rewrap"
)

const (
	recordPath   = metaDir + "/" + storeFile
	recordCopy   = record.StoreCopy
	journalPath  = metaDir + "/" + journalDir
	classesPath  = metaDir + "/" + classesDir
	anotherBlock = "wrapped name key differs from the copy in the store record"
)

func isStoreCopy(entry string) bool { return entry == recordCopy }

// keepTimes changes something of the store's own in a directory of the tree, whose
// times are the plaintext's.
func keepTimes(d *backing.Dir, change func() error) error { return rewrap.KeepTimes(d, change) }

// checkStore checks what the store keeps for itself: its record with the wrapped
// keys in it, both copies of either, and what a crash left open.
func (k *checker) checkStore(ctx context.Context) error {
	want, err := k.checkKeys(ctx)
	if err != nil {
		return err
	}
	if err := k.checkRecords(want); err != nil {
		return err
	}
	if err := k.clearMeta(k.v.meta, metaDir, nil); err != nil {
		return err
	}
	if k.v.conf.ReadOnly {
		if err := k.unfinished(); err != nil {
			return err
		}
	}
	return k.jobs()
}

// wrapped is a key of the store itself, of which there are several copies.
type wrapped struct {
	cl      *class
	purpose keywrap.Purpose
	fits    func(h *envelope.Header, key *envelope.FileKey) bool // key is nil in a quick check
}

// try returns nil for a header block that gives the key.
func (k *checker) try(ctx context.Context, w *wrapped, block []byte) error {
	h, err := envelope.Parse(block)
	if err != nil {
		return err
	}
	if k.conf.Quick {
		if !w.fits(h, nil) {
			return ErrHeader
		}
		return nil
	}
	key, err := k.v.keys.Open(ctx, w.cl.keys(), w.purpose, h)
	if err != nil {
		return err
	}
	defer key.Wipe()
	if !w.fits(h, key) {
		return ErrHeader
	}
	return nil
}

// best tries blocks until one is good, and returns it, with the error of the
// first: nil if that is the one. Where none is good it is one that a key which is
// not to be had now may open, else the first.
func (k *checker) best(ctx context.Context, w *wrapped, blocks ...[]byte) (block []byte, good bool, first error) {
	block = blocks[0]
	closed := false
	for i, b := range blocks {
		if i > 0 && (b == nil || bytes.Equal(b, blocks[0])) {
			continue
		}
		err := k.try(ctx, w, b)
		if i == 0 {
			first = err
		}
		if err == nil {
			return b, true, first
		}
		if !closed && isKeyKind(fault.Of(err)) {
			block, closed = b, true
		}
	}
	return block, false, first
}

// checkKeys tries every wrapped store key and name key, and returns the record
// with the good ones in it.
func (k *checker) checkKeys(ctx context.Context) (*record.Store, error) {
	v := k.v
	want := cloneRecord(v.rec)
	second, l, err := readCopy(v.root)
	if err != nil || l.ID != v.layout.ID {
		second = &record.Store{}
	}
	for _, name := range v.policy.Names() {
		cl := v.classes[name]
		store := &wrapped{cl, keywrap.PurposeStore, func(h *envelope.Header, key *envelope.FileKey) bool {
			if h.Store != v.layout.ID || h.File != v.layout.ID {
				return false
			}
			if key == nil {
				return true
			}
			mac, err := recordMAC(v.rec, key)
			return err == nil && hmac.Equal(mac[:], v.rec.MAC[:])
		}}
		block, good, err := k.best(ctx, store, v.rec.Keys.Store[name], second.Keys.Store[name])
		k.wrappedIn(recordPath, "wrapped store key of class "+name, good, err)
		want.Keys.Store[name] = block

		commitment, _ := hex.DecodeString(v.rec.Body.Names[name])
		names := &wrapped{cl, keywrap.PurposeNames, func(h *envelope.Header, _ *envelope.FileKey) bool {
			return h.Store == v.layout.ID && hmac.Equal(h.Commitment[:], commitment)
		}}
		own, rerr := readClassFile(v.meta, name)
		block, good, err = k.best(ctx, names, v.rec.Keys.Names[name], own, second.Keys.Names[name])
		k.wrappedIn(recordPath, "wrapped name key of class "+name, good, err)
		want.Keys.Names[name] = block
		if good && !bytes.Equal(own, block) {
			k.classFile(ctx, names, name, own, rerr, block)
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	return want, nil
}

// wrappedIn tells of a wrapped key in the record. It is mended with the record, if
// there is a good one.
func (k *checker) wrappedIn(at, what string, good bool, err error) {
	switch {
	case err == nil:
	case good:
		k.mend(Problem{Path: at, What: what + ": " + err.Error() + "; there is another copy", Kind: fault.Integrity}, func() error { return nil })
	default:
		k.failed(at, fmt.Errorf("%s: %w", what, err))
	}
}

// classFile restores the file of a class's name key from the record.
func (k *checker) classFile(ctx context.Context, w *wrapped, name string, own []byte, rerr error, want []byte) {
	p := Problem{Path: path.Join(classesPath, name), What: anotherBlock, Class: classSecond}
	if rerr == nil {
		rerr = k.try(ctx, w, own)
	}
	if rerr != nil && !isKeyKind(fault.Of(rerr)) {
		p.Class, p.Kind = "", fault.Integrity
	}
	k.mend(p, func() error {
		if err := k.v.meta.Mkdir(classesDir, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		dir, err := k.v.meta.OpenDir(classesDir)
		if err != nil {
			return err
		}
		defer func() { _ = dir.Close() }()
		return dir.Replace(name, want, 0o600)
	})
}

// checkRecords compares both copies of the record with what it is to be. What is
// replaced is kept, unless it only lacks good keys.
func (k *checker) checkRecords(want *record.Store) error {
	v := k.v
	b, err := want.Encode()
	if err != nil {
		return err
	}
	first, ferr := v.meta.ReadFile(storeFile, record.MaxStore)
	if v.lost != nil {
		k.mend(Problem{Path: recordPath, What: "first copy of the store record: " + v.lost.Error(), Kind: fault.Integrity}, func() error {
			if len(first) > 0 {
				if err := v.quarantineBytes(storeFile, first); err != nil {
					return err
				}
			}
			return v.meta.Replace(storeFile, b, 0o600)
		})
	} else if k.conf.Repair && (ferr != nil || !bytes.Equal(first, b)) { // listed key by key
		if err := v.meta.Replace(storeFile, b, 0o600); err != nil {
			return err
		}
	}
	if k.conf.Repair {
		v.rec = want
	}
	var second []byte
	cerr := lifted(v.root, func() (err error) { second, err = v.root.ReadFile(recordCopy, record.MaxStore); return err })
	if cerr == nil && bytes.Equal(second, b) {
		return nil
	}
	what := "second copy of the store record is another one"
	if cerr != nil {
		what = "second copy of the store record is missing"
	} else if _, err := record.ParseStore(second); err != nil {
		what = "second copy of the store record is damaged"
	}
	k.mend(Problem{Path: recordCopy, What: what, Class: classSecond}, func() error {
		if len(second) > 0 {
			if err := v.quarantineBytes(recordCopy, second); err != nil {
				return err
			}
		}
		return rewrap.WriteCopy(v.root, b)
	})
	return nil
}

// clearMeta puts aside temporaries of the store's own directory, and class files
// of classes that the record does not have: a policy that was not applied to the
// end leaves them.
func (k *checker) clearMeta(d *backing.Dir, at string, classes map[string]bool) error {
	entries, err := d.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range entries {
		p := Problem{Path: path.Join(at, e.Name), Class: classOrphan}
		switch {
		case isTemp(e.Name):
			p.What = "temporary that a crash left"
		case classes != nil && !classes[e.Name] && k.v.lost == nil:
			p.What = "name key of a class that the store record does not have"
		case classes == nil && e.Name == classesDir:
			if err := k.clearClasses(d); err != nil {
				return err
			}
			continue
		default:
			continue
		}
		k.mend(p, func() error { return k.v.quarantine(d, e.Name) })
	}
	return nil
}

func (k *checker) clearClasses(meta *backing.Dir) error {
	dir, err := meta.OpenDir(classesDir)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	classes := map[string]bool{}
	for _, name := range k.v.policy.Names() {
		classes[name] = true
	}
	return k.clearMeta(dir, classesPath, classes)
}

// unfinished tells of files that the next mount, or a repair, will finish.
func (k *checker) unfinished() error {
	if b, err := k.v.meta.ReadFile(record.RewrapFile, record.MaxRewrap); err == nil && len(b) > 0 {
		k.add(Problem{Path: path.Join(metaDir, record.RewrapFile), Class: classUnfinished,
			What: "a rewrap was ended while it wrote headers: mount the store, or run fsck --repair, to finish them"})
	}
	if k.v.found != nil {
		k.add(Problem{Path: journalPath, Class: classUnfinished,
			What: "the store was not unmounted cleanly: mount it, or run fsck --repair, to finish files that were being written"})
	}
	return nil
}

// jobs tells of jobs that were interrupted: what the next mount, or a repair,
// finishes is unfinished; a job that goes on when it is called again is pending,
// and no damage.
func (k *checker) jobs() error {
	for _, j := range []struct{ dir, what string }{
		{rekeyDir, "a rekey was interrupted: kmsfs rekey goes on with it"},
		{reclassifyDir, "a reclassification was interrupted: kmsfs reclassify goes on with it"},
	} {
		stage, err := k.v.meta.OpenDir(j.dir)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return err
		}
		entries, err := stage.ReadDir()
		_ = stage.Close()
		if err != nil {
			return err
		}
		half := false
		for _, e := range entries {
			half = half || strings.HasPrefix(e.Name, swapNew) || e.Name == oldTree
		}
		at := path.Join(metaDir, j.dir)
		if half {
			k.add(Problem{Path: at, Class: classUnfinished, What: "a job was killed: mount the store, or run fsck --repair, to finish what it was at"})
		} else {
			k.add(Problem{Path: at, Class: classPending, What: j.what})
		}
	}
	return nil
}

// births remembers the newest epoch in which a file was born.
type births struct {
	mu     sync.Mutex
	newest uint32
}

func (b *births) note(birth uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.newest = max(b.newest, uint32(birth>>32))
}

// checkEpochs compares births with the journal. One that was lost, or put back,
// begins with epochs that were used before: in those a cut of an old file passes
// for what a crash did (docs/format.md, F-31 and F-60).
func (k *checker) checkEpochs() {
	if k.births.newest <= k.v.lastEpoch {
		return
	}
	if k.conf.Repair {
		k.reborn = k.births.newest // when the journal is closed
		return
	}
	k.add(k.oldJournal())
}

func (k *checker) oldJournal() Problem {
	return Problem{Path: journalPath, Kind: fault.Integrity, What: fmt.Sprintf(
		"the journal is lost or an older one: it is at epoch %d, and files were born in epoch %d", k.v.lastEpoch, k.births.newest)}
}

// liftEpoch has the journal begin after every epoch that a file was born in.
func (k *checker) liftEpoch(ctx context.Context) error {
	v, err := Open(ctx, k.conf.Config)
	if err != nil {
		return err
	}
	k.mend(k.oldJournal(), func() error { return v.journal.Beyond(k.reborn) })
	return v.Close()
}
