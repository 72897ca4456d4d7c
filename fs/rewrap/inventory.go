package rewrap

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/kmsfs/kmsfs/crypto/dare"
	"github.com/kmsfs/kmsfs/crypto/envelope"
	"github.com/kmsfs/kmsfs/fs/journal"
	"github.com/kmsfs/kmsfs/fs/record"
)

// Count is a number of files and of the plaintext bytes in them.
type Count struct {
	Files uint64 `json:"files"`
	Bytes uint64 `json:"bytes"`
}

func (c *Count) add(bytes uint64) { c.Files, c.Bytes = c.Files+1, c.Bytes+bytes }

// Dependents are the files with a recipient under a key.
type Dependents struct {
	Sole    Count `json:"sole"`    // no other recipient opens them
	Several Count `json:"several"` // one of several recipients
}

func (d *Dependents) add(sole bool, bytes uint64) {
	if sole {
		d.Sole.add(bytes)
	} else {
		d.Several.add(bytes)
	}
}

// KeyUse is what depends on one key.
type KeyUse struct {
	Key string `json:"key"` // URI
	Dependents
	Classes   map[string]*Dependents `json:"classes"`             // by class
	Materials map[string]*Dependents `json:"materials,omitempty"` // by key-material id, as headers name it; "" if they name none
	NameKeys  []string               `json:"name_keys,omitempty"` // classes whose name key has a copy under the key
	StoreKeys []string               `json:"store_keys,omitempty"`
	ActiveIn  []string               `json:"active_in,omitempty"` // classes whose new files get a recipient under it
	RetiredIn []string               `json:"retired_in,omitempty"`
	Foreign   bool                   `json:"foreign,omitempty"` // the key is none of the store's: its recipients open nothing
}

// Needed reports whether anything that is there has a copy under the key.
func (k *KeyUse) Needed() bool {
	return k.Sole.Files+k.Several.Files > 0 || len(k.NameKeys)+len(k.StoreKeys) > 0
}

// Verdict is the answer to "may I delete this key?".
type Verdict struct {
	Deletable bool     `json:"deletable"`
	Reasons   []string `json:"reasons"` // for people; never empty
}

// Inventory is what depends on which key.
type Inventory struct {
	Files    Count     // all files with contents
	Keys     []*KeyUse // of the policy first, in its order, then others
	Problems []Problem // files that are not counted because their header cannot be read
	// Unfinished says that a crash, or a mount at this moment, has files under
	// way, whose headers may come back as they were.
	Unfinished bool
}

// Key returns what depends on a key, nil if neither the store nor any file
// names it.
func (v *Inventory) Key(uri string) *KeyUse {
	for _, k := range v.Keys {
		if k.Key == uri {
			return k
		}
	}
	return nil
}

// Verdict says whether the store would lose anything with the key. mounted says
// that somebody has the store mounted now.
func (v *Inventory) Verdict(k *KeyUse, mounted bool) Verdict {
	var no []string
	note := func(format string, args ...any) { no = append(no, fmt.Sprintf(format, args...)) }
	if n := k.Sole.Files; n > 0 {
		note("%d files (%d bytes) open under no other key", n, k.Sole.Bytes)
	}
	if n := k.Several.Files; n > 0 {
		note("%d files (%d bytes) have a recipient under it beside others", n, k.Several.Bytes)
	}
	if len(k.NameKeys) > 0 {
		note("the name keys of %s have a copy under it", strings.Join(k.NameKeys, ", "))
	}
	if len(k.StoreKeys) > 0 {
		note("the store key has a copy under it for %s", strings.Join(k.StoreKeys, ", "))
	}
	if len(k.ActiveIn) > 0 {
		note("new files of %s are wrapped under it", strings.Join(k.ActiveIn, ", "))
	}
	if n := len(v.Problems); n > 0 {
		note("%d files cannot be looked at, and may depend on it", n)
	}
	if v.Unfinished && !mounted {
		note("the store was not unmounted cleanly: mount it once, then ask again")
	}
	if len(no) > 0 {
		return Verdict{false, no}
	}
	yes := "nothing in the store has a copy under it; copies and backups of the store elsewhere are not looked at"
	if len(k.RetiredIn) > 0 {
		yes += "; take it out of retired in the policy of " + strings.Join(k.RetiredIn, ", ")
	}
	return Verdict{true, []string{yes}}
}

// Inventory counts what depends on each key. progress, if not nil, is called
// with the number of files seen, from several goroutines.
func (s *Store) Inventory(ctx context.Context, progress func(files uint64)) (*Inventory, error) {
	t := &tally{s: s, out: &Inventory{}, keys: map[string]*KeyUse{}, progress: progress}
	for _, class := range s.Classes() {
		for _, key := range s.Active(class) {
			k := t.key(key)
			k.ActiveIn = append(k.ActiveIn, class)
		}
		for _, key := range s.Retired(class) {
			k := t.key(key)
			k.RetiredIn = append(k.RetiredIn, class)
		}
	}
	t.stored()
	err := s.walk(ctx, sight{file: t.file, problem: t.problem})
	if err != nil {
		return nil, err
	}
	if t.out.Unfinished, err = s.unfinished(); err != nil {
		return nil, err
	}
	slices.SortFunc(t.out.Problems, func(a, b Problem) int { return strings.Compare(a.Path, b.Path) })
	return t.out, nil
}

type tally struct {
	s        *Store
	progress func(uint64)

	mu   sync.Mutex
	out  *Inventory
	keys map[string]*KeyUse
}

