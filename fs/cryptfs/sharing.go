package cryptfs

import (
	"errors"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// sharing knows, for each directory in which something was removed, the
// companions (sidecars, long targets) that several files need. kmsfs makes none:
// hard links in one directory are one file. But whoever copies a store with a
// tool that does not keep hard links, as those for S3 do not, gets a file for
// each name and one sidecar beside them.
type sharing struct {
	mu   sync.Mutex
	dirs map[inoKey]map[string]bool // also empty ones: a directory is searched once
	gen  uint64                     // counts what makes a search under way stale
}

// maxSharing bounds the directories that are remembered.
const maxSharing = 1 << 16

func (s *sharing) get(dir inoKey) (set map[string]bool, known bool, gen uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	set, known = s.dirs[dir]
	return set, known, s.gen
}

func (s *sharing) put(dir inoKey, set map[string]bool, gen uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gen != gen {
		return
	}
	if s.dirs == nil || len(s.dirs) >= maxSharing {
		s.dirs = map[inoKey]map[string]bool{}
	}
	s.dirs[dir] = set
}

// forget is for a directory that got a companion which was there already: it
// may be another file's.
func (s *sharing) forget(dir *backing.Dir) {
	st, err := dir.Stat("")
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gen++
	if err != nil {
		s.dirs = nil
		return
	}
	delete(s.dirs, keyOf(st))
}

// removeUnshared removes a companion that the file of inode ino needs no more,
// unless another file needs it.
func (v *Volume) removeUnshared(dir *backing.Dir, name string, ino uint64) {
	if !v.shared(dir, name, ino) {
		_ = dir.Unlink(name) // an orphan is fsck's
	}
}

// shared reports whether a file other than the one of inode ino needs the
// companion name in dir. If in doubt it does: an orphan is fsck's.
func (v *Volume) shared(dir *backing.Dir, name string, ino uint64) bool {
	st, err := dir.Stat("")
	if err != nil {
		return true
	}
	set, known, gen := v.sharing.get(keyOf(st))
	if known && !set[name] {
		return false
	}
	owners, err := v.companions(dir)
	if err != nil {
		return true
	}
	needed := false
	for _, owner := range owners[name] {
		needed = needed || owner != ino
	}
	set = map[string]bool{}
	for companion, inodes := range owners {
		if len(inodes) > 1 || companion == name && needed {
			set[companion] = true
		}
	}
	v.sharing.put(keyOf(st), set, gen)
	return needed
}

// companions returns the inodes that need each companion in a directory.
func (v *Volume) companions(dir *backing.Dir) (map[string][]uint64, error) {
	var entries []backing.Entry
	err := lifted(dir, func() error {
		entries = entries[:0]
		return dir.Each(func(e backing.Entry) bool {
			if !isInternal(e.Name) {
				entries = append(entries, e)
			}
			return true
		})
	})
	if err != nil {
		return nil, err
	}
	out, seen := map[string][]uint64{}, map[uint64]bool{}
	for _, e := range entries {
		st, err := dir.Stat(e.Name)
		if errors.Is(err, unix.ENOENT) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		if seen[st.Ino] {
			continue
		}
		seen[st.Ino] = true
		name, err := v.sidecarOf(dir, e.Name, st)
		if err != nil {
			return nil, err
		}
		if name != "" {
			out[name] = append(out[name], st.Ino)
		}
	}
	return out, nil
}
