package cryptfs

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/record"
	"github.com/kmsfs/kmsfs/fs/rewrap"
)

// The second copy of the store record lies in the root and not beside the first,
// so that it outlives the loss of .kmsfs. The first one counts wherever it can be
// read: the second may be older, where a program that does not know it, or a
// crash, left it so. (docs/format.md, F-70 and F-71)

// InspectCopy is Inspect for the second copy of the record.
func InspectCopy(path string) (*Info, error) {
	root, err := backing.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = root.Close() }()
	rec, layout, err := readCopy(root)
	if err != nil {
		return nil, err
	}
	return newInfo(rec, layout, false), nil
}

func readCopy(root *backing.Dir) (*record.Store, *record.Layout, error) {
	var b []byte
	err := lifted(root, func() (err error) { b, err = root.ReadFile(record.StoreCopy, record.MaxStore); return err })
	if err != nil {
		return nil, nil, err
	}
	rec, err := record.ParseStore(b)
	if err != nil {
		return nil, nil, err
	}
	layout, err := rec.Layout()
	return rec, layout, err
}

// readRecords reads the record that the volume is opened by.
func (v *Volume) readRecords() (err error) {
	v.rec, v.layout, err = readRecord(v.root)
	if v.conf.mend && errors.Is(err, ErrRecordLost) {
		v.lost = err
		v.rec, v.layout, err = readCopy(v.root)
	}
	return err
}

// openMeta opens .kmsfs, and makes it for a repair if it is gone.
func (v *Volume) openMeta() (err error) {
	v.meta, err = v.root.OpenDir(metaDir)
	if !errors.Is(err, unix.ENOENT) || v.lost == nil {
		return err
	}
	if v.conf.ReadOnly {
		return v.lost
	}
	err = rewrap.KeepTimes(v.root, func() error { return v.root.Mkdir(metaDir, 0o700) })
	if err == nil {
		v.meta, err = v.root.OpenDir(metaDir)
	}
	return err
}

// openEither is openClasses, by the second copy of the record if the first turns
// out to be damaged.
func (v *Volume) openEither(open func() (*envelope.FileKey, error)) (*envelope.FileKey, error) {
	key, err := open()
	if !v.conf.mend || v.lost != nil || !isDamage(err) {
		return key, err
	}
	rec, layout, cerr := readCopy(v.root)
	if cerr != nil || layout.ID != v.layout.ID || !sameKeys(v.conf.Keys, rec.Body.Keys) {
		return nil, err
	}
	first, was := v.rec, v.layout
	v.adoptRecord(rec, layout)
	if key, cerr = open(); cerr != nil {
		v.adoptRecord(first, was)
		return nil, err
	}
	if !v.conf.ReadOnly { // where headers are is what the other record says
		v.rewraps.batch = rewrap.NewBatch(v.root, v.meta, v.place)
	}
	v.lost = err
	return key, nil
}

// keepCopy writes the second copy where there is none, or where it says something
// else than the record, which was verified: a policy that was not applied to the
// end, a program that does not know the copy, or somebody who put an older one of
// them back. Nobody can tell, so that what is replaced is kept. Wrapped keys are
// compared by fsck, which tries them.
func (v *Volume) keepCopy() {
	second, _, err := readCopy(v.root)
	switch {
	case err == nil && rewrap.SameSigned(second, v.rec):
		return
	case err == nil:
		v.log.Warn("the second copy of the store record is another one: moved to the quarantine and written anew", "audit", true)
		err = rewrap.KeepTimes(v.root, func() error { return v.quarantine(v.root, record.StoreCopy) })
	case errors.Is(err, unix.ENOENT):
		err = nil
	default:
		err = fmt.Errorf("run kmsfs fsck --repair: %w", err)
	}
	var b []byte
	if err == nil {
		b, err = v.rec.Encode()
	}
	if err == nil {
		err = rewrap.WriteCopy(v.root, b)
	}
	if err != nil {
		v.log.Warn("the second copy of the store record is not written", "error", err)
	}
}