func (t *tally) key(uri string) *KeyUse {
	k := t.keys[uri]
	if k == nil {
		k = &KeyUse{Key: uri, Classes: map[string]*Dependents{}, Materials: map[string]*Dependents{}}
		t.keys[uri], t.out.Keys = k, append(t.out.Keys, k)
	}
	return k
}

func (t *tally) problem(p Problem) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.out.Problems = append(t.out.Problems, p)
}

// of returns an entry of a map, made if need be.
func of(m map[string]*Dependents, name string) *Dependents {
	if m[name] == nil {
		m[name] = &Dependents{}
	}
	return m[name]
}

func (t *tally) file(f *file) error {
	geo := dare.Geometry{ChunkSize: f.header.ChunkSize, Base: dare.CipherOff(t.s.layout.Placement.Base(t.s.layout.HeaderSize))}
	plain, err := geo.PlainSize(dare.CipherOff(f.size))
	if err != nil { // a size that no file has: fsck's
		plain = 0
	}
	t.mu.Lock()
	t.out.Files.add(uint64(plain))
	files := t.out.Files.Files
	usable := 0
	for i := range f.header.Recipients {
		if r := &f.header.Recipients[i]; t.s.allowed(r.Class, r.Wrapped.Key) != "" {
			usable++
		}
	}
	for i := range f.header.Recipients {
		r := &f.header.Recipients[i]
		k := t.key(r.Wrapped.Key)
		if t.s.allowed(r.Class, r.Wrapped.Key) == "" {
			k.Foreign = k.Foreign || len(k.ActiveIn)+len(k.RetiredIn) == 0
			// It opens nothing as the store is. It may have, and may again.
			k.add(usable == 0 && len(f.header.Recipients) == 1, uint64(plain))
			of(k.Classes, r.Class).add(usable == 0 && len(f.header.Recipients) == 1, uint64(plain))
			continue
		}
		k.add(usable == 1, uint64(plain))
		of(k.Classes, r.Class).add(usable == 1, uint64(plain))
		of(k.Materials, r.Wrapped.Material).add(usable == 1, uint64(plain))
	}
	t.mu.Unlock()
	if t.progress != nil {
		t.progress(files)
	}
	return nil
}

// stored counts the wrapped keys in the store record and in the class files. A
// copy that does not parse is fsck's, and a problem here.
func (t *tally) stored() {
	add := func(at string, block []byte, err error, to func(k *KeyUse) *[]string, class string) {
		var h *envelope.Header
		if err == nil {
			h, err = envelope.Parse(block)
		}
		if err != nil {
			t.problem(Problem{at, err})
			return
		}
		for i := range h.Recipients {
			list := to(t.key(h.Recipients[i].Wrapped.Key))
			if !slices.Contains(*list, class) {
				*list = append(*list, class)
			}
		}
	}
	names := func(k *KeyUse) *[]string { return &k.NameKeys }
	for _, class := range t.s.Classes() {
		inRecord := path.Join(record.MetaDir, record.StoreFile)
		add(inRecord, t.s.rec.Keys.Names[class], nil, names, class)
		add(inRecord, t.s.rec.Keys.Store[class], nil, func(k *KeyUse) *[]string { return &k.StoreKeys }, class)
		block, err := t.s.classFile(class)
		add(path.Join(record.MetaDir, record.ClassesDir, class), block, err, names, class)
	}
}

func (s *Store) classFile(class string) ([]byte, error) {
	dir, err := s.meta.OpenDir(record.ClassesDir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	return dir.ReadFile(class, envelope.MaxHeader)
}

// unfinished reports whether the store was not unmounted cleanly, or is mounted
// and was changed, or has headers in a batch.
func (s *Store) unfinished() (bool, error) {
	if unclean, err := journal.Unclean(s.meta); unclean || err != nil {
		return unclean, err
	}
	st, err := s.meta.Stat(record.RewrapFile)
	if gone(err) {
		return false, nil
	}
	return err == nil && st.Size > 0, err
}

// DependsOn returns the ciphertext paths of the files with a recipient under a
// key, sorted, and the problems of files that may have one.
func (s *Store) DependsOn(ctx context.Context, key string) ([]string, []Problem, error) {
	var mu sync.Mutex
	var paths []string
	var problems []Problem
	err := s.walk(ctx, sight{
		file: func(f *file) error {
			if slices.ContainsFunc(f.header.Recipients, func(r envelope.Recipient) bool { return r.Wrapped.Key == key }) {
				mu.Lock()
				defer mu.Unlock()
				paths = append(paths, f.path)
			}
			return nil
		},
		problem: func(p Problem) { mu.Lock(); defer mu.Unlock(); problems = append(problems, p) },
	})
	slices.Sort(paths)
	return paths, problems, err
}

// Refers returns which of the keys of a class files still have a recipient
// under, with the reasons in words. Name keys and store keys are left out: a new
// policy wraps them again.
func (s *Store) Refers(ctx context.Context, class string, keys []string) (map[string]string, error) {
	inv, err := s.Inventory(ctx, nil)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, key := range keys {
		if n := len(inv.Problems); n > 0 {
			out[key] = fmt.Sprintf("%d files cannot be looked at, the first is %s: %v", n, inv.Problems[0].Path, inv.Problems[0].Err)
		}
		if k := inv.Key(key); k != nil && k.Classes[class] != nil {
			d := k.Classes[class]
			out[key] = fmt.Sprintf("%d files have a copy under it, %d of them no other", d.Sole.Files+d.Several.Files, d.Sole.Files)
		}
	}
	return out, nil
}
