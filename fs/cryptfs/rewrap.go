package cryptfs

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/crypto/nameenc"
	"github.com/kmsfs/kmsfs/fs/backing"
	"github.com/kmsfs/kmsfs/fs/placement"
	"github.com/kmsfs/kmsfs/fs/record"
	"github.com/kmsfs/kmsfs/fs/rewrap"
)

// The attributes of the root through which kmsfs rewrap has headers written
// while the store is mounted. Set: RewrapAttr with an id of 32 hexadecimal
// digits behind it takes a batch (record.EncodeRewrap), RewrapKeysAttr the
// wrapped name keys and store keys of classes (record.StoreKeys in JSON). Get:
// RewrapAttr and the id of a batch gives its outcome, one RewrapResult for each
// file, in JSON. Only root and the mount's owner may set them.
const (
	RewrapAttr     = "user.kmsfs.rewrap."
	RewrapKeysAttr = "user.kmsfs.rewrap-keys"
)

// RewrapResult is the outcome for one file of a batch.
type RewrapResult struct {
	Error string `json:"error,omitempty"` // "" if the header is on the disk
	Gone  bool   `json:"gone,omitempty"`  // the file is not there any more, or changed: look again
}

// rewraps is what the volume keeps for rewrapping.
type rewraps struct {
	batch *rewrap.Batch
	usage *rewrap.Usage

	mu       sync.Mutex
	outcomes map[string][]byte // by batch id, JSON
	order    []string
}

// maxOutcomes is how many outcomes are kept for those who will ask.
const maxOutcomes = 64

func (v *Volume) openRewraps() {
	v.rewraps.batch = rewrap.NewBatch(v.root, v.meta, v.place)
	if !v.conf.mend { // which looks for temporaries
		v.rewraps.usage = rewrap.NewUsage(v.meta, nil)
	}
	v.rewraps.outcomes = map[string][]byte{}
}

// noteCall notes the use of a key, then tells Config.Call.
func (v *Volume) noteCall(ctx context.Context, c envelope.CallRecord) error {
	if c.Err == nil && v.rewraps.usage != nil {
		v.rewraps.usage.Note(c.Key)
	}
	if v.conf.Call != nil {
		return v.conf.Call(ctx, c)
	}
	return nil
}

// setRewrap is Setxattr of the attributes above.
func (v *Volume) setRewrap(ctx context.Context, name string, value []byte, c Caller) error {
	if c.Uid != 0 && int(c.Uid) != os.Geteuid() {
		return unix.EPERM
	}
	if err := v.mayChange(); err != nil {
		return err
	}
	if name == RewrapKeysAttr {
		return v.rewrapKeys(value)
	}
	id := name[len(RewrapAttr):]
	if b, err := hex.DecodeString(id); err != nil || len(b) != len(envelope.ID{}) {
		return unix.EINVAL
	}
	files, err := record.ParseRewrap(value)
	if err != nil {
		v.log.Warn("rewrap: bad batch", "error", err)
		return unix.EINVAL
	}
	results, err := v.rewrapFiles(ctx, files)
	if err != nil {
		return err
	}
	out, err := json.Marshal(results)
	if err != nil {
		return err
	}
	r := &v.rewraps
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, again := r.outcomes[id]; !again {
		r.order = append(r.order, id)
	}
	r.outcomes[id] = out
	if len(r.order) > maxOutcomes {
		delete(r.outcomes, r.order[0])
		r.order = r.order[1:]
	}
	return nil
}

// rewrapOutcome is Getxattr of a batch's outcome.
func (v *Volume) rewrapOutcome(id string) ([]byte, error) {
	v.rewraps.mu.Lock()
	defer v.rewraps.mu.Unlock()
	if out, ok := v.rewraps.outcomes[id]; ok {
		return out, nil
	}
	return nil, unix.ENODATA
}

// rehead is a file of a batch, opened.
type rehead struct {
	next record.Rewrapped
	dir  *backing.Dir
	disk *backing.File
	node *Node
	err  error
}

