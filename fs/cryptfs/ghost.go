package cryptfs

import (
	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/fs/backing"
)

// ghost keeps a file within reach whose last name went while the kernel still
// knew the node: whoever looked the name up just before may be about to open
// it, and gets the old file, as on any local file system.
type ghost struct {
	path   *backing.File // O_PATH
	block  []byte        // the header, where it lay in a sidecar
	target string        // of a symlink
}

// maxGhosts bounds the descriptors that ghosts hold. Beyond it such an open is
// ESTALE, on which the kernel looks the name up again.
const maxGhosts = 128 // fewer where the process may have few descriptors

// raise makes a ghost of a node whose last name is about to go; nil where none
// is needed or to be had.
func (v *Volume) raise(n *Node, dir *backing.Dir, entry string, st backing.Stat) *ghost {
	if n == nil || n.IsDir() || st.Nlink > 1 || v.ghosts.Load() >= v.descr.ghosts {
		return nil
	}
	path, err := dir.Open(entry, unix.O_PATH, 0)
	if err != nil {
		return nil
	}
	g := &ghost{path: path}
	if n.typ == unix.S_IFLNK {
		if cipher, err := n.class.unwrapped(); err == nil {
			g.target, _ = readTarget(dir, entry, n.class, cipher) // damage is told as ESTALE
		}
	}
	if n.typ == unix.S_IFREG && v.place.Sidecar(make([]byte, idLen)) != "" && st.Size > 0 {
		if disk, err := v.openEntry(dir, entry, unix.O_RDONLY); err == nil {
			g.block, _ = v.place.Read(disk, []*backing.Dir{dir}) // without it an open says so
			_ = disk.Close()
		}
	}
	v.ghosts.Add(1)
	return g
}

// lay lets go of a ghost; nil is none.
func (v *Volume) lay(g *ghost) {
	if g != nil {
		_ = g.path.Close()
		v.ghosts.Add(-1)
	}
}

// setGhost gives a node its ghost.
func (v *Volume) setGhost(n *Node, g *ghost) {
	if g == nil {
		return
	}
	n.mu.Lock()
	old := n.ghost
	n.ghost = g
	n.mu.Unlock()
	v.lay(old)
}

// openGhost opens the file of a node without a name.
func (v *Volume) openGhost(n *Node, flags int, header bool) (disk *backing.File, st backing.Stat, block []byte, err error) {
	n.mu.Lock()
	g := n.ghost
	if g != nil {
		disk, err = g.path.Reopen(flags)
	}
	n.mu.Unlock()
	if g == nil {
		return nil, st, nil, unix.ESTALE
	}
	if err != nil {
		return nil, st, nil, err
	}
	st, err = disk.Stat()
	if err == nil && header && st.Size > 0 {
		if block = g.block; block == nil {
			block, err = v.place.Read(disk, nil)
		}
	}
	if err != nil {
		_ = disk.Close()
		return nil, st, nil, err
	}
	return disk, st, block, nil
}
