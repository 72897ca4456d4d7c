package cryptfs

import (
	"errors"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

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
			k.add(Problem{Path: at, Class: "unfinished", What: "a job was killed: mount the store, or run fsck --repair, to finish what it was at"})
		} else {
			k.add(Problem{Path: at, Class: "pending", What: j.what})
		}
	}
	return nil
}