// rewrapFiles writes the headers of a batch. Those that it cannot write, or that
// changed meanwhile, are in the results.
func (v *Volume) rewrapFiles(ctx context.Context, files []record.Rewrapped) ([]RewrapResult, error) {
	all := make([]*rehead, len(files))
	var ready []record.Rewrapped
	for i, f := range files {
		all[i] = v.openRehead(ctx, f)
		defer v.closeRehead(all[i])
		if all[i].err == nil {
			ready = append(ready, f)
		}
	}
	if len(ready) > 0 {
		err := v.rewraps.batch.Do(ready, func() {
			for _, r := range all {
				if r.err == nil {
					r.err = v.reheadSettled(r)
				}
			}
		})
		if err != nil {
			return nil, err
		}
	}
	out := make([]RewrapResult, len(all))
	for i, r := range all {
		if r.err != nil {
			const limit = 300
			text := r.err.Error()
			out[i] = RewrapResult{Error: text[:min(len(text), limit)], Gone: rewrap.Moved(r.err)}
		}
	}
	return out, nil
}

// openRehead finds a file, and checks that the new recipients may be its own.
func (v *Volume) openRehead(ctx context.Context, f record.Rewrapped) *rehead {
	r := &rehead{next: f}
	var entry string
	if r.dir, entry, r.err = rewrap.OpenDir(v.root, f.Path); r.err != nil {
		return r
	}
	flags := unix.O_RDONLY
	if v.place.Body() {
		flags = unix.O_RDWR
	}
	if r.disk, r.err = placement.Open(r.dir, entry, flags); r.err != nil {
		return r
	}
	st, err := r.disk.Stat()
	if err == nil && (st.Type() != unix.S_IFREG || st.Size == 0) {
		err = rewrap.ErrChanged
	}
	var cl *class
	if err == nil {
		cl, err = v.classAt(ctx, r.dir)
	}
	var have []byte
	if err == nil {
		have, err = v.place.Read(r.disk, []*backing.Dir{r.dir})
	}
	if err == nil {
		err = v.mayRewrap(have, f.Block)
	}
	if err != nil {
		r.err = err
		return r
	}
	r.node = v.nodes.intern(st, v.identify(st, r.disk.Handle), nil, "", "", cl)
	return r
}

func (v *Volume) closeRehead(r *rehead) {
	if r.node != nil {
		v.Forget(r.node, 1)
	}
	if r.disk != nil {
		_ = r.disk.Close() // what was written is synced
	}
	if r.dir != nil {
		_ = r.dir.Close()
	}
}

// mayRewrap checks new recipients: those that the header has not yet are under
// active keys of a class that it is of, and one is left that opens it.
func (v *Volume) mayRewrap(have, next []byte) error {
	if _, err := rewrap.Replace(have, next); err != nil {
		return err
	}
	old, err := envelope.Parse(have)
	if err != nil {
		return err
	}
	h, err := envelope.Parse(next)
	if err != nil {
		return err
	}
	v.ns.RLock()
	defer v.ns.RUnlock()
	opens := false
	for _, n := range h.Recipients {
		cl := v.classes[n.Class]
		kept := slices.ContainsFunc(old.Recipients, func(o envelope.Recipient) bool {
			return o.Class == n.Class && o.Wrapped.Key == n.Wrapped.Key && bytes.Equal(o.Wrapped.Blob, n.Wrapped.Blob)
		})
		ofClass := slices.ContainsFunc(old.Recipients, func(o envelope.Recipient) bool { return o.Class == n.Class })
		if !kept && (cl == nil || !ofClass || !slices.Contains(cl.keys().Keys, n.Wrapped.Key)) {
			return fmt.Errorf("class %s, %s: %w", n.Class, n.Wrapped.Key, rewrap.ErrKey)
		}
		opens = opens || cl != nil && slices.Contains(cl.keys().Allowed, n.Wrapped.Key)
	}
	if !opens {
		return fmt.Errorf("no recipient is left that opens it: %w", rewrap.ErrKey)
	}
	return nil
}

// errHeadLogged means that the journal would bring the old header back.
var errHeadLogged = errors.New("cryptfs: header is in the journal")

// reheadSettled is rehead, with the journal empty of what it replaces.
func (v *Volume) reheadSettled(r *rehead) error {
	err := v.rehead(r)
	for n := 0; n < openTries && errors.Is(err, errHeadLogged); n++ {
		if err = v.Checkpoint(); err == nil {
			err = v.rehead(r)
		}
	}
	return err
}

