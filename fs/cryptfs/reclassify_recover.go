package cryptfs

import (
	"context"
	"encoding/hex"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// finishReclassify removes the tree that a reclassification replaced. One that
// has not come to that is left as it is.
func (v *Volume) finishReclassify(_ context.Context) error {
	stage, err := v.meta.OpenDir(reclassifyDir)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = stage.Close() }()
	var job reclassifyJob
	err = v.jobs.readJob(stage, reclassifyMagic, &job)
	switch {
	case errors.Is(err, ErrJob):
		v.log.Error("the record of a reclassification is left alone", "error", err, "audit", true)
		return nil
	case errors.Is(err, unix.ENOENT):
		if err := v.clearTemps(stage); err != nil {
			return err
		}
		return v.endStage(stage, reclassifyDir)
	case err != nil:
		return err
	}
	there, err := v.idAt(job.Path)
	if err != nil || there != job.New {
		return v.clearTemps(stage) // not exchanged yet
	}
	if err := v.restoreAbove(&job); err != nil {
		return err
	}
	if id, err := treeID(stage, stagedTree); err == nil && id == job.Old {
		if err := v.step("put old tree aside"); err != nil {
			return err
		}
		if err := stage.Rename(stagedTree, stage, oldTree, 0); err != nil {
			return err
		}
	}
	if err := v.removeTree(stage, oldTree); err != nil {
		return err
	}
	if err := v.clearTemps(stage); err != nil {
		return err
	}
	return v.endStage(stage, reclassifyDir)
}

// restoreAbove puts back the times of the directory above the exchanged one.
func (v *Volume) restoreAbove(job *reclassifyJob) error {
	if len(job.Times) != 4 || len(job.Path) == 0 {
		return nil
	}
	if err := v.step("put times back"); err != nil {
		return err
	}
	d, err := openPath(v.root, job.Path[:len(job.Path)-1])
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	t := job.Times
	return d.SetTimes(".", unix.Timespec{Sec: t[0], Nsec: t[1]}, unix.Timespec{Sec: t[2], Nsec: t[3]})
}

// treeID returns the id in the record of a directory below d.
func treeID(d *backing.Dir, name string) (string, error) {
	sub, err := d.OpenDir(name)
	if err != nil {
		return "", err
	}
	defer func() { _ = sub.Close() }()
	rec, _, err := readDirRecord(sub)
	if err != nil {
		return "", err
	}
	return hex.EncodeToString(rec.ID[:]), nil
}

// clearTemps removes temporaries of a staging directory.
func (v *Volume) clearTemps(stage *backing.Dir) error {
	entries, err := stage.ReadDir()
	for _, e := range entries {
		if err == nil && isTemp(e.Name) {
			err = v.removeTree(stage, e.Name)
		}
	}
	return err
}

// removeTree removes a file or a directory with all that is in it. Nothing there
// is no failure.
func (v *Volume) removeTree(d *backing.Dir, name string) error {
	err := d.Unlink(name)
	switch {
	case err == nil || errors.Is(err, unix.ENOENT):
		return nil
	case !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM):
		return err
	}
	sub, err := d.OpenDir(name)
	if err != nil {
		return err
	}
	defer func() { _ = sub.Close() }()
	err = lifted(sub, func() error {
		entries, err := sub.ReadDir()
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := v.step("remove old tree"); err != nil {
				return err
			}
			if err := v.removeTree(sub, e.Name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return d.Rmdir(name)
}
