package cryptfs

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/chunkfile"
	"github.com/kmsfs/kmsfs/fs/journal"
)

// mend does what recovery could not do for a file, before it is opened: the disk
// failed or was full then, or the key was not to be had. It reports whether
// there was something to do. block is the file's header.
func (v *Volume) mend(ctx context.Context, n *Node, block []byte) (bool, error) {
	if block == nil || v.conf.ReadOnly || !v.anyBroken() {
		return false, nil
	}
	h, err := envelope.Parse(block)
	if err != nil {
		return false, nil // whoever opens it is told
	}
	v.loose.mending.Lock()
	defer v.loose.mending.Unlock()
	v.loose.mu.Lock()
	entries, broken := v.loose.broken[h.File]
	v.loose.mu.Unlock()
	if !broken {
		return false, nil
	}
	if err := v.finishBroken(ctx, n, h, entries); err != nil {
		return false, fmt.Errorf("file %s: what a crash left is not finished: %w", h.File, err)
	}
	n.opening.Lock()
	n.gen++
	n.opening.Unlock()
	v.counters.repairs.Add(1)
	v.log.Warn("file repaired after a crash", "file", h.File, "did", "what could not be done at the mount")
	return true, nil
}

func (v *Volume) anyBroken() bool {
	v.loose.mu.Lock()
	defer v.loose.mu.Unlock()
	return len(v.loose.broken) > 0
}

// finishBroken finishes a file, and has it out of the journal.
func (v *Volume) finishBroken(ctx context.Context, n *Node, h *envelope.Header, entries []journal.Entry) error {
	disk, dir, err := v.brokenAt(n)
	if err != nil {
		return err
	}
	defer dir.release()
	defer func() { _ = disk.Close() }() // a checkpoint has synced it
	v.loose.mu.Lock()
	delete(v.loose.broken, h.File)
	v.loose.mu.Unlock()
	r := &recovery{v: v, found: &journal.Found{Epochs: v.loose.epochs}}
	_, err = r.finish(ctx, &torn{dir: dir.Dir, disk: disk, head: h, entries: entries})
	if err != nil && !chunkfile.IsDamage(err) {
		return err // it is among the broken again
	}
	if err := v.Checkpoint(); err != nil {
		v.broke(h.File, entries)
		return err
	}
	return nil
}

// brokenAt opens a store file for writing, and the directory that it is in.
func (v *Volume) brokenAt(n *Node) (*backing.File, *dirRef, error) {
	v.ns.RLock()
	defer v.ns.RUnlock()
	l, ok := n.where()
	if !ok {
		return nil, nil, unix.ESTALE
	}
	dir, err := v.use(l.parent)
	if err != nil {
		return nil, nil, err
	}
	disk, err := v.openLink(l, unix.O_RDWR)
	if err != nil {
		dir.release()
		return nil, nil, err
	}
	return disk, dir, nil
}