// rehead writes one header. Nobody opens the file meanwhile, and if it is open
// nothing writes it: the header in memory gets the recipients too, so that a
// later change of its flags does not bring the old ones back.
func (v *Volume) rehead(r *rehead) error {
	n := r.node
	n.opening.Lock()
	defer n.opening.Unlock()
	f := n.openFile()
	if f == nil {
		if v.headLogged(n.key) {
			return errHeadLogged
		}
		_, err := v.reheadDisk(r)
		n.gen++ // whoever is opening it has read the header of before
		return err
	}
	done, err := f.cf.Rehead(func() error {
		if v.headLogged(n.key) {
			return errHeadLogged
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		h := f.secrets.header
		if h == nil && !f.idle.Load() {
			return rewrap.ErrChanged
		}
		block, err := v.reheadDisk(r)
		if err != nil || h == nil {
			return err
		}
		next, err := envelope.Parse(block)
		if err != nil {
			return err
		}
		if next.Fixed != h.Fixed || next.Commitment != h.Commitment {
			return rewrap.ErrChanged // cannot be: the header on the disk is ours
		}
		h.Recipients = next.Recipients
		return nil
	})
	if err == nil && !done {
		err = rewrap.ErrChanged // emptied meanwhile
	}
	return err
}

// reheadDisk writes the header on the disk and returns it.
func (v *Volume) reheadDisk(r *rehead) ([]byte, error) {
	dirs := []*backing.Dir{r.dir}
	have, err := v.place.Read(r.disk, dirs)
	if err != nil {
		return nil, err
	}
	block, err := rewrap.Replace(have, r.next.Block)
	if err != nil {
		return nil, err
	}
	h, err := envelope.Parse(block)
	if err != nil {
		return nil, err
	}
	return block, placement.Lifted(r.dir, func() error { return v.place.Rewrite(r.disk, dirs, h.File, block) })
}

// rewrapKeys writes wrapped name keys and store keys.
func (v *Volume) rewrapKeys(value []byte) error {
	var k record.StoreKeys
	if err := json.Unmarshal(value, &k); err != nil {
		return unix.EINVAL
	}
	v.ns.RLock()
	rec := v.rec
	v.ns.RUnlock()
	for _, of := range []struct{ have, next map[string][]byte }{{rec.Keys.Store, k.Store}, {rec.Keys.Names, k.Names}} {
		for class, block := range of.next {
			if err := v.mayRewrap(of.have[class], block); err != nil {
				return fmt.Errorf("wrapped key of class %s: %w", class, err)
			}
		}
	}
	v.ns.Lock()
	defer v.ns.Unlock()
	next, err := rewrap.ReplaceKeys(v.rec, k)
	if err != nil {
		return err
	}
	if err := rewrap.WriteKeys(v.root, v.meta, next, k); err != nil {
		return err
	}
	v.rec = next
	for class := range maps.Keys(k.Names) {
		if h, err := envelope.Parse(next.Keys.Names[class]); err == nil {
			cl := v.classes[class]
			cl.mu.Lock()
			cl.header, cl.spare = h, nil
			cl.mu.Unlock()
		}
	}
	return nil
}

// notInUse answers ErrKeyInUse if files still have recipients under a key that
// its class would lose.
func (v *Volume) notInUse(ctx context.Context, dropped map[string][]string) error {
	if len(dropped) == 0 {
		return nil
	}
	s, err := rewrap.Open(rewrap.Config{Path: v.path, SameKey: v.conf.SameKey})
	if err != nil {
		return err
	}
	defer s.Close()
	for _, class := range slices.Sorted(maps.Keys(dropped)) {
		why, err := s.Refers(ctx, class, dropped[class])
		if err != nil {
			return err
		}
		for _, key := range dropped[class] {
			if why[key] != "" {
				return fmt.Errorf("class %s, key %s: %s: %w", class, key, why[key], ErrKeyInUse)
			}
		}
	}
	return nil
}

// PlainPath returns the plaintext path of a ciphertext path of the store, from
// the root on, which takes the name keys of the classes on the way.
func (v *Volume) PlainPath(ctx context.Context, at string) (string, error) {
	dir, err := v.root.OpenDir(".")
	if err != nil {
		return "", err
	}
	defer func() { _ = dir.Close() }() // the one of then
	out := ""
	names := strings.Split(at, "/")
	for i, entry := range names {
		cl, rec, cipher, err := v.dirAt(ctx, dir)
		if err != nil {
			return "", err
		}
		bearer := &Node{dir: &dirState{id: nameenc.DirID(rec.ID), class: cl, loaded: true}}
		name, ok, err := bearer.unseal(cipher, dir, entry)
		if err == nil && !ok {
			err = ErrName
		}
		if err != nil {
			return "", err
		}
		out += "/" + name
		if i == len(names)-1 {
			break
		}
		sub, err := dir.OpenDir(entry)
		if err != nil {
			return "", err
		}
		_ = dir.Close()
		dir = sub
	}
	return out, nil
}
